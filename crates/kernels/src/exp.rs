//! The exponential function and its relatives, for loops that LLVM vectorises.
//!
//! eˣ: with n = round(x / ln 2) and r = x - n·ln 2, |r| ≤ ln 2 / 2: eˣ = 2ⁿ·eʳ. r is formed in two steps (Cody &
//! Waite) so that it loses nothing, eʳ is a polynomial (Cephes' `expf`), and 2ⁿ is written into the exponent
//! bits. Plain arithmetic without branches; within 2 units in the last place.
//!
//! tanh x = x + x³·P(x²) for |x| < 0.625 (Cephes' `tanhf`), where 1 - 2/(e²ˣ + 1) would cancel; that formula beyond.
//!
//! erf x = x + x·P(x²) for |x| < 0.92, 1 - e^(Q(|x|)) beyond, with N. Juffa's minimax polynomials; within 2·10⁻⁷.

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

/// tanh x, within 3 units in the last place.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let z = x * x;
    let mut p = -5.704_988_7e-3;
    p = p * z + 2.063_909e-2;
    p = p * z - 5.373_971_6e-2;
    p = p * z + 1.333_144_2e-1;
    p = p * z - 3.333_328e-1;
    let near = p * z * x + x;
    // symmetric, so that e²ˣ is never infinite where it matters
    let e = exp(2.0 * x.abs().min(20.0));
    let far = (1.0 - 2.0 / (e + 1.0)).copysign(x);
    let y = if x.abs() < 0.625 { near } else { far };
    if x.is_nan() { x } else { y }
}

/// erf x, within 2·10⁻⁷.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let (a, s) = (x.abs().min(10.0), x * x);
    let mut q = -1.728_534_7e-5 * a + 3.831_979_7e-4;
    q = q * s.min(100.0) + (-3.883_964_4e-3 * a + 2.425_462_2e-2);
    q = q * a - 1.067_778_8e-1;
    q = q * a - 6.348_467e-1;
    q = q * a - 1.287_175_1e-1;
    q = q * a - a;
    let far = (1.0 - exp(q)).copysign(x);
    let mut p = -5.967_617e-4;
    p = p * s + 4.991_194_2e-3;
    p = p * s - 2.676_813_5e-2;
    p = p * s + 1.128_199_3e-1;
    p = p * s - 3.761_253_4e-1;
    p = p * s + 1.283_791_7e-1;
    let near = p * x + x;
    let y = if x.abs() > 0.921_875 { far } else { near };
    if x.is_nan() { x } else { y }
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
    /// `x[i] = cap·tanh(x[i] / cap)`.
    pub(crate) fn soft_cap(x: &mut [f32], cap: f32) = soft_cap_body
);

#[inline(always)]
fn soft_cap_body(x: &mut [f32], cap: f32) {
    x.iter_mut().for_each(|x| *x = cap * tanh(*x / cap));
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

/// erf in f64, for tests: 2/√π·e^(-x²)·Σ 2ⁿ·x²ⁿ⁺¹/(2n+1)!!, whose terms all have one sign.
#[cfg(test)]
pub(crate) fn erf_exact(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..300 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    sum * (-x * x).exp() * std::f64::consts::FRAC_2_SQRT_PI
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
    fn tanh_and_erf_agree_with_f64() {
        let mut x = -4.0f32;
        while x < 4.0 {
            let exact = f64::from(x).tanh();
            assert!((f64::from(tanh(x)) - exact).abs() <= 2e-7 * exact.abs().max(1e-30), "tanh {x}");
            let exact = erf_exact(f64::from(x));
            assert!((f64::from(erf(x)) - exact).abs() <= 2e-7, "erf {x}: {} {exact}", erf(x));
            x += 0.000_37;
        }
        // small arguments keep their relative precision
        for x in [1e-30f32, 1e-10, 1e-4] {
            assert!((tanh(x) / x - 1.0).abs() < 1e-6);
            assert!(
                (f64::from(erf(x)) / (f64::from(x) * 2.0 / std::f64::consts::PI.sqrt()) - 1.0).abs() < 1e-6
            );
        }
        for f in [tanh, erf] {
            assert_eq!([f(f32::INFINITY), f(f32::NEG_INFINITY), f(50.0), f(0.0)], [1.0, -1.0, 1.0, 0.0]);
            assert!(f(f32::NAN).is_nan());
        }
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
