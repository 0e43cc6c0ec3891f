//! Copies of the right-hand matrix in the order in which the inner loops read it.
//!
//! A *panel* is up to [`NR`] columns of B: row k of it lies at `k * NR`, columns beyond the matrix are zero. A
//! frozen weight is decoded on the way, so nothing but panels ever exists of it in f32.
//!
//! For `Wᵀ` (a forward product) the rows of W become columns: sixteen rows at a time are decoded into scratch and
//! turned in blocks of 8 by 8, so that each cache line of the panel is written whole.

use super::micro::{Isa, NR};
use crate::mat::MatRef;
use crate::storage::WeightView;
use std::ops::Range;

/// The right-hand matrix `[k, n]` of a product.
#[derive(Clone, Copy, Debug)]
pub enum Right<'a> {
    /// `Wᵀ` of a stored weight W `[n, k]`: forward
    WeightT(WeightView<'a>),
    /// a stored weight W `[k, n]` as it is: gradient of the input
    Weight(WeightView<'a>),
    /// floats
    Dense(MatRef<'a>),
}

impl Right<'_> {
    /// Rows and columns of the matrix.
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Self::WeightT(w) => (w.cols(), w.rows()),
            Self::Weight(w) => (w.rows(), w.cols()),
            Self::Dense(m) => (m.rows, m.cols),
        }
    }

    /// Inner rows must be cut at multiples of this.
    pub(super) fn inner_step(&self) -> usize {
        match self {
            Self::WeightT(w) => w.column_step(),
            _ => 1,
        }
    }

    /// Columns must be cut at multiples of this.
    pub(super) fn column_step(&self) -> usize {
        match self {
            Self::Weight(w) => w.column_step().max(NR),
            _ => NR,
        }
    }
}

/// Rows of W that are decoded and turned together.
const STRIP: usize = 16;

/// Fills panels with `scale · b[inner, columns]`; the panels of `columns` lie behind each other, each
/// `inner.len() * NR` long. `rows` is scratch of at least [`scratch_len`].
pub(crate) fn pack(
    isa: Isa,
    b: &Right,
    scale: f32,
    inner: Range<usize>,
    columns: Range<usize>,
    panels: &mut [f32],
    rows: &mut [f32],
) {
    let depth = inner.len();
    if let Right::Weight(w) = b {
        return straight_weight(w, scale, inner, columns, panels, rows);
    }
    for (panel, start) in panels.chunks_exact_mut(depth * NR).zip(columns.clone().step_by(NR)) {
        let columns = start..columns.end.min(start + NR);
        match b {
            Right::Weight(_) => {}
            Right::WeightT(w) => turned_weight(isa, w, scale, &inner, columns, panel, rows),
            Right::Dense(m) if m.col_stride == 1 => straight(m, scale, &inner, columns, panel),
            Right::Dense(m) => {
                // columns of b that are contiguous along the inner dimension are rows to be turned
                let m = m.t();
                for strip in (0..NR).step_by(STRIP) {
                    let row = |j: usize| {
                        let column = columns.start + strip + j;
                        let at = column * m.row_stride + inner.start * m.col_stride;
                        (strip + j < columns.len()).then(|| &m.data[at..])
                    };
                    match m.col_stride {
                        1 => turn_strip(isa, row, depth, scale, strip, panel),
                        stride => gather_strip(row, stride, depth, scale, strip, panel),
                    }
                }
            }
        }
    }
}

/// Floats of scratch that [`pack`] needs for `depth` inner rows and `columns` columns.
pub(super) fn scratch_len(depth: usize, columns: usize) -> usize {
    (STRIP * depth).max(columns.next_multiple_of(NR))
}

/// Rows of the panel are pieces of rows of the weight.
fn straight_weight(
    w: &WeightView,
    scale: f32,
    inner: Range<usize>,
    columns: Range<usize>,
    panels: &mut [f32],
    row: &mut [f32],
) {
    let (depth, width) = (inner.len(), columns.len());
    let plain = w.as_f32();
    for (k, r) in inner.enumerate() {
        let elements: &[f32] = match plain {
            Some(data) => &data[r * w.cols()..][columns.clone()],
            None => {
                w.decode_row(r, columns.start, &mut row[..width]);
                &row[..width]
            }
        };
        for (piece, panel) in elements.chunks(NR).zip(panels.chunks_exact_mut(depth * NR)) {
            put_row(piece, scale, &mut panel[k * NR..][..NR]);
        }
    }
}

fn straight(m: &MatRef, scale: f32, inner: &Range<usize>, columns: Range<usize>, panel: &mut [f32]) {
    for (k, out) in inner.clone().zip(panel.chunks_exact_mut(NR)) {
        put_row(&m.data[k * m.row_stride + columns.start..][..columns.len()], scale, out);
    }
}

/// `out = scale · piece`, filled up with zeros.
#[inline]
fn put_row(piece: &[f32], scale: f32, out: &mut [f32]) {
    if let (Some(piece), Some(out), true) =
        (piece.first_chunk::<NR>(), out.first_chunk_mut::<NR>(), scale == 1.0)
    {
        // known lengths: moved in registers, not by a call
        *out = *piece;
        return;
    }
    let (head, rest) = out.split_at_mut(piece.len());
    match scale == 1.0 {
        true => head.copy_from_slice(piece),
        false => head.iter_mut().zip(piece).for_each(|(o, v)| *o = scale * v),
    }
    rest.fill(0.0);
}

/// Columns of the panel are pieces of rows of the weight.
fn turned_weight(
    isa: Isa,
    w: &WeightView,
    scale: f32,
    inner: &Range<usize>,
    columns: Range<usize>,
    panel: &mut [f32],
    rows: &mut [f32],
) {
    let depth = inner.len();
    let plain = w.as_f32();
    for strip in (0..NR).step_by(STRIP) {
        let alive = columns.len().saturating_sub(strip).min(STRIP);
        if let Some(data) = plain {
            let row = |j: usize| {
                (j < alive).then(|| &data[(columns.start + strip + j) * w.cols() + inner.start..][..depth])
            };
            turn_strip(isa, row, depth, scale, strip, panel);
            continue;
        }
        for (j, out) in rows.chunks_exact_mut(depth).enumerate().take(alive) {
            w.decode_row(columns.start + strip + j, inner.start, out);
        }
        let row = |j: usize| (j < alive).then(|| &rows[j * depth..][..depth]);
        turn_strip(isa, row, depth, scale, strip, panel);
    }
}

/// `panel[k, strip + j] = scale · row(j)[k]` for the sixteen j of a strip; missing rows are zero.
fn turn_strip<'r>(
    isa: Isa,
    row: impl Fn(usize) -> Option<&'r [f32]>,
    depth: usize,
    scale: f32,
    strip: usize,
    panel: &mut [f32],
) {
    assert!(panel.len() >= depth * NR && strip + STRIP <= NR);
    let rows: [Option<&[f32]>; STRIP] = std::array::from_fn(row);
    let whole = rows.iter().all(|r| r.is_some_and(|r| r.len() >= depth));
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if whole && isa != Isa::Portable {
        let pointers: [*const f32; STRIP] = std::array::from_fn(|j| rows[j].unwrap_or(&[]).as_ptr());
        done = depth / 8 * 8;
        // SAFETY: every row has `depth` elements and the panel `depth` rows; Avx2 and Avx512 imply AVX2.
        unsafe { turn_avx2(&pointers, done, scale, panel.as_mut_ptr().add(strip)) };
    }
    let _ = (isa, whole);
    for (j, row) in rows.iter().enumerate() {
        for k in done..depth {
            panel[k * NR + strip + j] = row.map_or(0.0, |r| scale * r[k]);
        }
    }
}

/// As [`turn_strip`] for rows whose elements lie `stride` apart.
fn gather_strip<'r>(
    row: impl Fn(usize) -> Option<&'r [f32]>,
    stride: usize,
    depth: usize,
    scale: f32,
    strip: usize,
    panel: &mut [f32],
) {
    for j in 0..STRIP {
        let row = row(j);
        for k in 0..depth {
            panel[k * NR + strip + j] = row.map_or(0.0, |r| scale * r[k * stride]);
        }
    }
}

/// Turns sixteen rows of `depth` (a multiple of 8) elements into columns of `out`, whose rows lie [`NR`] apart.
///
/// # Safety
///
/// The CPU has AVX2; the rows have `depth` elements; `out` has `depth` rows with 16 writable elements each.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn turn_avx2(rows: &[*const f32; STRIP], depth: usize, scale: f32, out: *mut f32) {
    use std::arch::x86_64::*;
    let factor = _mm256_set1_ps(scale);
    for k in (0..depth).step_by(8) {
        for half in 0..2 {
            // SAFETY: within the rows and the panel, as the caller promises.
            unsafe {
                let r: [__m256; 8] = std::array::from_fn(|j| {
                    _mm256_mul_ps(_mm256_loadu_ps(rows[8 * half + j].add(k)), factor)
                });
                // pairs, then quarters, then halves change places
                let p: [__m256; 8] = std::array::from_fn(|i| {
                    let (a, b) = (r[i / 2 * 2], r[i / 2 * 2 + 1]);
                    if i % 2 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) }
                });
                let q: [__m256; 8] = std::array::from_fn(|i| {
                    let base = i / 4 * 4;
                    let (a, b) = (p[base + (i % 4) / 2], p[base + (i % 4) / 2 + 2]);
                    match i % 2 {
                        0 => _mm256_shuffle_ps::<0x44>(a, b),
                        _ => _mm256_shuffle_ps::<0xEE>(a, b),
                    }
                });
                for i in 0..4 {
                    let low = _mm256_permute2f128_ps::<0x20>(q[i], q[i + 4]);
                    let high = _mm256_permute2f128_ps::<0x31>(q[i], q[i + 4]);
                    _mm256_storeu_ps(out.add((k + i) * NR + 8 * half), low);
                    _mm256_storeu_ps(out.add((k + 4 + i) * NR + 8 * half), high);
                }
            }
        }
    }
}
