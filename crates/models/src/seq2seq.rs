//! The encoder-decoders, by name. Adding one is its file, its line here, and a golden configuration.

use crate::registry::check_quantization;
use crate::settings::DecoderSizes;
use crate::{LoadOptions, Result, Weights, not_of};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::hf_config::HfConfig;
use engobe_nn::Seq2Seq;
use std::path::Path;

/// An encoder-decoder's architecture.
#[derive(Debug)]
pub struct Seq2SeqArchitecture {
    /// Hugging Face's `model_type`
    pub model_type: &'static str,
    /// sizes of its blocks, those of the encoder and the decoder counted together
    pub sizes: fn(&HfConfig) -> Result<DecoderSizes>,
    /// builds it over the weights of a checkpoint
    pub build: fn(&HfConfig, &Weights<'_>) -> Result<Box<dyn Seq2Seq>>,
}

/// All that we know.
pub static SEQ2SEQS: &[&Seq2SeqArchitecture] =
    &[&crate::t5::ARCHITECTURE, &crate::mt5::ARCHITECTURE, &crate::umt5::ARCHITECTURE];

/// The encoder-decoder's architecture that a configuration names, if it is one.
pub fn seq2seq_architecture(config: &HfConfig) -> Result<Option<&'static Seq2SeqArchitecture>> {
    let found = config.model_type()?;
    Ok(SEQ2SEQS.iter().find(|a| a.model_type == found).copied())
}

/// Loads the encoder-decoder in a Hugging Face directory, by memory map and in parallel.
pub fn load_seq2seq(path: &Path, options: &LoadOptions) -> Result<Box<dyn Seq2Seq>> {
    let config = HfConfig::open(path)?;
    check_quantization(&config)?;
    let Some(architecture) = seq2seq_architecture(&config)? else {
        return Err(not_of(&config, config.model_type()?, SEQ2SEQS.iter().map(|a| a.model_type)));
    };
    let checkpoint = Checkpoint::open(path)?;
    let weights = Weights::hugging_face(&checkpoint, options)?;
    (architecture.build)(&config, &weights)
}
