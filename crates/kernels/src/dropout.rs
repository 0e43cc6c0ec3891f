//! Dropout whose mask is a function of a seed and the element's index.
//!
//! Nothing is stored and nothing is drawn in order: the backward, a recomputed block and any number of
//! threads see the same mask. Element `i` is dropped if the hash of (seed, i), read as a fraction of 2³²,
//! lies below `p`; kept ones are scaled by 1/(1-p) (Srivastava et al. 2014, inverted form as in PyTorch).

use rayon::prelude::*;

/// A well-mixed 64-bit hash of two words (SplitMix64's finalizer, Steele et al. 2014).
pub fn mix(seed: u64, counter: u64) -> u64 {
    let mut z = seed ^ counter.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

const CHUNK: usize = 1 << 14;

/// `out[i] = x[i] · mask[i] / (1-p)`. Also its own backward: apply it to the gradient with the same seed.
///
/// Panics if the lengths differ or `p` is not in [0, 1).
pub fn dropout(seed: u64, p: f32, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    assert!((0.0..1.0).contains(&p));
    let threshold = (f64::from(p) * 4_294_967_296.0) as u64;
    let keep = 1.0 / (1.0 - p);
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate().for_each(|(c, (out, x))| {
        for (i, (o, v)) in out.iter_mut().zip(x).enumerate() {
            let hash = mix(seed, (c * CHUNK + i) as u64) >> 32;
            *o = if hash < threshold { 0.0 } else { v * keep };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_the_asked_share_and_keeps_the_mean() {
        let x = vec![1f32; 100_000];
        let mut y = vec![0f32; x.len()];
        dropout(7, 0.3, &x, &mut y);
        let dropped = y.iter().filter(|v| **v == 0.0).count() as f64 / x.len() as f64;
        // standard deviation of the share is sqrt(0.3·0.7/1e5) = 0.0015; five of them
        assert!((dropped - 0.3).abs() < 0.0075, "{dropped}");
        assert!(y.iter().all(|v| *v == 0.0 || *v == 1.0 / (1.0 - 0.3f32)));
    }

    #[test]
    fn same_seed_same_mask_other_seed_another() {
        let x = vec![1f32; 50_000];
        let run = |seed| {
            let mut y = vec![0f32; x.len()];
            dropout(seed, 0.5, &x, &mut y);
            y
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert_ne!(run(1)[..CHUNK], run(1)[CHUNK..2 * CHUNK]);
    }
}
