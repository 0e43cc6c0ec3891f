//! From a checkpoint's tensors to frozen weights: names, storage, shape and sanity.

use crate::gguf_names;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use engobe_autograd::{FrozenWeight, HostBytes, tensor_of};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::tensor::TensorView;
use engobe_kernels::codec;
use engobe_kernels::storage::StorageType;
use rayon::prelude::*;
use std::sync::Arc;

/// How base weights are kept in memory. Compute is in f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WeightDtype {
    /// as they lie in the file, memory-mapped
    #[default]
    Stored,
    /// widened to f32 at load
    F32,
    /// rounded to bfloat16 at load
    Bf16,
    /// rounded to half precision at load
    F16,
}

/// Tensors of one checkpoint under Hugging Face names.
pub struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    dtype: WeightDtype,
    device: Device,
    /// heads and key/value heads of a GGUF file whose q and k rows are permuted
    gguf_heads: Option<(usize, usize)>,
}

impl<'a> Weights<'a> {
    /// Tensors of a Hugging Face directory.
    pub fn hugging_face(checkpoint: &'a Checkpoint, dtype: WeightDtype, device: Device) -> Self {
        Self { checkpoint, dtype, device, gguf_heads: None }
    }

    /// Tensors of a GGUF file of architecture `llama`, whose q and k rows were permuted by the converter
    /// for `heads` and `kv_heads` heads.
    pub fn gguf_llama(
        checkpoint: &'a Checkpoint,
        dtype: WeightDtype,
        device: Device,
        heads: usize,
        kv_heads: usize,
    ) -> Self {
        Self { checkpoint, dtype, device, gguf_heads: Some((heads, kv_heads)) }
    }

    /// Where the weights shall live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn find(&self, name: &str) -> Result<&'a TensorView> {
        let name = match self.gguf_heads {
            Some(_) => gguf_names::from_hf(name).unwrap_or_else(|| name.to_string()),
            None => name.to_string(),
        };
        Ok(self.checkpoint.get(&name)?)
    }

    /// A matrix `[rows, cols]`.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<FrozenWeight> {
        let view = self.find(name)?;
        check_shape(view, &[rows, cols])?;
        let storage = view.storage()?;
        check_finite(view, storage)?;
        let permuted = self.permuted_heads(name);
        let wanted = match self.dtype {
            WeightDtype::Stored => storage,
            WeightDtype::F32 => StorageType::F32,
            WeightDtype::Bf16 => StorageType::BF16,
            WeightDtype::F16 => StorageType::F16,
        };
        let bytes = match permuted {
            Some(heads) => Bytes::Owned(unpermute_rows(view.bytes(), rows, heads)),
            None => Bytes::Mapped,
        };
        let source = match &bytes {
            Bytes::Owned(b) => b.as_slice(),
            Bytes::Mapped => view.bytes(),
        };
        let host = if wanted != storage {
            convert(source, storage, wanted)?
        } else {
            match bytes {
                Bytes::Owned(b) => owned(b),
                Bytes::Mapped => HostBytes::new(view.file.clone(), view.range.clone()),
            }
        };
        let weight = FrozenWeight::host(wanted, rows, cols, host)?;
        if self.device.is_cpu() { Ok(weight) } else { self.to_device(&weight) }
    }

    fn permuted_heads(&self, name: &str) -> Option<usize> {
        self.gguf_heads.and_then(|(heads, kv_heads)| gguf_names::permuted_heads(name, heads, kv_heads))
    }

    fn to_device(&self, weight: &FrozenWeight) -> Result<FrozenWeight> {
        Ok(FrozenWeight::from_tensor(&weight.to_tensor(&self.device)?)?)
    }

    /// A vector `[len]` in f32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        let view = self.find(name)?;
        check_shape(view, &[len])?;
        let storage = view.storage()?;
        check_finite(view, storage)?;
        let mut out = vec![0f32; len];
        codec::decode(storage, view.bytes(), &mut out);
        if let Some(heads) = self.permuted_heads(name) {
            out = unpermute_rows(&out, len, heads);
        }
        Ok(tensor_of(out, len)?.to_device(&self.device).map_err(engobe_autograd::Error::from)?)
    }

    /// A vector that may be missing.
    pub fn optional_vector(&self, name: &str) -> Result<Option<Vec<f32>>> {
        if !self.checkpoint.contains(name) {
            return Ok(None);
        }
        let view = self.checkpoint.get(name)?;
        let len = view.shape.iter().product();
        Ok(Some(self.vector(name, len)?.to_vec1().map_err(engobe_autograd::Error::from)?))
    }
}

enum Bytes {
    Owned(Vec<u8>),
    Mapped,
}

fn owned(bytes: Vec<u8>) -> HostBytes {
    let len = bytes.len();
    HostBytes::new(Arc::new(bytes), 0..len)
}

fn check_shape(view: &TensorView, expected: &[usize]) -> Result<()> {
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

/// Refuses a plain-float tensor that holds an infinity or a NaN: training over it can only end in NaN.
fn check_finite(view: &TensorView, storage: StorageType) -> Result<()> {
    if storage.is_quantized() {
        return Ok(());
    }
    const ELEMENTS: usize = 1 << 16;
    let chunk = ELEMENTS * storage.block_bytes();
    let bad = view.bytes().par_chunks(chunk).position_any(|bytes| !all_finite(storage, bytes));
    match bad {
        None => Ok(()),
        Some(_) => Err(Error::NotFinite { path: view.file.path().to_path_buf(), tensor: view.name.clone() }),
    }
}

/// A float is finite unless all bits of its exponent are set.
fn all_finite(storage: StorageType, bytes: &[u8]) -> bool {
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

/// Undoes the converter's reordering of q and k rows (`permute` in llama.cpp's `convert_hf_to_gguf.py`),
/// which turns Hugging Face's pairs (i, i + half) of each head into neighbours (2i, 2i + 1). `data` is `rows` rows
/// of equal length.
///
/// Row `h·d + 2i + s` of the file is row `h·d + s·d/2 + i` in Hugging Face's order, d being the head's size.
pub fn unpermute_rows<T: Copy>(data: &[T], rows: usize, heads: usize) -> Vec<T> {
    reorder(data, rows, heads, |within, half| 2 * (within % half) + within / half)
}

/// The converter's reordering of q and k rows: what [`unpermute_rows`] undoes.
pub fn permute_rows<T: Copy>(data: &[T], rows: usize, heads: usize) -> Vec<T> {
    reorder(data, rows, heads, |within, half| within / 2 + within % 2 * half)
}

/// Rows in another order: row i of a head is row `from(i, half)` of the same head, half of a head's rows being
/// `half`. What is no whole number of heads stays as it is.
fn reorder<T: Copy>(data: &[T], rows: usize, heads: usize, from: impl Fn(usize, usize) -> usize) -> Vec<T> {
    let head = rows / heads.max(1);
    if head < 2 || !head.is_multiple_of(2) || head * heads != rows || !data.len().is_multiple_of(rows) {
        return data.to_vec();
    }
    let width = data.len() / rows;
    let mut out = Vec::with_capacity(data.len());
    for i in 0..rows {
        let row = i / head * head + from(i % head, head / 2);
        out.extend_from_slice(&data[row * width..][..width]);
    }
    out
}

/// The elements in another storage, in parallel.
fn convert(bytes: &[u8], from: StorageType, to: StorageType) -> Result<HostBytes> {
    const ELEMENTS: usize = 1 << 16;
    let from_chunk = ELEMENTS / from.block_len() * from.block_bytes();
    let len = bytes.len() / from.block_bytes() * from.block_len();
    if to == StorageType::F32 {
        let mut out = vec![0f32; len];
        out.par_chunks_mut(ELEMENTS)
            .zip(bytes.par_chunks(from_chunk))
            .for_each(|(out, bytes)| codec::decode(from, bytes, out));
        return Ok(HostBytes::from_f32(out));
    }
    let parts: Vec<Vec<u8>> = bytes
        .par_chunks(from_chunk)
        .map(|bytes| {
            let mut floats = vec![0f32; bytes.len() / from.block_bytes() * from.block_len()];
            codec::decode(from, bytes, &mut floats);
            let mut out = Vec::new();
            codec::encode(to, &floats, &mut out).map(|()| out)
        })
        .collect::<std::result::Result<_, _>>()?;
    Ok(owned(parts.concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpermute_is_the_inverse_of_the_converter() {
        // one byte a row; two heads of four: the converter stores (0,2,1,3) of each head
        let stored = [0u8, 2, 1, 3, 4, 6, 5, 7];
        assert_eq!(unpermute_rows(&stored, 8, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(permute_rows(&[0u8, 1, 2, 3, 4, 5, 6, 7], 8, 2), stored);
        let wide: Vec<u16> = (0..72).collect();
        assert_eq!(unpermute_rows(&permute_rows(&wide, 24, 4), 24, 4), wide);
        // what is no whole number of heads is left alone
        assert_eq!(permute_rows(&[1u8, 2, 3], 3, 2), [1, 2, 3]);
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
