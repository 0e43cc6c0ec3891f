//! From a checkpoint's tensors to frozen weights: names, storage, shape and sanity.

use crate::blank::Blank;
use crate::registry::Described;
use crate::stored::Stored;
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
    /// what a GGUF file calls its tensors, and how it keeps them
    gguf: Option<&'a Described>,
}

/// How a matrix lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[out, in]`
    Rows,
    /// `[in, out]` in Hugging Face's files (transformers' `Conv1D`), `[out, in]` in GGUF's and quantized
    Columns,
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
        described: &'a Described,
        checkpoint: Option<&'a Checkpoint>,
        options: &LoadOptions,
        blank: &'a Blank,
    ) -> Result<Self> {
        Self::new(Some(described), Source::Blank(blank, checkpoint), options)
    }

    /// Tensors of a decoder, in a Hugging Face directory or a GGUF file.
    ///
    /// # Errors
    /// Options that contradict each other.
    pub(crate) fn of(
        described: &'a Described,
        checkpoint: &'a Checkpoint,
        options: &LoadOptions,
    ) -> Result<Self> {
        Self::new(Some(described), Source::Checkpoint(checkpoint), options)
    }

    /// Tensors of a Hugging Face directory, whatever it holds.
    ///
    /// # Errors
    /// Options that contradict each other.
    pub fn hugging_face(checkpoint: &'a Checkpoint, options: &LoadOptions) -> Result<Self> {
        Self::new(None, Source::Checkpoint(checkpoint), options)
    }

    fn new(described: Option<&'a Described>, source: Source<'a>, options: &LoadOptions) -> Result<Self> {
        if options.quantize.is_some() && options.dtype != WeightDtype::Stored {
            let why = "quantized weights are kept in their own type, not in another one";
            return Err(Error::Options(why));
        }
        if options.quantize.is_some() && !options.device.is_cpu() {
            return Err(Error::Options("quantized weights live in the memory of the CPU"));
        }
        let LoadOptions { dtype, quantize, device } = options.clone();
        let gguf = described.filter(|d| d.is_gguf);
        Ok(Self { source, dtype, quantize, device, gguf })
    }

    /// Where the weights shall live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Name of a tensor in the checkpoint.
    fn name(&self, name: &str) -> String {
        match (self.gguf.and_then(Described::gguf), self.source) {
            (Some(form), _) => form.names.from_hf(name).unwrap_or_else(|| name.to_string()),
            (None, Source::Checkpoint(checkpoint) | Source::Blank(_, Some(checkpoint))) => {
                hf_name_in(checkpoint, name).to_string()
            }
            (None, Source::Blank(_, None)) => name.to_string(),
        }
    }

    /// How the file keeps a tensor.
    fn stored(&self, name: &str) -> Stored {
        self.gguf.map_or(Stored::AsIs, |described| described.family.stored(name))
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
        self.load(name, (rows, cols), None, false, Layout::Rows)
    }

    /// The matrix `[rows, cols]` of a linear layer: quantized while it is read, if that was asked for.
    pub fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<FrozenWeight> {
        self.load(name, (rows, cols), self.quantize, true, Layout::Rows)
    }

    /// The matrix `[rows, cols]` of a linear layer that Hugging Face's files hold as `[cols, rows]`.
    pub fn transposed(&self, name: &str, rows: usize, cols: usize) -> Result<FrozenWeight> {
        let layout = if self.gguf.is_some() { Layout::Rows } else { Layout::Columns };
        self.load(name, (rows, cols), self.quantize, true, layout)
    }

    fn load(
        &self,
        name: &str,
        (rows, cols): (usize, usize),
        quantize: Option<Scheme>,
        linear: bool,
        layout: Layout,
    ) -> Result<FrozenWeight> {
        let checkpoint = match self.source {
            Source::Checkpoint(checkpoint) => checkpoint,
            Source::Blank(blank, checkpoint) => {
                let names = (name, &*self.name(name));
                let reordered = self.stored(name).reorders();
                return blank.matrix(
                    checkpoint,
                    names,
                    (rows, cols),
                    self.dtype,
                    quantize,
                    reordered,
                    linear,
                    layout,
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
                Some(scheme) => FrozenWeight::quantized(self.quantized(
                    checkpoint,
                    name,
                    (rows, cols),
                    scheme,
                    layout,
                )?)?,
                None => self.blocks(checkpoint, name, (rows, cols), layout)?,
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
        layout: Layout,
    ) -> Result<FrozenWeight> {
        let view = checkpoint.get(&self.name(name))?;
        let storage = view.storage()?;
        let owned = self.in_order(view, name, (rows, cols), layout)?;
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

    /// The bytes of a matrix whose rows or elements lie in another order than `[rows, cols]`; `None` where they do not.
    fn in_order(
        &self,
        view: &TensorView,
        name: &str,
        (rows, cols): (usize, usize),
        layout: Layout,
    ) -> Result<Option<Vec<u8>>> {
        let storage = view.storage()?;
        if layout == Layout::Columns {
            check_shape(view, &[cols, rows])?;
            if storage.is_quantized() {
                let what = format!("{storage} cannot be transposed: only f32, bf16 and f16 can");
                return Err(Error::Unfit {
                    path: view.file.path().to_path_buf(),
                    tensor: view.name.clone(),
                    what,
                });
            }
            return Ok(Some(match storage.block_bytes() {
                2 => transpose::<2>(view.bytes(), cols, rows),
                _ => transpose::<4>(view.bytes(), cols, rows),
            }));
        }
        check_shape(view, &[rows, cols])?;
        let stored = self.stored(name);
        Ok(stored.reorders().then(|| stored.rows_from_gguf(view.bytes(), rows)))
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
        layout: Layout,
    ) -> Result<QuantizedWeight> {
        let view = checkpoint.get(&self.name(name))?;
        let storage = view.storage()?;
        let made = match self.in_order(view, name, (rows, cols), layout)? {
            Some(ordered) if !storage.is_quantized() => {
                view.release(0..view.bytes().len());
                QuantizedWeight::new(scheme, storage, rows, cols, &ordered, &|_| ())
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
        out = self.stored(name).values_from_gguf(&out, len);
        Ok(tensor_of(out, len)?.to_device(&self.device).map_err(engobe_autograd::Error::from)?)
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

/// The name under which a Hugging Face checkpoint holds the tensor `name`: some were saved from the model without its
/// head, whose names lack the first part (GPT-2's `h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`).
pub(crate) fn hf_name_in<'n>(checkpoint: &Checkpoint, name: &'n str) -> &'n str {
    match name.split_once('.') {
        Some((_, short)) if !checkpoint.contains(name) && checkpoint.contains(short) => short,
        _ => name,
    }
}

/// A matrix `[rows, cols]` of elements of N bytes as `[cols, rows]`, in parallel.
fn transpose<const N: usize>(bytes: &[u8], rows: usize, cols: usize) -> Vec<u8> {
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
