//! Each kernel at the shapes of W1 (one row of 512 tokens through SmolLM2-135M), on rayon's global pool.
//!
//! Throughput is floating-point operations (criterion's "elements") and the bytes that must cross memory if every
//! operand is read once and every result written once. `bench/kernels` runs these and puts them against the roofline.
//!
//! `cargo bench -p engobe-kernels [-- FILTER]`

mod attention;
mod codecs;
mod elementwise;
mod head;
mod linear;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;

/// Tokens of a step.
const TOKENS: usize = 512;
/// Width of the hidden states.
const WIDTH: usize = 576;
/// Width of the gated layer.
const FFN: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCAB: usize = 49152;
/// Bytes of a float.
const F: usize = 4;

/// Numbers in (-0.5, 0.5) without a pattern.
fn numbers(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 16_777_216.0 - 0.499_9).collect()
}

/// One benchmark, with its floating-point operations and bytes.
fn measure(c: &mut Criterion, name: &str, flops: usize, bytes: usize, mut run: impl FnMut()) {
    let mut group = c.benchmark_group("kernels");
    group.throughput(Throughput::ElementsAndBytes { elements: flops as u64, bytes: bytes as u64 });
    group.bench_function(name, |b| b.iter(&mut run));
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
}

criterion_group! {
    name = kernels;
    config = config();
    targets = elementwise::all, attention::all, linear::all, head::all, codecs::all
}
criterion_main!(kernels);
