//! Activations rounded to 8 bits per block, as ggml rounds them before it multiplies.
//!
//! For weights in blocks of 32 (ggml's Q8_0 and Q8_1, x86 version): with d = max|x| / 127 over the block,
//!
//! ```text
//! q = round(x · 127 / max|x|)    scale: d rounded to f16    s = d·Σq rounded to f16  (for weights with a minimum)
//! ```
//!
//! For k-quants (ggml's Q8_K), over 256 elements, with x* the (first) element of largest size:
//!
//! ```text
//! q = min(127, round(x · -127 / x*))    scale: x* / -127, in f32    Σq of each 16 elements
//! ```
//!
//! Halves round to even, on every CPU. Source: `quantize_row_q8_0`, `_q8_1`, `_q8_K` in ggml.
//!
//! A NaN or infinity makes its block's scale NaN or infinite, so that no broken activation looks sound.

use crate::codec::simd::multiversion;
use crate::mat::MatRef;
use crate::storage::StorageType;
use half::f16;
use rayon::prelude::*;

/// The blocks in which activations are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// 32 elements, for Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0
    By32,
    /// 256 elements, for k-quants
    By256,
}

impl Rounding {
    /// How activations are rounded beside a weight of this storage; `None` for plain floats, which take them as
    /// they are.
    pub fn beside(storage: StorageType) -> Option<Self> {
        match storage.block_len() {
            32 => Some(Self::By32),
            256 => Some(Self::By256),
            _ => None,
        }
    }

    /// Elements of a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::By32 => 32,
            Self::By256 => 256,
        }
    }
}

/// Scale of one block of 32, and two forms of its sum.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Scale32 {
    /// d
    pub d: f32,
    /// d·Σq with d rounded to f16, for symmetric weights whose codes carry an offset
    pub sum: f32,
}

/// Rounded rows of activations.
#[derive(Debug)]
pub struct Rounded {
    pub(super) rounding: Rounding,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// elements of `codes` from row to row: By32, a block of zeros follows each row, so that kernels which take
    /// two blocks at a time may read on
    pub(super) stride: usize,
    pub(super) codes: Vec<i8>,
    /// By32: (d, d·Σq) of each block, zeros behind each row
    pub(super) offset_scales: Vec<Scale32>,
    /// By32: (d, s) of each block, zeros behind each row
    pub(super) minimum_scales: Vec<Scale32>,
    /// By256: d of each block
    pub(super) block_scales: Vec<f32>,
    /// sums of 32 codes (By32), or of 16 (By256)
    pub(super) sums: Vec<i16>,
}

impl Rounded {
    /// Rounds the rows of `x`, whose columns must be next to each other and whole blocks.
    ///
    /// Panics if they are not.
    pub fn new(x: MatRef, rounding: Rounding) -> Self {
        assert!(
            x.col_stride == 1 && x.cols.is_multiple_of(rounding.block_len()),
            "whole blocks of whole rows"
        );
        let blocks = x.cols / rounding.block_len();
        let stride = x.cols + if rounding == Rounding::By32 { 32 } else { 0 };
        let mut this = Self {
            rounding,
            rows: x.rows,
            cols: x.cols,
            stride,
            codes: vec![0; x.rows * stride],
            offset_scales: Vec::new(),
            minimum_scales: Vec::new(),
            block_scales: Vec::new(),
            sums: Vec::new(),
        };
        if x.cols == 0 || x.rows == 0 {
            return this;
        }
        let row = |i: usize| &x.data[i * x.row_stride..][..x.cols];
        // below this many rows other threads are not woken
        const MIN_ROWS: usize = 32;
        match rounding {
            Rounding::By32 => {
                this.offset_scales = vec![Scale32::default(); x.rows * (blocks + 1)];
                this.minimum_scales = this.offset_scales.clone();
                this.sums = vec![0; x.rows * blocks];
                this.codes
                    .par_chunks_mut(stride)
                    .zip(this.offset_scales.par_chunks_mut(blocks + 1))
                    .zip(this.minimum_scales.par_chunks_mut(blocks + 1))
                    .zip(this.sums.par_chunks_mut(blocks))
                    .enumerate()
                    .with_min_len(MIN_ROWS)
                    .for_each(|(i, (((codes, offset), minimum), sums))| {
                        row32(row(i), codes, offset, minimum, sums);
                    });
            }
            Rounding::By256 => {
                this.block_scales = vec![0.0; x.rows * blocks];
                this.sums = vec![0; x.rows * blocks * 16];
                this.codes
                    .par_chunks_mut(stride)
                    .zip(this.block_scales.par_chunks_mut(blocks))
                    .zip(this.sums.par_chunks_mut(blocks * 16))
                    .enumerate()
                    .with_min_len(MIN_ROWS)
                    .for_each(|(i, ((codes, scales), sums))| row256(row(i), codes, scales, sums));
            }
        }
        this
    }

    /// How it was rounded.
    pub fn rounding(&self) -> Rounding {
        self.rounding
    }

    /// The values that the codes stand for, row by row.
    pub fn values(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.rows * self.cols];
        if self.cols > 0 {
            let rows = out.par_chunks_mut(self.cols).enumerate().with_min_len(16);
            rows.for_each(|(i, row)| row.iter_mut().enumerate().for_each(|(j, v)| *v = self.value(i, j)));
        }
        out
    }

    /// The value that element (i, j) stands for.
    pub(super) fn value(&self, i: usize, j: usize) -> f32 {
        let q = f32::from(self.codes[i * self.stride + j]);
        match self.rounding {
            Rounding::By32 => self.offset_scales[i * (self.cols / 32 + 1) + j / 32].d * q,
            Rounding::By256 => self.block_scales[i * (self.cols / 256) + j / 256] * q,
        }
    }
}

fn row32(x: &[f32], codes: &mut [i8], offset: &mut [Scale32], minimum: &mut [Scale32], sums: &mut [i16]) {
    let blocks = x.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<32>().0);
    for (b, (x, q)) in blocks.enumerate() {
        let (d, sum) = round32(x, q);
        let near = f16::from_f32(d).to_f32();
        sums[b] = sum as i16;
        offset[b] = Scale32 { d: near, sum: near * sum as f32 };
        minimum[b] = Scale32 { d: near, sum: f16::from_f32(d * sum as f32).to_f32() };
    }
}

fn row256(x: &[f32], codes: &mut [i8], scales: &mut [f32], sums: &mut [i16]) {
    let blocks = x.as_chunks::<256>().0.iter().zip(codes.as_chunks_mut::<256>().0);
    for ((x, q), (d, sums)) in blocks.zip(scales.iter_mut().zip(sums.as_chunks_mut::<16>().0)) {
        *d = round256(x, q, sums);
    }
}

/// Rounds one block of 32; d and Σq.
fn round32(x: &[f32; 32], q: &mut [i8; 32]) -> (f32, i32) {
    let (mut d, mut sum) = (0.0, 0);
    fast32(x, q, &mut d, &mut sum);
    (d, sum)
}

multiversion!(fn fast32(x: &[f32; 32], q: &mut [i8; 32], d: &mut f32, sum: &mut i32) = body32);
multiversion!(fn fast256(x: &[f32; 256], q: &mut [i8; 256], factor: f32) = body256);

/// The largest |x|; NaN if there is one. The bits of positive floats are ordered as the floats are, NaN on top.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let bits = x.iter().fold(0u32, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
    f32::from_bits(bits)
}

/// The nearest whole number, halves to even, of |x| < 2²². Others give any number.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    // 1.5·2²³: the sum has no fraction left, and its low mantissa bits are the number
    ((x + 12_582_912.0).to_bits() as i32).wrapping_sub(12_582_912f32.to_bits() as i32)
}

#[inline(always)]
fn body32(x: &[f32; 32], q: &mut [i8; 32], d: &mut f32, sum: &mut i32) {
    let most = largest(x);
    let factor = if most == 0.0 { 0.0 } else { 127.0 / most };
    let mut total = 0;
    for (q, x) in q.iter_mut().zip(x) {
        *q = nearest(x * factor) as i8;
        total += i32::from(*q);
    }
    (*d, *sum) = (most / 127.0, total);
}

#[inline(always)]
fn body256(x: &[f32; 256], q: &mut [i8; 256], factor: f32) {
    for (q, x) in q.iter_mut().zip(x) {
        *q = nearest(x * factor).min(127) as i8;
    }
}

/// Rounds one block of 256; its scale.
fn round256(x: &[f32; 256], q: &mut [i8; 256], sums: &mut [i16; 16]) -> f32 {
    let size = largest(x);
    if size == 0.0 {
        return 0.0; // codes and sums are zero already
    }
    let extreme = x.iter().copied().find(|x| x.abs() == size).unwrap_or(f32::NAN);
    let factor = -127.0 / extreme;
    fast256(x, q, factor);
    for (sum, q) in sums.iter_mut().zip(q.as_chunks::<16>().0) {
        *sum = q.iter().map(|q| i16::from(*q)).sum();
    }
    1.0 / factor
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As ggml's scalar code has it, element by element.
    fn reference32(x: &[f32]) -> (Vec<i8>, f32, f32) {
        let most = x.iter().fold(0f32, |m, x| m.max(x.abs()));
        let factor = if most == 0.0 { 0.0 } else { 127.0 / most };
        let q: Vec<i8> = x.iter().map(|x| (x * factor).round_ties_even() as i8).collect();
        let sum: i32 = q.iter().map(|q| i32::from(*q)).sum();
        let d = most / 127.0;
        (q, f16::from_f32(d).to_f32(), f16::from_f32(d * sum as f32).to_f32())
    }

    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        crate::test_numbers::numbers(seed, n).into_iter().map(|x| x * 3.0).collect()
    }

    #[test]
    fn blocks_of_32_are_ggmls() {
        let mut x = numbers(1, 3 * 96);
        x[32..64].fill(0.0);
        x[64] = -9.0;
        let rounded = Rounded::new(MatRef::new(&x, 3, 96), Rounding::By32);
        for (b, block) in x.chunks(32).enumerate() {
            let (row, col) = (b / 3, b % 3);
            let (q, d, s) = reference32(block);
            assert_eq!(rounded.codes[row * rounded.stride + col * 32..][..32], q);
            let at = row * 4 + col;
            assert_eq!((rounded.minimum_scales[at].d, rounded.minimum_scales[at].sum), (d, s));
            let sum: i32 = q.iter().map(|q| i32::from(*q)).sum();
            assert_eq!((rounded.offset_scales[at].d, rounded.offset_scales[at].sum), (d, d * sum as f32));
        }
    }

    #[test]
    fn blocks_of_256_are_ggmls() {
        let mut x = numbers(2, 4 * 256);
        x[256..512].fill(0.0);
        (x[600], x[700]) = (-5.0, 5.0); // the first of two equal ones gives the sign
        let rounded = Rounded::new(MatRef::new(&x, 2, 512), Rounding::By256);
        for (b, block) in x.chunks(256).enumerate() {
            let extreme = block.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
            let at = b / 2 * rounded.stride + b % 2 * 256;
            if extreme == 0.0 {
                assert_eq!(rounded.block_scales[b], 0.0);
                assert!(rounded.codes[at..at + 256].iter().all(|q| *q == 0));
                continue;
            }
            let factor = -127.0 / extreme;
            let q: Vec<i8> = block.iter().map(|x| (x * factor).round_ties_even().min(127.0) as i8).collect();
            assert_eq!(rounded.codes[at..at + 256], q);
            assert_eq!(rounded.block_scales[b], 1.0 / factor);
            for (j, part) in q.chunks(16).enumerate() {
                assert_eq!(rounded.sums[b * 16 + j], part.iter().map(|q| i16::from(*q)).sum::<i16>());
            }
        }
    }

    #[test]
    fn values_are_within_half_a_step() {
        for rounding in [Rounding::By32, Rounding::By256] {
            let x = numbers(3, 512);
            let rounded = Rounded::new(MatRef::new(&x, 1, 512), rounding);
            for (b, block) in x.chunks(rounding.block_len()).enumerate() {
                let step = block.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
                for (j, x) in block.iter().enumerate() {
                    let value = rounded.value(0, b * rounding.block_len() + j);
                    // half a step, and the f16 rounding (2⁻¹¹) of a scale times at most 127 steps
                    assert!((x - value).abs() <= step * (0.5 + 127.0 / 2048.0), "{x} {value} {step}");
                }
            }
        }
    }

    #[test]
    fn broken_numbers_stay_broken() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for rounding in [Rounding::By32, Rounding::By256] {
                let mut x = numbers(4, 256);
                x[7] = bad;
                let rounded = Rounded::new(MatRef::new(&x, 1, 256), rounding);
                let d = match rounding {
                    Rounding::By32 => rounded.offset_scales[0].d,
                    Rounding::By256 => rounded.block_scales[0],
                };
                assert!(!d.is_finite(), "{bad} {rounding:?}");
            }
        }
    }
}
