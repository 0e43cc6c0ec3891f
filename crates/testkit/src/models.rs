//! The tiny models of `golden/`, and what they say.

use crate::golden;
use engobe_autograd::{Tape, Var, host};
use engobe_models::{LoadOptions, load_causal_lm};
use engobe_nn::{CausalLm, TokenBatch};
use std::path::Path;

/// The model in a directory or GGUF file. Panics if it cannot be read.
pub fn load(path: &Path) -> Box<dyn CausalLm> {
    load_causal_lm(path, &LoadOptions::default()).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A model of `golden/llama`.
pub fn tiny(name: &str) -> Box<dyn CausalLm> {
    load(&golden(format!("llama/{name}")))
}

/// Twenty ids that all tiny models know.
pub fn some_ids() -> Vec<u32> {
    (0..20).map(|i| i * 13 % 40).collect()
}

/// Logits after every token of one row.
pub fn logits(model: &dyn CausalLm, ids: &[u32]) -> Vec<Vec<f32>> {
    let batch = TokenBatch::packed(ids, std::slice::from_ref(&(0..ids.len())));
    let mut tape = Tape::inference();
    let said = model.hidden_states(&mut tape, &batch, None).and_then(|hidden| {
        let logits = model.logits(&mut tape, &Var::constant(hidden.into_tensor()))?;
        let rows = host(&logits)?.chunks_exact(logits.dim(1)?).map(<[f32]>::to_vec).collect();
        Ok(rows)
    });
    said.unwrap_or_else(|e| panic!("{e}"))
}

/// Values of an adapter's tensor that its name alone says, as `filled` in golden/shared.py makes them: between -1/16 and
/// 1/16, and around 1 for what multiplies.
pub fn filled(name: &str, len: usize) -> Vec<f32> {
    let step = |seed: u64, byte: u8| (seed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325, step);
    let factors = ["ia3_l", "magnitude", "ln_tuning_layers.weight", "vera_lambda"];
    let around = if factors.iter().any(|part| name.contains(part)) { 1.0 } else { 0.0 };
    // 16 bits: exact in f32
    let value = |i: u64| ((engobe_kernels::dropout::mix(seed, i) & 0xFFFF) as f32 - 32768.0) / 524_288.0;
    (0..len as u64).map(|i| value(i) + around).collect()
}
