//! Numbers for tests.

use crate::dropout::mix;

/// `n` numbers in [-1, 1), the same ones for a seed.
pub fn numbers(seed: u64, n: usize) -> Vec<f32> {
    (0..n as u64).map(|i| (mix(seed, i) >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}
