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
