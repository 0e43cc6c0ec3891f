//! [`Var`]: a tensor on the tape, and how ops keep it for their backward.

use crate::host::widened;
use crate::tape::Slot;
use crate::{Result, host};
use candle_core::Tensor;
use std::sync::{Arc, OnceLock};

/// A tensor and its place on the tape.
#[derive(Clone)]
pub struct Var {
    pub(crate) tensor: Tensor,
    pub(crate) slot: Slot,
    pub(crate) recipe: Option<Recipe>,
    /// the value in 16 bits, made when first an op keeps it so: all that keep it share one copy
    pub(crate) narrow: Arc<OnceLock<Tensor>>,
}

/// Makes a value again from tensors that are kept anyway.
pub type Recipe = Arc<dyn Fn() -> Result<Tensor> + Send + Sync>;

/// A value that an op keeps for its backward ([`Tape::keep`]): the tensor, the tensor in 16 bits, or how to make it again.
#[derive(Clone)]
pub(crate) enum Kept {
    Tensor(Tensor),
    Narrow(Tensor),
    Again(Recipe),
}

impl Kept {
    /// The value, in f32.
    pub fn value(&self) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => Ok(tensor.clone()),
            Self::Narrow(tensor) => widened(tensor),
            Self::Again(recipe) => recipe(),
        }
    }

    /// The value, where nothing else will ask for it: its 16 bits are let go at once.
    pub fn take(self) -> Result<Tensor> {
        self.value()
    }
}

impl std::fmt::Debug for Var {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Var {:?} {:?}", self.tensor.dims(), self.slot)
    }
}

impl Var {
    pub(crate) fn new(tensor: Tensor, slot: Slot) -> Self {
        Self { tensor, slot, recipe: None, narrow: Arc::default() }
    }

    /// A value with nothing trainable upstream.
    pub fn constant(tensor: Tensor) -> Self {
        Self::new(tensor, Slot::default())
    }

    /// Says that the value is cheap to make again from what is kept anyway: ops that need it in their backward then
    /// keep `recipe` instead of the tensor.
    pub fn made_by(mut self, recipe: impl Fn() -> Result<Tensor> + Send + Sync + 'static) -> Self {
        self.recipe = Some(Arc::new(recipe));
        self
    }

    /// The value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The value, taken out.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }

    /// Where its gradient goes.
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// True if something trainable is upstream.
    pub fn is_tracked(&self) -> bool {
        self.slot.is_tracked()
    }

    /// Value of a one-element tensor.
    pub fn scalar(&self) -> Result<f32> {
        if self.tensor.device().is_cpu() {
            return Ok(host(&self.tensor)?[0]);
        }
        Ok(self.tensor.flatten_all()?.to_vec1::<f32>()?[0])
    }
}
