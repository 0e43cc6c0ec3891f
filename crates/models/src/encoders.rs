//! The encoders, by name. Adding one is its file, its line here, and a golden configuration.

use crate::registry::check_quantization;
use crate::scope::Naming;
use crate::settings::PLAIN;
use crate::{LoadOptions, Result, Weights, not_of};

pub(crate) use crate::settings::bad;
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_nn::Encoder;
use std::path::Path;

/// Builds an encoder over the weights of a checkpoint.
pub type BuildEncoder = fn(&HfConfig, &Weights<'_>, Naming) -> Result<Box<dyn Encoder>>;

/// An encoder's architecture.
#[derive(Debug)]
pub struct EncoderArchitecture {
    /// Hugging Face's `model_type`
    pub model_type: &'static str,
    /// how the names of transformers' classes for it begin
    pub class: &'static str,
    /// other names of the same, and how their classes' names begin: models that transformers has as copies of it
    pub also: &'static [(&'static str, &'static str)],
    /// what stands before its modules' paths in task models
    pub prefix: &'static str,
    /// builds it
    pub build: BuildEncoder,
}

impl EncoderArchitecture {
    /// Every `model_type` that is this, and how its classes' names begin.
    pub fn names(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        [(self.model_type, self.class)].into_iter().chain(self.also.iter().copied())
    }
}

/// All that we know.
pub static ENCODERS: &[&EncoderArchitecture] = &[
    &crate::bert::ARCHITECTURE,
    &crate::roberta::ARCHITECTURE,
    &crate::distilbert::ARCHITECTURE,
    &crate::electra::ARCHITECTURE,
    &crate::deberta_v2::ARCHITECTURE,
    &crate::modernbert::ARCHITECTURE,
];

/// The encoder's architecture that a configuration names.
///
/// # Errors
/// It is none that we know.
pub fn encoder_architecture(config: &HfConfig) -> Result<&'static EncoderArchitecture> {
    let found = config.model_type()?;
    let unknown = || {
        let names = ENCODERS.iter().flat_map(|a| a.names()).map(|(name, _)| name);
        not_of(config, found, names)
    };
    let is_it = |a: &&&EncoderArchitecture| a.names().any(|(name, _)| name == found);
    ENCODERS.iter().find(is_it).copied().ok_or_else(unknown)
}

/// Loads the encoder in a Hugging Face directory: that of a bare model or of any task model over it.
pub fn load_encoder(path: &Path, options: &LoadOptions, naming: Naming) -> Result<Box<dyn Encoder>> {
    let config = HfConfig::open(path)?;
    check_quantization(&config)?;
    let architecture = encoder_architecture(&config)?;
    let checkpoint = Checkpoint::open(path)?;
    let weights = Weights::hugging_face(&checkpoint, options)?;
    (architecture.build)(&config, &weights, naming)
}

/// The width of each of `heads` heads of an activation of width `d`.
pub(crate) fn head_dim(config: &HfConfig, key: &str, d: usize, heads: usize) -> Result<usize> {
    match heads > 0 && d > 0 && d.is_multiple_of(heads) {
        true => Ok(d / heads),
        false => Err(bad(config, key, heads, &format!("a divisor of the width {d}"))),
    }
}

/// The activation under `key`.
pub(crate) fn activation(config: &HfConfig, key: &str, default: &str) -> Result<Activation> {
    crate::settings::activation(config, key, default, PLAIN)
}
