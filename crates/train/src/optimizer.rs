//! AdamW and SGD over an adapter's parameters.

mod moments;

pub use moments::{Saved, StateBytes, moments_bytes};

use crate::plan::{Optimization, OptimizerKind, PlanError};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use engobe_autograd::{Gradients, Param, Result as OpResult, host};
use engobe_formats::tensor::{Dtype, TensorView};
use engobe_kernels::adamw::{self, AdamWStep};
use engobe_kernels::adamw8;
use engobe_kernels::codec;
use engobe_kernels::storage::StorageType;
use moments::{Moment, Moments};
use std::collections::BTreeMap;
use std::path::Path;

/// An optimizer and the state that it keeps for each parameter.
#[derive(Debug)]
pub struct Optimizer {
    kind: OptimizerKind,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    momentum: f64,
    groups: Groups,
    slots: BTreeMap<String, Slot>,
    /// moments of the parameters in host memory
    moments: Moments,
}

/// Which parameters have a learning rate of their own: LoRA+, in the groups of PEFT's `create_loraplus_optimizer`.
#[derive(Clone, Copy, Debug)]
struct Groups {
    ratio: Option<f64>,
    /// learning rate beside embeddings over that of A
    embedding: f64,
}

impl Groups {
    fn new(plan: &Optimization) -> Self {
        let base = plan.learning_rate;
        let embedding = if base > 0.0 { plan.loraplus_lr_embedding / base } else { 0.0 };
        Self { ratio: plan.loraplus_lr_ratio, embedding }
    }

    /// Learning rate and weight decay of a parameter, given those of A.
    fn of(&self, param: &Param, lr: f64, decay: f64) -> (f64, f64) {
        let (Some(ratio), name) = (self.ratio, param.name()) else { return (lr, decay) };
        if name.contains(".lora_embedding_") {
            return (lr * self.embedding, decay);
        }
        let late = name.contains("lora_B") || param.tensor().dims().len() == 1;
        match (late, name.contains("bias")) {
            (false, _) => (lr, decay),
            (true, false) => (lr * ratio, decay),
            (true, true) => (lr * ratio, 0.0),
        }
    }
}

/// State of one parameter.
#[derive(Debug)]
struct Slot {
    /// steps that moved this parameter
    steps: u64,
    shape: Vec<usize>,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// number in [`Moments`]
    Host(usize),
    /// first moment (or SGD's momentum buffer) and second moment
    Device(Tensor, Option<Tensor>),
}

/// A tensor of the state, for checkpoints.
#[derive(Debug)]
pub struct StateTensor<'a> {
    /// name
    pub name: String,
    /// type
    pub dtype: Dtype,
    /// shape
    pub shape: Vec<usize>,
    /// elements
    pub data: StateData<'a>,
}

/// Elements of a state's tensor.
#[derive(Debug)]
pub enum StateData<'a> {
    /// where they lie
    Borrowed(StateBytes<'a>),
    /// a copy
    Owned(Vec<f32>),
}

impl AsRef<[u8]> for StateData<'_> {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes.as_ref(),
            Self::Owned(data) => bytemuck::cast_slice(data),
        }
    }
}

impl Optimizer {
    /// An optimizer whose moments are zero; those of a paged one lie in `file`.
    ///
    /// # Errors
    /// The file can't be made; 8-bit or paged moments for parameters that are not in host memory.
    pub fn new(plan: &Optimization, params: &[&Param], file: &Path) -> Result<Self> {
        let kind = plan.optimizer;
        let mut slots = BTreeMap::new();
        let mut sizes = Vec::new();
        for p in params {
            let place = if p.tensor().device().is_cpu() {
                sizes.push(p.len());
                Place::Host(sizes.len() - 1)
            } else if kind.is_8bit() || kind.is_paged() {
                let reason = "keeps its moments in the memory of the CPU: use --device cpu, or adamw";
                return Err(PlanError { key: "optimizer", value: kind.name().to_string(), reason }.into());
            } else {
                let zeros = || Tensor::zeros(p.tensor().dims(), DType::F32, p.tensor().device());
                Place::Device(zeros()?, (kind.moments() == 2).then(zeros).transpose()?)
            };
            let shape = p.tensor().dims().to_vec();
            slots.insert(p.name().to_string(), Slot { steps: 0, shape, place });
        }
        Ok(Self {
            kind,
            beta1: plan.adam_beta1,
            beta2: plan.adam_beta2,
            epsilon: plan.adam_epsilon,
            weight_decay: plan.weight_decay,
            momentum: plan.momentum,
            groups: Groups::new(plan),
            slots,
            moments: Moments::new(kind, &sizes, file)?,
        })
    }

    /// Moves every parameter that has a gradient; gradients are multiplied by `grad_scale` first.
    pub fn step(&mut self, params: &[&Param], grads: &Gradients, lr: f64, grad_scale: f64) -> Result<()> {
        for param in params {
            let Some(grad) = grads.get(param) else { continue };
            let slot = self
                .slots
                .get_mut(param.name())
                .ok_or_else(|| Error::Resume { what: format!("no optimizer state for {}", param.name()) })?;
            slot.steps += 1;
            let (lr, weight_decay) = self.groups.of(param, lr, self.weight_decay);
            let rule = Rule {
                kind: self.kind,
                adam: AdamWStep {
                    lr: lr as f32,
                    beta1: self.beta1 as f32,
                    beta2: self.beta2 as f32,
                    eps: self.epsilon as f32,
                    weight_decay: weight_decay as f32,
                    bias_correction1: (1.0 - self.beta1.powi(slot.steps as i32)) as f32,
                    bias_correction2: (1.0 - self.beta2.powi(slot.steps as i32)) as f32,
                    grad_scale: grad_scale as f32,
                },
                momentum: self.momentum as f32,
            };
            match &mut slot.place {
                Place::Host(i) => self.moments.with(*i, |moments| rule.on_host(param, grad, moments))?,
                Place::Device(first, second) => rule.composed(param, grad, first, second)?,
            }
        }
        Ok(())
    }

    /// State as named tensors, for checkpoints: `steps.<param>` and what [`Saved`] lists.
    pub fn state(&self) -> Result<Vec<StateTensor<'_>>> {
        let f32s = Dtype::Storage(StorageType::F32);
        let mut state = Vec::new();
        for (name, slot) in &self.slots {
            match &slot.place {
                Place::Host(i) => {
                    state.extend(self.moments.saved(*i, name, &slot.shape).into_iter().map(|s| StateTensor {
                        name: s.name,
                        dtype: s.dtype,
                        shape: s.shape,
                        data: StateData::Borrowed(s.bytes),
                    }))
                }
                Place::Device(first, second) => {
                    for (kind, t) in [("first", Some(first)), ("second", second.as_ref())] {
                        let Some(t) = t else { continue };
                        let data = t.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
                        let (name, shape) = (format!("{kind}.{name}"), slot.shape.clone());
                        state.push(StateTensor {
                            name,
                            dtype: f32s.clone(),
                            shape,
                            data: StateData::Owned(data),
                        });
                    }
                }
            }
            // exact in f32 up to 16.7 million steps
            let data = StateData::Owned(vec![slot.steps as f32]);
            state.push(StateTensor {
                name: format!("steps.{name}"),
                dtype: f32s.clone(),
                shape: vec![1],
                data,
            });
        }
        state.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(state)
    }

    /// Restores what [`Optimizer::state`] gave.
    pub fn restore(&mut self, state: &BTreeMap<String, TensorView>) -> Result<()> {
        {
            let expected: Vec<String> = self.state()?.into_iter().map(|t| t.name).collect();
            if let Some(name) = state.keys().find(|k| expected.binary_search(k).is_err()) {
                return Err(Error::Resume { what: format!("optimizer state {name} matches no parameter") });
            }
        }
        let floats = |key: String, shape: &[usize]| -> Result<Vec<f32>> {
            match state.get(&key) {
                Some(view) if view.shape == shape => {
                    let mut data = vec![0f32; view.elements()];
                    codec::decode(view.storage()?, view.bytes(), &mut data);
                    Ok(data)
                }
                _ => Err(Error::Resume { what: format!("optimizer state {key} is missing or misshapen") }),
            }
        };
        for (name, slot) in &mut self.slots {
            match &mut slot.place {
                Place::Host(i) => self.moments.restore(*i, name, &slot.shape, |key| state.get(key))?,
                Place::Device(first, second) => {
                    for (kind, t) in [("first", Some(first)), ("second", second.as_mut())] {
                        let Some(t) = t else { continue };
                        let data = floats(format!("{kind}.{name}"), &slot.shape)?;
                        *t = Tensor::from_vec(data, slot.shape.as_slice(), t.device())?;
                    }
                }
            }
            slot.steps = floats(format!("steps.{name}"), &[1])?[0] as u64;
        }
        Ok(())
    }
}

/// The numbers of one update.
struct Rule {
    kind: OptimizerKind,
    adam: AdamWStep,
    momentum: f32,
}

impl Rule {
    fn on_host(&self, param: &Param, grad: &Tensor, moments: Vec<Moment<'_>>) -> OpResult<()> {
        let grad = grad.contiguous()?;
        let (g, a) = (host(&grad)?, &self.adam);
        let mut moments = moments.into_iter();
        param.update_host(|p| match (moments.next(), moments.next()) {
            (Some(Moment::Full(m)), Some(Moment::Full(v))) => adamw::adamw_step(a, p, &g, m, v),
            (Some(Moment::Eight(m)), Some(Moment::Eight(v))) => adamw8::adamw8_step(a, p, &g, m, v),
            (Some(Moment::Full(m)), None) => {
                adamw::sgd_step(a.lr, self.momentum, a.weight_decay, a.grad_scale, p, &g, m);
            }
            _ => unreachable!("Moments::with gives one or two moments of one kind"),
        })
    }

    /// The same with candle's operations, for other devices.
    fn composed(
        &self,
        param: &Param,
        grad: &Tensor,
        first: &mut Tensor,
        second: &mut Option<Tensor>,
    ) -> OpResult<()> {
        let a = &self.adam;
        let f = f64::from;
        let (p, g) = (param.tensor(), (grad * f(a.grad_scale))?);
        match (self.kind, &second) {
            (OptimizerKind::AdamW, Some(v)) => {
                let decayed = (p * f(1.0 - a.lr * a.weight_decay))?;
                *first = ((&*first * f(a.beta1))? + (&g * f(1.0 - a.beta1))?)?;
                let v = ((v * f(a.beta2))? + (g.sqr()? * f(1.0 - a.beta2))?)?;
                let denominator = ((v.sqrt()? / f(a.bias_correction2.sqrt()))? + f(a.eps))?;
                *second = Some(v);
                let step = ((&*first / denominator)? * f(a.lr / a.bias_correction1))?;
                param.set(&(decayed - step)?)
            }
            _ => {
                let g = (g + (p * f(a.weight_decay))?)?;
                *first = ((&*first * f(self.momentum))? + &g)?;
                let direction = if self.momentum == 0.0 { &g } else { &*first };
                param.set(&(p - (direction * f(a.lr))?)?)
            }
        }
    }
}
