//! The arithmetic of one micro-batch: loss, and gradients if asked for.

use crate::Result;
use candle_core::Tensor;
use engobe_autograd::{Gradients, Tape, Watch, ops};
use engobe_data::MicroBatch;
use engobe_nn::{CausalLm, TokenBatch};

/// Sums over the labelled tokens of one or more micro-batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSums {
    /// summed cross entropy, nats
    pub loss: f64,
    /// labelled tokens
    pub label_tokens: usize,
    /// labelled tokens whose label was the most likely one
    pub correct: usize,
}

impl LossSums {
    /// Adds another batch's sums.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.label_tokens += other.label_tokens;
        self.correct += other.correct;
    }

    /// Loss per labelled token.
    pub fn mean(&self) -> f64 {
        self.loss / self.label_tokens.max(1) as f64
    }
}

/// How a training micro-batch is differentiated.
#[derive(Clone)]
pub struct Differentiate {
    /// recompute blocks in the backward
    pub checkpointing: bool,
    /// seed of this micro-batch's dropout masks
    pub dropout_seed: u64,
    /// factor on the summed loss before it is differentiated: one over the window's labelled tokens
    pub scale: f32,
    /// looks on; may end the pass
    pub watch: Option<Watch>,
}

/// Loss of a micro-batch without gradients; `watch` looks on and may end the pass.
pub fn evaluate(model: &dyn CausalLm, batch: &MicroBatch, watch: Option<Watch>) -> Result<LossSums> {
    forward(model, Tape::inference().watch(watch), batch, None)
}

/// Loss of a micro-batch; its gradients are added to `grads`.
pub fn differentiate(
    model: &dyn CausalLm,
    batch: &MicroBatch,
    how: Differentiate,
    grads: &mut Gradients,
) -> Result<LossSums> {
    let tape = Tape::new().checkpointing(how.checkpointing).dropout_seed(how.dropout_seed).watch(how.watch);
    forward(model, tape, batch, Some((how.scale, grads)))
}

fn forward<'m>(
    model: &'m dyn CausalLm,
    mut tape: Tape<'m>,
    batch: &MicroBatch,
    backward: Option<(f32, &mut Gradients)>,
) -> Result<LossSums> {
    let mut rows = Vec::with_capacity(batch.label_tokens);
    let mut targets = Vec::with_capacity(batch.label_tokens);
    for (i, target) in batch.targets.iter().enumerate() {
        if let Some(target) = target {
            rows.push(i as u32);
            targets.push(*target);
        }
    }
    if rows.is_empty() {
        return Ok(LossSums::default());
    }
    let tokens = TokenBatch::packed(&batch.tokens, &batch.segments);
    let hidden = model.hidden_states(&mut tape, &tokens, None)?;
    // positions without a label need no logits
    let labelled =
        if rows.len() == tokens.len() { hidden } else { ops::select_rows(&mut tape, &hidden, rows.into())? };
    let label_tokens = targets.len();
    let out = model.head_loss(&mut tape, &labelled, targets.into())?;
    drop(labelled);
    let sums = LossSums {
        loss: out.tokens.iter().map(|t| f64::from(t.loss)).sum(),
        label_tokens,
        correct: out.tokens.iter().filter(|t| t.correct).count(),
    };
    if let Some((scale, grads)) = backward {
        let seed = Tensor::full(scale, 1, out.loss.tensor().device())?;
        tape.backward(&out.loss, seed, grads)?;
    }
    Ok(sums)
}
