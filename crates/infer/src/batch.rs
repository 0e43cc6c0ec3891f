//! Many prompts at once, each continued greedily: for scoring.
//!
//! A fixed number of sequences run side by side, so that every weight is read once for all of them; when one
//! ends, the next prompt takes its slot. Sequences never see each other, and the result of each is what it
//! would be alone, up to the rounding of differently shaped products.

use crate::generate::last_logits;
use crate::{Error, Sampler, Sampling};
use engobe_autograd::{Activations, Tape};
use engobe_nn::{CausalLm, KvCache};
use std::collections::VecDeque;

/// Sequences side by side: enough to run near matmul speed, few enough to start quickly.
const SLOTS: usize = 32;

/// A sequence that is being continued.
struct Running {
    /// which prompt
    index: usize,
    /// tokens that the model has not seen yet: the prompt at first, then the last token
    pending: Vec<u32>,
    output: Vec<u32>,
}

/// Greedy continuations of `prompts`, each up to `max_new_tokens[i]` tokens or a token in `end` (which is left
/// out). `progress` sees the number of finished prompts.
pub fn complete_all(
    model: &dyn CausalLm,
    prompts: &[Vec<u32>],
    max_new_tokens: &[usize],
    end: &[u32],
    activations: Activations,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<u32>>, Error> {
    if prompts.iter().any(Vec::is_empty) {
        return Err(Error::EmptyPrompt);
    }
    let longest = prompts.iter().zip(max_new_tokens).map(|(p, n)| p.len() + n).max().unwrap_or(1);
    let slots = SLOTS.min(prompts.len()).max(1);
    let mut cache = model.new_cache(slots, longest)?;
    let mut greedy = Sampler::new(Sampling::default())?;
    let mut waiting: VecDeque<usize> = (0..prompts.len()).filter(|i| max_new_tokens[*i] > 0).collect();
    let mut outputs = vec![Vec::new(); prompts.len()];
    let mut done = prompts.len() - waiting.len();
    let mut running: Vec<Option<Running>> = (0..slots).map(|_| None).collect();
    loop {
        for (slot, place) in running.iter_mut().enumerate().filter(|(_, r)| r.is_none()) {
            if let Some(index) = waiting.pop_front() {
                cache.truncate(slot, 0);
                *place = Some(Running { index, pending: prompts[index].clone(), output: Vec::new() });
            }
        }
        if running.iter().all(Option::is_none) {
            return Ok(outputs);
        }
        for (slot, token) in step(model, &mut cache, &mut running, activations, &mut greedy)? {
            let Some(sequence) = &mut running[slot] else { continue };
            let ended = end.contains(&token);
            if !ended {
                sequence.output.push(token);
                sequence.pending = vec![token];
            }
            if ended || sequence.output.len() >= max_new_tokens[sequence.index] {
                outputs[sequence.index] = std::mem::take(&mut sequence.output);
                running[slot] = None;
                done += 1;
                progress(done);
            }
        }
    }
}

/// Runs every sequence's pending tokens and returns each one's next token.
fn step(
    model: &dyn CausalLm,
    cache: &mut KvCache,
    running: &mut [Option<Running>],
    activations: Activations,
    greedy: &mut Sampler,
) -> Result<Vec<(usize, u32)>, Error> {
    let alive = || running.iter().enumerate().filter_map(|(slot, r)| Some((slot, r.as_ref()?)));
    let rows: Vec<(usize, &[u32])> = alive().map(|(slot, r)| (slot, r.pending.as_slice())).collect();
    let batch = cache.batch(&rows)?;
    let hidden = model.hidden_states(&mut Tape::generation(activations), &batch, Some(cache))?;
    let last: Vec<usize> = batch.segments.iter().map(|s| s.q.end - 1).collect();
    let logits = last_logits(model, hidden.tensor(), &last, activations)?;
    let slots: Vec<usize> = rows.iter().map(|(slot, _)| *slot).collect();
    let mut next = Vec::new();
    for (slot, mut logits) in slots.into_iter().zip(logits) {
        next.push((slot, greedy.sample(&mut logits, &[]).ok_or(Error::NotFinite)?));
    }
    Ok(next)
}
