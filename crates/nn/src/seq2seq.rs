//! What an encoder-decoder offers to training and generation.

use crate::cache::KvCache;
use crate::causal::{ModelInfo, TokenBatch};
use crate::modules::ModuleTree;
use candle_core::{Device, Tensor};
use engobe_autograd::ops::HeadLoss;
use engobe_autograd::{Result, Tape, Var};
use engobe_kernels::attention::Segment;
use std::ops::Range;
use std::sync::Arc;

/// The encoder's last hidden states, and where each source lies in them.
#[derive(Clone, Debug)]
pub struct EncoderStates {
    /// `[n, d]`
    pub hidden: Var,
    /// rows of each source, in the order of the batch's segments
    pub rows: Arc<[Range<usize>]>,
}

impl EncoderStates {
    /// The segments of cross attention: segment i of `target` sees source i, or source `target.slots[i]` where the
    /// batch came from a cache.
    ///
    /// # Errors
    /// There are more segments than sources.
    pub fn cross(&self, target: &TokenBatch) -> Result<Arc<[Segment]>> {
        cross(&self.rows, target)
    }
}

fn cross(rows: &[Range<usize>], target: &TokenBatch) -> Result<Arc<[Segment]>> {
    let of = |(i, s): (usize, &Segment)| {
        let source = target.slots.get(i).copied().unwrap_or(i);
        let kv = rows.get(source).cloned().ok_or_else(|| {
            engobe_autograd::Error::shape("cross attention", format!("source {source} of {}", rows.len()))
        })?;
        Ok(Segment { q: s.q.clone(), kv })
    };
    target.segments.iter().enumerate().map(of).collect()
}

/// What generation keeps: the decoder's own keys and values, one slot a source, and those of the sources, which are
/// made once.
#[derive(Debug)]
pub struct Seq2SeqCache {
    /// the decoder's own attention
    pub own: KvCache,
    /// keys and values of the encoder's states, per layer: `[n, width]` each
    pub sources: Vec<(Tensor, Tensor)>,
    /// rows of each source
    pub rows: Arc<[Range<usize>]>,
}

impl Seq2SeqCache {
    /// [`EncoderStates::cross`] for a batch made by [`KvCache::batch`] of `own`.
    ///
    /// # Errors
    /// A slot has no source.
    pub fn cross(&self, target: &TokenBatch) -> Result<Arc<[Segment]>> {
        cross(&self.rows, target)
    }
}

/// An encoder-decoder language model.
pub trait Seq2Seq: ModuleTree + Send + Sync {
    /// Its sizes; `num_layers` and `kv_width` are the decoder's.
    fn info(&self) -> &ModelInfo;

    /// Where its weights are.
    fn device(&self) -> &Device;

    /// True if what the head reads is scaled, as T5 v1.0 does because its head is the embedding's matrix.
    fn scales_head_input(&self) -> bool {
        false
    }

    /// The token that a decoder's row begins with: labels are shifted right behind it.
    fn start_token(&self) -> u32;

    /// The encoder's last hidden states, its final norm included.
    fn encode<'m>(&'m self, tape: &mut Tape<'m>, source: &TokenBatch) -> Result<EncoderStates>;

    /// Hidden states of the decoder's tokens, final norm and head not included: `[n, d]`. Segment i of `target` sees
    /// itself causally, and source i.
    fn decoder_states<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        target: &TokenBatch,
        states: &EncoderStates,
    ) -> Result<Var>;

    /// An empty cache over `states`, with room for `capacity` tokens a source.
    fn new_cache<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        states: &EncoderStates,
        capacity: usize,
    ) -> Result<Seq2SeqCache>;

    /// [`Seq2Seq::decoder_states`] of the next tokens of some sources: `batch` is made by `cache.own.batch`.
    fn next_states<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        batch: &TokenBatch,
        cache: &mut Seq2SeqCache,
    ) -> Result<Var>;

    /// Summed cross entropy of `hidden` (labelled rows only) against `targets`; final norm and head included.
    fn head_loss<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var, targets: Arc<[u32]>) -> Result<HeadLoss>;

    /// Logits of `hidden`: `[n, vocab]`; final norm and head included.
    fn logits<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var) -> Result<Tensor>;
}
