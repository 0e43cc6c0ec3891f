//! AdamW and SGD over an adapter's parameters.

use crate::plan::{Optimization, OptimizerKind};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use engobe_autograd::{Gradients, Param, Result as OpResult, host, update};
use engobe_kernels::adamw::{self, AdamWStep};
use std::collections::BTreeMap;

/// An optimizer and the state that it keeps for each parameter.
#[derive(Debug)]
pub struct Optimizer {
    kind: OptimizerKind,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    momentum: f64,
    slots: BTreeMap<String, Slot>,
}

/// State of one parameter.
#[derive(Debug)]
struct Slot {
    /// steps that moved this parameter
    steps: u64,
    /// first moment, or SGD's momentum buffer
    first: Tensor,
    /// second moment (AdamW)
    second: Option<Tensor>,
}

impl Optimizer {
    /// An optimizer whose moments are zero.
    pub fn new(plan: &Optimization, params: &[&Param]) -> Result<Self> {
        let mut slots = BTreeMap::new();
        for p in params {
            let zeros = || Tensor::zeros(p.tensor().dims(), DType::F32, p.tensor().device());
            let second = matches!(plan.optimizer, OptimizerKind::AdamW).then(zeros).transpose()?;
            slots.insert(p.name().to_string(), Slot { steps: 0, first: zeros()?, second });
        }
        Ok(Self {
            kind: plan.optimizer,
            beta1: plan.adam_beta1,
            beta2: plan.adam_beta2,
            epsilon: plan.adam_epsilon,
            weight_decay: plan.weight_decay,
            momentum: plan.momentum,
            slots,
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
            let rule = Rule {
                kind: self.kind,
                adam: AdamWStep {
                    lr: lr as f32,
                    beta1: self.beta1 as f32,
                    beta2: self.beta2 as f32,
                    eps: self.epsilon as f32,
                    weight_decay: self.weight_decay as f32,
                    bias_correction1: (1.0 - self.beta1.powi(slot.steps as i32)) as f32,
                    bias_correction2: (1.0 - self.beta2.powi(slot.steps as i32)) as f32,
                    grad_scale: grad_scale as f32,
                },
                momentum: self.momentum as f32,
            };
            if param.tensor().device().is_cpu() {
                rule.on_host(param, grad, slot)?;
            } else {
                rule.composed(param, grad, slot)?;
            }
        }
        Ok(())
    }

    /// State as named tensors, for checkpoints: `first.<param>`, `second.<param>`, `steps.<param>`.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (name, slot) in &self.slots {
            state.insert(format!("first.{name}"), slot.first.clone());
            if let Some(second) = &slot.second {
                state.insert(format!("second.{name}"), second.clone());
            }
            // exact in f32 up to 16.7 million steps
            let steps = Tensor::full(slot.steps as f32, 1, &candle_core::Device::Cpu)?;
            state.insert(format!("steps.{name}"), steps);
        }
        Ok(state)
    }

    /// Restores what [`Optimizer::state`] gave.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let expected = self.state()?;
        if let Some(name) = state.keys().find(|k| !expected.contains_key(*k)) {
            return Err(Error::Resume { what: format!("optimizer state {name} matches no parameter") });
        }
        for (name, slot) in &mut self.slots {
            let get = |kind: &str, like: &Tensor| -> Result<Tensor> {
                let key = format!("{kind}.{name}");
                match state.get(&key) {
                    Some(t) if t.dims() == like.dims() => Ok(t.to_device(like.device())?.copy()?),
                    _ => {
                        Err(Error::Resume { what: format!("optimizer state {key} is missing or misshapen") })
                    }
                }
            };
            slot.first = get("first", &slot.first)?;
            if let Some(second) = &slot.second {
                slot.second = Some(get("second", second)?);
            }
            let one = Tensor::zeros(1, DType::F32, &candle_core::Device::Cpu)?;
            slot.steps = get("steps", &one)?.to_vec1::<f32>()?[0] as u64;
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
    fn on_host(&self, param: &Param, grad: &Tensor, slot: &Slot) -> OpResult<()> {
        let grad = grad.contiguous()?;
        let g = host(&grad)?;
        param.update_host(|p| {
            update(&slot.first, |m| match &slot.second {
                Some(second) => update(second, |v| adamw::adamw_step(&self.adam, p, &g, m, v)),
                None => {
                    let a = &self.adam;
                    adamw::sgd_step(a.lr, self.momentum, a.weight_decay, a.grad_scale, p, &g, m);
                    Ok(())
                }
            })
        })???;
        Ok(())
    }

    /// The same with candle's operations, for other devices.
    fn composed(&self, param: &Param, grad: &Tensor, slot: &mut Slot) -> OpResult<()> {
        let a = &self.adam;
        let f = f64::from;
        let (p, g) = (param.tensor(), (grad * f(a.grad_scale))?);
        match (self.kind, &slot.second) {
            (OptimizerKind::AdamW, Some(second)) => {
                let decayed = (p * f(1.0 - a.lr * a.weight_decay))?;
                slot.first = ((&slot.first * f(a.beta1))? + (&g * f(1.0 - a.beta1))?)?;
                let v = ((second * f(a.beta2))? + (g.sqr()? * f(1.0 - a.beta2))?)?;
                let denominator = ((v.sqrt()? / f(a.bias_correction2.sqrt()))? + f(a.eps))?;
                slot.second = Some(v);
                let step = ((&slot.first / denominator)? * f(a.lr / a.bias_correction1))?;
                param.set(&(decayed - step)?)
            }
            _ => {
                let g = (g + (p * f(a.weight_decay))?)?;
                slot.first = ((&slot.first * f(self.momentum))? + &g)?;
                let direction = if self.momentum == 0.0 { &g } else { &slot.first };
                param.set(&(p - (direction * f(a.lr))?)?)
            }
        }
    }
}
