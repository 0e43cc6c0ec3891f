//! The arithmetic of one micro-batch: loss, and gradients if asked for.

use crate::Result;
use crate::model::Model;
use candle_core::Tensor;
use engobe_autograd::{Gradients, Half, Tape, Watch};
use engobe_data::MicroBatch;

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
    /// keep the backward's values in 16 bits
    pub half: Option<Half>,
    /// looks on; may end the pass
    pub watch: Option<Watch>,
}

/// Loss of a micro-batch without gradients, and the logits of each label's place if the model has few of them: a row
/// each `[labels]`. `watch` looks on and may end the pass.
pub fn predict(
    model: Model<'_>,
    batch: &MicroBatch,
    watch: Option<Watch>,
) -> Result<(LossSums, Vec<Vec<f32>>)> {
    let pass = model.forward(&mut Tape::inference().watch(watch), batch)?;
    Ok(pass.map_or_else(Default::default, |pass| (pass.sums, pass.logits)))
}

/// Loss of a micro-batch; its gradients are added to `grads`.
pub fn differentiate<'m>(
    model: impl Into<Model<'m>>,
    batch: &MicroBatch,
    how: Differentiate,
    grads: &mut Gradients,
) -> Result<LossSums> {
    let tape = Tape::new().checkpointing(how.checkpointing).half(how.half);
    let mut tape = tape.dropout_seed(how.dropout_seed).watch(how.watch);
    let Some(pass) = model.into().forward(&mut tape, batch)? else { return Ok(LossSums::default()) };
    if let Some(loss) = pass.loss {
        let seed = Tensor::full(how.scale, 1, loss.tensor().device())?;
        tape.backward(&loss, seed, grads)?;
    }
    Ok(pass.sums)
}
