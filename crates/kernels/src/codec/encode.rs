//! From f32 to stored numbers, by the rules of ggml's `quantize_row_*_ref` and the `gguf` Python package.
//!
//! With x the 32 elements of a block, each rounded result in f32 and the scale stored as f16 but used unrounded:
//!
//! - Q8_0: d = max|x| / 127, q = round(x / d), halves away from zero.
//! - Q4_0, Q5_0 (L = 16, 32 levels): the element of largest magnitude, sign kept, maps to the lowest level:
//!   d = x_max / -(L/2), q = min(floor(x / d + L/2 + 0.5), L - 1).
//! - Q4_1, Q5_1: d = (max - min) / (L - 1), m = min, q = min(floor((x - m) / d + 0.5), L - 1).
//!
//! Division by d is multiplication with 1 / d (0 if d is 0), as there. Layouts: `legacy.rs`. K-quants: `encode_k.rs`.

use super::encode_k;
use crate::storage::StorageType;
use half::{bf16, f16};

/// Why numbers could not be stored.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EncodeError {
    /// No encoder for this storage.
    #[error(
        "cannot quantize to {storage}: only F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K can be written"
    )]
    Unsupported {
        /// storage asked for
        storage: StorageType,
    },
    /// The elements are not a whole number of blocks.
    #[error("{elements} elements are not whole {storage} blocks of {}", storage.block_len())]
    PartialBlock {
        /// storage asked for
        storage: StorageType,
        /// elements handed in
        elements: usize,
    },
}

/// Appends `x`, stored as `storage`, to `out`. `x.len()` must be a whole number of blocks.
///
/// Elements that are not finite give blocks without meaning (never a panic), as they do in ggml.
pub fn encode(storage: StorageType, x: &[f32], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let bytes = storage.row_bytes(x.len()).ok_or(EncodeError::PartialBlock { storage, elements: x.len() })?;
    out.reserve(bytes);
    match storage {
        StorageType::F32 => out.extend(x.iter().flat_map(|x| x.to_le_bytes())),
        StorageType::F16 => out.extend(x.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes())),
        StorageType::BF16 => out.extend(x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
        StorageType::Q8_0 => each_block(x, |x| q8_0(x, out)),
        StorageType::Q4_0 => each_block(x, |x| {
            let (d, q) = around_zero(x, 16);
            push_half(out, d);
            push_nibbles(out, &q);
        }),
        StorageType::Q4_1 => each_block(x, |x| {
            let (d, m, q) = above_minimum(x, 16);
            push_half(out, d);
            push_half(out, m);
            push_nibbles(out, &q);
        }),
        StorageType::Q5_0 => each_block(x, |x| {
            let (d, q) = around_zero(x, 32);
            push_half(out, d);
            push_fifth_bits(out, &q);
            push_nibbles(out, &q);
        }),
        StorageType::Q5_1 => each_block(x, |x| {
            let (d, m, q) = above_minimum(x, 32);
            push_half(out, d);
            push_half(out, m);
            push_fifth_bits(out, &q);
            push_nibbles(out, &q);
        }),
        StorageType::Q4_K => encode_k::q4_k(x, out),
        StorageType::Q5_K => encode_k::q5_k(x, out),
        StorageType::Q6_K => encode_k::q6_k(x, out),
        StorageType::Q2_K | StorageType::Q3_K => return Err(EncodeError::Unsupported { storage }),
    }
    Ok(())
}

fn each_block(x: &[f32], block: impl FnMut(&[f32; 32])) {
    x.as_chunks::<32>().0.iter().for_each(block);
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn q8_0(x: &[f32; 32], out: &mut Vec<u8>) {
    let largest = x.iter().fold(0f32, |a, x| a.max(x.abs()));
    let d = largest / 127.0;
    let inv = inverse(d);
    push_half(out, d);
    out.extend(x.iter().map(|x| (x * inv).round() as i8 as u8));
}

/// Scale and levels of Q4_0 and Q5_0.
fn around_zero(x: &[f32; 32], levels: u8) -> (f32, [u8; 32]) {
    let largest = x.iter().fold(0f32, |best, &x| if x.abs() > best.abs() { x } else { best });
    let half_range = (levels / 2) as f32;
    let d = largest / -half_range;
    let inv = inverse(d);
    // `as u8` cuts off the fraction and saturates; the sum is never below 0.
    (d, x.map(|x| ((x * inv + (half_range + 0.5)) as u8).min(levels - 1)))
}

/// Scale, minimum and levels of Q4_1 and Q5_1.
fn above_minimum(x: &[f32; 32], levels: u8) -> (f32, f32, [u8; 32]) {
    let min = x.iter().copied().fold(f32::INFINITY, f32::min);
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let d = (max - min) / (levels - 1) as f32;
    let inv = inverse(d);
    (d, min, x.map(|x| (((x - min) * inv + 0.5) as u8).min(levels - 1)))
}

fn push_half(out: &mut Vec<u8>, x: f32) {
    out.extend(f16::from_f32(x).to_le_bytes());
}

fn push_nibbles(out: &mut Vec<u8>, q: &[u8; 32]) {
    out.extend((0..16).map(|i| q[i] & 15 | q[i + 16] << 4));
}

fn push_fifth_bits(out: &mut Vec<u8>, q: &[u8; 32]) {
    let high = (0..32).fold(0u32, |high, i| high | ((q[i] >> 4) as u32) << i);
    out.extend(high.to_le_bytes());
}
