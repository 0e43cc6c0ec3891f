//! `c = alpha·a·b + beta·c` in f32.

use super::{Job, Right, Term, run_serial};
use crate::mat::{MatMut, MatRef};

/// `c[m, n] = alpha·a[m, k]·b[k, n] + beta·c` on the calling thread, for use inside parallel loops.
///
/// With `beta == 0` c is not read, so it may hold anything. Panics if the shapes do not fit.
pub fn sgemm_serial(alpha: f32, a: MatRef, b: MatRef, beta: f32, c: &mut MatMut) {
    if beta != 0.0 && beta != 1.0 {
        for row in c.data.chunks_mut(c.row_stride.max(1)).take(c.rows) {
            row.iter_mut().take(c.cols).for_each(|v| *v *= beta);
        }
    }
    run_serial(&[Job::new(c, beta != 0.0, vec![Term { a, b: Right::Dense(b), scale: alpha }])]);
}
