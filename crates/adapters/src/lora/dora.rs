//! DoRA (Liu et al. 2024): a weight as a direction and a magnitude, row by row,
//!
//! ```text
//! W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖        y = g ⊙ (W·x + s·B·A·x) + b,   g = m / ‖W + s·B·A‖
//! ```
//!
//! with the norm of each row taken as a constant in the backward (section 4.3 of the paper; PEFT does the same).
//!
//! Neither W + s·B·A nor W is ever formed. With rows wᵢ of W and bᵢ of B, and A the stack of all deltas' A,
//!
//! ```text
//! ‖wᵢ + bᵢ·A‖² = ‖wᵢ‖² + 2·bᵢ·(A·wᵢ) + bᵢ·(A·Aᵀ)·bᵢᵀ
//! ```
//!
//! so that a forward needs one product of A with the weight in whatever storage it lies: as much as r more tokens.
//! The norms hold until a factor changes, so evaluation, accumulation and recomputed blocks find them ready.
//!
//! PEFT drops elements of the input of W as well where `lora_dropout` is above 0 (its base part is `x·Wᵀ` plus
//! `(g - 1)` times the masked product); here the mask is on the input of A alone, which has the same mean.

use crate::Result;
use candle_core::{DType, Device, Tensor};
use engobe_autograd::ops::Matrix;
use engobe_autograd::{FrozenWeight, Param, Tape, Var, host, tensor_of, uninit};
use engobe_kernels::mat::{MatMut, MatRef};
use engobe_kernels::matmul;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A delta `scale · B·A` that counts in the norm.
pub(crate) struct Delta<'a> {
    /// `[r, in]`
    pub a: &'a Tensor,
    /// `[out, r]`
    pub b: &'a Tensor,
    pub scale: f32,
}

/// The trained magnitudes of one layer.
#[derive(Debug)]
pub(crate) struct Magnitude {
    m: Param,
    /// ‖wᵢ‖²: the base does not change
    base: OnceLock<Arc<Vec<f64>>>,
    /// norms, and the versions of the factors that they belong to
    norms: Mutex<Option<(Vec<u64>, Tensor)>>,
}

impl Magnitude {
    /// Magnitudes of the layer at `path` that change nothing: the norms themselves. Without a weight, as many ones.
    pub fn new(
        path: &str,
        out: usize,
        weight: Option<&FrozenWeight>,
        deltas: &[Delta<'_>],
        device: &Device,
    ) -> Result<Self> {
        let name = format!("base_model.model.{path}.lora_magnitude_vector");
        let base = OnceLock::new();
        let norms = match weight {
            Some(weight) => row_norms(&Matrix::Frozen(weight.clone()), &base, deltas, device)?,
            None => Tensor::ones(out, DType::F32, device)?,
        };
        Ok(Self { m: Param::new(name, &norms)?, base, norms: Mutex::new(None) })
    }

    /// Magnitudes `[out]`.
    pub fn param(&self) -> &Param {
        &self.m
    }

    /// g `[out]`. `versions` are those of the parameters in `deltas`.
    pub fn gain(
        &self,
        tape: &mut Tape<'_>,
        weight: &Matrix,
        deltas: &[Delta<'_>],
        versions: Vec<u64>,
    ) -> engobe_autograd::Result<Var> {
        let norms = self.norms(weight, deltas, versions)?;
        let m = tape.param(&self.m);
        let gain = (m.tensor() / &norms)?;
        let slot = m.slot();
        Ok(tape.record1(&[slot], gain, move |dg, sink| sink.add(slot, (dg / norms)?)))
    }

    fn norms(
        &self,
        weight: &Matrix,
        deltas: &[Delta<'_>],
        versions: Vec<u64>,
    ) -> engobe_autograd::Result<Tensor> {
        let mut kept = self.norms.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((of, norms)) if *of == versions => Ok(norms.clone()),
            _ => {
                let norms = row_norms(weight, &self.base, deltas, self.m.tensor().device())?;
                *kept = Some((versions, norms.clone()));
                Ok(norms)
            }
        }
    }

    /// `g ⊙ weight`, row by row, where `weight` `[out, in]` already holds the deltas: for merging.
    pub fn applied(&self, weight: &Tensor) -> Result<Tensor> {
        let norms = weight.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(f32::MIN_POSITIVE)?;
        let m = self.m.tensor().to_device(weight.device())?.reshape(norms.shape())?;
        Ok(weight.broadcast_mul(&(m / norms)?)?)
    }
}

/// `‖wᵢ + Σ s·bᵢ·A‖` of every row: `[out]`.
fn row_norms(
    weight: &Matrix,
    base: &OnceLock<Arc<Vec<f64>>>,
    deltas: &[Delta<'_>],
    device: &Device,
) -> engobe_autograd::Result<Tensor> {
    let frozen = match weight {
        Matrix::Frozen(w) if device.is_cpu() && w.view().is_ok() => w,
        other => return composed(other, deltas, device),
    };
    let view = frozen.view()?;
    let (out, width) = (frozen.rows(), frozen.cols());
    let squares = base.get_or_init(|| Arc::new(squares(frozen)));
    // all deltas as one: A stacked, B side by side with the scales in it
    let a: Vec<&Tensor> = deltas.iter().map(|d| d.a).collect();
    let b = deltas.iter().map(|d| d.b * f64::from(d.scale)).collect::<candle_core::Result<Vec<_>>>()?;
    let (a, b) = (Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?.contiguous()?);
    let r = a.dim(0)?;
    let (a, b) = (host(&a)?, host(&b)?);
    let (mut aw, mut gram) = (uninit(r * out), vec![0f64; r * r]);
    matmul::linear(MatRef::new(&a, r, width), view, &mut MatMut::new(&mut aw, r, out), false);
    for (i, row) in a.chunks_exact(width.max(1)).enumerate() {
        for (j, other) in a.chunks_exact(width.max(1)).enumerate() {
            gram[i * r + j] = row.iter().zip(other).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        }
    }
    let norms = b.chunks_exact(r.max(1)).zip(squares.iter()).enumerate().map(|(i, (b, square))| {
        let mut sum = *square;
        for (k, bk) in b.iter().enumerate() {
            let across: f64 = b.iter().zip(&gram[k * r..]).map(|(b, g)| f64::from(*b) * g).sum();
            sum += f64::from(*bk) * (2.0 * f64::from(aw[k * out + i]) + across);
        }
        (sum.max(0.0).sqrt() as f32).max(f32::MIN_POSITIVE)
    });
    tensor_of(norms.collect(), out)
}

/// ‖wᵢ‖² of every row.
fn squares(weight: &FrozenWeight) -> Vec<f64> {
    /// rows that are decoded at once
    const ROWS: usize = 16;
    let Ok(view) = weight.view() else { return Vec::new() };
    let mut tile = vec![0f32; ROWS * weight.cols()];
    let mut all = Vec::with_capacity(weight.rows());
    for top in (0..weight.rows()).step_by(ROWS) {
        let rows = top..(top + ROWS).min(weight.rows());
        let tile = &mut tile[..rows.len() * weight.cols()];
        view.decode_rows(rows, tile);
        let rows = tile.chunks_exact(weight.cols().max(1));
        all.extend(rows.map(|row| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()));
    }
    all
}

/// The same with candle's operations, for other devices: forms the sum.
fn composed(weight: &Matrix, deltas: &[Delta<'_>], device: &Device) -> engobe_autograd::Result<Tensor> {
    let mut sum = match weight {
        Matrix::Frozen(w) => w.to_tensor(device)?,
        Matrix::Trained(w) => w.tensor().to_dtype(DType::F32)?,
    };
    for d in deltas {
        sum = (sum + (d.b.matmul(d.a)? * f64::from(d.scale))?)?;
    }
    Ok(sum.sqr()?.sum(1)?.sqrt()?.maximum(f32::MIN_POSITIVE)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_without_the_sum_is_the_norm_of_the_sum() {
        let random = |seed: u32, shape: (usize, usize)| {
            let data = (0..shape.0 * shape.1).map(|i| ((i as f32 + 1.0) * 1.7 + seed as f32).sin()).collect();
            Tensor::from_vec::<_, f32>(data, shape, &Device::Cpu).unwrap()
        };
        let weight = Matrix::Frozen(FrozenWeight::from_tensor(&random(1, (37, 20))).unwrap());
        let (a, b) = (random(2, (3, 20)), random(3, (37, 3)));
        let (a0, b0) = (random(4, (2, 20)), random(5, (37, 2)));
        let deltas = [Delta { a: &a, b: &b, scale: 0.5 }, Delta { a: &a0, b: &b0, scale: -0.3 }];
        let fast = row_norms(&weight, &OnceLock::new(), &deltas, &Device::Cpu).unwrap().to_vec1::<f32>();
        let slow = composed(&weight, &deltas, &Device::Cpu).unwrap().to_vec1::<f32>();
        for (fast, slow) in fast.unwrap().into_iter().zip(slow.unwrap()) {
            assert!((fast - slow).abs() < 1e-5 * slow, "{fast} {slow}"); // sums of 20 products, rounded
        }
    }
}
