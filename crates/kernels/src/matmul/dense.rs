//! `c = alpha·a·b + beta·c` in f32, on the `gemm` crate.
//!
//! gemm computes each element of c as one chain of fused multiply-adds per slice of the inner dimension, and
//! the slices depend on the shapes only: threads share out elements of c, never a sum.

use super::disjoint::SharedMat;
use crate::mat::{MatMut, MatRef};
use gemm::Parallelism;

/// `c[m, n] = alpha·a[m, k]·b[k, n] + beta·c`, parallel over rayon's current pool.
///
/// With `beta == 0` c is not read, so it may hold anything. Panics if the shapes do not fit.
pub fn sgemm(alpha: f32, a: MatRef, b: MatRef, beta: f32, c: &mut MatMut) {
    // 0 threads asked for: as many as the current pool has.
    SharedMat::new(c).whole().gemm(alpha, a, b, beta, Parallelism::Rayon(0));
}

/// [`sgemm`] on the calling thread, for use inside parallel loops.
pub fn sgemm_serial(alpha: f32, a: MatRef, b: MatRef, beta: f32, c: &mut MatMut) {
    SharedMat::new(c).whole().gemm(alpha, a, b, beta, Parallelism::None);
}
