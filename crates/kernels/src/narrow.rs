//! f32 kept in 16 bits: what a step holds for its backward at half the size.
//!
//! Both types round to the nearest, ties to even. bf16 is the upper half of an f32 (8 exponent and 7 mantissa bits): with
//! b the bits of x, the result is `(b + 0x7fff + (b >> 16 & 1)) >> 16`; the carry that this may send into the exponent is
//! right, also where it leads to infinity. A NaN must not become infinity, so its top mantissa bit is set instead. f16 has
//! 5 exponent and 10 mantissa bits: eight times as fine, but nothing from 65520 upwards has a place, which is an error here
//! and not an infinity. Magnitudes are compared as integers, which order as floats do, so that the loop vectorises.
//!
//! Widening is exact (`codec/floats.rs`). The reference is the crate `half`.

use crate::codec::simd::multiversion;
use crate::elementwise::CHUNK;
use crate::{codec, storage::StorageType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// A 16-bit float.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// the range of f32 with 3 significant digits
    BF16,
    /// 4 significant digits below 65504
    F16,
}

/// A number has no place in f16.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("a value of {0:.0} is beyond f16's 65504: --compute-dtype bf16 has the range of f32")]
pub struct OutOfRange(pub f32);

/// The smallest magnitude that rounds to f16's infinity.
pub const F16_END: f32 = 65520.0;
const INFINITY_BITS: u32 = 0x7f80_0000;

/// `out = x`, rounded. Panics if lengths differ.
pub fn to_bf16(x: &[f32], out: &mut [bf16]) {
    assert_eq!(x.len(), out.len());
    let parts = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
    parts.for_each(|(out, x)| round_bf16(x, bytemuck::cast_slice_mut(out)));
}

/// `out = x`, rounded; NaN and infinity stay what they are. Panics if lengths differ.
///
/// # Errors
/// The largest finite number of the part that was looked at, if it has no place.
pub fn to_f16(x: &[f32], out: &mut [f16]) -> Result<(), OutOfRange> {
    assert_eq!(x.len(), out.len());
    let parts = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
    parts.map(|(out, x)| narrow_f16(x, out)).collect::<Vec<_>>().into_iter().collect()
}

/// `out = x`. Panics if lengths differ.
pub fn from_bf16(x: &[bf16], out: &mut [f32]) {
    codec::decode_parallel(StorageType::BF16, bytemuck::cast_slice(x), out);
}

/// `out = x`. Panics if lengths differ.
pub fn from_f16(x: &[f16], out: &mut [f32]) {
    codec::decode_parallel(StorageType::F16, bytemuck::cast_slice(x), out);
}

multiversion!(fn round_bf16(x: &[f32], out: &mut [u16]) = bf16_body);

#[inline(always)]
fn bf16_body(x: &[f32], out: &mut [u16]) {
    for (x, o) in x.iter().zip(out) {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let nan = bits >> 16 | 0x40;
        *o = if bits & 0x7fff_ffff > INFINITY_BITS { nan as u16 } else { rounded as u16 };
    }
}

fn narrow_f16(x: &[f32], out: &mut [f16]) -> Result<(), OutOfRange> {
    out.convert_from_f32_slice(x);
    let mut largest = [0u32];
    largest_finite(x, &mut largest);
    match f32::from_bits(largest[0]) {
        beyond if beyond >= F16_END => Err(OutOfRange(beyond)),
        _ => Ok(()),
    }
}

multiversion!(
    /// The bits of the largest finite magnitude.
    fn largest_finite(x: &[f32], largest: &mut [u32; 1]) = largest_body
);

#[inline(always)]
fn largest_body(x: &[f32], largest: &mut [u32; 1]) {
    let finite = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).map(|m| if m < INFINITY_BITS { m } else { 0 });
    largest[0] = finite.fold(0, u32::max);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All upper halves of an f32 with lower halves around the tie: every bf16, every way to round.
    fn every_upper_half() -> Vec<f32> {
        let lows = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        (0..=u16::MAX).flat_map(|high| lows.map(|low| f32::from_bits(u32::from(high) << 16 | low))).collect()
    }

    #[test]
    fn bf16_rounds_as_half_does() {
        let x = every_upper_half();
        let (mut fast, mut plain) = (vec![bf16::ZERO; x.len()], vec![0u16; x.len()]);
        to_bf16(&x, &mut fast);
        bf16_body(&x, &mut plain);
        for ((x, fast), plain) in x.iter().zip(&fast).zip(&plain) {
            let expected = bf16::from_f32(*x);
            for found in [*fast, bf16::from_bits(*plain)] {
                let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                assert!(same, "{x}: {found} and {expected}");
            }
        }
        let mut back = vec![0f32; x.len()];
        from_bf16(&fast, &mut back);
        assert!(back.iter().zip(&fast).all(|(b, f)| b.to_bits() == f.to_f32().to_bits() || b.is_nan()));
    }

    #[test]
    fn f16_rounds_as_half_does_and_knows_its_end() {
        let x: Vec<f32> = every_upper_half().into_iter().filter(|x| x.abs() < F16_END).collect();
        assert!(x.len() > 1 << 17);
        let mut fast = vec![f16::ZERO; x.len()];
        to_f16(&x, &mut fast).unwrap();
        for (x, found) in x.iter().zip(&fast) {
            assert_eq!(found.to_bits(), f16::from_f32(*x).to_bits(), "{x}");
        }
        let mut back = vec![0f32; x.len()];
        from_f16(&fast, &mut back);
        assert!(back.iter().zip(&fast).all(|(b, f)| *b == f.to_f32()));
        for (x, fits) in
            [(65519.9, true), (-65519.9, true), (65520.0, false), (-1e9, false), (f32::INFINITY, true)]
        {
            let mut values = vec![1.0; CHUNK + 5];
            values[CHUNK + 1] = x;
            values.push(f32::NAN);
            let found = to_f16(&values, &mut vec![f16::ZERO; CHUNK + 6]);
            assert_eq!(found, if fits { Ok(()) } else { Err(OutOfRange(x.abs())) }, "{x}");
        }
    }
}
