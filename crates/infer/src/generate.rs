//! One sequence, token by token.

use crate::{Error, Sampler};
use candle_core::Tensor;
use engobe_autograd::{Activations, Tape, Var, host, ops};
use engobe_nn::{CausalLm, KvCache};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Prompt tokens that go through the model at a time: enough to run at matmul speed, few enough that
/// activations stay small.
const PROMPT_CHUNK: usize = 512;

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// an end token came
    EndToken,
    /// as many tokens as asked for
    Length,
    /// the caller said so (a stop string, Ctrl-C)
    Caller,
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Generated {
    /// the new tokens, without the end token
    pub token_ids: Vec<u32>,
    /// why it ended
    pub reason: StopReason,
    /// time for the prompt
    pub prompt_time: Duration,
    /// time for the tokens after the first
    pub decode_time: Duration,
}

impl Generated {
    /// Tokens a second after the first one; `None` if there was only one.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        let n = self.token_ids.len().checked_sub(1).filter(|n| *n > 0)?;
        Some(n as f64 / self.decode_time.as_secs_f64())
    }
}

/// A dialogue with a model: keeps the cache between turns.
pub struct Generator<'m> {
    model: &'m dyn CausalLm,
    activations: Activations,
    cache: KvCache,
    /// tokens whose keys and values are in the cache
    seen: Vec<u32>,
}

impl<'m> Generator<'m> {
    /// An empty context with room for `capacity` tokens before the cache must grow.
    pub fn new(model: &'m dyn CausalLm, capacity: usize, activations: Activations) -> Result<Self, Error> {
        Ok(Self { model, activations, cache: model.new_cache(1, capacity)?, seen: Vec::new() })
    }

    /// Continues `prompt` (the whole context: what is already cached is not computed again) by up to
    /// `max_new_tokens` tokens, or to a token in `end`. `on_token` sees each token as it comes.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_new_tokens: usize,
        end: &[u32],
        sampler: &mut Sampler,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated, Error> {
        let started = Instant::now();
        let mut logits = self.read(prompt)?;
        let prompt_time = started.elapsed();
        let started = Instant::now();
        let mut token_ids = Vec::new();
        let mut decode_time = Duration::ZERO;
        let mut context = prompt.to_vec();
        let reason = loop {
            if token_ids.len() >= max_new_tokens {
                break StopReason::Length;
            }
            let token = sampler.sample(&mut logits, &context).ok_or(Error::NotFinite)?;
            decode_time = started.elapsed();
            if end.contains(&token) {
                break StopReason::EndToken;
            }
            token_ids.push(token);
            context.push(token);
            if on_token(token).is_break() {
                break StopReason::Caller;
            }
            if token_ids.len() < max_new_tokens {
                logits = self.advance(&[token])?;
            }
        };
        Ok(Generated { token_ids, reason, prompt_time, decode_time })
    }

    /// Brings the cache to `prompt` and returns the logits after its last token.
    fn read(&mut self, prompt: &[u32]) -> Result<Vec<f32>, Error> {
        let last = prompt.len().checked_sub(1).ok_or(Error::EmptyPrompt)?;
        // the last token is computed again if need be: its logits are wanted
        let shared = self.seen.iter().zip(&prompt[..last]).take_while(|(a, b)| a == b).count();
        self.seen.truncate(shared);
        self.cache.truncate(0, shared);
        let (before, rest) =
            prompt[shared..].split_at((prompt.len() - 1 - shared) / PROMPT_CHUNK * PROMPT_CHUNK);
        for chunk in before.chunks(PROMPT_CHUNK) {
            self.hidden(chunk)?;
        }
        self.advance(rest)
    }

    /// Logits after `tokens`, which join the context.
    fn advance(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        let hidden = self.hidden(tokens)?;
        let mut logits = last_logits(self.model, &hidden, &[tokens.len() - 1], self.activations)?;
        Ok(logits.pop().unwrap_or_default())
    }

    fn hidden(&mut self, tokens: &[u32]) -> Result<Tensor, Error> {
        let batch = self.cache.batch(&[(0, tokens)])?;
        let mut tape = Tape::generation(self.activations);
        let hidden = self.model.hidden_states(&mut tape, &batch, Some(&mut self.cache))?;
        self.seen.extend_from_slice(tokens);
        Ok(hidden.into_tensor())
    }
}

/// Logits of some rows of the hidden states.
pub(crate) fn last_logits(
    model: &dyn CausalLm,
    hidden: &Tensor,
    rows: &[usize],
    activations: Activations,
) -> Result<Vec<Vec<f32>>, Error> {
    let mut tape = Tape::generation(activations);
    let rows: Vec<u32> = rows.iter().map(|r| *r as u32).collect();
    let chosen = ops::select_rows(&mut tape, &Var::constant(hidden.clone()), rows.into())?;
    let logits = model.logits(&mut tape, &chosen)?.to_device(&candle_core::Device::Cpu)?;
    let width = logits.dim(1)?;
    Ok(host(&logits)?.chunks_exact(width).map(<[f32]>::to_vec).collect())
}
