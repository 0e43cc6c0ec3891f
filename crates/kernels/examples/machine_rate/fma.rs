//! The peak of the multiply-add units: chains of fused multiply-adds that live in registers alone.
//!
//! A chain waits for its own last result (4 or 5 cycles); 16 independent ones keep two units busy. Where the CPU has
//! no fused multiply-add that we know of, a product and a sum stand in for it.

use rayon::ThreadPool;
use std::hint::black_box;
use std::time::Instant;

/// Independent chains.
const CHAINS: usize = 16;
/// Multiply-adds of one chain in one call: some milliseconds.
const LENGTH: usize = 1 << 21;
/// Calls, of which the median counts.
const CALLS: usize = 25;

/// Runs the chains once and says how many floating-point operations that was.
type Run = fn() -> f64;

macro_rules! chains {
    ($(#[$meta:meta])* $name:ident, $lanes:expr, $set:path, $fma:expr) => {
        $(#[$meta])*
        fn $name() -> f64 {
            let (a, b) = ($set(black_box(0.999_9)), $set(black_box(1e-4)));
            let mut x = [$set(black_box(1.0)); CHAINS];
            for _ in 0..LENGTH {
                for x in &mut x {
                    *x = $fma(*x, a, b);
                }
            }
            black_box(x);
            (2 * CHAINS * $lanes * LENGTH) as f64
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHAINS, LENGTH, black_box};
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps, _mm512_fmadd_ps, _mm512_set1_ps};
    chains!(
        #[target_feature(enable = "avx512f")]
        avx512,
        16,
        _mm512_set1_ps,
        _mm512_fmadd_ps
    );
    chains!(
        #[target_feature(enable = "avx2,fma")]
        avx2,
        8,
        _mm256_set1_ps,
        _mm256_fmadd_ps
    );

    /// The widest that the CPU has.
    pub fn best() -> Option<(&'static str, super::Run)> {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has AVX-512.
            return Some(("AVX-512", || unsafe { avx512() }));
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has AVX2 and FMA.
            return Some(("AVX2", || unsafe { avx2() }));
        }
        None
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::{CHAINS, LENGTH, black_box};
    use std::arch::aarch64::{float32x4_t, vdupq_n_f32, vfmaq_f32};
    // vfmaq_f32 adds to its first argument
    #[target_feature(enable = "neon")]
    fn fma(x: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vfmaq_f32(b, x, a)
    }
    chains!(
        #[target_feature(enable = "neon")]
        neon,
        4,
        vdupq_n_f32,
        fma
    );

    /// NEON, which every 64-bit ARM has.
    pub fn best() -> Option<(&'static str, super::Run)> {
        // SAFETY: NEON is part of the architecture's baseline.
        Some(("NEON", || unsafe { neon() }))
    }
}

/// Eight numbers, for the compiler to put into what registers there are.
fn eight(v: f32) -> [f32; 8] {
    [v; 8]
}

chains!(plain, 8, eight, |x: [f32; 8], a: [f32; 8], b: [f32; 8]| std::array::from_fn(|i| x[i] * a[i] + b[i]));

fn best() -> (&'static str, Run) {
    #[cfg(target_arch = "x86_64")]
    let found = x86::best();
    #[cfg(target_arch = "aarch64")]
    let found = arm::best();
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found = None;
    found.unwrap_or(("no FMA", plain))
}

/// (instruction set, GFLOP/s of one thread, GFLOP/s of all threads together)
pub fn peak(pool: &ThreadPool) -> (&'static str, f64, f64) {
    let (isa, run) = best();
    let one = median_rate(&run);
    let all = median_rate(&|| pool.broadcast(|_| run()).into_iter().sum());
    (isa, one, all)
}

fn median_rate(run: &dyn Fn() -> f64) -> f64 {
    let mut rates: Vec<f64> = (0..CALLS)
        .map(|_| {
            let start = Instant::now();
            let flops = run();
            flops / start.elapsed().as_secs_f64() / 1e9
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[CALLS / 2]
}
