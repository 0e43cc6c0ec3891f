//! Tiny models and what they say.
#![allow(dead_code)]

use candle_core::Device;
use engobe_adapters::Adapter;
use engobe_autograd::{Tape, Var, host};
use engobe_models::{LoadOptions, load_causal_lm};
use engobe_nn::{CausalLm, TokenBatch};
use engobe_testkit::{golden, golden_json};
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Expected {
    base: String,
}

/// The base of an adapter in `golden/peft`.
pub fn base_of(adapter: &str) -> PathBuf {
    let expected: Expected = golden_json(format!("peft/{adapter}/expected.json"));
    golden(format!("llama/{}", expected.base))
}

pub fn load(path: &Path) -> Box<dyn CausalLm> {
    load_causal_lm(path, &LoadOptions::default()).unwrap()
}

pub fn logits_of(model: &dyn CausalLm) -> Vec<f32> {
    let ids: Vec<u32> = (0..20).map(|i| i * 13 % 40).collect();
    let batch = TokenBatch::packed(&ids, std::slice::from_ref(&(0..20)));
    let mut tape = Tape::inference();
    let hidden = model.hidden_states(&mut tape, &batch, None).unwrap().into_tensor();
    let logits = model.logits(&mut tape, &Var::constant(hidden)).unwrap();
    host(&logits).unwrap().to_vec()
}

/// Logits of a model with the adapter in a PEFT directory.
pub fn logits(model: &Path, adapter: Option<&Path>) -> Vec<f32> {
    let mut model = load(model);
    if let Some(dir) = adapter {
        Adapter::load(model.as_mut(), dir, &Device::Cpu).unwrap();
    }
    logits_of(model.as_ref())
}

pub fn doubles(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}
