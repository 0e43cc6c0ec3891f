//! Which directions AdaLoRA gives up, and when: PEFT's `RankAllocator`.
//!
//! After step t, with the gradient g that moved a parameter p:
//!
//! ```text
//! I = |p·g|     Ī = β₁·Ī + (1 - β₁)·I     U = β₂·U + (1 - β₂)·|I - Ī|      importance of an element: Ī·U
//! of direction i: that of E_i, plus the means over A's row and B's column
//! ```
//!
//! The budget falls from all ranks to the target with the cube of the time that is left; where a choice is due, the E
//! of the least important directions become zero. After the last choice they are made zero again after every step.

use super::Triplet;
use crate::method::StepTaken;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use engobe_autograd::{Param, host};
use engobe_formats::peft::PeftConfig;
use std::sync::Arc;

/// When and how far the budget falls.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    /// ranks at the start, summed
    pub initial: usize,
    /// ranks at the end, summed
    pub target: usize,
    pub tinit: usize,
    pub tfinal: usize,
    pub interval: usize,
    pub beta1: f32,
    pub beta2: f32,
}

impl Schedule {
    /// Budget after `step` of `total`, and whether a choice is due.
    fn at(&self, step: usize, total: usize) -> (usize, bool) {
        let end = total - self.tfinal;
        if step <= self.tinit {
            return (self.initial, false);
        }
        if step > end {
            return (self.target, true);
        }
        let left = 1.0 - (step - self.tinit) as f64 / (end - self.tinit) as f64;
        let span = self.initial as f64 - self.target as f64;
        ((span * left.powi(3) + self.target as f64) as usize, step.is_multiple_of(self.interval))
    }
}

/// The running importance of every parameter, kept in checkpoints.
#[derive(Debug)]
pub(crate) struct Allocator {
    schedule: Schedule,
    /// of A, E and B of each layer: Ī and U
    importance: Vec<[[Param; 2]; 3]>,
    /// one for a direction that is kept, 0 for one that was given up: `[r]` of each layer
    kept: Vec<Param>,
    /// 1 once a choice was made
    chosen: Param,
}

impl Allocator {
    pub fn new(schedule: Schedule, triplets: &[Arc<Triplet>]) -> Result<Self> {
        let like =
            |kind: &str, p: &Param| Param::new(format!("{kind}.{}", p.name()), &p.tensor().zeros_like()?);
        let both =
            |p: &Param| -> Result<[Param; 2]> { Ok([like("importance", p)?, like("uncertainty", p)?]) };
        let of = |t: &Arc<Triplet>| -> Result<_> { Ok([both(&t.a)?, both(&t.e)?, both(&t.b)?]) };
        let kept = |t: &Arc<Triplet>| -> Result<Param> {
            let ones = Tensor::ones(t.rank(), DType::F32, t.e.tensor().device())?;
            Ok(Param::new(format!("kept.{}", t.e.name()), &ones)?)
        };
        Ok(Self {
            schedule,
            importance: triplets.iter().map(of).collect::<Result<_>>()?,
            kept: triplets.iter().map(kept).collect::<Result<_>>()?,
            chosen: Param::new("chosen", &Tensor::zeros(1, DType::F32, &Device::Cpu)?)?,
        })
    }

    pub fn buffers(&self) -> Vec<&Param> {
        let importance = self.importance.iter().flatten().flatten();
        importance.chain(&self.kept).chain([&self.chosen]).collect()
    }

    /// # Errors
    /// The schedule leaves no step for the budget to fall.
    pub fn check(&self, total: usize, config: &PeftConfig) -> Result<()> {
        let s = &self.schedule;
        if s.tinit + s.tfinal >= total {
            let found = format!("{} beside tfinal {} in {total} steps", s.tinit, s.tfinal);
            return Err(config
                .bad("tinit", &found, "less than total_step - tfinal: steps for the budget to fall")
                .into());
        }
        if s.target > s.initial {
            let found = config.get("target_r").map(ToString::to_string).unwrap_or_default();
            return Err(Error::Format(config.bad("target_r", &found, "no more than init_r")));
        }
        Ok(())
    }

    /// True once directions were chosen.
    pub fn has_chosen(&self) -> bool {
        host(self.chosen.tensor()).is_ok_and(|v| v.first() == Some(&1.0))
    }

    /// Which directions of each layer are kept.
    pub fn kept(&self) -> Result<Vec<Vec<bool>>> {
        let of = |p: &Param| Ok(values(p.tensor())?.into_iter().map(|v| v != 0.0).collect());
        self.kept.iter().map(of).collect()
    }

    pub fn after_step(&self, triplets: &[Arc<Triplet>], taken: &StepTaken<'_>, total: usize) -> Result<()> {
        let last = total.saturating_sub(self.schedule.tfinal);
        if total <= self.schedule.tfinal {
            return Ok(());
        }
        if taken.step > last {
            // the optimizer moved what was given up again
            return self.silence(triplets);
        }
        if taken.step < last {
            for (t, importance) in triplets.iter().zip(&self.importance) {
                for (param, averages) in [&t.a, &t.e, &t.b].into_iter().zip(importance) {
                    self.update(param, averages, taken)?;
                }
            }
        }
        let (budget, due) = self.schedule.at(taken.step, total);
        match due || taken.step == last {
            true => self.choose(triplets, budget),
            false => Ok(()),
        }
    }

    fn update(&self, param: &Param, [mean, uncertainty]: &[Param; 2], taken: &StepTaken<'_>) -> Result<()> {
        let Some(grad) = taken.grads.get(param) else { return Ok(()) };
        let now = ((param.tensor() * grad)? * f64::from(taken.grad_scale))?.abs()?;
        let mixed = |old: &Tensor, new: &Tensor, beta: f32| -> Result<Tensor> {
            Ok(((old * f64::from(beta))? + (new * f64::from(1.0 - beta))?)?)
        };
        let average = mixed(mean.tensor(), &now, self.schedule.beta1)?;
        let off = (now - &average)?.abs()?;
        uncertainty.set(&mixed(uncertainty.tensor(), &off, self.schedule.beta2)?)?;
        Ok(mean.set(&average)?)
    }

    /// Gives up the least important directions.
    fn choose(&self, triplets: &[Arc<Triplet>], budget: usize) -> Result<()> {
        let element = |[mean, uncertainty]: &[Param; 2]| mean.tensor() * uncertainty.tensor();
        let mut scores = Vec::with_capacity(triplets.len());
        for [a, e, b] in &self.importance {
            let vectors = (element(a)?.mean(1)? + element(b)?.mean(0)?)?;
            scores.push(values(&(element(e)?.flatten_all()? + vectors)?)?);
        }
        let given_up = self.schedule.initial.saturating_sub(budget);
        let mut all: Vec<f32> = scores.iter().flatten().copied().collect();
        if given_up == 0 || given_up > all.len() {
            return Ok(());
        }
        all.sort_by(f32::total_cmp);
        let threshold = all[given_up - 1];
        for ((t, kept), scores) in triplets.iter().zip(&self.kept).zip(scores) {
            let mask: Vec<f32> = scores.iter().map(|s| f32::from(u8::from(*s > threshold))).collect();
            kept.set(&Tensor::from_vec(mask, t.rank(), t.e.tensor().device())?)?;
        }
        self.silence(triplets)?;
        Ok(self.chosen.set(&Tensor::ones(1, DType::F32, &Device::Cpu)?)?)
    }

    /// Makes the E of directions that were given up zero.
    fn silence(&self, triplets: &[Arc<Triplet>]) -> Result<()> {
        for (t, kept) in triplets.iter().zip(&self.kept) {
            t.e.set(&t.e.tensor().mul(&kept.tensor().reshape((t.rank(), 1))?)?)?;
        }
        Ok(())
    }
}

fn values(t: &Tensor) -> Result<Vec<f32>> {
    let t = t.to_device(&Device::Cpu)?.contiguous()?;
    Ok(host(&t)?.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_falls_with_the_cube_of_what_is_left() {
        let s =
            Schedule { initial: 40, target: 16, tinit: 3, tfinal: 5, interval: 2, beta1: 0.85, beta2: 0.85 };
        assert_eq!(s.at(3, 20), (40, false));
        // 12 steps in all: after one, (11/12)³·24 + 16
        assert_eq!(s.at(4, 20), (34, true));
        assert_eq!(s.at(5, 20), (29, false));
        assert_eq!(s.at(15, 20), (16, false));
        assert_eq!(s.at(16, 20), (16, true));
    }
}
