//! Pure functions over slices: the arithmetic of one training step, forward and backward.
//!
//! Each file holds the derivation of what it computes, a scalar reference, and the fast version that is
//! tested against it. This crate must not know tensors, layers, devices or files: callers hand it slices
//! and shapes that they have checked. Parallel work runs on rayon's global pool, and every reduction is
//! split into parts whose number does not depend on the number of threads.

pub mod activation;
pub mod adamw;
pub mod adamw8;
pub mod attention;
pub mod attention_step;
pub mod codec;
pub mod columns;
pub mod cross_entropy;
pub mod disentangled;
pub mod divergence;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
mod exp;
mod heads;
mod lanes;
pub mod layer_norm;
pub mod mat;
pub mod matmul;
pub mod narrow;
pub mod norm;
mod qdot;
pub mod quantize;
pub mod random;
pub mod rope;
pub mod storage;
mod team;
#[cfg(test)]
mod test_numbers;
