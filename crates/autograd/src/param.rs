//! Trainable tensors and their gradients.

use crate::host::update;
use crate::{Result, host};
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Identity of a [`Param`]; ordered by creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamId(u64);

/// A named trainable tensor. Clones share the tensor, which is updated in place.
#[derive(Clone)]
pub struct Param {
    id: ParamId,
    name: Arc<str>,
    tensor: Tensor,
    version: Arc<AtomicU64>,
}

impl fmt::Debug for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Param {} {:?}", self.name, self.tensor.dims())
    }
}

impl Param {
    /// Takes `tensor` (copied: the parameter alone owns its storage).
    pub fn new(name: impl Into<Arc<str>>, tensor: &Tensor) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = ParamId(NEXT.fetch_add(1, Ordering::Relaxed));
        Ok(Self {
            id,
            name: name.into(),
            tensor: tensor.contiguous()?.copy()?.detach(),
            version: Arc::default(),
        })
    }

    /// Identity.
    pub fn id(&self) -> ParamId {
        self.id
    }

    /// Name, as adapters' files have it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The current value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Counts the changes of the value: what was worked out from it holds as long as this stays.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.tensor.elem_count()
    }

    /// True for a parameter without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Replaces the value by that of `value`, which must have the same shape.
    pub fn set(&self, value: &Tensor) -> Result<()> {
        if value.dims() != self.tensor.dims() {
            return Err(crate::Error::shape(
                "Param::set",
                format!("{} is {:?}, the new value {:?}", self.name, self.tensor.dims(), value.dims()),
            ));
        }
        if self.tensor.device().is_cpu() {
            let value = value.contiguous()?;
            let value = host(&value)?.to_vec();
            return self.update_host(move |p| p.copy_from_slice(&value));
        }
        let value = value.contiguous()?;
        self.tensor.slice_set(&value, 0, 0)?;
        self.version.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Runs `f` on the elements of a CPU parameter, in place.
    pub fn update_host<R>(&self, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        let done = update(&self.tensor, f);
        self.version.fetch_add(1, Ordering::AcqRel);
        done
    }
}

/// Gradients by parameter, summed over every backward since they were cleared.
#[derive(Default)]
pub struct Gradients {
    by_param: BTreeMap<ParamId, Tensor>,
}

impl Gradients {
    /// No gradients.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `grad` to the parameter's gradient.
    pub fn add(&mut self, id: ParamId, grad: Tensor) -> Result<()> {
        match self.by_param.remove(&id) {
            None => self.by_param.insert(id, grad),
            Some(sum) => self.by_param.insert(id, (sum + grad)?),
        };
        Ok(())
    }

    /// The gradient of `param`, if anything reached it.
    pub fn get(&self, param: &Param) -> Option<&Tensor> {
        self.by_param.get(&param.id())
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.by_param.clear();
    }

    /// True if no gradient has arrived.
    pub fn is_empty(&self) -> bool {
        self.by_param.is_empty()
    }

    /// Sum of squares over all gradients.
    pub fn sum_squares(&self) -> Result<f64> {
        let mut sum = 0f64;
        for grad in self.by_param.values() {
            sum += if grad.device().is_cpu() {
                engobe_kernels::elementwise::sum_squares(&host(&grad.contiguous()?)?)
            } else {
                f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?)
            };
        }
        Ok(sum)
    }
}
