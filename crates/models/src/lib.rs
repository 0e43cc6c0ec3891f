//! Model architectures, one file each, named after Hugging Face's `model_type`.
//!
//! A model is built over the tensors of a checkpoint (`engobe-formats`) from the layers of `engobe-nn`.
//!
//! Must not know: adapter methods, the training loop.

mod bert;
mod blank;
mod deberta_v2;
mod distilbert;
mod electra;
mod encoders;
mod family;
mod gemma;
mod gemma2;
mod gemma3;
mod gemmas;
pub mod gguf_names;
mod gpt2;
mod gpt_neox;
mod granite;
mod llama;
mod mistral;
mod modernbert;
mod mt5;
mod olmo2;
mod opt;
mod outline;
mod parts;
mod phi;
mod phi3;
mod quantize;
mod qwen2;
mod qwen3;
mod registry;
mod roberta;
mod rope_settings;
mod scope;
mod seq2seq;
mod settings;
mod smollm3;
mod stablelm;
mod starcoder2;
mod stored;
mod t5;
mod task_heads;
mod task_outline;
mod umt5;
mod weights;

pub use blank::{TensorUse, scheme_bytes};
pub use encoders::{ENCODERS, EncoderArchitecture, encoder_architecture, load_encoder};
pub use outline::{GgufSettings, LinearOutline, Outline};
pub use quantize::{QuantizedModel, quantize};
pub use scope::Naming;
pub use seq2seq::{SEQ2SEQS, Seq2SeqArchitecture, load_seq2seq, seq2seq_architecture};
pub use settings::DecoderSizes;
pub use stored::Stored;
pub use task_heads::{HeadKind, config_of, load_task_model, task_class};
pub use task_outline::TaskOutline;
pub use weights::{WeightDtype, Weights};

use candle_core::Device;
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::quantize::Scheme;
use engobe_nn::CausalLm;
use registry::Described;
use std::path::{Path, PathBuf};

/// The error for a configuration that names none of the architectures that are wanted.
fn not_of<'a>(config: &HfConfig, found: &str, known: impl Iterator<Item = &'a str>) -> Error {
    let kinds = [
        ("a decoder", decoder_types().any(|name| name == found)),
        ("an encoder", ENCODERS.iter().any(|a| a.names().any(|(name, _)| name == found))),
        ("an encoder-decoder", SEQ2SEQS.iter().any(|a| a.model_type == found)),
    ];
    let (path, found) = (config.path().to_path_buf(), found.to_string());
    let known = known.collect::<Vec<_>>().join(", ");
    match kinds.iter().find(|(_, is_it)| *is_it) {
        Some((kind, _)) => Error::Kind { path, found, kind, known },
        None => Error::Architecture { path, found, known },
    }
}

/// Result of building a model.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A checkpoint that is no model that we can build.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The architecture is unknown.
    #[error("{}: architecture {found:?} is not supported; known: {known}", path.display())]
    Architecture {
        /// config.json or the GGUF file
        path: PathBuf,
        /// what it says it is
        found: String,
        /// what we know
        known: String,
    },
    /// The architecture is of another kind than what is wanted.
    #[error("{}: architecture {found:?} is {kind}; what is asked for takes one of {known}", path.display())]
    Kind {
        /// config.json
        path: PathBuf,
        /// what it says it is
        found: String,
        /// what that is
        kind: &'static str,
        /// what is wanted
        known: String,
    },
    /// llama.cpp has no such architecture, so there are no such GGUF files.
    #[error("{}: llama.cpp has no architecture for {model_type}: it cannot be written as GGUF", path.display())]
    NoGguf {
        /// config.json
        path: PathBuf,
        /// Hugging Face's `model_type`
        model_type: &'static str,
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
    /// A configuration describes a tensor that no memory holds.
    #[error("{tensor} would be [{rows}, {cols}]: config.json says sizes that cannot be")]
    TooLarge {
        /// tensor
        tensor: String,
        /// its rows
        rows: usize,
        /// its columns
        cols: usize,
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
    let described = Described::of(&checkpoint, path)?;
    described.family.build(&Weights::of(&described, &checkpoint, options)?)
}

/// `model_type` of every decoder that we know.
pub fn decoder_types() -> impl Iterator<Item = &'static str> {
    registry::ARCHITECTURES.iter().map(|a| a.model_type)
}

/// The `config.json` that transformers needs to load the weights of a GGUF file from a Hugging Face directory.
///
/// # Errors
/// The file is of another architecture, or has settings that transformers cannot express.
pub fn hf_config_of(gguf: &Gguf) -> Result<serde_json::Value> {
    let described = Described::from_gguf(gguf)?;
    let mut json = described.family.to_hf();
    json["architectures"] = serde_json::json!([described.architecture.class]);
    json["model_type"] = described.architecture.model_type.into();
    json["tie_word_embeddings"] = described.family.sizes().tied_head.into();
    for name in ["bos_token_id", "eos_token_id"] {
        if let Some(id) = gguf.opt_u32(&format!("tokenizer.ggml.{name}"))? {
            json[name] = id.into();
        }
    }
    Ok(json)
}

/// Rows of a model's embedding, from its configuration alone.
pub fn vocab_size(path: &Path) -> Result<usize> {
    let described = match path.is_dir() {
        true => Described::from_hf(&HfConfig::open(path)?)?,
        false => Described::from_gguf(&Gguf::open(path)?)?,
    };
    Ok(described.family.sizes().vocab)
}
