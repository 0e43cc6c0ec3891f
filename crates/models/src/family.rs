//! What an architecture's file has to say: how a configuration becomes a decoder.

use crate::gguf_names::Names;
use crate::settings::DecoderSizes;
use crate::stored::Stored;
use crate::{GgufSettings, HeadKind, Result, Weights};
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_nn::CausalLm;
use serde_json::Value;
use std::fmt::Debug;

/// A model's configuration.
pub trait Family: Debug + Send + Sync {
    /// Sizes of its blocks.
    fn sizes(&self) -> &DecoderSizes;

    /// The decoder over the weights of a checkpoint.
    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn CausalLm>>;

    /// How a GGUF file keeps the tensor that Hugging Face calls `name`.
    fn stored(&self, _name: &str) -> Stored {
        Stored::AsIs
    }

    /// The settings as `config.json` says them, without what every model has (its type, its tokens).
    fn to_hf(&self) -> Value;

    /// The settings as a GGUF file says them.
    ///
    /// # Errors
    /// What llama.cpp cannot express: key, what was found, what would be right.
    fn to_gguf(&self) -> Result<GgufSettings, Misfit>;
}

/// A setting that cannot be: key, what was found, what would be right.
#[derive(Debug)]
pub struct Misfit {
    /// Hugging Face's key
    pub key: &'static str,
    /// its value
    pub found: String,
    /// what would be right
    pub expected: String,
}

impl Misfit {
    /// A setting that cannot be.
    pub fn new(key: &'static str, found: impl ToString, expected: impl Into<String>) -> Self {
        Self { key, found: found.to_string(), expected: expected.into() }
    }
}

/// Reads a configuration.
pub type Read<T> = fn(&T) -> Result<Box<dyn Family>>;

/// Heads for texts and for tokens.
pub const HEADS: &[HeadKind] = &[HeadKind::Sequence, HeadKind::Token];

/// An architecture.
#[derive(Debug)]
pub struct Architecture {
    /// Hugging Face's `model_type`
    pub model_type: &'static str,
    /// the class that transformers loads it with
    pub class: &'static str,
    /// how the names of its classes with heads begin
    pub stem: &'static str,
    /// what transformers has heads for on it
    pub heads: &'static [HeadKind],
    /// reads `config.json`
    pub from_hf: Read<HfConfig>,
    /// in GGUF files, if llama.cpp knows it
    pub gguf: Option<GgufForm>,
}

/// An architecture in GGUF files.
#[derive(Debug)]
pub struct GgufForm {
    /// `general.architecture`
    pub name: &'static str,
    /// names of its tensors
    pub names: &'static Names,
    /// reads metadata; `None` where another architecture's files hold it (Mistral's are LLaMA's)
    pub read: Option<Read<Gguf>>,
}
