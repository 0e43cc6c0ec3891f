//! Initial values. They depend on the seed and on what they are for alone, so that choosing other targets or sizes
//! elsewhere does not change them.

use rand::distr::{Distribution, Uniform};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The generator of what is called `name`.
pub(crate) fn generator(seed: u64, name: &str) -> ChaCha8Rng {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3) // FNV-1a
    });
    ChaCha8Rng::seed_from_u64(seed ^ hash)
}

/// Uniform numbers within 1/√fan_in: `nn.init.kaiming_uniform_(a = √5)`, how `nn.Linear` starts.
pub(crate) fn uniform(rng: &mut ChaCha8Rng, len: usize, fan_in: usize) -> Vec<f32> {
    let bound = 1.0 / (fan_in as f32).sqrt();
    match Uniform::new_inclusive(-bound, bound) {
        Ok(between) => (0..len).map(|_| between.sample(rng)).collect(),
        Err(_) => vec![0.0; len],
    }
}

/// Normal numbers by Box & Muller's transform.
pub(crate) fn gaussian(rng: &mut ChaCha8Rng, len: usize, std: f32) -> Vec<f32> {
    let mut draw = || {
        let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32 * std
    };
    (0..len).map(|_| draw()).collect()
}
