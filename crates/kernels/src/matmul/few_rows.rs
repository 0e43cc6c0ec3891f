//! `y = x·wᵀ` with one to four rows of x: what generating a token does.
//!
//! Every element of W is used at most four times, so the time is that of reading W. A row of W is taken in
//! pieces that fit into L1, decoded there if need be, and dotted with each row of x; or, where activations may be
//! rounded, it is multiplied as it is stored (`qdot.rs`). Several products are one parallel region.
//!
//! A dot product keeps [`LANES`] partial sums: element c is added to sum c % LANES, and at the end the sums are
//! added in a fixed tree. Products are rounded before they are added (no fused multiply-add: the memory is the
//! limit, and so every CPU gives the same bits).

use super::Part;
use super::disjoint::SharedMat;
use super::float_rows;
use crate::codec::simd::multiversion;
use crate::lanes::Backend;
use crate::mat::MatRef;
use crate::qdot::{self, Rounded, Rounding};
use crate::storage::WeightView;
use crate::team;
use std::ops::Range;

/// Most rows of x for which this path is taken.
const MAX_ROWS: usize = 4;
/// Partial sums of one dot product: four AVX-512 or eight AVX2 registers.
const LANES: usize = 64;
/// Elements decoded at a time; a multiple of every block length and of [`LANES`].
const PIECE: usize = 1024;
/// Least bytes of W in a part: about a microsecond of reading. Smaller parts start the memory's streams too often.
const PART_BYTES: usize = 32 << 10;
/// Bytes of all W below which one thread does it.
const SERIAL_BYTES: usize = 64 << 10;

/// True if x has few rows, without gaps between columns.
pub(super) fn applies(x: &MatRef) -> bool {
    x.rows <= MAX_ROWS && x.col_stride == 1
}

/// One product, ready to be shared out.
struct Job<'a, 'b> {
    w: WeightView<'a>,
    y: SharedMat<'b>,
    accumulate: bool,
    rounded: Option<&'a Rounded>,
    /// plain floats are multiplied as they are loaded, which rounds differently from CPU to CPU
    fused: bool,
}

/// `y (+)= x·wᵀ` for all parts, in one parallel region. Parts beside a rounding in `rounded` take that for x; with
/// `generating`, plain floats are multiplied in fewer instructions.
pub(super) fn linear(x: MatRef, parts: &mut [Part<'_, '_>], rounded: &[Rounded], generating: bool) {
    let bytes: usize = parts.iter().map(|p| p.w.bytes().len()).sum();
    let rows: usize = parts.iter().map(|p| p.w.rows()).sum();
    let jobs: Vec<Job<'_, '_>> = parts
        .iter_mut()
        .map(|part| Job {
            w: part.w,
            rounded: rounded
                .iter()
                .find(|r| Some(r.rounding()) == part.w.storage().and_then(Rounding::beside)),
            y: SharedMat::new(&mut part.y),
            accumulate: part.accumulate,
            fused: generating && part.w.storage().is_some_and(|s| !s.is_quantized()),
        })
        .collect();
    let least = if bytes < SERIAL_BYTES { rows } else { (PART_BYTES * rows).div_ceil(bytes) };
    let backend = Backend::best();
    // the parts' rows one behind the other
    team::split(rows, least, &|range| {
        let mut before = 0;
        for job in &jobs {
            let (start, end) = (range.start.max(before), range.end.min(before + job.w.rows()));
            if start < end {
                job.rows(x, backend, start - before..end - before);
            }
            before += job.w.rows();
        }
    });
}

impl Job<'_, '_> {
    fn rows(&self, x: MatRef, backend: Backend, range: Range<usize>) {
        match self.rounded {
            // SAFETY: the parts' ranges of rows of W, columns of y, do not overlap.
            Some(rounded) => unsafe {
                qdot::rows(backend, rounded, self.w, range, &self.y, self.accumulate);
            },
            // SAFETY: as above.
            None if self.fused => unsafe {
                float_rows::rows(backend, x, self.w, range, &self.y, self.accumulate);
            },
            // SAFETY: as above.
            None => unsafe { decoded(x, self.w, range, &self.y, self.accumulate) },
        }
    }
}

/// Rows `range` of W, decoded piece by piece, times x.
///
/// # Safety
/// Nobody else may use the columns `range` of `y` meanwhile.
unsafe fn decoded(x: MatRef, w: WeightView, range: Range<usize>, y: &SharedMat<'_>, accumulate: bool) {
    let (cols, plain) = (w.cols(), w.as_f32());
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
            // SAFETY: column r of y is ours.
            unsafe { y.put(i, r, total(sums), accumulate) };
        }
    }
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
