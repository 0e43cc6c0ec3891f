//! Heads that make few logits out of hidden states: for classes of texts or words, and for numbers.

use crate::Linear;
use crate::causal::{CausalLm, ModelInfo, TokenBatch};
use crate::encoder::Encoder;
use crate::modules::{ModuleMut, ModuleTree, Norm, SiteMut};
use candle_core::{Device, Tensor};
use engobe_autograd::ops;
use engobe_autograd::{Result, Tape, Var};
use engobe_kernels::activation::Activation;
use std::ops::Range;
use std::sync::Arc;

/// Which hidden states stand for a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// the first token's (`[CLS]`)
    First,
    /// the mean of all tokens'
    Mean,
    /// the last token's
    Last,
    /// what the model's own pooler makes of the first token's
    Pooler,
}

/// One layer of a head: dropout, a linear layer, an activation, a norm.
#[derive(Debug)]
pub struct HeadLayer {
    /// probability that an element of the input is dropped in training
    pub dropout: f32,
    /// the layer
    pub linear: Linear,
    /// what follows it
    pub activation: Option<Activation>,
    /// what follows that
    pub norm: Option<Norm>,
}

/// A head.
#[derive(Debug)]
pub struct TaskHead {
    /// what it reads; `None`: every token
    pub pooling: Option<Pooling>,
    /// its layers; the last one makes the logits
    pub layers: Vec<HeadLayer>,
    /// names under which PEFT trains its parts (`modules_to_save`)
    pub saved: Vec<String>,
    /// paths of layers that the checkpoint did not have: they begin at random
    pub fresh: Vec<String>,
}

/// An encoder, or a decoder without its output head, with a head of its own.
pub struct TaskModel {
    encoder: Box<dyn Encoder>,
    head: TaskHead,
}

/// A decoder whose output head is not there: a task's head reads its hidden states behind the final norm.
pub struct HeadlessDecoder(Box<dyn CausalLm>);

impl HeadlessDecoder {
    /// `model` without its output head.
    pub fn new(model: Box<dyn CausalLm>) -> Self {
        Self(model)
    }
}

impl ModuleTree for HeadlessDecoder {
    fn visit_modules(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        let heads = self.0.output_heads();
        self.0.visit_modules(&mut |module| {
            if !heads.iter().any(|head| head == module.path()) {
                f(module);
            }
        });
    }

    fn visit_sites(&mut self, f: &mut dyn FnMut(SiteMut<'_>)) {
        self.0.visit_sites(f);
    }

    fn output_heads(&self) -> Vec<String> {
        Vec::new()
    }

    fn constants(&self) -> Result<Vec<(String, Tensor)>> {
        self.0.constants()
    }
}

impl Encoder for HeadlessDecoder {
    fn info(&self) -> &ModelInfo {
        self.0.info()
    }

    fn device(&self) -> &Device {
        self.0.device()
    }

    fn hidden_states<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> Result<Var> {
        let hidden = self.0.hidden_states(tape, batch, None)?;
        self.0.normed(tape, &hidden)
    }
}

/// One row of hidden states a segment: `[segments, d]`. No segment may be empty.
pub fn pool<'m>(
    tape: &mut Tape<'m>,
    encoder: &'m dyn Encoder,
    batch: &TokenBatch,
    hidden: &Var,
    pooling: Pooling,
) -> Result<Var> {
    let segments = || batch.segments.iter().map(|s| s.q.clone());
    if segments().any(|s: Range<usize>| s.is_empty()) {
        return Err(engobe_autograd::Error::shape("pooling", "a text without tokens"));
    }
    match pooling {
        Pooling::Mean => ops::segment_mean(tape, hidden, segments().collect()),
        Pooling::Last => ops::select_rows(tape, hidden, segments().map(|s| s.end as u32 - 1).collect()),
        Pooling::First => ops::select_rows(tape, hidden, segments().map(|s| s.start as u32).collect()),
        Pooling::Pooler => {
            let firsts = pool(tape, encoder, batch, hidden, Pooling::First)?;
            let none = || engobe_autograd::Error::shape("pooling", "the model has no pooler");
            encoder.pooled(tape, &firsts)?.ok_or_else(none)
        }
    }
}

impl TaskModel {
    /// `head` over `encoder`, which loses a pooler that the head does not read: in transformers' classes it is not there,
    /// so an adapter of it would find no place.
    pub fn new(mut encoder: Box<dyn Encoder>, head: TaskHead) -> Self {
        if head.pooling != Some(Pooling::Pooler) {
            encoder.drop_pooler();
        }
        Self { encoder, head }
    }

    /// Sizes of the encoder.
    pub fn info(&self) -> &ModelInfo {
        self.encoder.info()
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.encoder.device()
    }

    /// The head.
    pub fn head(&self) -> &TaskHead {
        &self.head
    }

    /// Number of logits.
    pub fn num_labels(&self) -> usize {
        self.head.layers.last().map_or(0, |l| l.linear.out_features())
    }

    /// Logits of each segment `[segments, labels]`; of a head that reads tokens, of the tokens `rows` (ascending).
    pub fn logits<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch, rows: Arc<[u32]>) -> Result<Var> {
        let mut x = match self.head.pooling {
            Some(pooling) => {
                let (hidden, seen) = self.encoder.hidden_rows(tape, batch)?;
                pool(tape, self.encoder.as_ref(), &seen, &hidden, pooling)?
            }
            None => {
                let hidden = self.encoder.hidden_states(tape, batch)?;
                ops::select_rows(tape, &hidden, rows)?
            }
        };
        for layer in &self.head.layers {
            x = ops::drop_out(tape, &x, layer.dropout)?;
            x = layer.linear.forward(tape, &x)?;
            if let Some(activation) = layer.activation {
                x = ops::activate(tape, activation, &x)?;
            }
            if let Some(norm) = &layer.norm {
                x = norm.forward(tape, &x)?;
            }
        }
        Ok(x)
    }
}

impl ModuleTree for TaskModel {
    fn visit_modules(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        self.encoder.visit_modules(f);
        for layer in &mut self.head.layers {
            f(ModuleMut::Linear(&mut layer.linear));
            if let Some(norm) = &mut layer.norm {
                f(norm.module());
            }
        }
    }

    fn visit_sites(&mut self, f: &mut dyn FnMut(SiteMut<'_>)) {
        self.encoder.visit_sites(f);
    }

    fn output_heads(&self) -> Vec<String> {
        self.head.layers.last().map(|l| l.linear.path().to_string()).into_iter().collect()
    }

    fn constants(&self) -> Result<Vec<(String, Tensor)>> {
        self.encoder.constants()
    }
}
