//! The exponential function over slices.
//!
//! With n = round(x / ln 2) and r = x - n·ln 2, |r| ≤ ln 2 / 2: eˣ = 2ⁿ·eʳ. r is formed in two steps (Cody &
//! Waite) so that it loses nothing, eʳ is a polynomial (Cephes' `expf`), and 2ⁿ is written into the exponent
//! bits. Plain arithmetic without branches, which LLVM vectorises; within 2 units in the last place.

use crate::codec::simd::multiversion;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 to 9 bits, so that n·LN2_HIGH is exact
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// adding and subtracting 1.5·2²³ rounds to the nearest whole number
const ROUND: f32 = 12_582_912.0;
/// below this eˣ is not a normal number; we give 0
const LOWEST: f32 = -87.336_54;
/// above this eˣ is infinite
const HIGHEST: f32 = 88.722_83;

/// eˣ.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(LOWEST, HIGHEST);
    let n = (clamped * LOG2_E + ROUND) - ROUND;
    // 2¹²⁸ is no number: the last binade is reached by one more doubling
    let (n, twice) = if n > 127.0 { (n - 1.0, 2.0) } else { (n, 1.0) };
    let r = clamped - (n + (twice - 1.0)) * LN2_HIGH - (n + (twice - 1.0)) * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = (p * r * r + r) + 1.0;
    // n is whole and within -126..=127: adding it to ROUND puts it into the low bits of the mantissa
    let bits = ((n + ROUND).to_bits()).wrapping_add(127) << 23;
    let scaled = y * f32::from_bits(bits) * twice;
    let scaled = if x < LOWEST { 0.0 } else { scaled };
    let scaled = if x > HIGHEST { f32::INFINITY } else { scaled };
    if x.is_nan() { x } else { scaled }
}

multiversion!(
    /// `x[i] = e^(x[i] - shift)`; the sum is added to `sum`.
    pub(crate) fn exp_shifted(x: &mut [f32], shift: f32, sum: &mut f32) = exp_shifted_body
);

#[inline(always)]
fn exp_shifted_body(x: &mut [f32], shift: f32, sum: &mut f32) {
    let mut sums = [0f32; 16];
    let (blocks, rest) = x.as_chunks_mut::<16>();
    for block in blocks {
        for i in 0..16 {
            block[i] = exp(block[i] - shift);
            sums[i] += block[i];
        }
    }
    for v in rest.iter_mut() {
        *v = exp(*v - shift);
        sums[0] += *v;
    }
    *sum += sums.iter().sum::<f32>();
}

multiversion!(
    /// Of scores `p` and the gradients `ds` of their probabilities: `p = e^(p - lse)`, `ds = s·p·(ds - d)`.
    pub(crate) fn probabilities_and_gradient(p: &mut [f32], ds: &mut [f32], lse: f32, d: f32, s: f32)
        = probabilities_and_gradient_body
);

#[inline(always)]
fn probabilities_and_gradient_body(p: &mut [f32], ds: &mut [f32], lse: f32, d: f32, s: f32) {
    for (p, ds) in p.iter_mut().zip(ds) {
        *p = exp(*p - lse);
        *ds = s * *p * (*ds - d);
    }
}

multiversion!(
    /// The largest element, joined with `best`.
    pub(crate) fn max(x: &[f32], best: &mut f32) = max_body
);

#[inline(always)]
fn max_body(x: &[f32], best: &mut f32) {
    let mut most = [f32::NEG_INFINITY; 16];
    let (blocks, rest) = x.as_chunks::<16>();
    for block in blocks {
        for i in 0..16 {
            // a comparison with NaN is false: NaN never wins, and shows in the sum instead
            most[i] = if block[i] > most[i] { block[i] } else { most[i] };
        }
    }
    for v in rest.iter().chain(&most) {
        *best = best.max(*v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn within_two_units_in_the_last_place() {
        let mut worst = 0f64;
        let mut x = -87.3f32;
        while x < 88.7 {
            let exact = f64::from(x).exp();
            let got = f64::from(exp(x));
            let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            worst = worst.max((got - exact).abs() / ulp);
            x += 0.000_713;
        }
        assert!(worst < 2.0, "{worst}");
    }

    #[test]
    fn ends_and_strange_numbers() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(88.7).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn slices_sum_what_they_exponentiate() {
        let mut x: Vec<f32> = (0..37).map(|i| i as f32 * 0.1).collect();
        let expected: Vec<f64> = x.iter().map(|v| (f64::from(*v) - 3.6).exp()).collect();
        let mut sum = 1.0;
        exp_shifted(&mut x, 3.6, &mut sum);
        assert!(x.iter().zip(&expected).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6));
        assert!((f64::from(sum) - 1.0 - expected.iter().sum::<f64>()).abs() < 1e-5);
        let mut best = f32::NEG_INFINITY;
        max(&[1.0, 5.0, -2.0], &mut best);
        assert_eq!(best, 5.0);
    }
}
