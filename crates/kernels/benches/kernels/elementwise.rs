//! Norms, rope, gated activation, residuals, dropout, optimizer.

use crate::{F, FFN, HEAD_DIM, HEADS, TOKENS, WIDTH, measure, numbers};
use criterion::Criterion;
use engobe_kernels::activation::Activation;
use engobe_kernels::adamw::{AdamWStep, adamw_step};
use engobe_kernels::layer_norm::{RowStats, layer_norm, layer_norm_backward};
use engobe_kernels::rope::{RopeTable, apply};
use engobe_kernels::{activation, dropout, elementwise, norm};

/// Elements of LoRA r=16 on all linear layers.
const PARAMETERS: usize = 4_884_480;
/// What an exponential counts for in `silu_mul`: the polynomial's products and sums.
const EXP: usize = 20;

pub fn all(c: &mut Criterion) {
    rms_norm(c);
    layer_norms(c);
    rope(c);
    silu_mul(c);
    let n = TOKENS * WIDTH;
    let (a, b, mut out) = (numbers(n), numbers(n), vec![0f32; n]);
    measure(c, "add", n, 3 * n * F, || elementwise::add(&a, &b, &mut out));
    measure(c, "dropout", n, 2 * n * F, || dropout::dropout(7, 0.1, &a, &mut out));
    optimizer(c);
}

fn rms_norm(c: &mut Criterion) {
    let n = TOKENS * WIDTH;
    let (x, dy, w) = (numbers(n), numbers(n), numbers(WIDTH));
    let (mut y, mut rstd) = (vec![0f32; n], vec![0f32; TOKENS]);
    measure(c, "rms_norm", 4 * n, 2 * n * F, || norm::rms_norm(&x, &w, 1e-5, &mut y, &mut rstd));
    let mut dx = vec![0f32; n];
    measure(c, "rms_norm backward", 8 * n, 3 * n * F, || {
        norm::rms_norm_backward(&x, &w, &rstd, &dy, &mut dx, None);
    });
}

fn layer_norms(c: &mut Criterion) {
    let n = TOKENS * WIDTH;
    let (x, dy, w, b) = (numbers(n), numbers(n), numbers(WIDTH), numbers(WIDTH));
    let (mut y, mut stats) = (vec![0f32; n], vec![RowStats::default(); TOKENS]);
    measure(c, "layer_norm", 7 * n, 2 * n * F, || layer_norm(&x, &w, Some(&b), 1e-5, &mut y, &mut stats));
    let mut dx = vec![0f32; n];
    measure(c, "layer_norm backward", 12 * n, 3 * n * F, || {
        layer_norm_backward(&x, &w, &stats, &dy, &mut dx, None, None);
    });
}

fn rope(c: &mut Criterion) {
    let frequencies: Vec<f32> =
        (0..HEAD_DIM / 2).map(|i| 1e5f32.powf(-2.0 * i as f32 / HEAD_DIM as f32)).collect();
    let table = RopeTable::new(&frequencies, 1.0, TOKENS);
    let positions: Vec<u32> = (0..TOKENS as u32).collect();
    let x = numbers(TOKENS * HEADS * HEAD_DIM);
    let n = x.len();
    let mut y = vec![0f32; n];
    measure(c, "rope", 3 * n, 2 * n * F, || apply(&table, &positions, &x, HEADS, HEAD_DIM, false, &mut y));
}

fn silu_mul(c: &mut Criterion) {
    let n = TOKENS * FFN;
    let (gate, up, dy) = (numbers(n), numbers(n), numbers(n));
    let (mut out, mut other) = (vec![0f32; n], vec![0f32; n]);
    measure(c, "gated silu", (EXP + 4) * n, 3 * n * F, || {
        activation::gated(Activation::Silu, &gate, &up, &mut out)
    });
    measure(c, "silu_mul backward", (EXP + 10) * n, 5 * n * F, || {
        activation::gated_backward(Activation::Silu, &gate, &up, &dy, &mut out, &mut other);
    });
}

fn optimizer(c: &mut Criterion) {
    let n = PARAMETERS;
    let (mut p, g, mut m, mut v) = (numbers(n), numbers(n), vec![0f32; n], vec![0f32; n]);
    let step = AdamWStep {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        bias_correction1: 0.1,
        bias_correction2: 1e-3,
        grad_scale: 1.0,
    };
    measure(c, "adamw", 16 * n, 7 * n * F, || adamw_step(&step, &mut p, &g, &mut m, &mut v));
}
