//! Factors on the columns of an activation, with what is added to it.
//!
//! ```text
//! forward   y = g ⊙ z (+ bias) (+ residual)              z, residual [n, d], g and bias [d]
//! backward  dz = g ⊙ dy        dg = Σ_rows dy ⊙ z        (bias and residual: sums and copies of dy)
//! ```
//!
//! Sums over rows are taken in parts of fixed height that are added in order, so results do not depend on the number
//! of threads.

use rayon::prelude::*;

/// Rows that one task takes.
const ROWS: usize = 64;

/// `y = g ⊙ z (+ bias) (+ residual)`, overwriting `y`. Panics if lengths do not fit.
pub fn scale_columns(z: &[f32], g: &[f32], bias: Option<&[f32]>, residual: Option<&[f32]>, y: &mut [f32]) {
    let d = g.len();
    assert!(z.len() == y.len() && bias.is_none_or(|b| b.len() == d));
    assert!(residual.is_none_or(|r| r.len() == z.len()));
    if d == 0 {
        return;
    }
    y.par_chunks_mut(ROWS * d).zip(z.par_chunks(ROWS * d)).enumerate().for_each(|(part, (y, z))| {
        for (i, (y, z)) in y.chunks_exact_mut(d).zip(z.chunks_exact(d)).enumerate() {
            for ((y, z), g) in y.iter_mut().zip(z).zip(g) {
                *y = z * g;
            }
            for term in bias.iter().copied().chain(residual.map(|r| &r[(part * ROWS + i) * d..][..d])) {
                y.iter_mut().zip(term).for_each(|(y, t)| *y += t);
            }
        }
    });
}

/// `dg` (overwritten) `= Σ_rows dy ⊙ z`. Panics if lengths do not fit.
pub fn column_products(dy: &[f32], z: &[f32], dg: &mut [f32]) {
    let d = dg.len();
    assert!(dy.len() == z.len());
    dg.fill(0.0);
    if d == 0 {
        return;
    }
    let part = |(dy, z): (&[f32], &[f32])| {
        let mut sum = vec![0f32; d];
        for (dy, z) in dy.chunks_exact(d).zip(z.chunks_exact(d)) {
            for ((s, dy), z) in sum.iter_mut().zip(dy).zip(z) {
                *s += dy * z;
            }
        }
        sum
    };
    let parts: Vec<Vec<f32>> = dy.par_chunks(ROWS * d).zip(z.par_chunks(ROWS * d)).map(part).collect();
    for part in parts {
        dg.iter_mut().zip(part).for_each(|(g, p)| *g += p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_numbers::numbers;

    #[test]
    fn they_are_the_formula() {
        for (n, d) in [(0, 3), (1, 1), (5, 7), (150, 33)] {
            let (z, dy, res) = (numbers(1, n * d), numbers(2, n * d), numbers(3, n * d));
            let (g, bias) = (numbers(4, d), numbers(5, d));
            for (b, r) in [(None, None), (Some(&bias), None), (None, Some(&res)), (Some(&bias), Some(&res))] {
                let mut y = vec![f32::NAN; n * d];
                scale_columns(&z, &g, b.map(|b| b.as_slice()), r.map(|r| r.as_slice()), &mut y);
                for (i, y) in y.iter().enumerate() {
                    let expected = z[i] * g[i % d] + b.map_or(0.0, |b| b[i % d]) + r.map_or(0.0, |r| r[i]);
                    assert_eq!(*y, expected, "[{n}, {d}] at {i}"); // the same operations in the same order
                }
            }
            let mut dg = vec![f32::NAN; d];
            column_products(&dy, &z, &mut dg);
            for (j, dg) in dg.iter().enumerate() {
                let sum: f64 = (0..n).map(|i| f64::from(dy[i * d + j]) * f64::from(z[i * d + j])).sum();
                assert!((f64::from(*dg) - sum).abs() < 1e-5 * n.max(1) as f64, "{dg} {sum}"); // rounding of n sums
            }
        }
    }
}
