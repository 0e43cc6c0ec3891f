//! Layer norm (Ba et al. 2016), row by row.
//!
//! ```text
//! forward   μ = mean(x), r = 1/√(mean((x - μ)²) + eps), x̂ = (x - μ)·r:      y = w ⊙ x̂ + b
//! backward  g = dy ⊙ w:   dx = r·(g - mean(g) - x̂·mean(g ⊙ x̂))      dw += Σ_rows dy ⊙ x̂      db += Σ_rows dy
//! ```
//!
//! since ∂μ/∂xᵢ = 1/d and ∂r/∂xᵢ = -r³·(xᵢ - μ)/d (the share through μ vanishes, as Σ(x - μ) = 0).

use crate::codec::simd::multiversion;
use crate::norm::{ROWS, dot, sum_of};
use rayon::prelude::*;

/// What the backward needs of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowStats {
    /// μ
    pub mean: f32,
    /// 1/√(variance + eps)
    pub rstd: f32,
}

/// `y = w ⊙ x̂ + b`, and each row's `stats` for the backward. x and y are `[n, d]` with n = `stats.len()`, d =
/// `w.len()`; b is `[d]`.
///
/// Panics if lengths do not fit.
pub fn layer_norm(x: &[f32], w: &[f32], b: Option<&[f32]>, eps: f32, y: &mut [f32], stats: &mut [RowStats]) {
    let d = w.len();
    assert!(x.len() == stats.len() * d && y.len() == x.len() && b.is_none_or(|b| b.len() == d));
    if d == 0 {
        return;
    }
    y.par_chunks_mut(ROWS * d)
        .zip(x.par_chunks(ROWS * d))
        .zip(stats.par_chunks_mut(ROWS))
        .for_each(|((y, x), stats)| forward(x, w, b, eps, y, stats));
}

multiversion!(fn forward(
    x: &[f32],
    w: &[f32],
    b: Option<&[f32]>,
    eps: f32,
    y: &mut [f32],
    stats: &mut [RowStats],
) = forward_body);

#[inline(always)]
fn forward_body(x: &[f32], w: &[f32], b: Option<&[f32]>, eps: f32, y: &mut [f32], stats: &mut [RowStats]) {
    let d = w.len();
    for ((y, x), stats) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(stats) {
        let mean = sum_of(x, x, |x, _| x) / d as f32;
        for (y, x) in y.iter_mut().zip(x) {
            *y = x - mean;
        }
        let rstd = 1.0 / (dot(y, y) / d as f32 + eps).sqrt();
        *stats = RowStats { mean, rstd };
        match b {
            Some(b) => y.iter_mut().zip(w).zip(b).for_each(|((y, w), b)| *y = *y * rstd * w + b),
            None => y.iter_mut().zip(w).for_each(|(y, w)| *y = *y * rstd * w),
        }
    }
}

/// The input's gradient (`dx`, overwritten) and, if asked for, the weight's and the bias' (`dw`, `db`, added to).
///
/// Panics if lengths do not fit.
pub fn layer_norm_backward(
    x: &[f32],
    w: &[f32],
    stats: &[RowStats],
    dy: &[f32],
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
    db: Option<&mut [f32]>,
) {
    let d = w.len();
    assert!(x.len() == stats.len() * d && dy.len() == x.len() && dx.len() == x.len());
    if d == 0 {
        return;
    }
    dx.par_chunks_mut(ROWS * d)
        .zip(x.par_chunks(ROWS * d))
        .zip(dy.par_chunks(ROWS * d))
        .zip(stats.par_chunks(ROWS))
        .for_each(|(((dx, x), dy), stats)| backward(x, w, stats, dy, dx));
    if let Some(dw) = dw {
        assert_eq!(dw.len(), d);
        for ((x, dy), s) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(stats) {
            for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy * (x - s.mean) * s.rstd;
            }
        }
    }
    if let Some(db) = db {
        assert_eq!(db.len(), d);
        for dy in dy.chunks_exact(d) {
            db.iter_mut().zip(dy).for_each(|(db, dy)| *db += dy);
        }
    }
}

multiversion!(fn backward(x: &[f32], w: &[f32], stats: &[RowStats], dy: &[f32], dx: &mut [f32]) = backward_body);

#[inline(always)]
fn backward_body(x: &[f32], w: &[f32], stats: &[RowStats], dy: &[f32], dx: &mut [f32]) {
    let d = w.len();
    let rows = dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d)).zip(stats);
    for (((dx, x), dy), s) in rows {
        for ((g, dy), w) in dx.iter_mut().zip(dy).zip(w) {
            *g = dy * w;
        }
        let total = sum_of(dx, dx, |g, _| g);
        // Σ g·(x - μ) = Σ g·x - μ·Σ g would lose digits where μ is large: the difference is taken first
        let along = sum_of(dx, x, |g, x| g * (x - s.mean)) * s.rstd * s.rstd / d as f32;
        let mean = total / d as f32;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = s.rstd * (*dx - mean - (x - s.mean) * along);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_numbers;

    /// Numbers whose mean is not 0.
    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        test_numbers::numbers(seed, n).into_iter().map(|x| x + 0.5).collect()
    }

    /// Straight from the formula, in f64.
    fn reference(x: &[f32], w: &[f32], b: Option<&[f32]>, eps: f32) -> Vec<f64> {
        let d = w.len();
        let row = |x: &[f32]| {
            let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / d as f64;
            let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / d as f64;
            let r = 1.0 / (variance + f64::from(eps)).sqrt();
            let y = |i: usize| {
                let shift = b.map_or(0.0, |b| f64::from(b[i]));
                (f64::from(x[i]) - mean) * r * f64::from(w[i]) + shift
            };
            (0..d).map(y).collect::<Vec<_>>()
        };
        x.chunks(d).flat_map(row).collect()
    }

    #[test]
    fn forward_and_backward_agree_with_the_formula() {
        const EPS: f32 = 1e-2; // rows of one or two elements have hardly a variance
        for (n, d) in [(1, 1), (3, 7), (37, 64), (20, 576)] {
            for with_bias in [true, false] {
                let (x, w, dy) = (numbers(1, n * d), numbers(2, d), numbers(3, n * d));
                let bias = with_bias.then(|| numbers(4, d));
                let b = bias.as_deref();
                let (mut y, mut stats) = (vec![0.0; n * d], vec![RowStats::default(); n]);
                layer_norm(&x, &w, b, EPS, &mut y, &mut stats);
                for (a, b) in y.iter().zip(reference(&x, &w, b, EPS)) {
                    assert!((f64::from(*a) - b).abs() < 1e-5, "[{n}, {d}] {a} {b}"); // rounding of sums below 10
                }
                let (mut dx, mut dw, mut db) = (vec![0.0; n * d], vec![1.0; d], vec![1.0; d]);
                layer_norm_backward(&x, &w, &stats, &dy, &mut dx, Some(&mut dw), Some(&mut db));
                let loss = |x: &[f32], w: &[f32]| -> f64 {
                    reference(x, w, b, EPS).iter().zip(&dy).map(|(y, g)| y * f64::from(*g)).sum()
                };
                let h = 1e-3f32;
                for i in (0..n * d).step_by(1 + n * d / 50) {
                    let (mut up, mut down) = (x.clone(), x.clone());
                    up[i] += h;
                    down[i] -= h;
                    let slope = (loss(&up, &w) - loss(&down, &w)) / f64::from(up[i] - down[i]);
                    let tolerance = 2e-3 * slope.abs().max(1.0); // curvature of a short row
                    assert!((slope - f64::from(dx[i])).abs() < tolerance, "dx[{i}] {slope} {}", dx[i]);
                }
                for i in 0..d.min(20) {
                    let (mut up, mut down) = (w.clone(), w.clone());
                    up[i] += h;
                    down[i] -= h;
                    let slope = 1.0 + (loss(&x, &up) - loss(&x, &down)) / f64::from(up[i] - down[i]);
                    assert!((slope - f64::from(dw[i])).abs() < 1e-3 * slope.abs().max(1.0), "dw[{i}]");
                    let column = 1.0 + dy.iter().skip(i).step_by(d).sum::<f32>();
                    assert!((column - db[i]).abs() < 1e-5, "db[{i}] {column} {}", db[i]);
                }
            }
        }
    }

    #[test]
    fn a_large_mean_costs_no_digits() {
        let d = 512;
        let near: Vec<f32> = numbers(1, d);
        let far: Vec<f32> = near.iter().map(|x| x * 0.25 + 100.0).collect();
        let (w, mut y, mut stats) = (vec![1.0; d], vec![0.0; d], [RowStats::default()]);
        layer_norm(&far, &w, None, 1e-5, &mut y, &mut stats);
        for (a, b) in y.iter().zip(reference(&far, &w, None, 1e-5)) {
            // the mean of numbers around 100 is known to 1e-5, the deviation is 0.14
            assert!((f64::from(*a) - b).abs() < 2e-4, "{a} {b}");
        }
    }
}
