//! A model without its weights: its modules and the sizes of its tensors, from headers alone.
//!
//! The decoder is built by the same code that loads one, over zeros that are never read, so whatever walks over a
//! model's modules works on an outline too. What each tensor will take in memory is noted on the way.

use crate::llama_config::LlamaConfig;
use crate::weights::{WeightDtype, Weights};
use crate::{Error, Llama, LoadOptions, Result, check_quantization};
use engobe_autograd::{FrozenWeight, HostBytes};
use engobe_formats::bitsandbytes::{self, Quantized, Scales};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::hf_config::HfConfig;
use engobe_formats::mmap::Zeros;
use engobe_kernels::codec::{FourBit, NESTED_BLOCK};
use engobe_kernels::quantize::Scheme;
use engobe_kernels::storage::StorageType;
use engobe_nn::CausalLm;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Sizes of a decoder's blocks, as far as what a training step keeps depends on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderSizes {
    /// number of blocks
    pub layers: usize,
    /// width of the hidden states
    pub hidden: usize,
    /// query heads
    pub heads: usize,
    /// key/value heads
    pub kv_heads: usize,
    /// width of a head
    pub head_dim: usize,
    /// width of the MLP
    pub mlp: usize,
    /// rows of the output head
    pub vocab: usize,
}

/// What a tensor takes in memory once it is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorUse {
    /// Hugging Face's name
    pub name: String,
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

/// A model without its weights.
pub struct Outline {
    /// the decoder; its weights must not be read
    pub model: Box<dyn CausalLm>,
    /// sizes of its blocks
    pub sizes: DecoderSizes,
    /// its tensors
    pub tensors: Vec<TensorUse>,
    /// the weights are there, not only a configuration
    pub has_weights: bool,
}

impl Outline {
    /// Reads the headers of a Hugging Face directory or `.gguf` file. A directory without weights, or a `config.json`
    /// by itself, is taken to have weights of the type that it names.
    ///
    /// # Errors
    /// The files are broken, or not a model that [`crate::load_causal_lm`] would load.
    pub fn read(path: &Path, options: &LoadOptions) -> Result<Self> {
        let (config_path, checkpoint) = match path.is_dir() {
            true => {
                let weights = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"];
                let there = weights.iter().any(|name| path.join(name).exists());
                (path.join("config.json"), there.then(|| Checkpoint::open(path)).transpose()?)
            }
            false if path.extension().is_some_and(|e| e == "json") => (path.to_path_buf(), None),
            false => (path.to_path_buf(), Some(Checkpoint::open(path)?)),
        };
        if let Some(gguf) = checkpoint.as_ref().and_then(Checkpoint::gguf) {
            let architecture = gguf.str("general.architecture")?;
            if architecture != "llama" {
                return Err(Error::Architecture {
                    path: path.to_path_buf(),
                    found: architecture.to_string(),
                });
            }
            let config = LlamaConfig::from_gguf(gguf)?;
            let heads = Some((config.num_attention_heads, config.num_key_value_heads));
            return Self::build(&config, checkpoint.as_ref(), heads, options, Unstored::default());
        }
        let config = HfConfig::read(&config_path)?;
        check_quantization(&config)?;
        match config.model_type()? {
            "llama" => {
                let unstored = Unstored::of(&config)?;
                Self::build(&LlamaConfig::from_hf(&config)?, checkpoint.as_ref(), None, options, unstored)
            }
            other => Err(Error::Architecture { path: config.path().to_path_buf(), found: other.to_string() }),
        }
    }

    fn build(
        c: &LlamaConfig,
        checkpoint: Option<&Checkpoint>,
        gguf_heads: Option<(usize, usize)>,
        options: &LoadOptions,
        unstored: Unstored,
    ) -> Result<Self> {
        let widest = c.vocab_size.max(c.intermediate_size).max(c.num_attention_heads * c.head_dim);
        let most = widest * c.hidden_size.max(c.num_attention_heads * c.head_dim) * 2;
        let blank = Blank { zeros: Arc::new(Zeros::new(most)?), unstored, seen: Mutex::default() };
        let weights = Weights::blank(checkpoint, options, gguf_heads, &blank)?;
        let model = Llama::load(c, &weights)?;
        let mut tensors = blank.seen.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self {
            model: Box::new(model),
            sizes: DecoderSizes {
                layers: c.num_hidden_layers,
                hidden: c.hidden_size,
                heads: c.num_attention_heads,
                kv_heads: c.num_key_value_heads,
                head_dim: c.head_dim,
                mlp: c.intermediate_size,
                vocab: c.vocab_size,
            },
            tensors,
            has_weights: checkpoint.is_some(),
        })
    }
}

/// How weights that are not there would be stored.
#[derive(Clone, Copy, Debug)]
struct Unstored {
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
    fn of(config: &HfConfig) -> Result<Self> {
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
pub struct Blank {
    zeros: Arc<Zeros>,
    unstored: Unstored,
    seen: Mutex<Vec<TensorUse>>,
}

impl Blank {
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
    ) -> Result<FrozenWeight> {
        let (bytes, kept) = match checkpoint {
            Some(checkpoint) => match bitsandbytes::find(checkpoint, stored)? {
                Some(found) => (found_bytes(&found), found.scheme().to_string()),
                None => {
                    let view = checkpoint.get(stored)?;
                    if view.shape != [rows, cols] {
                        return Err(Error::Shape {
                            path: view.file.path().to_path_buf(),
                            tensor: view.name.clone(),
                            found: view.shape.clone(),
                            expected: vec![rows, cols],
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
        let zeros = HostBytes::new(self.zeros.clone(), 0..rows * cols * 2);
        Ok(FrozenWeight::host(StorageType::BF16, rows, cols, zeros)?)
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
