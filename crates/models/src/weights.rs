//! From a checkpoint's tensors to frozen weights: names, storage, shape and sanity.

mod bytes;

use self::bytes::{all_finite, check_finite, check_shape, convert, mapped, numbers, transpose};
use crate::blank::Blank;
use crate::registry::Described;
use crate::stored::Stored;
use crate::{Error, LoadOptions, Result};
use candle_core::{Device, Tensor};
use engobe_autograd::{Error as OpError, FrozenWeight, HostBytes, HostScales, tensor_of};
use engobe_formats::bitsandbytes::{self, Quantized, Scales};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::tensor::TensorView;
use engobe_kernels::quantize::{QuantizeError, QuantizedWeight, Scheme};
use engobe_kernels::storage::{StorageType, WeightView};

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
    /// nothing reads the output head: a checkpoint may lack it
    headless: bool,
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
        described: Option<&'a Described>,
        checkpoint: Option<&'a Checkpoint>,
        options: &LoadOptions,
        blank: &'a Blank,
    ) -> Result<Self> {
        Self::new(described, Source::Blank(blank, checkpoint), options)
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
        Ok(Self { source, dtype, quantize, device, gguf, headless: false })
    }

    /// These tensors for a model whose output head nobody reads: it need not be there.
    pub(crate) fn headless(self) -> Self {
        Self { headless: true, ..self }
    }

    /// True if a decoder's output head is not wanted.
    pub(crate) fn is_headless(&self) -> bool {
        self.headless
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

    /// True if only sizes are asked for, and no checkpoint says which tensors there are.
    pub(crate) fn are_imagined(&self) -> bool {
        matches!(self.source, Source::Blank(_, None))
    }

    /// True if the checkpoint holds the same numbers under both names, in one type: some files have tied weights twice.
    /// Without a checkpoint, no two tensors are the same.
    pub fn are_same(&self, a: &str, b: &str) -> bool {
        let (Source::Checkpoint(checkpoint) | Source::Blank(_, Some(checkpoint))) = self.source else {
            return false;
        };
        match (checkpoint.get(&self.name(a)), checkpoint.get(&self.name(b))) {
            (Ok(a), Ok(b)) => a.dtype == b.dtype && a.shape == b.shape && a.bytes() == b.bytes(),
            _ => false,
        }
    }

    /// The shape of a tensor that is there; nothing is said of those that only will be.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self.source {
            Source::Checkpoint(checkpoint) | Source::Blank(_, Some(checkpoint)) => {
                checkpoint.get(&self.name(name)).ok().map(|t| t.shape.to_vec())
            }
            Source::Blank(_, None) => None,
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

    /// A small tensor of any shape, in f32 on the CPU.
    pub fn numbers(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match self.source {
            Source::Checkpoint(checkpoint) => numbers(checkpoint.get(&self.name(name))?, shape),
            Source::Blank(..) => Ok(vec![0.0; shape.iter().product()]),
        }
    }

    /// A vector `[len]` in f32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        let Source::Checkpoint(checkpoint) = self.source else {
            return Ok(tensor_of(vec![0.0; len], len)?);
        };
        let mut out = numbers(checkpoint.get(&self.name(name))?, &[len])?;
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

/// The name under which a Hugging Face checkpoint holds the tensor `name`: some were saved from the model without its
/// head, whose names lack the first part (GPT-2's `h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`).
pub(crate) fn hf_name_in<'n>(checkpoint: &Checkpoint, name: &'n str) -> &'n str {
    match name.split_once('.') {
        Some((_, short)) if !checkpoint.contains(name) && checkpoint.contains(short) => short,
        _ => name,
    }
}
