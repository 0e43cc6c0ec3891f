//! Generation by encoder-decoders: the source is read once, then the decoder goes on token by token from its start
//! token.

use crate::generate::{Generated, StopReason};
use crate::{Error, Sampler, Sampling};
use engobe_autograd::{Activations, Tape, Var, host, ops};
use engobe_nn::{Seq2Seq, Seq2SeqCache, TokenBatch};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Sources side by side: as many as decoders' sequences.
const SLOTS: usize = 32;

/// What the model says to `source`: up to `max_new_tokens` tokens, or to a token in `end` (which is left out).
/// `on_token` sees each token as it comes.
pub fn generate_from(
    model: &dyn Seq2Seq,
    source: &[u32],
    max_new_tokens: usize,
    end: &[u32],
    activations: Activations,
    sampler: &mut Sampler,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated, Error> {
    let started = Instant::now();
    let mut cache = read(model, &[source], max_new_tokens + 1, activations)?;
    let prompt_time = started.elapsed();
    let started = Instant::now();
    let mut context = vec![model.start_token()];
    let mut decode_time = Duration::ZERO;
    let reason = loop {
        if context.len() > max_new_tokens {
            break StopReason::Length;
        }
        let last = [*context.last().unwrap_or(&model.start_token())];
        let logits = step(model, &mut cache, &[(0, &last)], activations)?.pop();
        let token = sampler.sample(&mut logits.unwrap_or_default(), &context).ok_or(Error::NotFinite)?;
        decode_time = started.elapsed();
        if end.contains(&token) {
            break StopReason::EndToken;
        }
        context.push(token);
        if on_token(token).is_break() {
            break StopReason::Caller;
        }
    };
    Ok(Generated { token_ids: context.split_off(1), reason, prompt_time, decode_time })
}

/// Greedy answers to `sources`, each up to `max_new_tokens` tokens or a token in `end` (which is left out). `progress`
/// sees the number of finished ones.
pub fn answer_all(
    model: &dyn Seq2Seq,
    sources: &[Vec<u32>],
    max_new_tokens: usize,
    end: &[u32],
    activations: Activations,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<u32>>, Error> {
    let mut greedy = Sampler::new(Sampling::default())?;
    let mut answers = Vec::with_capacity(sources.len());
    for chunk in sources.chunks(SLOTS) {
        let rows: Vec<&[u32]> = chunk.iter().map(Vec::as_slice).collect();
        let mut cache = read(model, &rows, max_new_tokens + 1, activations)?;
        let mut contexts = vec![vec![model.start_token()]; chunk.len()];
        let mut alive: Vec<usize> = if max_new_tokens > 0 { (0..chunk.len()).collect() } else { Vec::new() };
        while !alive.is_empty() {
            let last: Vec<[u32; 1]> = alive.iter().map(|i| [*contexts[*i].last().unwrap_or(&0)]).collect();
            let rows: Vec<(usize, &[u32])> =
                alive.iter().zip(&last).map(|(i, l)| (*i, l.as_slice())).collect();
            let all = step(model, &mut cache, &rows, activations)?;
            let mut going = Vec::with_capacity(alive.len());
            for (i, mut logits) in alive.into_iter().zip(all) {
                let token = greedy.sample(&mut logits, &[]).ok_or(Error::NotFinite)?;
                if end.contains(&token) {
                    continue;
                }
                contexts[i].push(token);
                if contexts[i].len() <= max_new_tokens {
                    going.push(i);
                }
            }
            alive = going;
        }
        answers.extend(contexts.into_iter().map(|mut c| c.split_off(1)));
        progress(answers.len());
    }
    Ok(answers)
}

/// The cache over what the encoder makes of the sources.
fn read(
    model: &dyn Seq2Seq,
    sources: &[&[u32]],
    capacity: usize,
    activations: Activations,
) -> Result<Seq2SeqCache, Error> {
    if sources.iter().any(|s| s.is_empty()) {
        return Err(Error::EmptyPrompt);
    }
    let mut start = 0;
    let ranges: Vec<_> = sources
        .iter()
        .map(|s| {
            start += s.len();
            start - s.len()..start
        })
        .collect();
    let batch = TokenBatch::packed(&sources.concat(), &ranges);
    let mut tape = Tape::generation(activations);
    let states = model.encode(&mut tape, &batch)?;
    Ok(model.new_cache(&mut tape, &states, capacity)?)
}

/// Logits after the next token of each `(source, token)`.
fn step(
    model: &dyn Seq2Seq,
    cache: &mut Seq2SeqCache,
    rows: &[(usize, &[u32])],
    activations: Activations,
) -> Result<Vec<Vec<f32>>, Error> {
    let batch = cache.own.batch(rows)?;
    let mut tape = Tape::generation(activations);
    let hidden = model.next_states(&mut tape, &batch, cache)?.into_tensor();
    let last = batch.segments.iter().map(|s| s.q.end as u32 - 1).collect();
    let chosen = ops::select_rows(&mut tape, &Var::constant(hidden), last)?;
    let logits = model.logits(&mut tape, &chosen)?.to_device(&candle_core::Device::Cpu)?;
    let width = logits.dim(1)?;
    Ok(host(&logits)?.chunks_exact(width).map(<[f32]>::to_vec).collect())
}
