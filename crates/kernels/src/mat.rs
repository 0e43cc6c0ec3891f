//! Strided views of f32 matrices.

/// A borrowed matrix: element (i, j) lies at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    /// the elements
    pub data: &'a [f32],
    /// rows
    pub rows: usize,
    /// columns
    pub cols: usize,
    /// distance of two rows, in elements
    pub row_stride: usize,
    /// distance of two columns, in elements
    pub col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A row-major matrix without gaps. Panics if `data` is shorter than `rows * cols`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "matrix [{rows}, {cols}] over {} elements", data.len());
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// A row-major matrix whose rows lie `row_stride` apart.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || data.len() >= (rows - 1) * row_stride + cols);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// Panics unless every element lies in `data`.
    pub(crate) fn check(&self) {
        let needed = extent(self.rows, self.cols, self.row_stride, self.col_stride);
        assert!(needed <= self.data.len(), "matrix [{}, {}] past its data", self.rows, self.cols);
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// A mutable row-major matrix; rows lie `row_stride` apart.
#[derive(Debug)]
pub struct MatMut<'a> {
    /// the elements
    pub data: &'a mut [f32],
    /// rows
    pub rows: usize,
    /// columns
    pub cols: usize,
    /// distance of two rows, in elements
    pub row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A row-major matrix without gaps. Panics if `data` is shorter than `rows * cols`.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "matrix [{rows}, {cols}] over {} elements", data.len());
        Self { data, rows, cols, row_stride: cols }
    }

    /// A row-major matrix whose rows lie `row_stride` apart.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || data.len() >= (rows - 1) * row_stride + cols);
        Self { data, rows, cols, row_stride }
    }
}

/// Elements from the first to behind the last one of a strided matrix.
pub(crate) fn extent(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    let last = (rows - 1).checked_mul(row_stride).zip((cols - 1).checked_mul(col_stride));
    last.and_then(|(i, j)| i.checked_add(j)?.checked_add(1)).expect("matrix size overflows")
}
