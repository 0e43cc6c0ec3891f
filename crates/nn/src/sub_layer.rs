//! The end of a sub-layer, where its output meets the residual: seam 4.

use crate::Linear;
use engobe_autograd::{Result, Tape, Var, ops};
use std::fmt::Debug;
use std::sync::Arc;

/// What kind of sub-layer it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubLayerKind {
    /// attention of a sequence to itself
    Attention,
    /// attention of a decoder to its encoder's states
    CrossAttention,
    /// the MLP
    FeedForward,
}

/// The layer norm behind the residual sum of post-norm models, as a function on a tape.
pub type NormAfter<'a, 'm> = &'a dyn Fn(&mut Tape<'m>, &Var) -> Result<Var>;

/// What an adapter of a sub-layer gets.
pub struct Closing<'a, 'm> {
    /// what the sub-layer computed, `[n, d]`, before the residual is added
    pub output: Var,
    /// what the sub-layer started from, `[n, d]`: its input before any norm
    pub residual: &'a Var,
    /// the norm behind the sum, in post-norm models
    pub norm: Option<NormAfter<'a, 'm>>,
}

impl<'m> Closing<'_, 'm> {
    /// `norm(residual + output)`: what the model itself does.
    pub fn close(&self, tape: &mut Tape<'m>, output: &Var) -> Result<Var> {
        let sum = ops::add(tape, self.residual, output)?;
        match self.norm {
            Some(norm) => norm(tape, &sum),
            None => Ok(sum),
        }
    }
}

/// Something attached to the end of a sub-layer. It gives what takes the place of `norm(residual + output)`.
pub trait SubLayerAdapter: Debug + Send + Sync {
    /// One forward pass.
    fn close<'m>(&'m self, tape: &mut Tape<'m>, closing: Closing<'_, 'm>) -> Result<Var>;
}

/// The end of a sub-layer of a model. Without an adapter it is the model's own fused op.
#[derive(Debug)]
pub struct SubLayer {
    path: String,
    kind: SubLayerKind,
    width: usize,
    /// factor on the output (Granite)
    scale: Option<f32>,
    adapter: Option<Arc<dyn SubLayerAdapter>>,
}

impl SubLayer {
    /// The end of the sub-layer at a module path, whose output is of width `d`.
    pub fn new(path: impl Into<String>, kind: SubLayerKind, width: usize) -> Self {
        Self { path: path.into(), kind, width, scale: None, adapter: None }
    }

    /// The same, its output multiplied before it meets the residual.
    pub fn scaled(self, scale: Option<f32>) -> Self {
        Self { scale, ..self }
    }

    /// Module path (`model.layers.3.mlp`).
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Attention or MLP.
    pub fn kind(&self) -> SubLayerKind {
        self.kind
    }

    /// Width of the output.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Attaches an adapter; it takes the place of another.
    pub fn attach(&mut self, adapter: Arc<dyn SubLayerAdapter>) {
        self.adapter = Some(adapter);
    }

    /// Takes away what was attached.
    pub fn detach(&mut self) {
        self.adapter = None;
    }

    /// True if the end is a sum alone, which a linear layer takes into its op.
    fn is_plain(&self) -> bool {
        self.adapter.is_none() && self.scale.is_none()
    }

    fn scale<'m>(&self, tape: &mut Tape<'m>, output: Var) -> Result<Var> {
        match self.scale {
            Some(factor) => ops::scale(tape, &output, factor),
            None => Ok(output),
        }
    }

    /// `residual + last(x)`, `last` being the sub-layer's last linear layer.
    pub fn close<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        last: &'m Linear,
        x: &Var,
        residual: &Var,
    ) -> Result<Var> {
        if self.is_plain() {
            return last.forward_residual(tape, x, residual);
        }
        let output = last.forward(tape, x)?;
        self.add(tape, output, residual)
    }

    /// [`SubLayer::close`] at the end of a [`Tape::block`], whose output nobody reads when the block runs again.
    pub fn close_block<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        last: &'m Linear,
        x: &Var,
        residual: &Var,
    ) -> Result<Var> {
        match self.is_plain() {
            true => last.forward_residual_last(tape, x, residual),
            false => self.close(tape, last, x, residual),
        }
    }

    /// `residual + output`, where a sub-layer does not end in a linear layer.
    pub fn add<'m>(&'m self, tape: &mut Tape<'m>, output: Var, residual: &Var) -> Result<Var> {
        let output = self.scale(tape, output)?;
        match &self.adapter {
            None => ops::add(tape, residual, &output),
            Some(adapter) => adapter.close(tape, Closing { output, residual, norm: None }),
        }
    }

    /// `norm(residual + last(x))`, in post-norm models.
    pub fn close_normed<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        last: &'m Linear,
        x: &Var,
        residual: &Var,
        norm: NormAfter<'_, 'm>,
    ) -> Result<Var> {
        if self.is_plain() {
            let sum = last.forward_residual(tape, x, residual)?;
            return norm(tape, &sum);
        }
        let output = last.forward(tape, x)?;
        let output = self.scale(tape, output)?;
        let closing = Closing { output: output.clone(), residual, norm: Some(norm) };
        match &self.adapter {
            None => closing.close(tape, &output),
            Some(adapter) => adapter.close(tape, closing),
        }
    }
}
