//! Loss over a set of rows.

use crate::memory::guard::Guard;
use crate::step::{self, LossSums};
use crate::{Error, Result};
use engobe_data::MicroBatch;
use engobe_nn::CausalLm;

/// What an evaluation found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// mean cross entropy over labelled tokens, nats
    pub loss: f64,
    /// exp(loss)
    pub perplexity: f64,
    /// share of labelled tokens whose label was the most likely one
    pub token_accuracy: f64,
    /// labelled tokens
    pub label_tokens: usize,
}

/// Evaluates `batches` while `guard` watches over the memory; `progress` sees the number of batches done.
///
/// # Errors
/// No labels, a loss that is no number, or memory beyond the guard's limit.
pub fn evaluate(
    model: &dyn CausalLm,
    batches: &[MicroBatch],
    mut guard: Option<&mut Guard>,
    progress: &mut dyn FnMut(usize),
) -> Result<Evaluation> {
    let mut sums = LossSums::default();
    for (i, batch) in batches.iter().enumerate() {
        let tokens = batch.tokens.len();
        sums.add(step::evaluate(model, batch, guard.as_ref().map(|guard| guard.watch_evaluation(tokens)))?);
        if let Some(guard) = &mut guard {
            guard.evaluated(tokens);
        }
        progress(i + 1);
    }
    if sums.label_tokens == 0 {
        return Err(Error::NoLabels);
    }
    let loss = sums.mean();
    if !loss.is_finite() {
        return Err(Error::EvalNotFinite { value: loss });
    }
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        token_accuracy: sums.correct as f64 / sums.label_tokens as f64,
        label_tokens: sums.label_tokens,
    })
}
