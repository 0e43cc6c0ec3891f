//! What an encoder offers to task heads and embeddings, and the stack of blocks that most encoders are.

use crate::causal::{ModelInfo, TokenBatch};
use crate::decoder::{Block, Context, Positions};
use crate::modules::ModuleTree;
use crate::rope::Rope;
use crate::{Embedding, Entry, Linear, ModuleMut, Norm, SiteMut};
use candle_core::Device;
use engobe_autograd::ops::{self, RopeSpec};
use engobe_autograd::{Result, Tape, Var};
use engobe_kernels::activation::Activation;
use std::sync::Arc;

/// What heads and pooling read: a bidirectional encoder, whose every token of a segment sees all the others of its segment, and nothing else. What other
/// programs mask as padding is not there.
pub trait Encoder: ModuleTree + Send + Sync {
    /// Its sizes; no head is counted.
    fn info(&self) -> &ModelInfo;

    /// Where its weights are.
    fn device(&self) -> &Device;

    /// Hidden states of all tokens as transformers' `last_hidden_state` has them: `[n, d]`. A final norm is included.
    fn hidden_states<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> Result<Var>;

    /// [`Encoder::hidden_states`] of all rows that the blocks see, those that an adapter put before each sequence among
    /// them, and the batch as they see it. It is what a head pools: with a prompt before a text, the first row is the
    /// prompt's.
    fn hidden_rows<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> Result<(Var, TokenBatch)> {
        Ok((self.hidden_states(tape, batch)?, batch.clone()))
    }

    /// What the model's own pooler makes of `firsts` `[segments, d]`, the hidden states of each segment's first token;
    /// `None` if the model has no pooler, or its checkpoint none.
    fn pooled<'m>(&'m self, _tape: &mut Tape<'m>, _firsts: &Var) -> Result<Option<Var>> {
        Ok(None)
    }

    /// Goes without its pooler from here on.
    fn drop_pooler(&mut self) {}
}

/// f(x·Wᵀ + b) over the first token's hidden state.
#[derive(Debug)]
pub struct Pooler {
    /// `[d, d]`
    pub dense: Linear,
    /// f
    pub activation: Activation,
}

impl Pooler {
    /// `firsts` `[n, d]` to `[n, d]`.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m>, firsts: &Var) -> Result<Var> {
        let x = self.dense.forward(tape, firsts)?;
        ops::activate(tape, self.activation, &x)
    }
}

/// An encoder: a stack of blocks over normed embeddings.
#[derive(Debug)]
pub struct EncoderStack {
    /// its sizes
    pub info: ModelInfo,
    /// tokens
    pub words: Embedding,
    /// where adapters put rows before each sequence
    pub entry: Entry,
    /// positions, where they are embedded
    pub positions: Option<Positions>,
    /// token types, where they are embedded
    pub token_types: Option<Embedding>,
    /// the norm of the embedded tokens
    pub embedding_norm: Norm,
    /// from the width of the embeddings to that of the blocks, where they differ
    pub projection: Option<Linear>,
    /// the blocks
    pub blocks: Vec<Block>,
    /// rotary embeddings that the blocks' attention points to
    pub ropes: Vec<Rope>,
    /// the norm behind the last block
    pub final_norm: Option<Norm>,
    /// the pooler
    pub pooler: Option<Pooler>,
    /// where the weights are
    pub device: Device,
}

impl EncoderStack {
    /// The hidden states that the first block takes, `[n, d]`, and the batch with what adapters put before it.
    fn embed<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> Result<(Var, TokenBatch)> {
        let x = self.words.forward(tape, batch.ids.clone(), &self.device)?;
        let (mut x, batch) = self.entry.enter(tape, x, batch)?;
        if let Some(token_types) = &self.token_types {
            let embedded = embed_types(tape, token_types, &batch, &self.device)?;
            x = ops::add(tape, &x, &embedded)?;
        }
        if let Some(positions) = &self.positions {
            let embedded = positions.forward(tape, &batch, &self.device)?;
            x = ops::add(tape, &x, &embedded)?;
        }
        let x = self.embedding_norm.forward(tape, &x)?;
        match &self.projection {
            Some(project) => Ok((project.forward(tape, &x)?, batch)),
            None => Ok((x, batch)),
        }
    }
}

/// Rows of the batch's token types; without any, all are of type 0.
pub fn embed_types<'m>(
    tape: &mut Tape<'m>,
    table: &'m Embedding,
    batch: &TokenBatch,
    device: &Device,
) -> Result<Var> {
    let types = batch.token_types.clone().unwrap_or_else(|| vec![0; batch.positions.len()].into());
    let (rows, _) = table.weight().dims();
    match types.iter().find(|t| **t as usize >= rows) {
        Some(t) => {
            let what = format!("a token is of type {t}; the model knows {rows} types");
            Err(engobe_autograd::Error::shape("token types", what))
        }
        None => table.forward(tape, types, device),
    }
}

impl ModuleTree for EncoderStack {
    fn visit_modules(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        f(ModuleMut::Embedding(&mut self.words));
        if let Some(positions) = &mut self.positions {
            f(ModuleMut::Embedding(&mut positions.embedding));
        }
        if let Some(token_types) = &mut self.token_types {
            f(ModuleMut::Embedding(token_types));
        }
        f(self.embedding_norm.module());
        if let Some(project) = &mut self.projection {
            f(ModuleMut::Linear(project));
        }
        self.blocks.iter_mut().for_each(|block| block.visit(f));
        if let Some(norm) = &mut self.final_norm {
            f(norm.module());
        }
        if let Some(pooler) = &mut self.pooler {
            f(ModuleMut::Linear(&mut pooler.dense));
        }
    }

    fn visit_sites(&mut self, f: &mut dyn FnMut(SiteMut<'_>)) {
        f(SiteMut::Entry(&mut self.entry));
        self.blocks.iter_mut().for_each(|block| block.visit_sites(f));
    }

    fn output_heads(&self) -> Vec<String> {
        Vec::new()
    }
}

impl Encoder for EncoderStack {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn hidden_states<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> Result<Var> {
        let (x, batch) = self.hidden_rows(tape, batch)?;
        self.entry.leave(tape, x, &batch)
    }

    fn hidden_rows<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> Result<(Var, TokenBatch)> {
        let (mut x, batch) = self.embed(tape, batch)?;
        let longest = batch.positions.iter().max().map_or(0, |p| *p as usize + 1);
        let angles =
            |rope: &Rope| RopeSpec { table: rope.table(longest), positions: batch.positions.clone() };
        let ropes: Arc<[RopeSpec]> = self.ropes.iter().map(angles).collect();
        for block in &self.blocks {
            let context = Context { ropes: ropes.clone(), batch: batch.clone(), bias: None };
            x = tape.block(&[x], move |tape, xs| block.forward(tape, &xs[0], &context, None))?;
        }
        if let Some(norm) = &self.final_norm {
            x = norm.forward(tape, &x)?;
        }
        Ok((x, batch))
    }

    fn pooled<'m>(&'m self, tape: &mut Tape<'m>, firsts: &Var) -> Result<Option<Var>> {
        self.pooler.as_ref().map(|pooler| pooler.forward(tape, firsts)).transpose()
    }

    fn drop_pooler(&mut self) {
        self.pooler = None;
    }
}
