//! What tiny models say.

use candle_core::Device;
use engobe_adapters::Adapter;
use engobe_nn::CausalLm;
use engobe_testkit::models::{load, logits as rows};
use std::path::Path;

/// Logits of twenty tokens.
pub fn logits_of(model: &dyn CausalLm) -> Vec<f32> {
    let ids = engobe_testkit::models::some_ids();
    rows(model, &ids).concat()
}

/// Logits of a model with the adapter in a PEFT directory.
pub fn logits(model: &Path, adapter: Option<&Path>) -> Vec<f32> {
    let mut model = load(model);
    if let Some(dir) = adapter {
        Adapter::load(model.as_mut(), dir, &Device::Cpu).unwrap();
    }
    logits_of(model.as_ref())
}
