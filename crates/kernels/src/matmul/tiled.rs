//! Products with a stored weight, tile by tile.
//!
//! A task owns a block of the output's columns. It walks along the inner dimension in slices of at most
//! [`DEPTH`]; for each it decodes the tile of W that the block needs and adds the tile's product to the block:
//!
//! ```text
//! forward     y[:, R]  = Σ_C x[:, C]·W[R, C]ᵀ     task: rows R of W;    slices: columns C
//! input grad  dx[:, C] = Σ_R dy[:, R]·W[R, C]     task: columns C of W; slices: rows R
//! ```
//!
//! A weight's element is decoded once per call and then used 2·m times, so at the m of training decoding is
//! nearly free. Each output element belongs to one task and its slices follow in order: the result depends on
//! the shapes alone.

use super::disjoint::SharedMat;
use crate::codec;
use crate::mat::{MatMut, MatRef};
use crate::storage::WeightView;
use gemm::Parallelism;
use rayon::prelude::*;
use std::cell::Cell;

/// Longest slice of the inner dimension: what the gemm crate takes in one pass as well.
const DEPTH: usize = 512;
/// Output columns of one task. A multiple of gemm's register block (48 with AVX-512, 24 with AVX2, 16 else),
/// small enough to share the layers of small models among many threads.
const WIDTH: usize = 96;
/// Elements between the rows of a tile beyond its columns: rows a power of two apart would all fall into the
/// same few sets of the L1 cache.
const PAD: usize = 16;

thread_local! {
    /// The tile being worked on: at most `DEPTH * (256 + PAD)` floats, kept between calls.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Lends `len` floats of this thread's scratch; what they hold is left from earlier use.
fn with_scratch(len: usize, use_it: impl FnOnce(&mut [f32])) {
    // Taken out, not borrowed: a nested call (rayon may run another task here) finds an empty Vec, not a panic.
    let mut scratch = SCRATCH.take();
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    use_it(&mut scratch[..len]);
    SCRATCH.set(scratch);
}

/// Length of the slices into which `inner` is cut: equal but for the last, at most [`DEPTH`], whole blocks.
fn slice_len(inner: usize, block_len: usize) -> usize {
    let slices = inner.div_ceil(DEPTH).max(1);
    inner.div_ceil(slices).next_multiple_of(block_len.max(16)).min(DEPTH)
}

/// Decodes `w[rows, cols]` into `tile`, row-major with `stride`; `cols` begins and ends between blocks.
fn decode_tile(w: WeightView, rows: (usize, usize), cols: (usize, usize), tile: &mut [f32], stride: usize) {
    for (r, out) in (rows.0..rows.1).zip(tile.chunks_mut(stride)) {
        codec::decode_range(w.row(r), w.storage(), cols.0, &mut out[..cols.1 - cols.0]);
    }
}

/// `y (+)= x·wᵀ`.
pub(super) fn linear(x: MatRef, w: WeightView, y: &mut MatMut, accumulate: bool) {
    if w.cols() == 0 {
        return super::sgemm(1.0, x, MatRef::new(&[], 0, w.rows()), accumulate as u8 as f32, y);
    }
    let depth = slice_len(w.cols(), w.storage().block_len());
    let stride = depth + PAD;
    let y = SharedMat::new(y);
    (0..w.rows().div_ceil(WIDTH)).into_par_iter().with_max_len(1).for_each(|block| {
        let rows = (block * WIDTH, w.rows().min((block + 1) * WIDTH));
        // SAFETY: the tasks' ranges of columns do not overlap.
        let mut out = unsafe { y.columns(rows.0..rows.1) };
        with_scratch(WIDTH * stride, |tile| {
            for start in (0..w.cols()).step_by(depth) {
                let cols = (start, w.cols().min(start + depth));
                let (height, width) = (rows.1 - rows.0, cols.1 - cols.0);
                decode_tile(w, rows, cols, tile, stride);
                let tile = MatRef::strided(tile, height, width, stride);
                let beta = if accumulate || start > 0 { 1.0 } else { 0.0 };
                out.gemm(1.0, columns(x, cols), tile.t(), beta, Parallelism::None);
            }
        });
    });
}

/// `dx (+)= dy·w`.
pub(super) fn linear_input_grad(dy: MatRef, w: WeightView, dx: &mut MatMut, accumulate: bool) {
    if w.rows() == 0 {
        return super::sgemm(1.0, dy, MatRef::new(&[], 0, w.cols()), accumulate as u8 as f32, dx);
    }
    let width = WIDTH.next_multiple_of(w.storage().block_len());
    let stride = width + PAD;
    let depth = slice_len(w.rows(), 1);
    let dx = SharedMat::new(dx);
    (0..w.cols().div_ceil(width)).into_par_iter().with_max_len(1).for_each(|block| {
        let cols = (block * width, w.cols().min((block + 1) * width));
        // SAFETY: the tasks' ranges of columns do not overlap.
        let mut out = unsafe { dx.columns(cols.0..cols.1) };
        with_scratch(depth * stride, |tile| {
            for start in (0..w.rows()).step_by(depth) {
                let rows = (start, w.rows().min(start + depth));
                decode_tile(w, rows, cols, tile, stride);
                let tile = MatRef::strided(tile, rows.1 - rows.0, cols.1 - cols.0, stride);
                let beta = if accumulate || start > 0 { 1.0 } else { 0.0 };
                out.gemm(1.0, columns(dy, rows), tile, beta, Parallelism::None);
            }
        });
    });
}

/// The columns `range` of `mat`.
fn columns(mat: MatRef, range: (usize, usize)) -> MatRef {
    let data = mat.data.get(range.0 * mat.col_stride..).unwrap_or(&[]);
    MatRef { data, cols: range.1 - range.0, ..mat }
}
