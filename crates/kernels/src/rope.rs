//! Rotary position embedding (Su et al. 2021) in Hugging Face's `rotate_half` form.
//!
//! For a head x of a token at position p, and i < half:
//!
//! ```text
//! y[i]        = x[i]·cos(p·fᵢ) - x[i + half]·sin(p·fᵢ)
//! y[i + half] = x[i + half]·cos(p·fᵢ) + x[i]·sin(p·fᵢ)
//! ```
//!
//! Elements from 2·half on are left alone. The transpose, which is the backward, has sin negated.

use crate::codec::simd::multiversion;
use rayon::prelude::*;

/// Cosines and sines by position: row p holds `half` values.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// `[positions, half]`
    pub cos: Vec<f32>,
    /// `[positions, half]`
    pub sin: Vec<f32>,
    /// pairs that are turned in each head
    pub half: usize,
}

impl RopeTable {
    /// The table of `positions` positions for inverse frequencies `inv_freq` `[half]`; `attention_scaling`
    /// multiplies cosines and sines. Angles are products in f32, as transformers computes them.
    pub fn new(inv_freq: &[f32], attention_scaling: f32, positions: usize) -> Self {
        let half = inv_freq.len();
        let angles = (0..positions).flat_map(|p| inv_freq.iter().map(move |f| p as f32 * f));
        let (mut cos, mut sin) = (Vec::with_capacity(positions * half), Vec::with_capacity(positions * half));
        for angle in angles {
            let (s, c) = angle.sin_cos();
            cos.push(c * attention_scaling);
            sin.push(s * attention_scaling);
        }
        Self { cos, sin, half }
    }
}

/// Turns the heads of `x` `[n, heads·head_dim]` into `out`; `inverse` applies the transpose.
///
/// Panics if lengths do not fit or a position lies beyond the table.
pub fn apply(
    table: &RopeTable,
    positions: &[u32],
    x: &[f32],
    heads: usize,
    head_dim: usize,
    inverse: bool,
    out: &mut [f32],
) {
    let (half, width) = (table.half, heads * head_dim);
    assert!(x.len() == positions.len() * width && out.len() == x.len() && 2 * half <= head_dim);
    if width == 0 {
        return;
    }
    let sign = if inverse { -1.0 } else { 1.0 };
    let rows = out.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(64).zip(positions);
    rows.for_each(|((out, x), p)| {
        let at = *p as usize * half;
        turn_row(x, &table.cos[at..at + half], &table.sin[at..at + half], sign, head_dim, out);
    });
}

multiversion!(
    /// One token's heads.
    fn turn_row(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, head_dim: usize, out: &mut [f32]) = turn_row_body
);

#[inline(always)]
fn turn_row_body(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, head_dim: usize, out: &mut [f32]) {
    let half = cos.len();
    for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
        let ((a, b), rest) = (x.split_at(half), 2 * half);
        let (out_a, out_b) = out.split_at_mut(half);
        for i in 0..half {
            let (c, s) = (cos[i], sin[i] * sign);
            out_a[i] = a[i] * c - b[i] * s;
            out_b[i] = b[i] * c + a[i] * s;
        }
        out[rest..].copy_from_slice(&x[rest..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_pairs_by_the_angle_and_back() {
        let table = RopeTable::new(&[1.0, 0.1], 1.0, 8);
        let x: Vec<f32> = (0..2 * 2 * 5).map(|i| i as f32 - 7.0).collect();
        let mut y = vec![f32::NAN; x.len()];
        apply(&table, &[3, 7], &x, 2, 5, false, &mut y);
        for (token, p) in [3.0f64, 7.0].iter().enumerate() {
            for head in 0..2 {
                let at = token * 10 + head * 5;
                for (i, f) in [1.0, 0.1].iter().enumerate() {
                    let (s, c) = (p * f).sin_cos();
                    let (a, b) = (f64::from(x[at + i]), f64::from(x[at + 2 + i]));
                    assert!((f64::from(y[at + i]) - (a * c - b * s)).abs() < 1e-5);
                    assert!((f64::from(y[at + 2 + i]) - (b * c + a * s)).abs() < 1e-5);
                }
                assert_eq!(y[at + 4], x[at + 4]);
            }
        }
        let turned = y.clone();
        apply(&table, &[3, 7], &turned, 2, 5, true, &mut y);
        // a rotation and its transpose: two roundings of numbers below 20
        assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}
