//! Sums, scalings and reductions over whole buffers.

use rayon::prelude::*;

/// Elements of a parallel part. Fixed, so that results do not depend on the number of threads.
pub(crate) const CHUNK: usize = 1 << 15;

/// `out = a + b`. Panics if lengths differ.
pub fn add(a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(a.len() == b.len() && a.len() == out.len());
    out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK)).for_each(|((o, a), b)| {
        for ((o, a), b) in o.iter_mut().zip(a).zip(b) {
            *o = a + b;
        }
    });
}

/// `a += b`. Panics if lengths differ.
pub fn add_assign(a: &mut [f32], b: &[f32]) {
    axpy(1.0, b, a);
}

/// `a *= s`.
pub fn scale(a: &mut [f32], s: f32) {
    a.par_chunks_mut(CHUNK).for_each(|a| a.iter_mut().for_each(|v| *v *= s));
}

/// Columns of two matrices whose rows are `group`s of columns: of each row's group g, what `from` says in the one
/// goes to what `to` says in the other.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// groups in a row
    pub groups: usize,
    /// columns that are copied of each group
    pub width: usize,
    /// a group's width in the source, and where its columns begin
    pub from: (usize, usize),
    /// the same in the destination
    pub to: (usize, usize),
}

/// Copies columns of every row. Panics if lengths do not fit.
pub fn copy_columns(columns: Columns, src: &[f32], dst: &mut [f32]) {
    let Columns { groups, width, from: (src_group, src_at), to: (dst_group, dst_at) } = columns;
    assert!(src_at + width <= src_group && dst_at + width <= dst_group);
    let (src_row, dst_row) = (groups * src_group, groups * dst_group);
    if dst_row == 0 || width == 0 {
        return;
    }
    assert!(src.len() / src_row == dst.len() / dst_row);
    dst.par_chunks_exact_mut(dst_row).zip(src.par_chunks_exact(src_row)).with_min_len(32).for_each(
        |(dst, src)| {
            for (dst, src) in dst.chunks_exact_mut(dst_group).zip(src.chunks_exact(src_group)) {
                dst[dst_at..dst_at + width].copy_from_slice(&src[src_at..src_at + width]);
            }
        },
    );
}

/// `y += s·x`. Panics if lengths differ.
pub fn axpy(s: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        for (y, x) in y.iter_mut().zip(x) {
            *y += s * x;
        }
    });
}

/// Sum of squares in f64, over parts of fixed size added in order.
pub fn sum_squares(x: &[f32]) -> f64 {
    let parts: Vec<f64> =
        x.par_chunks(CHUNK).map(|c| c.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()).collect();
    parts.iter().sum()
}

/// True if no element is NaN or infinite.
pub fn all_finite(x: &[f32]) -> bool {
    x.par_chunks(CHUNK).all(|c| c.iter().all(|v| v.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_go_to_their_place() {
        // two rows of two groups (a b c)
        let src: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let mut dst = vec![-1.0; 8];
        copy_columns(Columns { groups: 2, width: 1, from: (3, 1), to: (2, 0) }, &src, &mut dst);
        assert_eq!(dst, [1.0, -1.0, 4.0, -1.0, 7.0, -1.0, 10.0, -1.0]);
        copy_columns(Columns { groups: 1, width: 4, from: (6, 2), to: (4, 0) }, &src, &mut dst);
        assert_eq!(dst, [2.0, 3.0, 4.0, 5.0, 8.0, 9.0, 10.0, 11.0]);
    }

    #[test]
    fn sums_and_products() {
        let n = CHUNK * 2 + 7;
        let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
        let b: Vec<f32> = (0..n).map(|i| 0.5 * i as f32).collect();
        let mut out = vec![0.0; n];
        add(&a, &b, &mut out);
        axpy(-1.0, &b, &mut out);
        assert_eq!(out, a);
        scale(&mut out, 2.0);
        add_assign(&mut out, &b);
        assert_eq!(out[n - 1], 2.5 * (n - 1) as f32);
        assert_eq!(sum_squares(&[3.0, 4.0]), 25.0);
        assert!(all_finite(&a) && !all_finite(&[0.0, f32::NAN]) && !all_finite(&[f32::INFINITY]));
    }
}
