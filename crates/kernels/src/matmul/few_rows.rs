//! `y = x·wᵀ` with one to four rows of x: what generating a token does.
//!
//! Every element of W is used at most four times, so the time is that of reading W. A row of W is taken in
//! pieces that fit into L1, decoded there if need be, and dotted with each row of x; tasks are blocks of rows.
//!
//! A dot product keeps [`LANES`] partial sums: element c is added to sum c % LANES, and at the end the sums are
//! added in a fixed tree. Products are rounded before they are added (no fused multiply-add: the memory is the
//! limit, and so every CPU gives the same bits).

use super::disjoint::SharedMat;
use crate::codec::simd::multiversion;
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
    let plain = w.as_f32();
    (0..rows.div_ceil(TASK_ROWS)).into_par_iter().for_each(|task| {
        let range = task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS);
        let mut piece = [0f32; PIECE];
        for r in range {
            let mut sums = [[0f32; LANES]; MAX_ROWS];
            for start in (0..cols).step_by(PIECE) {
                let end = cols.min(start + PIECE);
                let weights = match plain {
                    Some(data) => &data[r * cols..][start..end],
                    None => {
                        w.decode_row(r, start, &mut piece[..end - start]);
                        &piece[..end - start]
                    }
                };
                add_products(&x.data[start..], x.row_stride, x.rows, weights, &mut sums);
            }
            for (i, sums) in sums.iter().enumerate().take(x.rows) {
                // SAFETY: the tasks' ranges of columns do not overlap.
                unsafe { y.put(i, r, total(sums), accumulate) };
            }
        }
    });
}

multiversion! {
    /// Adds `x[i * x_stride + c] * w[c]` to `sums[i][c % LANES]` for every c and every i < m.
    fn add_products(x: &[f32], x_stride: usize, m: usize, w: &[f32], sums: &mut [[f32; LANES]; MAX_ROWS])
        = add_products_body
}

#[inline(always)]
fn add_products_body(x: &[f32], x_stride: usize, m: usize, w: &[f32], sums: &mut [[f32; LANES]; MAX_ROWS]) {
    let row = |i: usize| &x[i * x_stride..][..w.len()];
    match m {
        0 => {}
        1 => rows_of_products([row(0)], w, sums),
        2 => rows_of_products([row(0), row(1)], w, sums),
        3 => rows_of_products([row(0), row(1), row(2)], w, sums),
        _ => rows_of_products([row(0), row(1), row(2), row(3)], w, sums),
    }
}

/// One pass over w for M rows of x.
#[inline(always)]
fn rows_of_products<const M: usize>(x: [&[f32]; M], w: &[f32], sums: &mut [[f32; LANES]; MAX_ROWS]) {
    // A local copy stays in registers.
    let mut local: [[f32; LANES]; M] = std::array::from_fn(|i| sums[i]);
    let x_groups = x.map(|x| x.as_chunks::<LANES>());
    let (w_groups, w_rest) = w.as_chunks::<LANES>();
    for (g, w) in w_groups.iter().enumerate() {
        for i in 0..M {
            let x = &x_groups[i].0[g];
            for l in 0..LANES {
                local[i][l] += x[l] * w[l];
            }
        }
    }
    for i in 0..M {
        for ((sum, x), w) in local[i].iter_mut().zip(x_groups[i].1).zip(w_rest) {
            *sum += x * w;
        }
        sums[i] = local[i];
    }
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
