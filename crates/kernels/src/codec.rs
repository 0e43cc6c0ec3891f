//! Between stored numbers and f32: ggml's quantized blocks, f16 and bf16; bitsandbytes' NF4, FP4 and int8.
//!
//! One file per family of blocks. Each states the block's layout, holds a scalar reference that follows the
//! layout literally, and a fast version. Both round as ggml and the `gguf` Python package do (every product and
//! sum rounded on its own, never fused), so decoding is equal to theirs bit for bit on every CPU.
//!
//! Layouts: `ggml-common.h` and `ggml-quants.c` of llama.cpp. Those of bitsandbytes keep their factors beside the
//! codes, in arrays of their own (`four_bit.rs`, `scales.rs`, `int8.rs`).

pub mod dynamic;
mod encode;
mod encode_k;
mod floats;
mod four_bit;
mod int8;
pub(crate) mod kquants;
mod legacy;
mod scales;
pub(crate) mod simd;

use crate::storage::StorageType;
use rayon::prelude::*;

pub use encode::{EncodeError, encode};
pub use floats::f16_to_f32;
pub use four_bit::{FourBit, FourBitView, encode_four_bit, is_block_size};
pub use int8::{Int8View, encode_int8};
pub use scales::{BlockScales, DoubleQuantized, DoubleScales, F32s, NESTED_BLOCK, double_quantize};

/// Elements that one parallel task of [`decode_parallel`] decodes: a whole number of blocks of every storage.
const PARALLEL_CHUNK: usize = 1 << 16;

/// Decodes whole blocks: `out[i]` is element `i` of the row-major tensor stored in `bytes`.
///
/// Panics unless `out.len()` is a whole number of blocks and `bytes` exactly their bytes.
pub fn decode(storage: StorageType, bytes: &[u8], out: &mut [f32]) {
    check_lengths(storage, bytes.len(), out.len());
    match storage {
        StorageType::F32 => floats::f32(bytes, out),
        StorageType::F16 => floats::f16(bytes, out),
        StorageType::BF16 => floats::bf16(bytes, out),
        StorageType::Q4_0 => legacy::q4_0(bytes, out),
        StorageType::Q4_1 => legacy::q4_1(bytes, out),
        StorageType::Q5_0 => legacy::q5_0(bytes, out),
        StorageType::Q5_1 => legacy::q5_1(bytes, out),
        StorageType::Q8_0 => legacy::q8_0(bytes, out),
        StorageType::Q2_K => kquants::q2_k(bytes, out),
        StorageType::Q3_K => kquants::q3_k(bytes, out),
        StorageType::Q4_K => kquants::q4_k(bytes, out),
        StorageType::Q5_K => kquants::q5_k(bytes, out),
        StorageType::Q6_K => kquants::q6_k(bytes, out),
    }
}

/// [`decode`] by the scalar reference of each storage: what the fast versions are tested against.
pub fn decode_reference(storage: StorageType, bytes: &[u8], out: &mut [f32]) {
    check_lengths(storage, bytes.len(), out.len());
    let blocks = bytes.chunks_exact(storage.block_bytes()).zip(out.chunks_exact_mut(storage.block_len()));
    for (block, out) in blocks {
        for (i, out) in out.iter_mut().enumerate() {
            *out = match storage {
                StorageType::F32 => f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
                StorageType::F16 => half::f16::from_le_bytes([block[0], block[1]]).to_f32(),
                StorageType::BF16 => half::bf16::from_le_bytes([block[0], block[1]]).to_f32(),
                StorageType::Q4_0 => legacy::reference::q4_0(block, i),
                StorageType::Q4_1 => legacy::reference::q4_1(block, i),
                StorageType::Q5_0 => legacy::reference::q5_0(block, i),
                StorageType::Q5_1 => legacy::reference::q5_1(block, i),
                StorageType::Q8_0 => legacy::reference::q8_0(block, i),
                StorageType::Q2_K => kquants::reference::q2_k(block, i),
                StorageType::Q3_K => kquants::reference::q3_k(block, i),
                StorageType::Q4_K => kquants::reference::q4_k(block, i),
                StorageType::Q5_K => kquants::reference::q5_k(block, i),
                StorageType::Q6_K => kquants::reference::q6_k(block, i),
            };
        }
    }
}

/// Decodes `out.len()` elements of one stored row, from column `start_col` on.
///
/// `row` is the whole row's bytes; `start_col` and `out.len()` are multiples of the block length. Panics if they are
/// not, or reach past the row.
pub fn decode_range(row: &[u8], storage: StorageType, start_col: usize, out: &mut [f32]) {
    let (len, size) = (storage.block_len(), storage.block_bytes());
    assert!(start_col.is_multiple_of(len), "column {start_col} is inside a {storage} block of {len}");
    let start = start_col / len * size;
    let end = start + out.len() / len * size;
    decode(storage, &row[start..end], out);
}

/// [`decode`] on rayon's current pool, for tensors that are decoded once when they are loaded.
pub fn decode_parallel(storage: StorageType, bytes: &[u8], out: &mut [f32]) {
    check_lengths(storage, bytes.len(), out.len());
    let chunk_bytes = PARALLEL_CHUNK / storage.block_len() * storage.block_bytes();
    out.par_chunks_mut(PARALLEL_CHUNK)
        .zip(bytes.par_chunks(chunk_bytes))
        .for_each(|(out, bytes)| decode(storage, bytes, out));
}

/// [`encode`] on rayon's current pool: the same bytes.
pub fn encode_parallel(storage: StorageType, x: &[f32]) -> Result<Vec<u8>, EncodeError> {
    let bytes = storage.row_bytes(x.len()).ok_or(EncodeError::PartialBlock { storage, elements: x.len() })?;
    let parts = x.par_chunks(PARALLEL_CHUNK).map(|x| {
        let mut out = Vec::new();
        encode(storage, x, &mut out).map(|()| out)
    });
    let parts: Vec<Vec<u8>> = parts.collect::<Result<_, _>>()?;
    let mut out = Vec::with_capacity(bytes);
    parts.iter().for_each(|part| out.extend(part));
    Ok(out)
}

fn check_lengths(storage: StorageType, bytes: usize, elements: usize) {
    assert_eq!(
        storage.row_bytes(elements),
        Some(bytes),
        "{elements} elements of {storage} from {bytes} bytes: not whole blocks"
    );
}

/// The f16 at byte `at` of a block, as f32.
#[inline(always)]
fn scale_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}
