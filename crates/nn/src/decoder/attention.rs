//! Attention with its projections: queries, keys and values of one input, heads that are normed or turned, and the
//! output projection.

use super::{CacheSlot, Context};
use crate::{KvPrefix, Linear, ModuleMut, Result, RmsNorm, linear_group};
use engobe_autograd::{Tape, Var, ops};
use engobe_kernels::attention::AttentionShape;

/// Where queries, keys and values come from.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // a few a model
pub enum Projection {
    /// a layer each
    Separate([Linear; 3]),
    /// one layer whose output is all queries, all keys, all values (GPT-2, Phi-3)
    Joined(Linear),
    /// one layer whose output is, head by head, its query, key and value (GPT-NeoX)
    ByHead(Linear),
}

/// An attention sub-layer without its norm and its residual.
#[derive(Debug)]
pub struct Attention {
    /// queries, keys and values
    pub projection: Projection,
    /// norms of queries and keys: of each head where they are as wide as one (Qwen 3, Gemma 3), else of all heads
    /// together (OLMo 2)
    pub head_norms: Option<[RmsNorm; 2]>,
    /// the output projection
    pub output: Linear,
    /// heads, scale, window
    pub shape: AttentionShape,
    /// which of the model's rotary embeddings turns queries and keys; positions may come in elsewhere
    pub rope: Option<usize>,
}

impl Attention {
    /// What the heads gather for `x` `[n, d]`, before the output projection: `[n, heads·head_dim]`. `prefix` may put
    /// keys and values before each sequence.
    pub fn attend<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        x: &Var,
        context: &Context,
        prefix: &'m KvPrefix,
        cache: Option<CacheSlot<'_>>,
    ) -> Result<Var> {
        let [mut q, mut k, mut v] = self.project(tape, x)?;
        let hd = self.shape.head_dim;
        if let Some([q_norm, k_norm]) = &self.head_norms {
            q = by_head(tape, &q, q_norm)?;
            k = by_head(tape, &k, k_norm)?;
        }
        if let Some(rope) = self.rope {
            let rope = &context.ropes[rope];
            q = ops::rope(tape, &q, rope, hd)?;
            k = ops::rope(tape, &k, rope, hd)?;
        }
        (k, v) = prefix.extend(tape, k, v, &context.batch)?;
        if let Some(cache) = cache {
            let (keys, values) = cache.kv.append(cache.layer, &context.batch, k.tensor(), v.tensor())?;
            (k, v) = (Var::constant(keys), Var::constant(values));
        }
        let (segments, bias) = (context.batch.segments.clone(), context.bias.as_ref());
        ops::biased_attention(tape, &q, &k, &v, self.shape, segments, bias)
    }

    fn project<'m>(&'m self, tape: &mut Tape<'m>, x: &Var) -> Result<[Var; 3]> {
        let AttentionShape { heads, kv_heads, head_dim: hd, .. } = self.shape;
        match &self.projection {
            Projection::Separate([q, k, v]) => linear_group(tape, x, [q, k, v]),
            Projection::Joined(qkv) => {
                let all = qkv.forward(tape, x)?;
                ops::split_columns(tape, &all, 1, [heads * hd, kv_heads * hd, kv_heads * hd])
            }
            Projection::ByHead(qkv) => {
                let all = qkv.forward(tape, x)?;
                ops::split_columns(tape, &all, heads, [hd, hd, hd])
            }
        }
    }

    /// Calls `f` on every module.
    pub fn visit(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        match &mut self.projection {
            Projection::Separate(layers) => layers.iter_mut().for_each(|l| f(ModuleMut::Linear(l))),
            Projection::Joined(layer) | Projection::ByHead(layer) => f(ModuleMut::Linear(layer)),
        }
        f(ModuleMut::Linear(&mut self.output));
        self.head_norms.iter_mut().flatten().for_each(|norm| f(ModuleMut::RmsNorm(norm)));
    }
}

/// Norms pieces of `x` `[n, heads·head_dim]` that are as wide as the norm, each by itself.
fn by_head<'m>(tape: &mut Tape<'m>, x: &Var, norm: &'m RmsNorm) -> Result<Var> {
    let (n, width) = x.tensor().dims2()?;
    let piece = norm.weight().elem_count();
    if piece == width {
        return norm.forward(tape, x);
    }
    let heads = ops::reshape(tape, x, (n * width / piece.max(1), piece))?;
    let normed = norm.forward(tape, &heads)?;
    ops::reshape(tape, &normed, (n, width))
}
