//! How far one model's next-token distribution is from another's, row by row.
//!
//! For logits z of the reference and w of the candidate, with Z = logsumexp(z) and W = logsumexp(w), the
//! distributions are p = exp(z - Z) and q = exp(w - W), and the Kullback-Leibler divergence in nats is
//!
//! ```text
//! KL(p‖q) = Σ p·(ln p - ln q) = Σ p·(z - w) - Z + W
//! ```
//!
//! so that one pass over each row's logits for the maximum and one for the sums suffice. Sums are in f64: the terms
//! of two nearly equal distributions cancel to far below f32's rounding of the sum.

use rayon::prelude::*;

/// What is known of one position.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowDivergence {
    /// KL(reference ‖ candidate), nats; NaN if a logit is
    pub kl: f64,
    /// cross entropy of the target under the reference, nats
    pub reference_loss: f64,
    /// cross entropy of the target under the candidate, nats
    pub candidate_loss: f64,
    /// both find the same token likeliest (of equal ones, the lowest id counts)
    pub same_top: bool,
}

/// Compares logits `[n, vocab]` with logits `[n, vocab]`, given what each position should predict.
///
/// Panics if lengths do not fit or a target is not in the vocabulary.
pub fn divergence(
    reference: &[f32],
    candidate: &[f32],
    vocab: usize,
    targets: &[u32],
    out: &mut [RowDivergence],
) {
    let n = targets.len();
    assert!(vocab > 0 && reference.len() == n * vocab && candidate.len() == n * vocab && out.len() == n);
    assert!(targets.iter().all(|t| (*t as usize) < vocab));
    let rows = reference.par_chunks_exact(vocab).zip(candidate.par_chunks_exact(vocab));
    rows.zip(targets).zip(out).for_each(|(((z, w), target), out)| *out = row(z, w, *target as usize));
}

fn row(z: &[f32], w: &[f32], target: usize) -> RowDivergence {
    let ((z_top, z_max), (w_top, w_max)) = (top(z), top(w));
    let (mut z_sum, mut w_sum, mut difference) = (0f64, 0f64, 0f64);
    for (z, w) in z.iter().zip(w) {
        let (z, w) = (f64::from(*z), f64::from(*w));
        let p = (z - z_max).exp();
        z_sum += p;
        w_sum += (w - w_max).exp();
        difference += p * (z - w);
    }
    let (z_all, w_all) = (z_max + z_sum.ln(), w_max + w_sum.ln());
    let kl = difference / z_sum - z_all + w_all;
    RowDivergence {
        // rounding may leave a few 1e-16 below zero; a NaN stays one
        kl: if kl < 0.0 { 0.0 } else { kl },
        reference_loss: z_all - f64::from(z[target]),
        candidate_loss: w_all - f64::from(w[target]),
        same_top: z_top == w_top,
    }
}

/// The largest logit and its place.
fn top(z: &[f32]) -> (usize, f64) {
    let first = (0, f64::NEG_INFINITY);
    let best = z.iter().enumerate().fold(first, |best, (i, z)| {
        let z = f64::from(*z);
        if z > best.1 { (i, z) } else { best }
    });
    // without any number, so that the sums become NaN instead of stopping the loop
    if best.1 == f64::NEG_INFINITY { (0, 0.0) } else { best }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, term by term.
    fn reference(z: &[f32], w: &[f32], target: usize) -> RowDivergence {
        let softmax = |z: &[f32]| -> Vec<f64> {
            let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let e: Vec<f64> = z.iter().map(|v| (f64::from(*v) - f64::from(max)).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.iter().map(|e| e / sum).collect()
        };
        let (p, q) = (softmax(z), softmax(w));
        let best = |p: &[f64]| (0..p.len()).fold(0, |best, i| if p[i] > p[best] { i } else { best });
        RowDivergence {
            kl: p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum(),
            reference_loss: -p[target].ln(),
            candidate_loss: -q[target].ln(),
            same_top: best(&p) == best(&q),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() })]

        /// Both sum the same f64 terms in another form; logits within ±20 keep every p above 1e-18.
        #[test]
        fn is_what_the_definition_says(
            rows in prop::collection::vec((prop::collection::vec((-20.0f32..20.0, -20.0f32..20.0), 7), 0u32..7), 1..5)
        ) {
            let z: Vec<f32> = rows.iter().flat_map(|(r, _)| r.iter().map(|p| p.0)).collect();
            let w: Vec<f32> = rows.iter().flat_map(|(r, _)| r.iter().map(|p| p.1)).collect();
            let targets: Vec<u32> = rows.iter().map(|(_, t)| *t).collect();
            let mut out = vec![RowDivergence::default(); rows.len()];
            divergence(&z, &w, 7, &targets, &mut out);
            for (i, found) in out.iter().enumerate() {
                let expected = reference(&z[7 * i..7 * i + 7], &w[7 * i..7 * i + 7], targets[i] as usize);
                prop_assert!((found.kl - expected.kl).abs() < 1e-9, "{found:?} {expected:?}");
                prop_assert!((found.reference_loss - expected.reference_loss).abs() < 1e-5);
                prop_assert!((found.candidate_loss - expected.candidate_loss).abs() < 1e-5);
                prop_assert_eq!(found.same_top, expected.same_top);
            }
        }
    }

    #[test]
    fn equal_rows_are_no_distance_apart_whatever_their_offset() {
        let z = [1.0f32, -3.0, 100.0, 99.5];
        let w = z.map(|v| v - 7.0);
        let mut out = [RowDivergence::default()];
        divergence(&z, &w, 4, &[3], &mut out);
        assert!(out[0].kl < 1e-12 && out[0].same_top, "{out:?}");
        assert!((out[0].reference_loss - out[0].candidate_loss).abs() < 1e-12);
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let mut out = [RowDivergence::default(); 2];
        divergence(&[f32::NAN, 1.0, 0.0, 1.0], &[0.0, 1.0, f32::INFINITY, 1.0], 2, &[0, 1], &mut out);
        assert!(out[0].kl.is_nan() && !out[1].kl.is_finite(), "{out:?}");
    }
}
