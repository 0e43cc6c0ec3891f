//! Activations of an MLP, alone and gated (`f(g) ⊙ u`: SwiGLU and GeGLU, Shazeer 2020).
//!
//! | f           | value                               | slope                                    |
//! |-------------|-------------------------------------|------------------------------------------|
//! | `Silu`      | x·σ(x), σ(x) = 1 / (1 + e⁻ˣ)        | σ·(1 + x·(1 - σ))                        |
//! | `Gelu`      | x·Φ(x), Φ(x) = (1 + erf(x/√2)) / 2  | Φ + x·φ, φ(x) = e^(-x²/2) / √(2π)        |
//! | `GeluTanh`  | x·(1 + t)/2, t = tanh(c·(x + a·x³)) | (1 + t)/2 + x·(1 - t²)·c·(1 + 3·a·x²)/2  |
//! | `Relu`      | max(x, 0)                           | 1 if x > 0, else 0                       |
//! | `Tanh`      | tanh x                              | 1 - tanh² x                              |
//!
//! with c = √(2/π) and a = 0.044715 (Hendrycks & Gimpel 2016). Gated: `dg = dy·u·f'(g)`, `du = dy·f(g)`.

use crate::codec::simd::multiversion;
use crate::elementwise::CHUNK;
use crate::exp::{erf, exp, tanh};
use rayon::prelude::*;

/// An activation function, by Hugging Face's names: `silu`, `gelu`, `gelu_pytorch_tanh` (and `gelu_new`), `relu`,
/// `tanh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Activation {
    Silu,
    Gelu,
    GeluTanh,
    Relu,
    Tanh,
}

/// One activation, known when the loop is compiled: value and slope.
trait Function {
    fn both(x: f32) -> (f32, f32);
}

struct Silu;
struct Gelu;
struct GeluTanh;
struct Relu;
struct Tanh;

impl Function for Silu {
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let s = 1.0 / (1.0 + exp(-x));
        (x * s, s * (1.0 + x * (1.0 - s)))
    }
}

impl Function for Gelu {
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        const DENSITY: f32 = 0.398_942_28; // 1/√(2π)
        let phi = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
        (x * phi, phi + x * DENSITY * exp(-0.5 * x * x))
    }
}

impl Function for GeluTanh {
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        const C: f32 = 0.797_884_6; // √(2/π)
        const A: f32 = 0.044_715;
        let t = tanh(C * (x + A * x * x * x));
        let half = 0.5 * (1.0 + t);
        (x * half, half + 0.5 * x * (1.0 - t * t) * C * (1.0 + 3.0 * A * x * x))
    }
}

impl Function for Relu {
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        // a NaN stays one
        (if x < 0.0 { 0.0 } else { x }, if x > 0.0 { 1.0 } else { 0.0 })
    }
}

impl Function for Tanh {
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let t = tanh(x);
        (t, 1.0 - t * t)
    }
}

/// Calls `$run::<F>` with the type of `$activation`.
macro_rules! with_function {
    ($activation:expr, $run:ident($($arg:expr),*)) => {
        match $activation {
            Activation::Silu => $run::<Silu>($($arg),*),
            Activation::Gelu => $run::<Gelu>($($arg),*),
            Activation::GeluTanh => $run::<GeluTanh>($($arg),*),
            Activation::Relu => $run::<Relu>($($arg),*),
            Activation::Tanh => $run::<Tanh>($($arg),*),
        }
    };
}

/// `out = f(x)`. Panics if lengths differ.
pub fn activate(f: Activation, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(o, x)| forward(f, x, o));
}

/// The input's gradient `dx = dy ⊙ f'(x)`, overwritten. Panics if lengths differ.
pub fn activate_backward(f: Activation, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    assert!(x.len() == dy.len() && x.len() == dx.len());
    let chunks = dx.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(dy.par_chunks(CHUNK));
    chunks.for_each(|((dx, x), dy)| backward(f, x, dy, dx));
}

/// `out = f(gate) ⊙ up`. Panics if lengths differ.
pub fn gated(f: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len());
    out.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks(CHUNK))
        .zip(up.par_chunks(CHUNK))
        .for_each(|((o, g), u)| gated_forward(f, g, u, o));
}

/// Gradients of both inputs of [`gated`], overwritten. Panics if lengths differ.
pub fn gated_backward(
    f: Activation,
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let n = gate.len();
    assert!(up.len() == n && dy.len() == n && dgate.len() == n && dup.len() == n);
    dgate
        .par_chunks_mut(CHUNK)
        .zip(dup.par_chunks_mut(CHUNK))
        .zip(gate.par_chunks(CHUNK))
        .zip(up.par_chunks(CHUNK))
        .zip(dy.par_chunks(CHUNK))
        .for_each(|((((dg, du), g), u), dy)| gated_back(f, g, u, dy, dg, du));
}

multiversion!(fn forward(f: Activation, x: &[f32], out: &mut [f32]) = forward_body);
multiversion!(fn backward(f: Activation, x: &[f32], dy: &[f32], dx: &mut [f32]) = backward_body);
multiversion!(fn gated_forward(f: Activation, g: &[f32], u: &[f32], out: &mut [f32]) = gated_forward_body);
multiversion!(
    fn gated_back(f: Activation, g: &[f32], u: &[f32], dy: &[f32], dg: &mut [f32], du: &mut [f32]) =
        gated_back_body
);

#[inline(always)]
fn forward_body(f: Activation, x: &[f32], out: &mut [f32]) {
    #[inline(always)]
    fn run<F: Function>(x: &[f32], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = F::both(*x).0;
        }
    }
    with_function!(f, run(x, out))
}

#[inline(always)]
fn backward_body(f: Activation, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    #[inline(always)]
    fn run<F: Function>(x: &[f32], dy: &[f32], dx: &mut [f32]) {
        for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
            *dx = dy * F::both(*x).1;
        }
    }
    with_function!(f, run(x, dy, dx))
}

#[inline(always)]
fn gated_forward_body(f: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    #[inline(always)]
    fn run<F: Function>(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = F::both(*g).0 * u;
        }
    }
    with_function!(f, run(gate, up, out))
}

#[inline(always)]
fn gated_back_body(f: Activation, gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    #[inline(always)]
    fn run<F: Function>(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        for ((((dg, du), g), u), dy) in dgate.iter_mut().zip(dup).zip(gate).zip(up).zip(dy) {
            let (value, slope) = F::both(*g);
            *dg = dy * u * slope;
            *du = dy * value;
        }
    }
    with_function!(f, run(gate, up, dy, dgate, dup))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exp::erf_exact;

    const ALL: [Activation; 5] =
        [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Tanh];

    /// Straight from the table, in f64.
    fn reference(f: Activation, x: f64) -> f64 {
        match f {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Gelu => 0.5 * x * (1.0 + erf_exact(x / 2f64.sqrt())),
            Activation::GeluTanh => {
                let c = (2.0 / std::f64::consts::PI).sqrt();
                0.5 * x * (1.0 + (c * (x + 0.044_715 * x.powi(3))).tanh())
            }
            Activation::Relu => x.max(0.0),
            Activation::Tanh => x.tanh(),
        }
    }

    #[test]
    fn forward_and_backward_agree_with_the_formulas() {
        let n = 1003;
        // 0, where relu has no slope, is not among them
        let gate: Vec<f32> = (0..n).map(|i| (i as f32 - 500.5) * 0.014).collect();
        let up: Vec<f32> = (0..n).map(|i| ((i * 7) % 13) as f32 * 0.3 - 1.5).collect();
        let dy: Vec<f32> = (0..n).map(|i| ((i * 5) % 11) as f32 * 0.2 - 1.0).collect();
        for f in ALL {
            let [mut y, mut dx, mut z, mut dg, mut du] = [(); 5].map(|()| vec![0.0; n]);
            activate(f, &gate, &mut y);
            activate_backward(f, &gate, &dy, &mut dx);
            gated(f, &gate, &up, &mut z);
            gated_backward(f, &gate, &up, &dy, &mut dg, &mut du);
            for i in 0..n {
                let (g, u, d) = (f64::from(gate[i]), f64::from(up[i]), f64::from(dy[i]));
                let h = 1e-5;
                let value = reference(f, g);
                let slope = (reference(f, g + h) - reference(f, g - h)) / (2.0 * h);
                let pairs = [(y[i], value), (dx[i], d * slope), (z[i], value * u), (dg[i], d * u * slope)];
                // products of numbers below 20 in f32, erf within 2e-7
                for (got, exact) in pairs.into_iter().chain([(du[i], d * value)]) {
                    assert!((f64::from(got) - exact).abs() < 1e-5, "{f:?}({g}): {got} {exact}");
                }
            }
        }
    }

    #[test]
    fn far_ends_are_finite() {
        for f in ALL {
            let (mut y, mut dx) = ([0.0; 2], [0.0; 2]);
            activate(f, &[-200.0, 200.0], &mut y);
            activate_backward(f, &[-200.0, 200.0], &[1.0, 1.0], &mut dx);
            let expected = [reference(f, -200.0) as f32, reference(f, 200.0) as f32];
            assert_eq!(y, expected, "{f:?}");
            assert!(dx.iter().all(|v| v.is_finite()), "{f:?} {dx:?}");
        }
    }
}
