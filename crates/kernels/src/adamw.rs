//! Optimizer updates in one pass over their buffers, in PyTorch's order of operations.
//!
//! AdamW (Loshchilov & Hutter 2019), as `torch.optim.AdamW`:
//!
//! ```text
//! p ← p·(1 - lr·wd)      m ← m + (g - m)·(1 - β₁)      v ← β₂·v + (1 - β₂)·g²
//! p ← p - (lr / bc₁)·m / (√v / √bc₂ + eps)             bcᵢ = 1 - βᵢᵗ
//! ```

use crate::codec::simd::multiversion;
use crate::elementwise::CHUNK;
use rayon::prelude::*;

/// Numbers of one AdamW step.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// learning rate
    pub lr: f32,
    /// decay of the first moment
    pub beta1: f32,
    /// decay of the second moment
    pub beta2: f32,
    /// added to the denominator
    pub eps: f32,
    /// decoupled weight decay
    pub weight_decay: f32,
    /// 1 - β₁ᵗ
    pub bias_correction1: f32,
    /// 1 - β₂ᵗ
    pub bias_correction2: f32,
    /// factor on the gradients (clipping)
    pub grad_scale: f32,
}

/// One AdamW step on parameters `p` with gradients `g` and moments `m`, `v`. Panics if lengths differ.
pub fn adamw_step(step: &AdamWStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    assert!(p.len() == g.len() && p.len() == m.len() && p.len() == v.len());
    p.par_chunks_mut(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .zip(m.par_chunks_mut(CHUNK))
        .zip(v.par_chunks_mut(CHUNK))
        .for_each(|(((p, g), m), v)| adamw(step, p, g, m, v));
}

multiversion!(fn adamw(s: &AdamWStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) = adamw_body);

#[inline(always)]
fn adamw_body(s: &AdamWStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let decay = 1.0 - s.lr * s.weight_decay;
    let (step_size, root) = (s.lr / s.bias_correction1, s.bias_correction2.sqrt());
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * s.grad_scale;
        *m += (g - *m) * (1.0 - s.beta1);
        *v = *v * s.beta2 + (1.0 - s.beta2) * g * g;
        *p = *p * decay - step_size * (*m / (v.sqrt() / root + s.eps));
    }
}

/// One step of `torch.optim.SGD`: `buf ← momentum·buf + (g + wd·p)`, `p ← p - lr·buf` (without momentum the
/// buffer is not used). Panics if lengths differ.
pub fn sgd_step(
    lr: f32,
    momentum: f32,
    weight_decay: f32,
    grad_scale: f32,
    p: &mut [f32],
    g: &[f32],
    buf: &mut [f32],
) {
    assert!(p.len() == g.len() && p.len() == buf.len());
    for ((p, g), b) in p.iter_mut().zip(g).zip(buf) {
        let g = g * grad_scale + weight_decay * *p;
        let direction = if momentum == 0.0 {
            g
        } else {
            *b = momentum * *b + g;
            *b
        };
        *p -= lr * direction;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Printed by torch 2.15: AdamW(lr=0.1, weight_decay=0.1) on p = [1, -2], g = [0.5, -1] then [0.1, 3].
    #[test]
    fn adamw_follows_pytorch() {
        let (mut p, mut m, mut v) = (vec![1.0, -2.0], vec![0.0; 2], vec![0.0; 2]);
        for (t, g) in [[0.5f32, -1.0], [0.1, 3.0]].iter().enumerate() {
            let t = t as i32 + 1;
            let step = AdamWStep {
                lr: 0.1,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.1,
                bias_correction1: 1.0 - 0.9f32.powi(t),
                bias_correction2: 1.0 - 0.999f32.powi(t),
                grad_scale: 1.0,
            };
            adamw_step(&step, &mut p, g, &mut m, &mut v);
        }
        for (a, b) in p.iter().zip(EXPECTED) {
            assert!((a - b).abs() < 1e-6, "{p:?}"); // a few roundings of numbers near 1
        }
    }

    const EXPECTED: [f32; 2] = [0.800_796, -1.910_619];

    #[test]
    fn sgd_with_momentum_gathers_speed() {
        let (mut p, mut b) = (vec![1.0f32], vec![0.0]);
        sgd_step(0.1, 0.9, 0.0, 1.0, &mut p, &[1.0], &mut b);
        sgd_step(0.1, 0.9, 0.0, 1.0, &mut p, &[1.0], &mut b);
        assert!((p[0] - (1.0 - 0.1 - 0.19)).abs() < 1e-6);
    }
}
