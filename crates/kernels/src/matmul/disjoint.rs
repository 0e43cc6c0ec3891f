//! One output matrix, written by several threads in blocks that do not overlap.
//!
//! A row-major matrix cut into blocks of columns is not a set of slices (each row of a block is followed by
//! other blocks), so the blocks are raw pointers. All of this crate's shared writing of one matrix is here.

use crate::mat::{MatMut, MatRef};
use gemm::Parallelism;
use std::marker::PhantomData;
use std::ops::Range;

/// A [`MatMut`] whose blocks of columns can be written from several threads.
pub(crate) struct SharedMat<'a> {
    ptr: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: the matrix is reached only through `columns`, whose callers promise that the blocks that are alive at
// the same time do not overlap; f32 may be written from any thread.
unsafe impl Sync for SharedMat<'_> {}
// SAFETY: as above; the exclusive borrow moves along with the value.
unsafe impl Send for SharedMat<'_> {}

impl<'a> SharedMat<'a> {
    /// Borrows `mat`. Panics if its rows overlap or reach past its data.
    pub fn new(mat: &'a mut MatMut) -> Self {
        let (rows, cols, row_stride) = (mat.rows, mat.cols, mat.row_stride);
        assert!(rows <= 1 || row_stride >= cols, "rows {row_stride} apart overlap at {cols} columns");
        assert!(extent(rows, cols, row_stride, 1) <= mat.data.len(), "matrix [{rows}, {cols}] past its data");
        Self { ptr: mat.data.as_mut_ptr(), rows, cols, row_stride, borrow: PhantomData }
    }

    /// The columns `range` of all rows.
    ///
    /// # Safety
    ///
    /// No two blocks with a column in common may be alive at the same time.
    pub unsafe fn columns(&self, range: Range<usize>) -> Block<'_> {
        assert!(range.start <= range.end && range.end <= self.cols);
        // Not `add`: an empty matrix may have no element at the offset.
        let ptr = self.ptr.wrapping_add(range.start);
        let (rows, cols, row_stride) = (self.rows, range.len(), self.row_stride);
        Block { ptr, rows, cols, row_stride, borrow: PhantomData }
    }

    /// The whole matrix as one block.
    pub fn whole(&mut self) -> Block<'_> {
        // SAFETY: `self` is borrowed mutably for the block's life, so there is no other block.
        unsafe { self.columns(0..self.cols) }
    }
}

/// A block of columns of a [`SharedMat`]; nobody else reads or writes it.
pub(crate) struct Block<'a> {
    ptr: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut f32>,
}

impl Block<'_> {
    /// `self = alpha·a·b + beta·self`; with `beta == 0` self is not read.
    pub fn gemm(&mut self, alpha: f32, a: MatRef, b: MatRef, beta: f32, parallelism: Parallelism) {
        assert_eq!((a.rows, b.cols), (self.rows, self.cols), "gemm: outer sizes");
        assert_eq!(a.cols, b.rows, "gemm: inner sizes");
        check(&a);
        check(&b);
        let stride = |n: usize| n as isize;
        // SAFETY: `check` and the constructors made sure that every element of `a`, `b` and this block lies in
        // its slice; the block is borrowed mutably and its rows do not overlap. gemm's "alpha" is the factor of
        // the old value, which it reads only if `read_dst`.
        unsafe {
            gemm::gemm(
                self.rows,
                self.cols,
                a.cols,
                self.ptr,
                1,
                stride(self.row_stride),
                beta != 0.0,
                a.data.as_ptr(),
                stride(a.col_stride),
                stride(a.row_stride),
                b.data.as_ptr(),
                stride(b.col_stride),
                stride(b.row_stride),
                beta,
                alpha,
                false,
                false,
                false,
                parallelism,
            );
        }
    }

    /// Sets element (i, j) to `value`, or adds it.
    #[inline]
    pub fn put(&mut self, i: usize, j: usize, value: f32, accumulate: bool) {
        assert!(i < self.rows && j < self.cols);
        // SAFETY: (i, j) is inside the block, and the block inside the borrowed slice.
        unsafe {
            let at = self.ptr.add(i * self.row_stride + j);
            *at = if accumulate { *at + value } else { value };
        }
    }
}

/// Panics unless every element of `mat` lies in its slice.
fn check(mat: &MatRef) {
    let needed = extent(mat.rows, mat.cols, mat.row_stride, mat.col_stride);
    assert!(needed <= mat.data.len(), "matrix [{}, {}] past its data", mat.rows, mat.cols);
}

/// Elements from the first to behind the last one of a strided matrix.
fn extent(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    let last = (rows - 1).checked_mul(row_stride).zip((cols - 1).checked_mul(col_stride));
    last.and_then(|(i, j)| i.checked_add(j)?.checked_add(1)).expect("matrix size overflows")
}
