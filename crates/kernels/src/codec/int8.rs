//! 8-bit integers with one factor for each row: the weights of LLM.int8 (Dettmers et al. 2022).
//!
//! ```text
//! absmax = max|x| over a row        q = round(x·(127 / absmax)), halves to even        x̃ = q·(absmax / 127)
//! ```
//!
//! bitsandbytes rounds weights to f16 first, and so does [`encode_int8`]: codes and factors are then equal to its own.

use super::scales::F32s;
use super::simd::multiversion;
use crate::storage::StorageError;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Quantizes whole rows of `cols` elements. A row with an element beyond f16's range (65504) gets an infinite factor
/// and codes without meaning; elements must be finite.
///
/// Panics unless `codes` is as long as `x` and `absmax` has one number for each row.
pub fn encode_int8(x: &[f32], cols: usize, codes: &mut [u8], absmax: &mut [f32]) {
    assert_eq!((codes.len(), absmax.len() * cols), (x.len(), x.len()));
    let mut halves = vec![f16::ZERO; cols];
    let mut rounded = vec![0f32; cols];
    let rows = x.chunks_exact(cols.max(1)).zip(codes.chunks_exact_mut(cols.max(1)));
    for ((x, codes), absmax) in rows.zip(absmax) {
        halves.convert_from_f32_slice(x);
        halves.convert_to_f32_slice(&mut rounded);
        *absmax = rounded.iter().fold(0f32, |most, x| most.max(x.abs()));
        to_integers(&rounded, 127.0 / *absmax, codes);
    }
}

multiversion!(fn to_integers(x: &[f32], factor: f32, codes: &mut [u8]) = to_integers_body);

#[inline(always)]
fn to_integers_body(x: &[f32], factor: f32, codes: &mut [u8]) {
    for (x, code) in x.iter().zip(codes) {
        // a row of zeros: 0·∞ is NaN, which casts to 0
        *code = (x * factor).round_ties_even() as i8 as u8;
    }
}

/// The codes of a matrix and its rows' factors, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct Int8View<'a> {
    cols: usize,
    codes: &'a [u8],
    scales: F32s<'a>,
}

impl<'a> Int8View<'a> {
    /// Checks that codes and factors are those of `[rows, cols]`.
    ///
    /// # Errors
    /// Too few or too many bytes.
    pub fn new(rows: usize, cols: usize, codes: &'a [u8], scales: F32s<'a>) -> Result<Self, StorageError> {
        StorageError::check("8-bit codes", codes.len(), rows.saturating_mul(cols))?;
        StorageError::check("row factors", scales.len(), rows)?;
        Ok(Self { cols, codes, scales })
    }

    /// The codes: i8.
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// The rows' largest magnitudes.
    pub fn scales(&self) -> F32s<'a> {
        self.scales
    }

    /// Element (row, col), by the definition: what [`Int8View::decode`] is tested against.
    pub fn element(&self, row: usize, col: usize) -> f32 {
        (self.codes[row * self.cols + col] as i8) as f32 * (self.scales.get(row) * (1.0 / 127.0))
    }

    /// Decodes `out.len()` elements of a row from column `start` on. Panics if they reach past the row.
    pub fn decode(&self, row: usize, start: usize, out: &mut [f32]) {
        let codes = &self.codes[row * self.cols..][..self.cols][start..][..out.len()];
        scaled(codes, self.scales.get(row) * (1.0 / 127.0), out);
    }
}

multiversion!(fn scaled(codes: &[u8], scale: f32, out: &mut [f32]) = scaled_body);

#[inline(always)]
fn scaled_body(codes: &[u8], scale: f32, out: &mut [f32]) {
    for (code, out) in codes.iter().zip(out) {
        *out = (*code as i8) as f32 * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn le(x: &[f32]) -> Vec<u8> {
        x.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn halves_round_to_even_and_zeros_stay() {
        let x = [127.0, 0.5, 1.5, -2.5, 0.0, 0.0, 0.0, 0.0];
        let (mut codes, mut absmax) = ([9; 8], [9.0; 2]);
        encode_int8(&x, 4, &mut codes, &mut absmax);
        assert_eq!(codes.map(|c| c as i8), [127, 0, 2, -2, 0, 0, 0, 0]);
        assert_eq!(absmax, [127.0, 0.0]);
    }

    #[test]
    fn what_f16_cannot_hold_shows_in_the_factor() {
        let (mut codes, mut absmax) = ([0; 2], [0.0; 1]);
        encode_int8(&[1e5, 1.0], 2, &mut codes, &mut absmax);
        assert_eq!(absmax, [f32::INFINITY]);
    }

    proptest! {
        #[test]
        fn rows_come_back_within_half_a_step(
            rows in 1usize..5,
            cols in 1usize..300,
            scale in 0.001f32..1000.0,
            seed: u64,
        ) {
            let at = |i: u64| (crate::dropout::mix(seed, i) >> 40) as f32 / (1 << 23) as f32 - 1.0;
            let x: Vec<f32> = (0..(rows * cols) as u64).map(|i| scale * at(i)).collect();
            let (mut codes, mut absmax) = (vec![0; x.len()], vec![0.0; rows]);
            encode_int8(&x, cols, &mut codes, &mut absmax);
            let absmax_bytes = le(&absmax);
            let view = Int8View::new(rows, cols, &codes, F32s::new(&absmax_bytes).unwrap()).unwrap();
            for r in 0..rows {
                let mut out = vec![f32::NAN; cols];
                view.decode(r, 0, &mut out);
                for c in 0..cols {
                    prop_assert_eq!(out[c].to_bits(), view.element(r, c).to_bits());
                    // half a step, and the rounding to f16
                    let allowed = absmax[r] / 254.0 + x[r * cols + c].abs() / 2048.0 + absmax[r] * 1e-6;
                    prop_assert!((out[c] - x[r * cols + c]).abs() <= allowed);
                }
                let start = cols / 3;
                let mut part = vec![f32::NAN; cols - start];
                view.decode(r, start, &mut part);
                prop_assert_eq!(&part[..], &out[start..]);
            }
        }
    }
}
