//! Model architectures, one file each, named after Hugging Face's `model_type`.
//!
//! A model is built over the tensors of a checkpoint (`engobe-formats`) from the layers of `engobe-nn`.
//!
//! Must not know: adapter methods, the training loop.

mod bert;
mod blueprint;
mod distilbert;
mod encoders;
pub mod gguf_names;
mod llama;
mod llama_config;
mod modernbert;
mod outline;
mod quantize;
mod roberta;
mod scope;
mod seq2seq;
mod t5;
mod weights;

pub use blueprint::{Blueprint, GgufSettings, LinearBlueprint};
pub use encoders::{ENCODERS, EncoderArchitecture, encoder_architecture, load_encoder};
pub use llama::Llama;
pub use llama_config::LlamaConfig;
pub use outline::{DecoderSizes, Outline, TensorUse, scheme_bytes};
pub use quantize::{QuantizedModel, quantize};
pub use scope::Naming;
pub use seq2seq::load_seq2seq;
pub use t5::{T5, T5Config};
pub use weights::{WeightDtype, Weights, permute_rows, unpermute_rows};

use candle_core::Device;
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::quantize::Scheme;
use engobe_nn::CausalLm;
use std::path::{Path, PathBuf};

/// Result of building a model.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A checkpoint that is no model that we can build.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The architecture is unknown.
    #[error("{}: architecture {found:?} is not supported; known: llama", path.display())]
    Architecture {
        /// config.json or the GGUF file
        path: PathBuf,
        /// what it says it is
        found: String,
    },
    /// A setting has an impossible value.
    #[error("{}: {key} is {found}; expected {expected}", path.display())]
    Config {
        /// file
        path: PathBuf,
        /// key
        key: String,
        /// value
        found: String,
        /// what would be right
        expected: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: {tensor} is {found:?}; the configuration says {expected:?}", path.display())]
    Shape {
        /// file
        path: PathBuf,
        /// tensor
        tensor: String,
        /// its shape
        found: Vec<usize>,
        /// shape by the configuration
        expected: Vec<usize>,
    },
    /// A weight that shall be quantized is quantized.
    #[error("{}: {tensor} is quantized already ({storage}); only weights in f32, bf16 or f16 can be quantized", path.display())]
    AlreadyQuantized {
        /// file
        path: PathBuf,
        /// tensor
        tensor: String,
        /// how it is stored
        storage: String,
    },
    /// A weight's parts do not fit each other, or it cannot be quantized.
    #[error("{}: {tensor}: {what}", path.display())]
    Unfit {
        /// file
        path: PathBuf,
        /// tensor
        tensor: String,
        /// what is wrong
        what: String,
    },
    /// Options contradict each other.
    #[error("{0}")]
    Options(&'static str),
    /// A weight is NaN or infinite.
    #[error("{}: {tensor} holds NaN or infinity; the file is broken", path.display())]
    NotFinite {
        /// file
        path: PathBuf,
        /// tensor
        tensor: String,
    },
    /// A file could not be read.
    #[error(transparent)]
    Format(#[from] engobe_formats::Error),
    /// A weight could not be converted.
    #[error(transparent)]
    Encode(#[from] engobe_kernels::codec::EncodeError),
    /// An op failed.
    #[error(transparent)]
    Op(#[from] engobe_autograd::Error),
}

/// How a model shall be loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// how base weights are kept
    pub dtype: WeightDtype,
    /// what linear layers are quantized to as they are read; the output head stays as it is
    pub quantize: Option<Scheme>,
    /// where they live
    pub device: Device,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { dtype: WeightDtype::Stored, quantize: None, device: Device::Cpu }
    }
}

/// Loads the decoder in a Hugging Face directory or a `.gguf` file, by memory map and in parallel.
pub fn load_causal_lm(path: &Path, options: &LoadOptions) -> Result<Box<dyn CausalLm>> {
    let checkpoint = Checkpoint::open(path)?;
    if let Some(gguf) = checkpoint.gguf() {
        let architecture = gguf.str("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::Architecture { path: path.to_path_buf(), found: architecture.to_string() });
        }
        let config = LlamaConfig::from_gguf(gguf)?;
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let weights = Weights::gguf_llama(&checkpoint, options, heads, kv_heads)?;
        return Ok(Box::new(Llama::load(&config, &weights)?));
    }
    let config = HfConfig::open(path)?;
    check_quantization(&config)?;
    match config.model_type()? {
        "llama" => {
            let weights = Weights::hugging_face(&checkpoint, options)?;
            Ok(Box::new(Llama::load(&LlamaConfig::from_hf(&config)?, &weights)?))
        }
        other => Err(Error::Architecture { path: config.path().to_path_buf(), found: other.to_string() }),
    }
}

/// Refuses models quantized by anybody but bitsandbytes.
fn check_quantization(config: &HfConfig) -> Result<()> {
    let Some(quantization) = config.get("quantization_config") else { return Ok(()) };
    match quantization.get("quant_method").and_then(serde_json::Value::as_str) {
        Some("bitsandbytes") => Ok(()),
        other => Err(Error::Config {
            path: config.path().to_path_buf(),
            key: "quantization_config.quant_method".to_string(),
            found: other.map_or("missing".to_string(), |name| format!("{name:?}")),
            expected: "\"bitsandbytes\", or a model that is not quantized".to_string(),
        }),
    }
}

/// The `config.json` that transformers needs to load the weights of a GGUF file from a Hugging Face directory.
///
/// # Errors
/// The file is of another architecture, or has settings that transformers cannot express.
pub fn hf_config_of(gguf: &engobe_formats::gguf::Gguf) -> Result<serde_json::Value> {
    llama_config::to_hf(&LlamaConfig::from_gguf(gguf)?, gguf)
}

/// Rows of a model's embedding, from its configuration alone.
pub fn vocab_size(path: &Path) -> Result<usize> {
    if path.is_dir() {
        return Ok(HfConfig::open(path)?.usize("vocab_size")?);
    }
    let gguf = engobe_formats::gguf::Gguf::open(path)?;
    let rows = gguf.tensor("token_embd.weight")?.shape.first().copied();
    Ok(rows.unwrap_or(0))
}
