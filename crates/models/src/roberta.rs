//! RoBERTa (Liu et al. 2019): BERT whose positions begin behind the padding's row.
//!
//! Module paths are those of transformers' `RobertaModel`. XLM-RoBERTa (Conneau et al. 2020) and CamemBERT (Martin et al. 2020)
//! are the same over other vocabularies: transformers' classes of them are copies, down to the names of their modules.

use crate::encoders::EncoderArchitecture;
use crate::scope::Naming;
use crate::{Result, Weights, bert};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::Encoder;

/// The architecture.
pub static ARCHITECTURE: EncoderArchitecture = EncoderArchitecture {
    model_type: "roberta",
    class: "Roberta",
    also: &[("camembert", "Camembert"), ("xlm-roberta", "XLMRoberta")],
    prefix: "roberta",
    build,
};

fn build(config: &HfConfig, weights: &Weights<'_>, naming: Naming) -> Result<Box<dyn Encoder>> {
    let padding = config.opt_usize("pad_token_id")?.unwrap_or(1);
    Ok(Box::new(bert::stack(config, weights, naming, &ARCHITECTURE, padding as u32 + 1)?))
}
