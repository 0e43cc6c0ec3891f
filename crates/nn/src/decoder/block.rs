//! One block of a decoder: attention and feed-forward, and where their norms and residuals stand.

use super::{Attention, CacheSlot, Context, Mlp};
use crate::{ModuleMut, Norm, Result};
use engobe_autograd::{Tape, Var, ops};

/// Where a block's norms stand; A is attention, F the feed-forward.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // a few a model
pub enum Norms {
    /// y = x + A(n₁(x)), y + F(n₂(y)) (GPT-2 and most since)
    Pre([Norm; 2]),
    /// y = n₁(x + A(x)), n₂(y + F(y)) (Vaswani et al. 2017)
    Post([Norm; 2]),
    /// y = x + n₂(A(n₁(x))), y + n₄(F(n₃(y))) (Gemma 2)
    Sandwich([Norm; 4]),
    /// x + A(n₁(x)) + F(n₂(x)) (GPT-J, GPT-NeoX)
    Parallel([Norm; 2]),
    /// y = x + A(x), y + F(n(y)): the first block after an embedding that is normed itself (ModernBERT)
    PreMlp(Norm),
}

/// A decoder block.
#[derive(Debug)]
pub struct Block {
    /// attention
    pub attention: Attention,
    /// feed-forward
    pub mlp: Mlp,
    /// norms and residuals
    pub norms: Norms,
}

impl Block {
    /// Hidden states `x` `[n, d]` one block further.
    pub fn forward<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        x: &Var,
        context: &Context,
        cache: Option<CacheSlot<'_>>,
    ) -> Result<Var> {
        let (attention, mlp) = (&self.attention, &self.mlp);
        match &self.norms {
            Norms::Pre([before_attention, before_mlp]) => {
                let normed = before_attention.forward(tape, x)?;
                self.pre(tape, x, normed, before_mlp, context, cache)
            }
            Norms::PreMlp(before_mlp) => self.pre(tape, x, x.clone(), before_mlp, context, cache),
            Norms::Post([after_attention, after_mlp]) => {
                let attended = attention.attend(tape, x, context, cache)?;
                let sum = attention.output.forward_residual(tape, &attended, x)?;
                let x = after_attention.forward(tape, &sum)?;
                let inner = mlp.inner(tape, &x)?;
                let sum = mlp.down.forward_residual(tape, &inner, &x)?;
                after_mlp.forward(tape, &sum)
            }
            Norms::Sandwich([before_attention, after_attention, before_mlp, after_mlp]) => {
                let normed = before_attention.forward(tape, x)?;
                let attended = attention.attend(tape, &normed, context, cache)?;
                drop(normed);
                let out = attention.output.forward(tape, &attended)?;
                let normed = after_attention.forward(tape, &out)?;
                let x = ops::add(tape, x, &normed)?;
                drop(normed);
                let normed = before_mlp.forward(tape, &x)?;
                let inner = mlp.inner(tape, &normed)?;
                drop(normed);
                let out = mlp.down.forward(tape, &inner)?;
                let normed = after_mlp.forward(tape, &out)?;
                ops::add(tape, &x, &normed)
            }
            Norms::Parallel([before_attention, before_mlp]) => {
                let normed = before_attention.forward(tape, x)?;
                let attended = attention.attend(tape, &normed, context, cache)?;
                drop(normed);
                let sum = attention.output.forward_residual(tape, &attended, x)?;
                drop(attended);
                let normed = before_mlp.forward(tape, x)?;
                let inner = mlp.inner(tape, &normed)?;
                drop(normed);
                mlp.down.forward_residual_last(tape, &inner, &sum)
            }
        }
    }

    /// x + A(`input`), and on it the feed-forward behind its norm.
    fn pre<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        x: &Var,
        input: Var,
        before_mlp: &'m Norm,
        context: &Context,
        cache: Option<CacheSlot<'_>>,
    ) -> Result<Var> {
        let attended = self.attention.attend(tape, &input, context, cache)?;
        drop(input);
        let x = self.attention.output.forward_residual(tape, &attended, x)?;
        drop(attended);
        let normed = before_mlp.forward(tape, &x)?;
        let inner = self.mlp.inner(tape, &normed)?;
        drop(normed);
        self.mlp.down.forward_residual_last(tape, &inner, &x)
    }

    /// Calls `f` on every module.
    pub fn visit(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        self.attention.visit(f);
        self.mlp.visit(f);
        let norms: &mut [Norm] = match &mut self.norms {
            Norms::Pre(norms) | Norms::Post(norms) | Norms::Parallel(norms) => norms,
            Norms::Sandwich(norms) => norms,
            Norms::PreMlp(norm) => std::slice::from_mut(norm),
        };
        norms.iter_mut().for_each(|norm| f(norm.module()));
    }
}
