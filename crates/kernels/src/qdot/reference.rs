//! The scalar reference: one row of a weight times one row of rounded activations, in f64.

use super::Rounded;
use crate::codec::{decode_reference, f16_to_f32};
use crate::storage::StorageType;

/// Σ_j w_j·x_ij, and Σ_j |w_j·x_ij|. Where ggml multiplies a block's minimum with its own rounding s of the
/// activations' sum, so does this.
pub fn dot(storage: StorageType, row: &[u8], x: &Rounded, i: usize) -> (f64, f64) {
    let (len, size) = (storage.block_len(), storage.block_bytes());
    let with_s = matches!(storage, StorageType::Q4_1 | StorageType::Q5_1);
    let (mut sum, mut sizes) = (0f64, 0f64);
    for (b, block) in row.chunks(size).enumerate() {
        let mut w = vec![0f32; len];
        decode_reference(storage, block, &mut w);
        let m = if with_s { f64::from(f16_to_f32(u16::from_le_bytes([block[2], block[3]]))) } else { 0.0 };
        for (j, w) in w.iter().enumerate() {
            let value = f64::from(x.value(i, b * len + j));
            sum += (f64::from(*w) - m) * value;
            sizes += (f64::from(*w).abs() + 2.0 * m.abs()) * value.abs();
        }
        if with_s {
            sum += m * f64::from(x.minimum_scales[i * (x.cols / 32 + 1) + b].sum);
        }
    }
    (sum, sizes)
}
