//! One output matrix, written by several threads in blocks that do not overlap.
//!
//! A row-major matrix cut into blocks of columns is not a set of slices (each row of a block is followed by
//! other blocks), so the blocks are raw pointers. All of this crate's shared writing of one matrix is here.

use crate::mat::MatMut;
use std::marker::PhantomData;
use std::ops::Range;

/// A [`MatMut`] whose blocks can be written from several threads.
pub(crate) struct SharedMat<'a> {
    ptr: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: elements are reached only through unsafe functions whose callers promise that what they touch at the same
// time does not overlap; f32 may be written from any thread.
unsafe impl Sync for SharedMat<'_> {}
// SAFETY: as above; the exclusive borrow moves along with the value.
unsafe impl Send for SharedMat<'_> {}

impl<'a> SharedMat<'a> {
    /// Borrows `mat`. Panics if its rows overlap or reach past its data.
    pub fn new(mat: &'a mut MatMut) -> Self {
        let (rows, cols, row_stride) = (mat.rows, mat.cols, mat.row_stride);
        assert!(rows <= 1 || row_stride >= cols, "rows {row_stride} apart overlap at {cols} columns");
        let needed = crate::mat::extent(rows, cols, row_stride, 1);
        assert!(needed <= mat.data.len(), "matrix [{rows}, {cols}] past its data");
        Self { ptr: mat.data.as_mut_ptr(), rows, cols, row_stride, borrow: PhantomData }
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Distance of two rows, in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Where element (i, j) lies. Using it needs the promise that nobody else does.
    pub fn pointer(&self, i: usize, j: usize) -> *mut f32 {
        debug_assert!(i < self.rows && j < self.cols);
        self.ptr.wrapping_add(i * self.row_stride + j)
    }

    /// Sets element (i, j) to `value`, or adds it.
    ///
    /// # Safety
    ///
    /// Nobody else may read or write the element meanwhile.
    #[inline]
    pub unsafe fn put(&self, i: usize, j: usize, value: f32, accumulate: bool) {
        assert!(i < self.rows && j < self.cols);
        let at = self.pointer(i, j);
        // SAFETY: (i, j) is inside the borrowed slice, and nobody else uses it.
        unsafe { *at = if accumulate { *at + value } else { value } };
    }

    /// Sets a block to `value`.
    ///
    /// # Safety
    ///
    /// Nobody else may read or write the block meanwhile.
    pub unsafe fn fill(&self, rows: Range<usize>, columns: Range<usize>, value: f32) {
        for i in rows {
            for j in columns.clone() {
                // SAFETY: passed on from the caller.
                unsafe { self.put(i, j, value, false) };
            }
        }
    }
}
