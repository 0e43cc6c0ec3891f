//! Gated activation `silu(g) ⊙ u` (SwiGLU, Shazeer 2020).
//!
//! With s = σ(g) = 1 / (1 + e⁻ᵍ):
//!
//! ```text
//! y = g·s·u        dg = dy·u·s·(1 + g·(1 - s))        du = dy·g·s
//! ```

use crate::codec::simd::multiversion;
use crate::elementwise::CHUNK;
use crate::exp::exp;
use rayon::prelude::*;

/// `out = silu(gate) ⊙ up`. Panics if lengths differ.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len());
    out.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks(CHUNK))
        .zip(up.par_chunks(CHUNK))
        .for_each(|((o, g), u)| forward(g, u, o));
}

multiversion!(fn forward(gate: &[f32], up: &[f32], out: &mut [f32]) = forward_body);

#[inline(always)]
fn forward_body(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
        *o = g / (1.0 + exp(-g)) * u;
    }
}

/// Gradients of both inputs, overwritten. Panics if lengths differ.
pub fn silu_mul_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let n = gate.len();
    assert!(up.len() == n && dy.len() == n && dgate.len() == n && dup.len() == n);
    dgate
        .par_chunks_mut(CHUNK)
        .zip(dup.par_chunks_mut(CHUNK))
        .zip(gate.par_chunks(CHUNK))
        .zip(up.par_chunks(CHUNK))
        .zip(dy.par_chunks(CHUNK))
        .for_each(|((((dg, du), g), u), dy)| backward(g, u, dy, dg, du));
}

multiversion!(fn backward(g: &[f32], u: &[f32], dy: &[f32], dg: &mut [f32], du: &mut [f32]) = backward_body);

#[inline(always)]
fn backward_body(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    for ((((dg, du), g), u), dy) in dgate.iter_mut().zip(dup).zip(gate).zip(up).zip(dy) {
        let s = 1.0 / (1.0 + exp(-g));
        *dg = dy * u * s * (1.0 + g * (1.0 - s));
        *du = dy * g * s;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silu(g: f64) -> f64 {
        g / (1.0 + (-g).exp())
    }

    #[test]
    fn forward_and_backward_agree_with_the_formula() {
        let n = 1003;
        let gate: Vec<f32> = (0..n).map(|i| (i as f32 - 500.0) * 0.04).collect();
        let up: Vec<f32> = (0..n).map(|i| ((i * 7) % 13) as f32 * 0.3 - 1.5).collect();
        let dy: Vec<f32> = (0..n).map(|i| ((i * 5) % 11) as f32 * 0.2 - 1.0).collect();
        let mut y = vec![0.0; n];
        let (mut dg, mut du) = (vec![0.0; n], vec![0.0; n]);
        silu_mul(&gate, &up, &mut y);
        silu_mul_backward(&gate, &up, &dy, &mut dg, &mut du);
        for i in 0..n {
            let (g, u, d) = (f64::from(gate[i]), f64::from(up[i]), f64::from(dy[i]));
            let h = 1e-6;
            let slope = (silu(g + h) - silu(g - h)) / (2.0 * h);
            // products of numbers below 20 in f32
            for (got, exact) in [(y[i], silu(g) * u), (dg[i], d * u * slope), (du[i], d * silu(g))] {
                assert!((f64::from(got) - exact).abs() < 1e-5, "{i}: {got} {exact}");
            }
        }
    }

    #[test]
    fn far_ends_are_finite() {
        let mut y = [0.0; 2];
        silu_mul(&[-200.0, 200.0], &[1.0, 1.0], &mut y);
        assert_eq!(y, [0.0, 200.0]);
    }
}
