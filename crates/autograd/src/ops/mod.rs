//! The ops, one file each.

mod add;
mod attention;
mod columns;
mod disentangled;
pub(crate) mod dropout;
mod embedding;
mod gated;
mod gather;
mod generation;
mod head_loss;
mod insert;
mod layer_norm;
mod linear;
mod lstm;
mod neighbours;
mod norm;
mod rope;
mod row_loss;
mod rows;
mod scale;
mod segment_mean;
mod split;

pub use add::add;
pub use attention::{ScoreBias, attention, biased_attention};
pub use columns::{concat_columns, flatten, scale_columns, scale_rows};
pub use disentangled::{PositionTerms, disentangled_attention};
pub use dropout::dropout as drop_out;
pub use embedding::embedding;
pub use gated::{activate, gated};
pub use gather::{replace_rows, select_columns};
pub use head_loss::{Head, HeadLoss, head_loss};
pub use insert::insert_rows;
pub use layer_norm::layer_norm;
pub use linear::{
    LinearSpec, LowRank, Matrix, OutputScale, linear, linear_group, linear_residual, linear_residual_last,
};
pub use lstm::lstm;
pub use neighbours::neighbours;
pub use norm::rms_norm;
pub use rope::{RopeSpec, rope};
pub use row_loss::{RowTargets, row_loss};
pub use rows::select_rows;
pub use scale::scale;
pub use segment_mean::segment_mean;
pub use split::{reshape, split_columns, transpose};

use crate::{Error, Result};
use candle_core::Tensor;

/// Rows and columns of an activation `[n, d]`.
pub(crate) fn dims2(op: &'static str, t: &Tensor) -> Result<(usize, usize)> {
    t.dims2().map_err(|_| Error::shape(op, format!("expected [tokens, features], found {:?}", t.dims())))
}
