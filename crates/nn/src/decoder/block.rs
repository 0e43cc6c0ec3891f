//! One block of a decoder: attention and feed-forward, and where their norms and residuals stand.

use super::{Attention, CacheSlot, Context, Mlp};
use crate::{KvPrefix, Linear, ModuleMut, Norm, Result, SiteMut, SubLayer, SubLayerKind};
use engobe_autograd::{Tape, Var};

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
    /// y = x + n₁(A(x)), y + n₂(F(y)) (OLMo 2)
    After([Norm; 2]),
    /// x + A(n₁(x)) + F(n₂(x)) (GPT-NeoX)
    Parallel([Norm; 2]),
    /// x + A(n(x)) + F(n(x)) (GPT-J, Phi)
    Shared(Norm),
    /// y = x + A(x), y + F(n(y)): the first block after an embedding that is normed itself (ModernBERT)
    PreMlp(Norm),
}

/// A block of a decoder or an encoder.
#[derive(Debug)]
pub struct Block {
    /// attention
    pub attention: Attention,
    /// feed-forward
    pub mlp: Mlp,
    /// norms and residuals
    pub norms: Norms,
    /// where adapters put keys and values
    prefix: KvPrefix,
    /// where the sub-layers' outputs meet the residual
    ends: [SubLayer; 2],
}

impl Block {
    /// The block of these parts. Its sites have the paths of the modules that hold the sub-layers' last layers.
    pub fn new(attention: Attention, mlp: Mlp, norms: Norms) -> Self {
        let parent = |path: &str| path.rsplit_once('.').map_or(path, |(parent, _)| parent).to_string();
        let (attention_path, mlp_path) = (parent(attention.output.path()), parent(mlp.down.path()));
        let (shape, width) = (attention.shape, mlp.down.out_features());
        Self {
            prefix: KvPrefix::new(attention_path.clone(), shape.kv_heads, shape.head_dim),
            ends: [
                SubLayer::new(attention_path, SubLayerKind::Attention, width),
                SubLayer::new(mlp_path, SubLayerKind::FeedForward, width),
            ],
            attention,
            mlp,
            norms,
        }
    }

    /// The same, what each sub-layer computes multiplied before it meets the residual.
    pub fn scaled(self, scale: Option<f32>) -> Self {
        Self { ends: self.ends.map(|end| end.scaled(scale)), ..self }
    }

    /// Hidden states `x` `[n, d]` one block further.
    pub fn forward<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        x: &Var,
        context: &Context,
        cache: Option<CacheSlot<'_>>,
    ) -> Result<Var> {
        let (attention, mlp, prefix) = (&self.attention, &self.mlp, &self.prefix);
        let [attention_end, mlp_end] = &self.ends;
        match &self.norms {
            Norms::Pre([before_attention, before_mlp]) => {
                let normed = before_attention.forward(tape, x)?;
                self.pre(tape, x, normed, before_mlp, context, cache)
            }
            Norms::PreMlp(before_mlp) => self.pre(tape, x, x.clone(), before_mlp, context, cache),
            Norms::Post([after_attention, after_mlp]) => {
                let attended = attention.attend(tape, x, context, prefix, cache)?;
                let norm = |tape: &mut Tape<'m>, sum: &Var| after_attention.forward(tape, sum);
                let x = attention_end.close_normed(tape, &attention.output, &attended, x, &norm)?;
                let inner = mlp.inner(tape, &x)?;
                let norm = |tape: &mut Tape<'m>, sum: &Var| after_mlp.forward(tape, sum);
                mlp_end.close_normed(tape, &mlp.down, &inner, &x, &norm)
            }
            Norms::Sandwich([before_attention, after_attention, before_mlp, after_mlp]) => {
                let normed = before_attention.forward(tape, x)?;
                let attended = attention.attend(tape, &normed, context, prefix, cache)?;
                drop(normed);
                let x = normed_into(attention_end, tape, &attention.output, after_attention, &attended, x)?;
                let normed = before_mlp.forward(tape, &x)?;
                let inner = mlp.inner(tape, &normed)?;
                drop(normed);
                normed_into(mlp_end, tape, &mlp.down, after_mlp, &inner, &x)
            }
            Norms::After([after_attention, after_mlp]) => {
                let attended = attention.attend(tape, x, context, prefix, cache)?;
                let x = normed_into(attention_end, tape, &attention.output, after_attention, &attended, x)?;
                let inner = mlp.inner(tape, &x)?;
                normed_into(mlp_end, tape, &mlp.down, after_mlp, &inner, &x)
            }
            Norms::Parallel([before_attention, before_mlp]) => {
                self.parallel(tape, x, before_attention, Some(before_mlp), context, cache)
            }
            Norms::Shared(before) => self.parallel(tape, x, before, None, context, cache),
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
        let [attention_end, mlp_end] = &self.ends;
        let attended = self.attention.attend(tape, &input, context, &self.prefix, cache)?;
        drop(input);
        let x = attention_end.close(tape, &self.attention.output, &attended, x)?;
        drop(attended);
        let normed = before_mlp.forward(tape, &x)?;
        let inner = self.mlp.inner(tape, &normed)?;
        drop(normed);
        mlp_end.close_block(tape, &self.mlp.down, &inner, &x)
    }

    /// x + A(n₁(x)) + F(n₂(x)), n₂ being n₁ where the feed-forward has no norm of its own.
    fn parallel<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        x: &Var,
        before_attention: &'m Norm,
        before_mlp: Option<&'m Norm>,
        context: &Context,
        cache: Option<CacheSlot<'_>>,
    ) -> Result<Var> {
        let [attention_end, mlp_end] = &self.ends;
        let normed = before_attention.forward(tape, x)?;
        let attended = self.attention.attend(tape, &normed, context, &self.prefix, cache)?;
        // `normed` is let go where the feed-forward has a norm of its own
        let before_mlp = before_mlp.ok_or(normed);
        let sum = attention_end.close(tape, &self.attention.output, &attended, x)?;
        drop(attended);
        let normed = match before_mlp {
            Ok(norm) => norm.forward(tape, x)?,
            Err(shared) => shared,
        };
        let inner = self.mlp.inner(tape, &normed)?;
        drop(normed);
        mlp_end.close_block(tape, &self.mlp.down, &inner, &sum)
    }

    /// Calls `f` on every module.
    pub fn visit(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        self.attention.visit(f);
        self.mlp.visit(f);
        let norms: &mut [Norm] = match &mut self.norms {
            Norms::Pre(norms) | Norms::Post(norms) | Norms::After(norms) | Norms::Parallel(norms) => norms,
            Norms::Sandwich(norms) => norms,
            Norms::PreMlp(norm) | Norms::Shared(norm) => std::slice::from_mut(norm),
        };
        norms.iter_mut().for_each(|norm| f(norm.module()));
    }

    /// Calls `f` on every site.
    pub fn visit_sites(&mut self, f: &mut dyn FnMut(SiteMut<'_>)) {
        f(SiteMut::KvPrefix(&mut self.prefix));
        self.ends.iter_mut().for_each(|end| f(SiteMut::SubLayer(end)));
    }
}

/// `residual + norm(last(inner))`: the end of a sub-layer whose output is normed.
fn normed_into<'m>(
    end: &'m SubLayer,
    tape: &mut Tape<'m>,
    last: &'m Linear,
    norm: &'m Norm,
    inner: &Var,
    residual: &Var,
) -> Result<Var> {
    let out = last.forward(tape, inner)?;
    let normed = norm.forward(tape, &out)?;
    end.add(tape, normed, residual)
}
