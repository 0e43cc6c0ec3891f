//! What is done with a tensor's bytes before they become a weight: checked, transposed, converted.

use crate::{Error, Result};
use engobe_autograd::HostBytes;
use engobe_formats::tensor::TensorView;
use engobe_kernels::codec;
use engobe_kernels::storage::{StorageType, WeightView};
use rayon::prelude::*;

/// A tensor as it lies in its file.
pub(super) fn mapped(view: &TensorView) -> HostBytes {
    HostBytes::new(view.file.clone(), view.range.clone())
}

pub(super) fn check_shape(view: &TensorView, expected: &[usize]) -> Result<()> {
    if view.shape == expected {
        return Ok(());
    }
    Err(Error::Shape {
        path: view.file.path().to_path_buf(),
        tensor: view.name.clone(),
        found: view.shape.clone(),
        expected: expected.to_vec(),
    })
}

/// The numbers of a small tensor of that shape, in f32.
pub(super) fn numbers(view: &TensorView, shape: &[usize]) -> Result<Vec<f32>> {
    check_shape(view, shape)?;
    let storage = view.storage()?;
    check_finite(view, storage)?;
    let mut out = vec![0f32; shape.iter().product()];
    codec::decode(storage, view.bytes(), &mut out);
    Ok(out)
}

/// Refuses a tensor that holds an infinity or a NaN: training over it can only end in NaN.
pub(super) fn check_finite(view: &TensorView, storage: StorageType) -> Result<()> {
    const BLOCKS: usize = 1 << 14;
    let chunk = BLOCKS * storage.block_bytes();
    let bad = view.bytes().par_chunks(chunk).position_any(|bytes| !all_finite(storage, bytes));
    match bad {
        None => Ok(()),
        Some(_) => Err(Error::NotFinite { path: view.file.path().to_path_buf(), tensor: view.name.clone() }),
    }
}

/// Where the half-precision numbers of a quantized block stand: what they scale is whole numbers.
fn scales_at(storage: StorageType) -> &'static [usize] {
    match storage {
        StorageType::Q4_0 | StorageType::Q5_0 | StorageType::Q8_0 => &[0],
        StorageType::Q4_1 | StorageType::Q5_1 | StorageType::Q4_K | StorageType::Q5_K => &[0, 2],
        StorageType::Q2_K => &[80, 82],
        StorageType::Q3_K => &[108],
        StorageType::Q6_K => &[208],
        _ => &[],
    }
}

/// A float is finite unless all bits of its exponent are set.
pub(super) fn all_finite(storage: StorageType, bytes: &[u8]) -> bool {
    if storage.is_quantized() {
        let finite = |at: &[u8]| u16::from_le_bytes([at[0], at[1]]) & 0x7C00 != 0x7C00;
        let mut blocks = bytes.chunks_exact(storage.block_bytes());
        return blocks.all(|block| scales_at(storage).iter().all(|at| finite(&block[*at..])));
    }
    let all16 = |mask: u16| {
        let (words, _) = bytes.as_chunks::<2>();
        !words.iter().fold(false, |bad, w| bad | (u16::from_le_bytes(*w) & mask == mask))
    };
    match storage {
        StorageType::BF16 => all16(0x7F80),
        StorageType::F16 => all16(0x7C00),
        _ => {
            let (words, _) = bytes.as_chunks::<4>();
            let mask = 0x7F80_0000;
            !words.iter().fold(false, |bad, w| bad | (u32::from_le_bytes(*w) & mask == mask))
        }
    }
}

/// A matrix `[rows, cols]` of elements of N bytes as `[cols, rows]`, in parallel.
pub(super) fn transpose<const N: usize>(bytes: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    /// columns of a task: a cache line of 4-byte elements
    const WIDTH: usize = 16;
    let (elements, _) = bytes.as_chunks::<N>();
    let mut out = vec![0u8; bytes.len()];
    let (to, _) = out.as_chunks_mut::<N>();
    if rows > 0 {
        to.par_chunks_mut(WIDTH * rows).enumerate().for_each(|(task, to)| {
            let first = task * WIDTH;
            for (i, row) in elements.chunks_exact(cols).enumerate() {
                for (j, column) in to.chunks_exact_mut(rows).enumerate() {
                    column[i] = row[first + j];
                }
            }
        });
    }
    out
}

/// The elements in another storage, in parallel.
pub(super) fn convert(from: WeightView<'_>, to: StorageType) -> Result<HostBytes> {
    /// elements of a task
    const ELEMENTS: usize = 1 << 16;
    let (rows, cols) = (from.rows(), from.cols());
    if to == StorageType::F32 {
        let mut out = vec![0f32; rows * cols];
        from.decode_parallel(&mut out);
        return Ok(HostBytes::from_f32(out));
    }
    let height = (ELEMENTS / cols.max(1)).max(1);
    let parts: Vec<Vec<u8>> = (0..rows.div_ceil(height))
        .into_par_iter()
        .map(|i| {
            let rows = i * height..rows.min((i + 1) * height);
            let mut floats = vec![0f32; rows.len() * cols];
            from.decode_rows(rows, &mut floats);
            let mut out = Vec::new();
            codec::encode(to, &floats, &mut out).map(|()| out)
        })
        .collect::<std::result::Result<_, _>>()?;
    Ok(HostBytes::from_vec(parts.concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_transposed() {
        for (rows, cols) in [(1, 1), (3, 40), (40, 3), (17, 33)] {
            let wide: Vec<u8> = (0..rows * cols).flat_map(|i| (i as u16).to_le_bytes()).collect();
            let turned = transpose::<2>(&wide, rows, cols);
            for (i, j) in (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))) {
                assert_eq!(turned[2 * (j * rows + i)..][..2], wide[2 * (i * cols + j)..][..2]);
            }
            assert_eq!(transpose::<2>(&turned, cols, rows), wide);
        }
    }

    #[test]
    fn finds_a_broken_scale_in_every_kind_of_block() {
        for storage in StorageType::ALL.into_iter().filter(|s| s.is_quantized()) {
            // block after block of zeros is fine; each number that decoding reads as a half must be looked at
            let good = vec![0u8; 3 * storage.block_bytes()];
            assert!(all_finite(storage, &good), "{storage}");
            for at in (0..storage.block_bytes() - 1).step_by(2) {
                let mut bytes = good.clone();
                bytes[storage.block_bytes() + at..][..2].copy_from_slice(&half::f16::NAN.to_le_bytes());
                let mut floats = vec![0f32; 3 * storage.block_len()];
                codec::decode(storage, &bytes, &mut floats);
                let is_scale = floats.iter().any(|f| f.is_nan());
                assert_eq!(all_finite(storage, &bytes), !is_scale, "{storage} at {at}");
            }
        }
    }

    #[test]
    fn finds_infinities_and_nans_of_every_float() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let good = [1.0f32, -3.0e5, 0.0, 6.0e4];
            let mut bytes: Vec<u8> = good.iter().flat_map(|f| f.to_le_bytes()).collect();
            assert!(all_finite(StorageType::F32, &bytes));
            bytes.extend(bad.to_le_bytes());
            assert!(!all_finite(StorageType::F32, &bytes));
            let half = half::f16::from_f32(bad).to_le_bytes();
            assert!(!all_finite(StorageType::F16, &half));
            let brain = half::bf16::from_f32(bad).to_le_bytes();
            assert!(!all_finite(StorageType::BF16, &brain));
        }
    }
}
