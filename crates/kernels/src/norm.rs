//! Root-mean-square norm (Zhang & Sennrich 2019), row by row.
//!
//! ```text
//! forward   r = 1/√(mean(x²) + eps)      y = w ⊙ x·r
//! backward  x̂ = x·r, g = dy ⊙ w:         dx = r·(g - x̂·mean(g ⊙ x̂))      dw += Σ_rows dy ⊙ x̂
//! ```
//!
//! since ∂r/∂xᵢ = -r³·xᵢ/d.

use crate::codec::simd::multiversion;
use rayon::prelude::*;

/// Rows that one task takes; fixed, so that sums do not depend on the number of threads.
pub(crate) const ROWS: usize = 16;

/// `y = w ⊙ x·rstd`, and `rstd` `[n]` for the backward. x and y are `[n, d]` with n = `rstd.len()`, d = `w.len()`.
///
/// Panics if lengths do not fit.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let d = w.len();
    assert!(x.len() == rstd.len() * d && y.len() == x.len());
    if d == 0 {
        return;
    }
    y.par_chunks_mut(ROWS * d)
        .zip(x.par_chunks(ROWS * d))
        .zip(rstd.par_chunks_mut(ROWS))
        .for_each(|((y, x), rstd)| forward(x, w, eps, y, rstd));
}

multiversion!(fn forward(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) = forward_body);

#[inline(always)]
fn forward_body(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let d = w.len();
    for ((y, x), rstd) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(rstd) {
        let mean = dot(x, x) / d as f32;
        let r = 1.0 / (mean + eps).sqrt();
        *rstd = r;
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * r * w;
        }
    }
}

/// Σ f(aᵢ, bᵢ) over 16 running sums, which vectorise and lose less than one.
#[inline(always)]
pub(crate) fn sum_of(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0f32; 16];
    let (a16, a_rest) = a.as_chunks::<16>();
    let (b16, b_rest) = b.as_chunks::<16>();
    for (a, b) in a16.iter().zip(b16) {
        for i in 0..16 {
            sums[i] += f(a[i], b[i]);
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| f(*a, *b)).sum();
    sums.iter().sum::<f32>() + rest
}

/// Σ aᵢ·bᵢ
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |a, b| a * b)
}

/// The input's gradient (`dx`, overwritten) and, if asked for, the weight's (`dw`, added to).
///
/// Panics if lengths do not fit.
pub fn rms_norm_backward(
    x: &[f32],
    w: &[f32],
    rstd: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) {
    let d = w.len();
    assert!(x.len() == rstd.len() * d && dy.len() == x.len() && dx.len() == x.len());
    if d == 0 {
        return;
    }
    dx.par_chunks_mut(ROWS * d)
        .zip(x.par_chunks(ROWS * d))
        .zip(dy.par_chunks(ROWS * d))
        .zip(rstd.par_chunks(ROWS))
        .for_each(|(((dx, x), dy), rstd)| backward(x, w, rstd, dy, dx));
    if let Some(dw) = dw {
        assert_eq!(dw.len(), d);
        for ((x, dy), r) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(rstd) {
            for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy * x * r;
            }
        }
    }
}

multiversion!(fn backward(x: &[f32], w: &[f32], rstd: &[f32], dy: &[f32], dx: &mut [f32]) = backward_body);

#[inline(always)]
fn backward_body(x: &[f32], w: &[f32], rstd: &[f32], dy: &[f32], dx: &mut [f32]) {
    let d = w.len();
    let rows = dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d)).zip(rstd);
    for (((dx, x), dy), r) in rows {
        for ((g, dy), w) in dx.iter_mut().zip(dy).zip(w) {
            *g = dy * w;
        }
        let mean = dot(dx, x) * r / d as f32; // mean of g ⊙ x̂
        let along = mean * r;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = r * (*dx - x * along);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_numbers::numbers;

    /// Straight from the formula, in f64.
    fn reference(x: &[f32], w: &[f32], eps: f32) -> Vec<f64> {
        let d = w.len();
        let row = |x: &[f32]| {
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / d as f64;
            let r = 1.0 / (mean + f64::from(eps)).sqrt();
            x.iter().zip(w).map(|(x, w)| f64::from(*x) * r * f64::from(*w)).collect::<Vec<_>>()
        };
        x.chunks(d).flat_map(row).collect()
    }

    #[test]
    fn forward_and_backward_agree_with_the_formula() {
        for (n, d) in [(1, 1), (3, 7), (37, 64), (20, 576)] {
            let (x, w, dy) = (numbers(1, n * d), numbers(2, d), numbers(3, n * d));
            let (mut y, mut rstd) = (vec![0.0; n * d], vec![0.0; n]);
            rms_norm(&x, &w, 1e-5, &mut y, &mut rstd);
            for (a, b) in y.iter().zip(reference(&x, &w, 1e-5)) {
                assert!((f64::from(*a) - b).abs() < 1e-5, "[{n}, {d}] {a} {b}"); // rounding of d sums below 10
            }
            let (mut dx, mut dw) = (vec![0.0; n * d], vec![1.0; d]);
            rms_norm_backward(&x, &w, &rstd, &dy, &mut dx, Some(&mut dw));
            let loss = |x: &[f32], w: &[f32]| -> f64 {
                reference(x, w, 1e-5).iter().zip(&dy).map(|(y, g)| y * f64::from(*g)).sum()
            };
            let h = 1e-3f32;
            for i in (0..n * d).step_by(1 + n * d / 50) {
                let (mut up, mut down) = (x.clone(), x.clone());
                up[i] += h;
                down[i] -= h;
                let slope = (loss(&up, &w) - loss(&down, &w)) / f64::from(up[i] - down[i]);
                let tolerance = 2e-3 * slope.abs().max(1.0); // curvature of a one-element row
                assert!((slope - f64::from(dx[i])).abs() < tolerance, "dx[{i}] {slope} {}", dx[i]);
            }
            for i in 0..d.min(20) {
                let (mut up, mut down) = (w.clone(), w.clone());
                up[i] += h;
                down[i] -= h;
                let slope = 1.0 + (loss(&x, &up) - loss(&x, &down)) / f64::from(up[i] - down[i]);
                assert!((slope - f64::from(dw[i])).abs() < 1e-3 * slope.abs().max(1.0), "dw[{i}]");
            }
        }
    }
}
