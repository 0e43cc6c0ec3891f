//! Weights that are not there: zeros that are never read, and notes of what each tensor will take in memory.

use crate::weights::{Layout, WeightDtype};
use crate::{Error, Result};
use engobe_autograd::{FrozenWeight, HostBytes};
use engobe_formats::bitsandbytes::{self, Quantized, Scales};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::hf_config::HfConfig;
use engobe_formats::mmap::Zeros;
use engobe_kernels::codec::{FourBit, NESTED_BLOCK};
use engobe_kernels::quantize::Scheme;
use engobe_kernels::storage::StorageType;
use std::sync::{Arc, Mutex};

/// What a tensor takes in memory once it is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorUse {
    /// Hugging Face's name
    pub name: String,
    /// its rows
    pub rows: usize,
    /// how it is kept, for people
    pub storage: String,
    /// bytes that are ours: converted, reordered or quantized
    pub owned: usize,
    /// bytes of the file that are mapped and read
    pub mapped: usize,
    /// the mapped bytes are used after loading too
    pub stays_mapped: bool,
    /// bytes beside these while it is loaded
    pub transient: usize,
}

/// How weights that are not there would be stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unstored {
    storage: StorageType,
    /// linear layers only
    scheme: Option<Scheme>,
}

impl Default for Unstored {
    fn default() -> Self {
        Self { storage: StorageType::F32, scheme: None }
    }
}

impl Unstored {
    /// `torch_dtype` (`dtype` in transformers 5) and `quantization_config`.
    pub(crate) fn of(config: &HfConfig) -> Result<Self> {
        let name = match config.opt_str("torch_dtype")? {
            Some(name) => Some(name),
            None => config.opt_str("dtype")?,
        };
        let storage = match name {
            Some("bfloat16") => StorageType::BF16,
            Some("float16") => StorageType::F16,
            _ => StorageType::F32,
        };
        let scheme = config.get("quantization_config").map(|q| {
            let flag = |key: &str| q.get(key).and_then(serde_json::Value::as_bool).unwrap_or(false);
            let fp4 = q.get("bnb_4bit_quant_type").and_then(serde_json::Value::as_str) == Some("fp4");
            match flag("load_in_8bit") {
                true => Scheme::Int8,
                false => Scheme::FourBit {
                    kind: if fp4 { FourBit::Fp4 } else { FourBit::Nf4 },
                    block: 64,
                    double: flag("bnb_4bit_use_double_quant"),
                },
            }
        });
        Ok(Self { storage, scheme })
    }
}

/// Stands for the tensors of a model, and notes which are asked for.
#[derive(Debug)]
pub(crate) struct Blank {
    /// as many as the largest tensor so far needs
    zeros: Mutex<Arc<Zeros>>,
    unstored: Unstored,
    seen: Mutex<Vec<TensorUse>>,
}

impl Blank {
    /// Stands for tensors that a configuration alone describes as `unstored` says.
    pub(crate) fn new(unstored: Unstored) -> Result<Self> {
        Ok(Self { zeros: Mutex::new(Arc::new(Zeros::new(0)?)), unstored, seen: Mutex::default() })
    }

    /// What was asked for, by name.
    pub(crate) fn into_seen(self) -> Vec<TensorUse> {
        let mut tensors = self.seen.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        tensors
    }

    /// A matrix that holds nothing; `name` is Hugging Face's, `stored` its name in the checkpoint. `scheme` is what it
    /// shall be quantized to, `reordered` says that its rows are, `linear` that a linear layer asks for it.
    pub(crate) fn matrix(
        &self,
        checkpoint: Option<&Checkpoint>,
        (name, stored): (&str, &str),
        (rows, cols): (usize, usize),
        dtype: WeightDtype,
        scheme: Option<Scheme>,
        reordered: bool,
        linear: bool,
        layout: Layout,
    ) -> Result<FrozenWeight> {
        let (expected, reordered) = match layout {
            Layout::Rows => ([rows, cols], reordered),
            Layout::Columns => ([cols, rows], true),
        };
        let zeros = self.zeros(name, rows, cols)?;
        let (bytes, kept) = match checkpoint {
            Some(checkpoint) => match bitsandbytes::find(checkpoint, stored)? {
                Some(found) => (found_bytes(&found), found.scheme().to_string()),
                None => {
                    let view = checkpoint.get(stored)?;
                    if view.shape != expected {
                        return Err(Error::Shape {
                            path: view.file.path().to_path_buf(),
                            tensor: view.name.clone(),
                            found: view.shape.clone(),
                            expected: expected.to_vec(),
                        });
                    }
                    (view.bytes().len(), view.storage()?.name().to_string())
                }
            },
            None => match self.unstored.scheme.filter(|_| linear && scheme.is_none()) {
                Some(scheme) => (scheme_bytes(scheme, rows, cols), scheme.to_string()),
                None => {
                    let storage = self.unstored.storage;
                    (storage.row_bytes(cols).unwrap_or(0) * rows, storage.name().to_string())
                }
            },
        };
        let mut seen = TensorUse {
            name: name.to_string(),
            rows,
            storage: kept.clone(),
            owned: 0,
            mapped: bytes,
            stays_mapped: true,
            transient: 0,
        };
        let wanted = dtype.storage().filter(|s| s.name() != kept);
        match (scheme, wanted) {
            (Some(scheme), _) => {
                // the file's pages are let go behind the work
                seen.stays_mapped = false;
                (seen.owned, seen.mapped) = (scheme_bytes(scheme, rows, cols), 0);
                seen.transient = if reordered { bytes } else { 0 };
                seen.storage = scheme.to_string();
            }
            (None, Some(wanted)) => {
                seen.stays_mapped = false;
                seen.owned = wanted.row_bytes(cols).unwrap_or(0) * rows;
                // rounded in parts that are joined at the end
                seen.transient = if wanted == StorageType::F32 { 0 } else { seen.owned };
                seen.storage = wanted.name().to_string();
            }
            (None, None) if reordered => (seen.owned, seen.stays_mapped) = (bytes, false),
            (None, None) => {}
        }
        self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(seen);
        Ok(FrozenWeight::host(StorageType::BF16, rows, cols, zeros)?)
    }

    /// Zeros for a matrix in 16 bits.
    ///
    /// # Errors
    /// No memory is as large as the configuration says.
    fn zeros(&self, name: &str, rows: usize, cols: usize) -> Result<HostBytes> {
        let too_large = || Error::TooLarge { tensor: name.to_string(), rows, cols };
        // f32 is the widest that is counted
        let bytes = rows.checked_mul(cols).filter(|n| n.checked_mul(8).is_some()).ok_or_else(too_large)? * 2;
        let mut zeros = self.zeros.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if (**zeros).as_ref().len() < bytes {
            *zeros = Arc::new(Zeros::new(bytes).map_err(|_| too_large())?);
        }
        Ok(HostBytes::new(zeros.clone(), 0..bytes))
    }
}

/// Bytes that a matrix takes in a form that we quantize to.
pub fn scheme_bytes(scheme: Scheme, rows: usize, cols: usize) -> usize {
    let n = rows * cols;
    match scheme {
        Scheme::Int8 => n + 4 * rows,
        Scheme::FourBit { block, double, .. } => {
            let blocks = n.div_ceil(block);
            n.div_ceil(2)
                + match double {
                    true => blocks + 4 * blocks.div_ceil(NESTED_BLOCK) + 4 * 256,
                    false => 4 * blocks,
                }
        }
    }
}

fn found_bytes(found: &Quantized<'_>) -> usize {
    match found {
        Quantized::FourBit { codes, scales, .. } => {
            codes.bytes().len()
                + match scales {
                    Scales::Plain(absmax) => absmax.bytes().len(),
                    Scales::Double { codes, map, nested, .. } => {
                        codes.bytes().len() + map.bytes().len() + nested.bytes().len()
                    }
                }
        }
        Quantized::Int8 { codes, scales, .. } => codes.bytes().len() + scales.bytes().len(),
    }
}
