//! Losses of rows of few logits: classes, sets of classes, numbers. For the vocabulary's many there is `head_loss`.
//!
//! With z a logit and the loss summed over rows:
//! - class t: −z_t + ln Σ e^z, gradient softmax(z) − 1[t];
//! - sets (each class holds, y = 1, or not): max(z, 0) − z·y + ln(1 + e^−|z|), gradient σ(z) − y;
//! - numbers: (z − y)², gradient 2(z − y).

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of};
use candle_core::{D, Tensor};
use std::sync::Arc;

/// What rows of logits `[n, c]` should be.
#[derive(Clone, Debug)]
pub enum RowTargets {
    /// one class a row: `[n]`
    Classes(Arc<[u32]>),
    /// 1 for classes that hold, 0 for the others: `[n · c]`
    Sets(Arc<[f32]>),
    /// numbers: `[n · c]`
    Values(Arc<[f32]>),
}

/// Summed loss of `logits` `[n, c]`, one element: cross entropy, binary cross entropy, or squared error.
///
/// # Errors
/// Targets that do not fit the logits.
pub fn row_loss<'m>(tape: &mut Tape<'m>, logits: &Var, targets: RowTargets) -> Result<Var> {
    let (n, c) = dims2("row_loss", logits.tensor())?;
    let (found, wanted) = match &targets {
        RowTargets::Classes(t) => (t.len(), n),
        RowTargets::Sets(t) | RowTargets::Values(t) => (t.len(), n * c),
    };
    if found != wanted {
        return Err(Error::shape("row_loss", format!("{found} targets for logits [{n}, {c}]")));
    }
    if let RowTargets::Classes(t) = &targets
        && let Some(t) = t.iter().find(|t| **t as usize >= c)
    {
        return Err(Error::shape("row_loss", format!("class {t} of {c}")));
    }
    let z = logits.tensor();
    let (value, gradient) = if tape.fast(z) { fast(z, c, &targets)? } else { composed(z, &targets)? };
    let slot = logits.slot();
    Ok(tape.record1(&[slot], value, move |dy, sink| {
        sink.add(slot, gradient.broadcast_mul(&dy.reshape((1, 1))?)?)
    }))
}

/// The loss, and its gradient `[n, c]`. Rows are few and short: one pass in f64.
fn fast(logits: &Tensor, c: usize, targets: &RowTargets) -> Result<(Tensor, Tensor)> {
    let z = host(logits)?;
    let mut gradient = vec![0f32; z.len()];
    let mut loss = 0f64;
    match targets {
        RowTargets::Classes(targets) => {
            for ((z, d), t) in z.chunks_exact(c).zip(gradient.chunks_exact_mut(c)).zip(targets.iter()) {
                let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let e = |z: f32| f64::from(z - max).exp();
                let sum: f64 = z.iter().map(|z| e(*z)).sum();
                loss += sum.ln() + f64::from(max - z[*t as usize]);
                for (d, z) in d.iter_mut().zip(z) {
                    *d = (e(*z) / sum) as f32;
                }
                d[*t as usize] -= 1.0;
            }
        }
        RowTargets::Sets(targets) => {
            for ((z, d), y) in z.iter().zip(&mut gradient).zip(targets.iter()) {
                let (z, y) = (f64::from(*z), f64::from(*y));
                loss += z.max(0.0) - z * y + (-z.abs()).exp().ln_1p();
                *d = (1.0 / (1.0 + (-z).exp()) - y) as f32;
            }
        }
        RowTargets::Values(targets) => {
            for ((z, d), y) in z.iter().zip(&mut gradient).zip(targets.iter()) {
                loss += f64::from(z - y).powi(2);
                *d = 2.0 * (z - y);
            }
        }
    }
    Ok((tensor_of(vec![loss as f32], 1)?, tensor_of(gradient, logits.shape().clone())?))
}

fn composed(z: &Tensor, targets: &RowTargets) -> Result<(Tensor, Tensor)> {
    let on = |y: &[f32]| Tensor::from_slice(y, z.dims(), z.device());
    let (losses, gradient) = match targets {
        RowTargets::Classes(targets) => {
            let index = Tensor::from_slice(targets, (targets.len(), 1), z.device())?;
            let max = z.max_keepdim(D::Minus1)?;
            let e = z.broadcast_sub(&max)?.exp()?;
            let sum = e.sum_keepdim(D::Minus1)?;
            let losses = ((sum.log()? + max)? - z.gather(&index, 1)?)?;
            let ones = Tensor::ones((targets.len(), 1), z.dtype(), z.device())?;
            (losses, e.broadcast_div(&sum)?.scatter_add(&index, &ones.neg()?, 1)?)
        }
        RowTargets::Sets(targets) => {
            let y = on(targets)?;
            let rest = ((z.abs()?.neg()?.exp()? + 1.0)?).log()?;
            let losses = ((z.relu()? - (z * &y)?)? + rest)?;
            (losses, ((z.neg()?.exp()? + 1.0)?.recip()? - y)?)
        }
        RowTargets::Values(targets) => {
            let difference = (z - on(targets)?)?;
            (difference.sqr()?, (difference * 2.0)?)
        }
    };
    Ok((losses.sum_all()?.reshape(1)?, gradient))
}
