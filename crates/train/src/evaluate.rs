//! Loss and scores over a set of rows.

use crate::memory::guard::Guard;
use crate::model::Model;
use crate::scores::{self, Named, Prediction};
use crate::step::{self, LossSums};
use crate::{Error, Result};
use engobe_data::MicroBatch;

/// What an evaluation found.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// mean loss over labels: cross entropy in nats, or the squared error
    pub loss: f64,
    /// exp(loss)
    pub perplexity: f64,
    /// share of labels that were the most likely ones
    pub token_accuracy: f64,
    /// labels
    pub label_tokens: usize,
    /// the task's scores; none for next tokens
    pub scores: Vec<Named>,
}

impl Evaluation {
    /// A score by name; `loss` is one.
    pub fn score(&self, name: &str) -> Option<f64> {
        match name {
            "loss" => Some(self.loss),
            _ => self.scores.iter().find(|(n, _)| n == name).and_then(|(_, value)| *value),
        }
    }
}

/// Evaluates `batches` while `guard` watches over the memory; `progress` sees the number of batches done.
///
/// # Errors
/// No labels, a loss that is no number, or memory beyond the guard's limit.
pub fn evaluate<'m>(
    model: impl Into<Model<'m>>,
    batches: &[MicroBatch],
    guard: Option<&mut Guard>,
    progress: &mut dyn FnMut(usize),
) -> Result<Evaluation> {
    let model = model.into();
    let (sums, predictions) = run(model, batches, guard, progress)?;
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
        scores: model.labels().map(|labels| scores::score(labels, &predictions)).unwrap_or_default(),
    })
}

/// What a model with few logits says of each row, in the order of the batches.
pub fn predict<'m>(
    model: impl Into<Model<'m>>,
    batches: &[MicroBatch],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Prediction>> {
    Ok(run(model.into(), batches, None, progress)?.1)
}

fn run(
    model: Model<'_>,
    batches: &[MicroBatch],
    mut guard: Option<&mut Guard>,
    progress: &mut dyn FnMut(usize),
) -> Result<(LossSums, Vec<Prediction>)> {
    let mut sums = LossSums::default();
    let mut predictions = Vec::new();
    for (i, batch) in batches.iter().enumerate() {
        let tokens = batch.tokens.len();
        let watch = guard.as_ref().map(|guard| guard.watch_evaluation(tokens));
        let (more, logits) = step::predict(model, batch, watch)?;
        sums.add(more);
        if let Some(guard) = &mut guard {
            guard.evaluated(tokens);
        }
        if model.labels().is_some() {
            predictions.extend(scores::predictions(batch, logits, model.reads_tokens()));
        }
        progress(i + 1);
    }
    Ok((sums, predictions))
}
