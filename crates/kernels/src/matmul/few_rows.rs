//! `y = x·wᵀ` with one to four rows of x: what generating a token does.
//!
//! Every element of W is used at most four times, so the time is that of reading W. A row of W is taken in
//! pieces that fit into L1, decoded there if need be, and dotted with each row of x; tasks are blocks of rows.
//!
//! A dot product keeps [`LANES`] partial sums: element c is added to sum c % LANES, and at the end the sums are
//! added in a fixed tree. Products are rounded before they are added (no fused multiply-add: the memory is the
//! limit, and so every CPU gives the same bits).

use super::disjoint::SharedMat;
use crate::codec::{self, simd::multiversion};
use crate::mat::{MatMut, MatRef};
use crate::storage::WeightView;
use rayon::prelude::*;

/// Most rows of x for which this path is taken.
const MAX_ROWS: usize = 4;
/// Partial sums of one dot product: four AVX-512 or eight AVX2 registers.
const LANES: usize = 64;
/// Elements decoded at a time; a multiple of every block length and of [`LANES`].
const PIECE: usize = 1024;
/// Rows of W in one task.
const TASK_ROWS: usize = 16;

/// True if x has few rows, without gaps between columns.
pub(super) fn applies(x: &MatRef) -> bool {
    x.rows <= MAX_ROWS && x.col_stride == 1
}

/// `y (+)= x·wᵀ`.
pub(super) fn linear(x: MatRef, w: WeightView, y: &mut MatMut, accumulate: bool) {
    let y = SharedMat::new(y);
    let (rows, cols) = (w.rows(), w.cols());
    let x_row = |i: usize| &x.data[i * x.row_stride..][..cols];
    let plain = w.as_f32();
    (0..rows.div_ceil(TASK_ROWS)).into_par_iter().for_each(|task| {
        let range = task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS);
        // SAFETY: the tasks' ranges of columns do not overlap.
        let mut out = unsafe { y.columns(range.clone()) };
        let mut piece = [0f32; PIECE];
        for (j, r) in range.enumerate() {
            let mut sums = [[0f32; LANES]; MAX_ROWS];
            for start in (0..cols).step_by(PIECE) {
                let end = cols.min(start + PIECE);
                let weights = match plain {
                    Some(data) => &data[r * cols..][start..end],
                    None => {
                        codec::decode_range(w.row(r), w.storage(), start, &mut piece[..end - start]);
                        &piece[..end - start]
                    }
                };
                for (i, sums) in sums.iter_mut().enumerate().take(x.rows) {
                    add_products(&x_row(i)[start..end], weights, sums);
                }
            }
            for (i, sums) in sums.iter().enumerate().take(x.rows) {
                out.put(i, j, total(sums), accumulate);
            }
        }
    });
}

multiversion! {
    /// Adds `a[c] * b[c]` to `sums[c % LANES]` for every c.
    fn add_products(a: &[f32], b: &[f32], sums: &mut [f32; LANES]) = add_products_body
}

#[inline(always)]
fn add_products_body(a: &[f32], b: &[f32], sums: &mut [f32; LANES]) {
    // A local copy stays in registers.
    let mut local = *sums;
    let (a_groups, a_rest) = a.as_chunks::<LANES>();
    let (b_groups, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_groups.iter().zip(b_groups) {
        for l in 0..LANES {
            local[l] += a[l] * b[l];
        }
    }
    for ((sum, a), b) in local.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += a * b;
    }
    *sums = local;
}

/// The lanes' sum, halves onto halves.
fn total(sums: &[f32; LANES]) -> f32 {
    let mut sums = *sums;
    let mut len = LANES;
    while len > 1 {
        len /= 2;
        for i in 0..len {
            sums[i] += sums[i + len];
        }
    }
    sums[0]
}
