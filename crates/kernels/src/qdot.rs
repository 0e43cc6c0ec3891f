//! Products of quantized weights, as they are stored, with activations rounded to 8 bits per block.
//!
//! A block's dot product is one of small integers, which CPUs multiply four (AVX2) to eight times as fast as
//! floats, and nothing is decoded. It is what llama.cpp computes; the rounding of activations moves a result by
//! about a thousandth. Only inference asks for it: training and evaluation take activations as they are.
//!
//! - `rounded.rs` rounds activations;
//! - `blocks32.rs` and `blocks256.rs` hold the dot products of each storage, written once for all CPUs (`lanes.rs`);
//! - `tile.rs` multiplies many rows of activations, with AVX-512;
//! - `reference.rs` is the scalar reference, element by element.

mod blocks256;
mod blocks32;
#[cfg(test)]
mod reference;
mod rounded;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tile;

use crate::lanes::{Backend, Lanes, by_backend};
use crate::matmul::SharedMat;
use crate::storage::{StorageType, WeightView};
use blocks32::Blocks32;
use blocks256::Blocks256;
pub use rounded::{Rounded, Rounding};
use std::ops::Range;

/// Rows of a weight times all rows of `x`, into columns of the output.
struct Task<'a, 'b> {
    w: WeightView<'a>,
    x: &'a Rounded,
    y: &'a SharedMat<'b>,
    accumulate: bool,
}

/// `y[i, j] (+)= x[i]·w[j]` for the rows j of `w` in `rows`.
///
/// # Safety
/// Nobody else may use these columns of `y` meanwhile.
///
/// # Panics
/// If `x` is not rounded as the weight's storage needs it, if shapes do not fit, or if the weight is not
/// quantized.
pub(crate) unsafe fn rows(
    backend: Backend,
    x: &Rounded,
    w: WeightView<'_>,
    rows: Range<usize>,
    y: &SharedMat<'_>,
    accumulate: bool,
) {
    assert_eq!(Rounding::beside(w.block_storage()), Some(x.rounding), "{} weight", w.block_storage());
    assert_eq!(x.cols, w.cols(), "columns of activations and weight");
    assert!(rows.end <= w.rows() && y.dims() == (x.rows, w.rows()));
    // SAFETY: passed on.
    unsafe { dispatch(backend, Task { w, x, y, accumulate }, rows) }
}

by_backend!(
    /// # Safety
    /// As for [`rows`].
    unsafe fn dispatch(task: Task<'_, '_>, rows: Range<usize>) = run
);

/// # Safety
/// As for [`Lanes`] and [`rows`].
#[inline(always)]
unsafe fn run<L: Lanes>(task: Task<'_, '_>, rows: Range<usize>) {
    // SAFETY: passed on.
    unsafe {
        match task.w.block_storage() {
            StorageType::Q4_0 => task.by32::<L, blocks32::Q4_0>(rows),
            StorageType::Q4_1 => task.by32::<L, blocks32::Q4_1>(rows),
            StorageType::Q5_0 => task.by32::<L, blocks32::Q5_0>(rows),
            StorageType::Q5_1 => task.by32::<L, blocks32::Q5_1>(rows),
            StorageType::Q8_0 => task.by32::<L, blocks32::Q8_0>(rows),
            StorageType::Q2_K => task.by256::<L, blocks256::Q2K>(rows),
            StorageType::Q3_K => task.by256::<L, blocks256::Q3K>(rows),
            StorageType::Q4_K => task.by256::<L, blocks256::Q4K>(rows),
            StorageType::Q5_K => task.by256::<L, blocks256::Q5K>(rows),
            StorageType::Q6_K => task.by256::<L, blocks256::Q6K>(rows),
            StorageType::F32 | StorageType::F16 | StorageType::BF16 => {}
        }
    }
}

/// Calls `$pass::<L, B, M>` for the rows of `x`, four, two or one at a time.
macro_rules! passes {
    ($task:expr, $rows:expr, $pass:ident, $l:ty, $b:ty) => {{
        let mut first = 0;
        while first < $task.x.rows {
            let m = match $task.x.rows - first {
                1 => 1,
                2 | 3 => 2,
                _ => 4,
            };
            match m {
                1 => $task.$pass::<$l, $b, 1>($rows.clone(), first),
                2 => $task.$pass::<$l, $b, 2>($rows.clone(), first),
                _ => $task.$pass::<$l, $b, 4>($rows.clone(), first),
            }
            first += m;
        }
    }};
}

impl Task<'_, '_> {
    #[inline(always)]
    unsafe fn by32<L: Lanes, B: Blocks32>(&self, rows: Range<usize>) {
        // SAFETY: passed on.
        unsafe { passes!(self, rows, pass32, L, B) }
    }

    #[inline(always)]
    unsafe fn by256<L: Lanes, B: Blocks256>(&self, rows: Range<usize>) {
        // SAFETY: passed on.
        unsafe { passes!(self, rows, pass256, L, B) }
    }

    #[inline(always)]
    unsafe fn pass32<L: Lanes, B: Blocks32, const M: usize>(&self, rows: Range<usize>, first: usize) {
        debug_assert_eq!(B::BYTES, self.w.block_storage().block_bytes());
        let x = blocks32::activations::<B, M>(self.x, first);
        let blocks = self.w.cols() / 32;
        for r in rows {
            let row = self.w.bytes()[r * blocks * B::BYTES..][..blocks * B::BYTES].as_ptr();
            // SAFETY: the row and the activations are `blocks` blocks.
            let sums = unsafe { blocks32::row::<L, B, M>(row, blocks, &x) };
            for (i, sum) in sums.into_iter().enumerate() {
                // SAFETY: column r of y is ours.
                unsafe { self.y.put(first + i, r, sum, self.accumulate) };
            }
        }
    }

    #[inline(always)]
    unsafe fn pass256<L: Lanes, B: Blocks256, const M: usize>(&self, rows: Range<usize>, first: usize) {
        debug_assert_eq!(B::BYTES, self.w.block_storage().block_bytes());
        let x = blocks256::activations::<M>(self.x, first);
        let blocks = self.w.cols() / 256;
        for r in rows {
            let row = self.w.bytes()[r * blocks * B::BYTES..][..blocks * B::BYTES].as_ptr();
            // SAFETY: the row and the activations are `blocks` blocks.
            let sums = unsafe { blocks256::row::<L, B, M>(row, blocks, &x) };
            for (i, sum) in sums.into_iter().enumerate() {
                // SAFETY: column r of y is ours.
                unsafe { self.y.put(first + i, r, sum, self.accumulate) };
            }
        }
    }
}

#[cfg(test)]
mod tests;
