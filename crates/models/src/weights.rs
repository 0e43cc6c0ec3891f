//! From a checkpoint's tensors to frozen weights: names, storage, shape and sanity.

use crate::gguf_names;
use crate::{Error, LoadOptions, Result};
use candle_core::{Device, Tensor};
use engobe_autograd::{Error as OpError, FrozenWeight, HostBytes, HostScales, tensor_of};
use engobe_formats::bitsandbytes::{self, Quantized, Scales};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::tensor::TensorView;
use engobe_kernels::codec;
use engobe_kernels::quantize::{QuantizeError, QuantizedWeight, Scheme};
use engobe_kernels::storage::{StorageType, WeightView};
use rayon::prelude::*;
use std::ops::Range;

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

impl WeightDtype {
    /// The storage that weights get, if not the one that they have.
    fn storage(self) -> Option<StorageType> {
        match self {
            Self::Stored => None,
            Self::F32 => Some(StorageType::F32),
            Self::Bf16 => Some(StorageType::BF16),
            Self::F16 => Some(StorageType::F16),
        }
    }
}

/// Tensors of one checkpoint under Hugging Face names.
pub struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    dtype: WeightDtype,
    quantize: Option<Scheme>,
    device: Device,
    /// heads and key/value heads of a GGUF file whose q and k rows are permuted
    gguf_heads: Option<(usize, usize)>,
}

impl<'a> Weights<'a> {
    /// Tensors of a Hugging Face directory.
    ///
    /// # Errors
    /// Options that contradict each other.
    pub fn hugging_face(checkpoint: &'a Checkpoint, options: &LoadOptions) -> Result<Self> {
        if options.quantize.is_some() && options.dtype != WeightDtype::Stored {
            let why = "quantized weights are kept in their own type, not in another one";
            return Err(Error::Options(why));
        }
        if options.quantize.is_some() && !options.device.is_cpu() {
            return Err(Error::Options("quantized weights live in the memory of the CPU"));
        }
        let LoadOptions { dtype, quantize, device } = options.clone();
        Ok(Self { checkpoint, dtype, quantize, device, gguf_heads: None })
    }

    /// Tensors of a GGUF file of architecture `llama`, whose q and k rows were permuted by the converter
    /// for `heads` and `kv_heads` heads.
    ///
    /// # Errors
    /// Options that contradict each other.
    pub fn gguf_llama(
        checkpoint: &'a Checkpoint,
        options: &LoadOptions,
        heads: usize,
        kv_heads: usize,
    ) -> Result<Self> {
        Ok(Self { gguf_heads: Some((heads, kv_heads)), ..Self::hugging_face(checkpoint, options)? })
    }

    /// Where the weights shall live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Name of a tensor in the checkpoint.
    fn name(&self, name: &str) -> String {
        match self.gguf_heads {
            Some(_) => gguf_names::from_hf(name).unwrap_or_else(|| name.to_string()),
            None => name.to_string(),
        }
    }

    fn find(&self, name: &str) -> Result<&'a TensorView> {
        Ok(self.checkpoint.get(&self.name(name))?)
    }

    /// A matrix `[rows, cols]` that stays as precise as it is stored: an embedding, an output head.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<FrozenWeight> {
        self.load(name, rows, cols, None)
    }

    /// The matrix `[rows, cols]` of a linear layer: quantized while it is read, if that was asked for.
    pub fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<FrozenWeight> {
        self.load(name, rows, cols, self.quantize)
    }

    fn load(&self, name: &str, rows: usize, cols: usize, quantize: Option<Scheme>) -> Result<FrozenWeight> {
        let weight = match bitsandbytes::find(self.checkpoint, &self.name(name))? {
            Some(found) if quantize.is_some() => {
                return Err(Error::AlreadyQuantized {
                    path: self.checkpoint.path().to_path_buf(),
                    tensor: name.to_string(),
                    storage: found.scheme().to_string(),
                });
            }
            Some(found) => self.codes(name, rows, cols, &found)?,
            None => self.blocks(name, rows, cols, quantize)?,
        };
        if self.device.is_cpu() { Ok(weight) } else { self.to_device(&weight) }
    }

    /// A matrix that bitsandbytes quantized: as it lies in the file, or widened.
    fn codes(&self, name: &str, rows: usize, cols: usize, found: &Quantized<'_>) -> Result<FrozenWeight> {
        if found.shape() != [rows, cols] {
            return Err(Error::Shape {
                path: self.checkpoint.path().to_path_buf(),
                tensor: name.to_string(),
                found: found.shape().to_vec(),
                expected: vec![rows, cols],
            });
        }
        let weight = match found {
            Quantized::FourBit { kind, block, codes, scales, .. } => {
                let scales = match scales {
                    Scales::Plain(absmax) => HostScales::Plain(mapped(absmax)),
                    Scales::Double { codes, map, nested, offset } => HostScales::Double {
                        codes: mapped(codes),
                        map: mapped(map),
                        nested: mapped(nested),
                        offset: *offset,
                    },
                };
                FrozenWeight::four_bit(*kind, *block, rows, cols, mapped(codes), scales)
            }
            Quantized::Int8 { codes, scales, .. } => {
                FrozenWeight::int8(rows, cols, mapped(codes), mapped(scales))
            }
        };
        let weight = weight.map_err(|e| self.unfit(name, &e.to_string()))?;
        self.check_factors(name, found)?;
        match self.dtype.storage() {
            None => Ok(weight),
            Some(wanted) => Ok(FrozenWeight::host(wanted, rows, cols, convert(weight.view()?, wanted)?)?),
        }
    }

    fn unfit(&self, name: &str, what: &str) -> Error {
        let (path, tensor) = (self.checkpoint.path().to_path_buf(), name.to_string());
        Error::Unfit { path, tensor, what: what.to_string() }
    }

    /// Factors are few, and one that is NaN or infinite spoils a block.
    fn check_factors(&self, name: &str, found: &Quantized<'_>) -> Result<()> {
        let factors = match found {
            Quantized::FourBit { scales: Scales::Plain(factors), .. } => vec![factors],
            Quantized::FourBit { scales: Scales::Double { nested, map, .. }, .. } => vec![nested, map],
            Quantized::Int8 { scales, .. } => vec![scales],
        };
        match factors.iter().find(|f| !all_finite(StorageType::F32, f.bytes())) {
            None => Ok(()),
            Some(bad) => Err(Error::NotFinite {
                path: self.checkpoint.path().to_path_buf(),
                tensor: format!("{name}: {}", bad.name),
            }),
        }
    }

    /// A matrix in plain floats or GGUF blocks.
    fn blocks(&self, name: &str, rows: usize, cols: usize, quantize: Option<Scheme>) -> Result<FrozenWeight> {
        let view = self.find(name)?;
        check_shape(view, &[rows, cols])?;
        let storage = view.storage()?;
        let permuted = self.permuted_heads(name);
        let owned = permuted.map(|heads| unpermute_rows(view.bytes(), rows, heads));
        if let Some(scheme) = quantize {
            return quantized(view, scheme, (rows, cols), owned.as_deref());
        }
        check_finite(view, storage)?;
        if self.quantize.is_some() {
            // what the check has read need not stay in memory
            view.release(0..view.bytes().len());
        }
        let wanted = self.dtype.storage().unwrap_or(storage);
        let host = match owned {
            _ if wanted != storage => {
                let bytes = owned.as_deref().unwrap_or(view.bytes());
                convert(WeightView::new(storage, rows, cols, bytes).map_err(OpError::from)?, wanted)?
            }
            Some(bytes) => HostBytes::from_vec(bytes),
            None => mapped(view),
        };
        Ok(FrozenWeight::host(wanted, rows, cols, host)?)
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

/// A tensor as it lies in its file.
fn mapped(view: &TensorView) -> HostBytes {
    HostBytes::new(view.file.clone(), view.range.clone())
}

/// Quantizes a matrix, letting go of the file's pages behind the work; or its `reordered` copy.
fn quantized(
    view: &TensorView,
    scheme: Scheme,
    (rows, cols): (usize, usize),
    reordered: Option<&[u8]>,
) -> Result<FrozenWeight> {
    let storage = view.storage()?;
    let done = |range: Range<usize>| {
        if reordered.is_none() {
            view.release(range);
        }
    };
    let bytes = reordered.unwrap_or(view.bytes());
    let made = QuantizedWeight::new(scheme, storage, rows, cols, bytes, &done);
    if reordered.is_some() {
        view.release(0..view.bytes().len());
    }
    let (path, tensor) = (view.file.path().to_path_buf(), view.name.clone());
    let weight = made.map_err(|e| match e {
        QuantizeError::AlreadyQuantized { storage } => {
            Error::AlreadyQuantized { path, tensor, storage: storage.to_string() }
        }
        QuantizeError::NotFinite => Error::NotFinite { path, tensor },
        other => Error::Unfit { path, tensor, what: other.to_string() },
    })?;
    Ok(FrozenWeight::quantized(weight)?)
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
fn convert(from: WeightView<'_>, to: StorageType) -> Result<HostBytes> {
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
