//! ELECTRA's discriminator (Clark et al. 2020): BERT without a pooler, whose embeddings may be narrower than its blocks.
//!
//! Module paths are those of transformers' `ElectraModel`.

use crate::encoders::EncoderArchitecture;
use crate::scope::Naming;
use crate::{Result, Weights, bert};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::Encoder;

/// The architecture.
pub static ARCHITECTURE: EncoderArchitecture =
    EncoderArchitecture { model_type: "electra", class: "Electra", also: &[], prefix: "electra", build };

fn build(config: &HfConfig, weights: &Weights<'_>, naming: Naming) -> Result<Box<dyn Encoder>> {
    Ok(Box::new(bert::stack(config, weights, naming, &ARCHITECTURE, 0)?))
}
