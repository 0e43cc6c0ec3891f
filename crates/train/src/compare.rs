//! How far one model is from another, on text.

use crate::{Error, Result};
use engobe_autograd::{Tape, Var, host, ops};
use engobe_data::MicroBatch;
use engobe_kernels::divergence::{RowDivergence, divergence};
use engobe_nn::{CausalLm, TokenBatch};

/// What [`compare`] found, over all labelled positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// mean of KL(reference ‖ candidate), nats a token
    pub mean_kl: f64,
    /// the largest
    pub max_kl: f64,
    /// the reference's perplexity
    pub reference_perplexity: f64,
    /// the candidate's perplexity
    pub candidate_perplexity: f64,
    /// share of positions where both find the same token likeliest
    pub top1_agreement: f64,
    /// positions
    pub tokens: usize,
}

/// Floats of logits that are held at a time, for each of the two models: 32 MB.
const LOGITS: usize = 1 << 23;

/// Compares the distributions of both models at every labelled position of `batches`. Logits of a few rows at a
/// time are held, never those of a whole text. `progress` sees the number of batches done.
///
/// # Errors
/// No labels, another vocabulary, or logits that are no numbers.
pub fn compare(
    reference: &dyn CausalLm,
    candidate: &dyn CausalLm,
    batches: &[MicroBatch],
    progress: &mut dyn FnMut(usize),
) -> Result<Comparison> {
    let (vocab, other) = (reference.info().vocab_size, candidate.info().vocab_size);
    if vocab != other {
        return Err(Error::Vocabulary { reference: vocab, candidate: other });
    }
    let mut rows = Vec::new();
    for (i, batch) in batches.iter().enumerate() {
        compare_batch(reference, candidate, batch, &mut rows)?;
        progress(i + 1);
    }
    if rows.is_empty() {
        return Err(Error::NoLabels);
    }
    let mean = |of: &dyn Fn(&RowDivergence) -> f64| rows.iter().map(of).sum::<f64>() / rows.len() as f64;
    let found = Comparison {
        mean_kl: mean(&|r| r.kl),
        max_kl: rows.iter().map(|r| r.kl).fold(0.0, f64::max),
        reference_perplexity: mean(&|r| r.reference_loss).exp(),
        candidate_perplexity: mean(&|r| r.candidate_loss).exp(),
        top1_agreement: mean(&|r| f64::from(u8::from(r.same_top))),
        tokens: rows.len(),
    };
    match found.mean_kl.is_finite() {
        true => Ok(found),
        false => Err(Error::NoNumbers),
    }
}

fn compare_batch(
    reference: &dyn CausalLm,
    candidate: &dyn CausalLm,
    batch: &MicroBatch,
    out: &mut Vec<RowDivergence>,
) -> Result<()> {
    let vocab = reference.info().vocab_size;
    let labelled: Vec<(u32, u32)> =
        (0u32..).zip(&batch.targets).filter_map(|(i, target)| Some((i, (*target)?))).collect();
    if labelled.is_empty() {
        return Ok(());
    }
    let tokens = TokenBatch::packed(&batch.tokens, &batch.segments);
    let hidden = |model: &dyn CausalLm| model.hidden_states(&mut Tape::inference(), &tokens, None);
    let (first, second) = (hidden(reference)?, hidden(candidate)?);
    for part in labelled.chunks((LOGITS / vocab.max(1)).max(1)) {
        let rows: Vec<u32> = part.iter().map(|(row, _)| *row).collect();
        let targets: Vec<u32> = part.iter().map(|(_, target)| *target).collect();
        let logits = |model: &dyn CausalLm, hidden: &Var| {
            let mut tape = Tape::inference();
            let some = ops::select_rows(&mut tape, hidden, rows.clone().into())?;
            model
                .logits(&mut tape, &some)?
                .to_device(&candle_core::Device::Cpu)
                .map_err(engobe_autograd::Error::from)
        };
        let (z, w) = (logits(reference, &first)?, logits(candidate, &second)?);
        let start = out.len();
        out.resize(start + part.len(), RowDivergence::default());
        divergence(&host(&z)?, &host(&w)?, vocab, &targets, &mut out[start..]);
    }
    Ok(())
}
