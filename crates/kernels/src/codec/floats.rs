//! Plain floats: f32 as stored, bf16 and f16 widened. Widening is exact.
//!
//! bf16 is the upper half of an f32. f16 has 1 sign, 5 exponent (bias 15) and 10 mantissa bits:
//!
//! - normal: move exponent and mantissa to f32's place and add 127 - 15 = 112 to the exponent;
//! - zero and subnormal, m·2^-24: with the exponent set to 113 the f32 is 2^-14 + m·2^-24; subtract 2^-14
//!   (exact; no f32 subnormal occurs, which some CPUs compute slowly and some modes flush);
//! - infinity and NaN: exponent 31 + 112 + 112 = 255.

use super::simd::multiversion;

/// An f16, given by its bits, as f32.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    const ONE_EXPONENT: u32 = 1 << 23;
    let sign = (bits as u32 & 0x8000) << 16;
    let magnitude = (bits as u32 & 0x7fff) << 13;
    let normal = magnitude + 112 * ONE_EXPONENT;
    let subnormal = f32::from_bits(magnitude + 113 * ONE_EXPONENT) - f32::from_bits(113 * ONE_EXPONENT);
    let widened = if magnitude < ONE_EXPONENT {
        subnormal.to_bits()
    } else if magnitude < 31 * ONE_EXPONENT {
        normal
    } else {
        normal + 112 * ONE_EXPONENT
    };
    f32::from_bits(sign | widened)
}

/// f32 from bytes of any alignment.
pub(super) fn f32(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *o = f32::from_le_bytes(*b);
    }
}

multiversion!(pub(super) fn bf16(bytes: &[u8], out: &mut [f32]) = bf16_body);

#[inline(always)]
fn bf16_body(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *o = f32::from_bits((u16::from_le_bytes(*b) as u32) << 16);
    }
}

/// f16 by the CPU's own conversion where it has one.
pub(super) fn f16(bytes: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if super::simd::has_avx2() {
        // SAFETY: the CPU has AVX2 and F16C.
        return unsafe { f16_f16c(bytes, out) };
    }
    f16_body(bytes, out)
}

#[inline(always)]
fn f16_body(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *o = f16_to_f32(u16::from_le_bytes(*b));
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn f16_f16c(bytes: &[u8], out: &mut [f32]) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    let (groups, rest) = bytes.as_chunks::<16>();
    let (out_groups, out_rest) = out.as_chunks_mut::<8>();
    for (b, o) in groups.iter().zip(out_groups) {
        // SAFETY: `b` is 16 readable bytes and `o` 8 writable floats; neither load nor store needs alignment.
        unsafe { _mm256_storeu_ps(o.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(b.as_ptr().cast()))) };
    }
    f16_body(rest, out_rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_widens_as_half_does() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut fast = vec![0f32; 1 << 16];
        f16(&all, &mut fast);
        let mut portable = vec![0f32; 1 << 16];
        f16_body(&all, &mut portable);
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits).to_f32();
            for found in [fast[bits as usize], portable[bits as usize]] {
                // A NaN stays a NaN; its payload is the CPU's business.
                let same = expected.to_bits() == found.to_bits() || expected.is_nan() && found.is_nan();
                assert!(same, "{bits:#06x}: {expected} {found}");
            }
        }
    }
}
