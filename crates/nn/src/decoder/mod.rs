//! Decoders: a stack of blocks between an embedding and an output head.
//!
//! What tells one architecture from another is which parts its [`Decoder`] is made of: each is data here, and the
//! architectures' files put them together.

mod attention;
mod block;
mod mlp;

pub use attention::{Attention, Projection};
pub use block::{Block, Norms};
pub use mlp::{Mlp, Up};

use crate::rope::Rope;
use crate::{
    CausalLm, Embedding, Entry, Error, KvCache, Linear, ModelInfo, ModuleMut, ModuleTree, Norm, Result,
    SiteMut, TokenBatch,
};
use candle_core::{Device, Tensor};
use engobe_autograd::ops::{self, Head, HeadLoss, RopeSpec, ScoreBias};
use engobe_autograd::{Tape, Var};
use std::sync::Arc;

/// What every block needs to know of the tokens at hand.
#[derive(Clone)]
pub struct Context {
    /// the angles of each of the model's rotary embeddings
    pub ropes: Arc<[RopeSpec]>,
    /// the tokens, with what adapters put before them
    pub batch: TokenBatch,
    /// what is added to attention's scores
    pub bias: Option<ScoreBias>,
}

/// A block's place in a cache.
pub struct CacheSlot<'a> {
    /// the cache
    pub kv: &'a mut KvCache,
    /// number of the block
    pub layer: usize,
}

/// Positions that are embedded and added to the tokens (GPT-2, OPT).
#[derive(Debug)]
pub struct Positions {
    /// a row for each position
    pub embedding: Embedding,
    /// row of position 0
    pub first: u32,
}

impl Positions {
    /// Rows of the batch's positions: `[n, d]`.
    ///
    /// # Errors
    /// A position beyond the last row.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch, device: &Device) -> Result<Var> {
        let rows = self.embedding.weight().dims().0;
        let at: Arc<[u32]> = batch.positions.iter().map(|p| p + self.first).collect();
        if let Some(p) = at.iter().find(|p| **p as usize >= rows) {
            let (at, most) = (p - self.first, rows - self.first as usize);
            let what = format!("a row reaches position {at}; the model has embeddings for {most} positions");
            return Err(Error::shape("positions", what));
        }
        self.embedding.forward(tape, at, device)
    }
}

/// A decoder with its output head.
#[derive(Debug)]
pub struct Decoder {
    /// its sizes
    pub info: ModelInfo,
    /// tokens
    pub embed_tokens: Embedding,
    /// where adapters put rows before each sequence
    pub entry: Entry,
    /// factor on the embedded tokens (Gemma)
    pub embed_scale: Option<f32>,
    /// factor on what enters the blocks, rows that adapters put before it included (Granite)
    pub entry_scale: Option<f32>,
    /// from the embedding's width to the blocks', where they differ (OPT-350m)
    pub project_in: Option<Linear>,
    /// positions, where they are embedded
    pub positions: Option<Positions>,
    /// the blocks
    pub blocks: Vec<Block>,
    /// rotary embeddings that the blocks' attention points to
    pub ropes: Vec<Rope>,
    /// the norm before the head
    pub norm: Option<Norm>,
    /// from the blocks' width to the head's
    pub project_out: Option<Linear>,
    /// factor on what the output head reads, and so on logits, if it has no bias; heads of tasks go without (Granite)
    pub head_scale: Option<f32>,
    /// the output head
    pub lm_head: Linear,
    /// logits are squashed into ±this
    pub soft_cap: Option<f32>,
    /// where the weights are
    pub device: Device,
}

impl Decoder {
    /// The hidden states that the first block takes, and the batch with what adapters put before each sequence.
    fn embed<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> Result<(Var, TokenBatch)> {
        let mut x = self.embed_tokens.forward(tape, batch.ids.clone(), &self.device)?;
        if let Some(factor) = self.embed_scale {
            x = ops::scale(tape, &x, factor)?;
        }
        let (mut x, batch) = self.entry.enter(tape, x, batch)?;
        if let Some(factor) = self.entry_scale {
            x = ops::scale(tape, &x, factor)?;
        }
        if let Some(project) = &self.project_in {
            x = project.forward(tape, &x)?;
        }
        if let Some(positions) = &self.positions {
            let embedded = positions.forward(tape, &batch, &self.device)?;
            x = ops::add(tape, &x, &embedded)?;
        }
        Ok((x, batch))
    }

    /// What the output head reads: `[n, d]`.
    fn head_input<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var) -> Result<Var> {
        let normed = self.normed(tape, hidden)?;
        match self.head_scale {
            Some(factor) => ops::scale(tape, &normed, factor),
            None => Ok(normed),
        }
    }
}

impl ModuleTree for Decoder {
    fn visit_modules(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        f(ModuleMut::Embedding(&mut self.embed_tokens));
        if let Some(positions) = &mut self.positions {
            f(ModuleMut::Embedding(&mut positions.embedding));
        }
        for project in [&mut self.project_out, &mut self.project_in].into_iter().flatten() {
            f(ModuleMut::Linear(project));
        }
        self.blocks.iter_mut().for_each(|block| block.visit(f));
        if let Some(norm) = &mut self.norm {
            f(norm.module());
        }
        f(ModuleMut::Linear(&mut self.lm_head));
    }

    fn visit_sites(&mut self, f: &mut dyn FnMut(SiteMut<'_>)) {
        f(SiteMut::Entry(&mut self.entry));
        self.blocks.iter_mut().for_each(|block| block.visit_sites(f));
    }

    fn output_heads(&self) -> Vec<String> {
        vec![self.lm_head.path().to_string()]
    }
}

impl CausalLm for Decoder {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn lead(&self) -> usize {
        self.entry.lead()
    }

    fn hidden_states<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        batch: &TokenBatch,
        mut cache: Option<&mut KvCache>,
    ) -> Result<Var> {
        let (mut x, batch) = self.embed(tape, batch)?;
        let longest = batch.positions.iter().max().map_or(0, |p| *p as usize + 1);
        let angles =
            |rope: &Rope| RopeSpec { table: rope.table(longest), positions: batch.positions.clone() };
        let context = Context { ropes: self.ropes.iter().map(angles).collect(), batch, bias: None };
        for (layer, block) in self.blocks.iter().enumerate() {
            x = match cache.as_deref_mut() {
                Some(kv) => block.forward(tape, &x, &context, Some(CacheSlot { kv, layer }))?,
                None => {
                    let context = context.clone();
                    tape.block(&[x], move |tape, xs| block.forward(tape, &xs[0], &context, None))?
                }
            };
        }
        if let Some(cache) = cache {
            cache.advance(&context.batch);
        }
        self.entry.leave(tape, x, &context.batch)
    }

    fn normed<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var) -> Result<Var> {
        let mut x = hidden.clone();
        if let Some(norm) = &self.norm {
            x = norm.forward(tape, &x)?;
        }
        match &self.project_out {
            Some(project) => project.forward(tape, &x),
            None => Ok(x),
        }
    }

    fn head_loss<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var, targets: Arc<[u32]>) -> Result<HeadLoss> {
        let normed = self.head_input(tape, hidden)?;
        let (normed, head) = self.lm_head.head(tape, &normed)?;
        let head = Head { soft_cap: self.soft_cap, ..head };
        ops::head_loss(tape, &normed, head, targets)
    }

    fn logits<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var) -> Result<Tensor> {
        let normed = self.head_input(tape, hidden)?;
        let logits = self.lm_head.forward(tape, &normed)?.into_tensor();
        match self.soft_cap.map(f64::from) {
            Some(cap) => Ok(((logits / cap)?.tanh()? * cap)?),
            None => Ok(logits),
        }
    }
}
