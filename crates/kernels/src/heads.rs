//! What the kernels of attention share: heads of buffers, and products with packed panels.

use crate::mat::MatRef;
use crate::matmul::micro::{self, Isa, NR, Tile};
use crate::matmul::pack::{self, Right};
use std::marker::PhantomData;
use std::ops::Range;

/// A buffer that tasks write in parts that do not overlap.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a>(*mut f32, usize, PhantomData<&'a mut [f32]>);

// SAFETY: users write rows of their own segment and head only.
unsafe impl Sync for Shared<'_> {}
// SAFETY: as above.
unsafe impl Send for Shared<'_> {}

impl<'a> Shared<'a> {
    /// All of `data`.
    pub fn new(data: &'a mut [f32]) -> Self {
        Self(data.as_mut_ptr(), data.len(), PhantomData)
    }

    /// From the element `index` on. Panics beyond the buffer's end.
    pub fn at(&self, index: usize) -> *mut f32 {
        assert!(index <= self.1);
        self.0.wrapping_add(index)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.1
    }
}

/// Packs all columns of `b`.
pub(crate) fn panels(isa: Isa, b: MatRef, scale: f32) -> Vec<f32> {
    let (inner, columns) = (b.rows, b.cols);
    let mut out = vec![0f32; inner * columns.next_multiple_of(NR)];
    if !out.is_empty() {
        pack::pack(isa, &Right::Dense(b), scale, 0..inner, 0..columns, &mut out, &mut []);
    }
    out
}

/// `c[rows, width] = a·b` for packed panels of `b`, over as many rows of b as a has columns, from row `skip` on.
///
/// # Safety
/// c has `a.rows` rows of `width` elements, `c_row` apart, that nobody else uses.
pub(crate) unsafe fn multiply(
    isa: Isa,
    a: MatRef,
    panels: &[f32],
    panel_rows: usize,
    skip: usize,
    width: usize,
    c: *mut f32,
    c_row: usize,
    accumulate: bool,
) {
    a.check();
    let (panel_len, k) = (panel_rows * NR, a.cols);
    assert!(skip + k <= panel_rows && panels.len() >= width.div_ceil(NR) * panel_len);
    for (panel, left) in panels.chunks_exact(panel_len.max(1)).zip((0..width).step_by(NR)) {
        let tile = Tile {
            a: a.data.as_ptr(),
            a_row: a.row_stride,
            a_col: a.col_stride,
            b: panel[skip * NR..].as_ptr(),
            b_row: NR,
            k,
            c: c.wrapping_add(left),
            c_row,
            rows: a.rows,
            width: (width - left).min(NR),
            accumulate,
        };
        // SAFETY: a was checked, the panel has k rows, the caller vouches for c.
        unsafe { micro::run(isa, &tile) };
    }
}

/// Makes room for `len` elements.
pub(crate) fn resize(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// Rows `rows` of head `head` in a buffer `[_, heads·hd]`.
pub(crate) fn view(data: &[f32], rows: Range<usize>, head: usize, heads: usize, hd: usize) -> MatRef<'_> {
    let (width, n) = (heads * hd, rows.len());
    if n == 0 {
        return MatRef::strided(&[], 0, hd, width);
    }
    let from = rows.start * width + head * hd;
    MatRef::strided(&data[from..from + (n - 1) * width + hd], n, hd, width)
}
