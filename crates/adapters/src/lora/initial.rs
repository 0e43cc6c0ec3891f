//! Starts that are made of the base's weight.
//!
//! PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) put a part of W into the factors and train that:
//!
//! ```text
//! PiSSA   W = U·S·Vᵀ:   A₀ = √(S_r/s)·V_rᵀ,  B₀ = U_r·√(S_r/s)        (S_r: the r largest)
//! OLoRA   W = Q·R:      A₀ = R_r,            B₀ = Q_r                  (the first r rows and columns)
//! y = (W - s·B₀·A₀)·x + s·B·A·x
//! ```
//!
//! PEFT changes W. Here the base stays as it lies, in whatever storage, and the constant `- s·B₀·A₀` is one more
//! low-rank delta. `pissa_niter_N` finds the largest singular values by N iterations on a random subspace (Halko et
//! al. 2011, as `torch.svd_lowrank`).
//!
//! LoftQ (Li et al. 2023) alternates between quantizing W - B·A and decomposing what that loses, W - Q; the base is
//! then Q. As in PEFT, the scale s is left out of account.

use crate::random::{gaussian, generator};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use engobe_autograd::{FrozenWeight, host, tensor_of};
use engobe_formats::peft::{InitLoraWeights, LoftqConfig};
use engobe_kernels::codec::FourBit;
use engobe_kernels::quantize::{QuantizedWeight, Scheme};
use engobe_kernels::storage::StorageType;
use faer::{Mat, MatRef};

/// Elements in a block of 4-bit codes, as bitsandbytes has them.
const BLOCK: usize = 64;

/// A `[r, in]` and B `[out, r]`.
#[derive(Clone, Debug)]
pub(crate) struct Factors {
    pub a: Tensor,
    pub b: Tensor,
}

/// What PiSSA or OLoRA take out of `weight`.
pub(crate) fn taken_out(
    path: &str,
    weight: &FrozenWeight,
    init: InitLoraWeights,
    r: usize,
    scale: f32,
    seed: u64,
) -> Result<Factors> {
    let (out, width) = (weight.rows(), weight.cols());
    if r > out.min(width) {
        let what = format!(
            "= {r} is more than the smaller side of {path}, [{out}, {width}], that init_lora_weights decomposes"
        );
        return Err(Error::Conflict { keys: "r", reason: what.into() });
    }
    let w = weight.to_tensor(&Device::Cpu)?;
    match init {
        InitLoraWeights::Olora => {
            let qr = matrix(&w)?.qr();
            let (q, upper) = (qr.compute_thin_Q(), qr.thin_R());
            Ok(Factors {
                a: tensor(upper.get(..r, ..), |_| 1.0, |_| 1.0)?,
                b: tensor(q.as_ref().get(.., ..r), |_| 1.0, |_| 1.0)?,
            })
        }
        InitLoraWeights::Pissa(Some(iterations)) => {
            largest(path, &subspace(&w, r, iterations, generator(seed, path))?, &w, r, scale)
        }
        _ => decomposed(path, &w, r, scale),
    }
}

/// √(S_r/s)·V_rᵀ and U_r·√(S_r/s) of `w`.
fn decomposed(path: &str, w: &Tensor, r: usize, scale: f32) -> Result<Factors> {
    let svd = matrix(w)?.thin_svd().map_err(|_| no_svd(path))?;
    let s = svd.S().column_vector();
    let root = |k: usize| (s[k] / scale).max(0.0).sqrt();
    Ok(Factors {
        a: tensor(svd.V().get(.., ..r).transpose(), root, |_| 1.0)?,
        b: tensor(svd.U().get(.., ..r), |_| 1.0, root)?,
    })
}

/// The same of the part of `w` in the span of `q` `[out, q]`.
fn largest(path: &str, q: &Tensor, w: &Tensor, r: usize, scale: f32) -> Result<Factors> {
    let inner = decomposed(path, &q.t()?.matmul(w)?, r, scale)?;
    Ok(Factors { a: inner.a, b: q.matmul(&inner.b)? })
}

/// Orthonormal columns that nearly span the largest left singular vectors: `[out, r]`.
fn subspace(w: &Tensor, r: usize, iterations: usize, mut rng: rand_chacha::ChaCha8Rng) -> Result<Tensor> {
    let width = w.dim(1)?;
    let start = tensor_of(gaussian(&mut rng, width * r, 1.0), (width, r))?;
    let mut q = orthonormal(&w.matmul(&start)?)?;
    let wt = w.t()?.contiguous()?;
    for _ in 0..iterations {
        q = orthonormal(&wt.matmul(&q)?)?;
        q = orthonormal(&w.matmul(&q)?)?;
    }
    Ok(q)
}

fn orthonormal(x: &Tensor) -> Result<Tensor> {
    tensor(matrix(x)?.qr().compute_thin_Q().as_ref(), |_| 1.0, |_| 1.0)
}

/// The quantized base, and the factors of what it lacks.
pub(crate) fn loftq(
    path: &str,
    w: &FrozenWeight,
    r: usize,
    config: LoftqConfig,
) -> Result<(FrozenWeight, Factors)> {
    let (out, width) = (w.rows(), w.cols());
    let scheme = match config.bits {
        8 => Scheme::Int8,
        _ => Scheme::FourBit { kind: FourBit::Nf4, block: BLOCK, double: false },
    };
    let w = w.to_tensor(&Device::Cpu)?;
    let mut rest = w.clone();
    let mut left = config.iterations.max(1);
    loop {
        let floats = host(&rest)?.to_vec();
        let bytes: Vec<u8> = floats.iter().flat_map(|v| v.to_le_bytes()).collect();
        let quantized = QuantizedWeight::new(scheme, StorageType::F32, out, width, &bytes, &|_| ())
            .map_err(|e| Error::Conflict { keys: "loftq_config", reason: format!("{path}: {e}").into() })?;
        let quantized = FrozenWeight::quantized(quantized)?;
        let lost = (&w - quantized.to_tensor(&Device::Cpu)?)?;
        let factors = decomposed(path, &lost, r.min(out.min(width)), 1.0)?;
        left -= 1;
        if left == 0 {
            return Ok((quantized, factors));
        }
        rest = (&w - factors.b.matmul(&factors.a)?)?;
    }
}

/// The best factors of rank at most `r` for the change `w` `[out, in]`: A has orthonormal rows, B the singular values.
pub(crate) fn decomposed_change(path: &str, w: &Tensor, r: usize) -> Result<(Tensor, Tensor)> {
    let svd = matrix(w)?.thin_svd().map_err(|_| no_svd(path))?;
    let s = svd.S().column_vector();
    let r = r.min(s.nrows());
    let a = tensor(svd.V().get(.., ..r).transpose(), |_| 1.0, |_| 1.0)?;
    Ok((a, tensor(svd.U().get(.., ..r), |_| 1.0, |k| s[k])?))
}

fn no_svd(path: &str) -> Error {
    let reason = format!("{path} has no singular value decomposition: it holds values that are not finite");
    Error::Conflict { keys: "init_lora_weights", reason: reason.into() }
}

/// A tensor as faer sees it.
fn matrix(t: &Tensor) -> Result<Mat<f32>> {
    let (rows, cols) = t.dims2()?;
    let t = t.contiguous()?;
    let data = host(&t)?;
    Ok(MatRef::from_row_major_slice(&data, rows, cols).to_owned())
}

/// The matrix with factors on its rows and columns.
fn tensor(m: MatRef<'_, f32>, row: impl Fn(usize) -> f32, col: impl Fn(usize) -> f32) -> Result<Tensor> {
    let (rows, cols) = (m.nrows(), m.ncols());
    let mut data = Vec::with_capacity(rows * cols);
    for i in 0..rows {
        data.extend((0..cols).map(|j| m[(i, j)] * row(i) * col(j)));
    }
    Ok(tensor_of(data, (rows, cols))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight() -> FrozenWeight {
        // directions that fall by half from one to the next, and noise
        let at = |i: usize, j: usize| {
            let wave = |k: i32| (i as f32 * 0.3 * k as f32).sin() * (j as f32 * 0.17 * k as f32).cos();
            let noise = (((i * 40 + j) * (i * 40 + j) + 3) as f32 * 0.37).sin();
            (1..8).map(|k| 0.5f32.powi(k) * wave(k)).sum::<f32>() + 0.01 * noise
        };
        let data: Vec<f32> = (0..24 * 40).map(|n| at(n / 40, n % 40)).collect();
        FrozenWeight::from_tensor(&Tensor::from_vec(data, (24, 40), &Device::Cpu).unwrap()).unwrap()
    }

    fn error(w: &Tensor, f: &Factors, scale: f64) -> f32 {
        let rest = (w - (f.b.matmul(&f.a).unwrap() * scale).unwrap()).unwrap();
        rest.sqr().unwrap().sum_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn pissa_takes_the_most_that_r_directions_can() {
        let (weight, scale) = (weight(), 2.0);
        let w = weight.to_tensor(&Device::Cpu).unwrap();
        let init = |init| taken_out("x", &weight, init, 5, scale, 1).unwrap();
        let exact = init(InitLoraWeights::Pissa(None));
        let olora = init(InitLoraWeights::Olora);
        assert!(error(&w, &exact, f64::from(scale)) < error(&w, &olora, 1.0));
        // the balance of the factors: √(S/s) each
        let norms = |t: &Tensor, dim| t.sqr().unwrap().sum(dim).unwrap().to_vec1::<f32>().unwrap();
        for (a, b) in norms(&exact.a, 1).into_iter().zip(norms(&exact.b, 0)) {
            assert!((a - b).abs() < 1e-4 * a, "{a} {b}"); // f32 sums of 40 squares
        }
        // with iterations, the random subspace comes to the same directions
        let found = init(InitLoraWeights::Pissa(Some(40)));
        let (exact, found) = (error(&w, &exact, f64::from(scale)), error(&w, &found, f64::from(scale)));
        assert!((exact - found).abs() < 1e-3 * exact, "{exact} {found}");
        assert!(taken_out("x", &weight, InitLoraWeights::Olora, 25, 1.0, 1).is_err());
    }

    #[test]
    fn olora_is_orthonormal_and_all_of_it_is_the_weight() {
        let weight = weight();
        let all = taken_out("x", &weight, InitLoraWeights::Olora, 24, 1.0, 1).unwrap();
        let w = weight.to_tensor(&Device::Cpu).unwrap();
        assert!(error(&w, &all, 1.0) < 1e-6);
        let gram = all.b.t().unwrap().matmul(&all.b).unwrap().to_vec2::<f32>().unwrap();
        for (i, row) in gram.iter().enumerate() {
            for (j, v) in row.iter().enumerate() {
                assert!((v - f32::from(u8::from(i == j))).abs() < 1e-5, "[{i}, {j}] {v}");
            }
        }
    }

    #[test]
    fn loftq_comes_nearer_than_quantizing_alone() {
        let weight = weight();
        let w = weight.to_tensor(&Device::Cpu).unwrap();
        let off = |iterations| {
            let (q, f) = loftq("x", &weight, 4, LoftqConfig { bits: 4, iterations }).unwrap();
            error(&(&w - q.to_tensor(&Device::Cpu).unwrap()).unwrap(), &f, 1.0)
        };
        let (none, one, five) = {
            let (q, _) = loftq("x", &weight, 4, LoftqConfig::default()).unwrap();
            let lost = (&w - q.to_tensor(&Device::Cpu).unwrap()).unwrap();
            (lost.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), off(1), off(5))
        };
        // (more rounds need not be better than one)
        assert!(one < 0.8 * none && five < 0.8 * none, "{none} {one} {five}");
    }
}
