//! From a checkpoint's tensors to frozen weights: names, storage, shape and sanity.

use crate::gguf_names;
use crate::outline::Blank;
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
    pub(crate) fn storage(self) -> Option<StorageType> {
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
    source: Source<'a>,
    dtype: WeightDtype,
    quantize: Option<Scheme>,
    device: Device,
    /// heads and key/value heads of a GGUF file whose q and k rows are permuted
    gguf_heads: Option<(usize, usize)>,
}

#[derive(Clone, Copy)]
enum Source<'a> {
    Checkpoint(&'a Checkpoint),
    /// zeros that are never read, and the headers if there are any
    Blank(&'a Blank, Option<&'a Checkpoint>),
}

impl<'a> Weights<'a> {
    /// Tensors that are never read: sizes are all that is wanted.
    pub(crate) fn blank(
        checkpoint: Option<&'a Checkpoint>,
        options: &LoadOptions,
        gguf_heads: Option<(usize, usize)>,
        blank: &'a Blank,
    ) -> Result<Self> {
        let source = Source::Blank(blank, checkpoint);
        Ok(Self { gguf_heads, ..Self::new(source, options)? })
    }

    /// Tensors of a Hugging Face directory.
    ///
    /// # Errors
    /// Options that contradict each other.
    pub fn hugging_face(checkpoint: &'a Checkpoint, options: &LoadOptions) -> Result<Self> {
        Self::new(Source::Checkpoint(checkpoint), options)
    }

    fn new(source: Source<'a>, options: &LoadOptions) -> Result<Self> {
        if options.quantize.is_some() && options.dtype != WeightDtype::Stored {
            let why = "quantized weights are kept in their own type, not in another one";
            return Err(Error::Options(why));
        }
        if options.quantize.is_some() && !options.device.is_cpu() {
            return Err(Error::Options("quantized weights live in the memory of the CPU"));
        }
        let LoadOptions { dtype, quantize, device } = options.clone();
        Ok(Self { source, dtype, quantize, device, gguf_heads: None })
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

    /// Heads of a tensor whose rows the converter permuted: weights and biases of q and k in a GGUF file.
    fn permuted_heads(&self, name: &str) -> Option<usize> {
        self.gguf_heads.and_then(|(heads, kv_heads)| gguf_names::permuted_heads(name, heads, kv_heads))
    }

    /// True if the checkpoint has a tensor of this name; without a checkpoint, every name is there.
    pub fn contains(&self, name: &str) -> bool {
        match self.source {
            Source::Checkpoint(checkpoint) | Source::Blank(_, Some(checkpoint)) => {
                checkpoint.contains(&self.name(name))
            }
            Source::Blank(_, None) => true,
        }
    }

    /// A matrix `[rows, cols]` that stays as precise as it is stored: an embedding, an output head.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<FrozenWeight> {
        self.load(name, rows, cols, None, false)
    }

    /// The matrix `[rows, cols]` of a linear layer: quantized while it is read, if that was asked for.
    pub fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<FrozenWeight> {
        self.load(name, rows, cols, self.quantize, true)
    }

    fn load(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        quantize: Option<Scheme>,
        linear: bool,
    ) -> Result<FrozenWeight> {
        let checkpoint = match self.source {
            Source::Checkpoint(checkpoint) => checkpoint,
            Source::Blank(blank, checkpoint) => {
                let names = (name, &*self.name(name));
                let reordered = self.permuted_heads(name).is_some();
                return blank.matrix(
                    checkpoint,
                    names,
                    (rows, cols),
                    self.dtype,
                    quantize,
                    reordered,
                    linear,
                );
            }
        };
        let weight = match bitsandbytes::find(checkpoint, &self.name(name))? {
            Some(found) if quantize.is_some() => {
                return Err(Error::AlreadyQuantized {
                    path: checkpoint.path().to_path_buf(),
                    tensor: name.to_string(),
                    storage: found.scheme().to_string(),
                });
            }
            Some(found) => self.codes(checkpoint, name, (rows, cols), &found)?,
            None => match quantize {
                Some(scheme) => {
                    FrozenWeight::quantized(self.quantized(checkpoint, name, (rows, cols), scheme)?)?
                }
                None => self.blocks(checkpoint, name, (rows, cols))?,
            },
        };
        if self.device.is_cpu() { Ok(weight) } else { self.to_device(&weight) }
    }

    /// A matrix that bitsandbytes quantized: as it lies in the file, or widened.
    fn codes(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        (rows, cols): (usize, usize),
        found: &Quantized<'_>,
    ) -> Result<FrozenWeight> {
        if found.shape() != [rows, cols] {
            return Err(Error::Shape {
                path: checkpoint.path().to_path_buf(),
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
        let weight = weight.map_err(|e| unfit(checkpoint, name, &e.to_string()))?;
        check_factors(checkpoint, name, found)?;
        match self.dtype.storage() {
            None => Ok(weight),
            Some(wanted) => Ok(FrozenWeight::host(wanted, rows, cols, convert(weight.view()?, wanted)?)?),
        }
    }

    /// A matrix in plain floats or GGUF blocks.
    fn blocks(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        (rows, cols): (usize, usize),
    ) -> Result<FrozenWeight> {
        let view = checkpoint.get(&self.name(name))?;
        check_shape(view, &[rows, cols])?;
        let storage = view.storage()?;
        let permuted = self.permuted_heads(name);
        let owned = permuted.map(|heads| unpermute_rows(view.bytes(), rows, heads));
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

    /// The matrix `[rows, cols]` of a linear layer, quantized; the file's pages are let go of behind the work.
    ///
    /// # Errors
    /// A matrix of another shape, or that is quantized already or not finite.
    pub(crate) fn quantized(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        (rows, cols): (usize, usize),
        scheme: Scheme,
    ) -> Result<QuantizedWeight> {
        let view = checkpoint.get(&self.name(name))?;
        check_shape(view, &[rows, cols])?;
        let storage = view.storage()?;
        let made = match self.permuted_heads(name) {
            Some(heads) if !storage.is_quantized() => {
                let reordered = unpermute_rows(view.bytes(), rows, heads);
                view.release(0..view.bytes().len());
                QuantizedWeight::new(scheme, storage, rows, cols, &reordered, &|_| ())
            }
            _ => {
                let done = |range| view.release(range);
                let made = QuantizedWeight::new(scheme, storage, rows, cols, view.bytes(), &done);
                // a fault brings in the pages around it, those too that another piece has let go of
                view.release(0..view.bytes().len());
                made
            }
        };
        let (path, tensor) = (view.file.path().to_path_buf(), view.name.clone());
        made.map_err(|e| match e {
            QuantizeError::AlreadyQuantized { storage } => {
                Error::AlreadyQuantized { path, tensor, storage: storage.to_string() }
            }
            QuantizeError::NotFinite => Error::NotFinite { path, tensor },
            other => Error::Unfit { path, tensor, what: other.to_string() },
        })
    }

    fn to_device(&self, weight: &FrozenWeight) -> Result<FrozenWeight> {
        Ok(FrozenWeight::from_tensor(&weight.to_tensor(&self.device)?)?)
    }

    /// A vector `[len]` in f32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        let Source::Checkpoint(checkpoint) = self.source else {
            return Ok(tensor_of(vec![0.0; len], len)?);
        };
        let view = checkpoint.get(&self.name(name))?;
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
        let checkpoint = match self.source {
            Source::Checkpoint(checkpoint) if checkpoint.contains(name) => checkpoint,
            _ => return Ok(None),
        };
        let view = checkpoint.get(name)?;
        let len = view.shape.iter().product();
        Ok(Some(self.vector(name, len)?.to_vec1().map_err(engobe_autograd::Error::from)?))
    }
}

fn unfit(checkpoint: &Checkpoint, name: &str, what: &str) -> Error {
    let (path, tensor) = (checkpoint.path().to_path_buf(), name.to_string());
    Error::Unfit { path, tensor, what: what.to_string() }
}

/// Factors are few, and one that is NaN or infinite spoils a block.
fn check_factors(checkpoint: &Checkpoint, name: &str, found: &Quantized<'_>) -> Result<()> {
    let factors = match found {
        Quantized::FourBit { scales: Scales::Plain(factors), .. } => vec![factors],
        Quantized::FourBit { scales: Scales::Double { nested, map, .. }, .. } => vec![nested, map],
        Quantized::Int8 { scales, .. } => vec![scales],
    };
    match factors.iter().find(|f| !all_finite(StorageType::F32, f.bytes())) {
        None => Ok(()),
        Some(bad) => Err(Error::NotFinite {
            path: checkpoint.path().to_path_buf(),
            tensor: format!("{name}: {}", bad.name),
        }),
    }
}

/// A tensor as it lies in its file.
fn mapped(view: &TensorView) -> HostBytes {
    HostBytes::new(view.file.clone(), view.range.clone())
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

/// Refuses a tensor that holds an infinity or a NaN: training over it can only end in NaN.
fn check_finite(view: &TensorView, storage: StorageType) -> Result<()> {
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
fn all_finite(storage: StorageType, bytes: &[u8]) -> bool {
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
