//! The encoder-decoders, by name.

use crate::registry::check_quantization;
use crate::t5::{T5, T5Config};
use crate::{Error, LoadOptions, Result, Weights};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::hf_config::HfConfig;
use engobe_nn::Seq2Seq;
use std::path::Path;

/// Loads the encoder-decoder in a Hugging Face directory, by memory map and in parallel.
pub fn load_seq2seq(path: &Path, options: &LoadOptions) -> Result<Box<dyn Seq2Seq>> {
    let config = HfConfig::open(path)?;
    check_quantization(&config)?;
    match config.model_type()? {
        "t5" => {
            let checkpoint = Checkpoint::open(path)?;
            let weights = Weights::hugging_face(&checkpoint, options)?;
            Ok(Box::new(T5::load(&T5Config::from_hf(&config)?, &weights)?))
        }
        other => Err(Error::Architecture {
            path: config.path().to_path_buf(),
            found: other.to_string(),
            known: "t5".to_string(),
        }),
    }
}
