//! What a decoder that predicts the next token offers to training and generation.

use crate::cache::KvCache;
use crate::modules::ModuleTree;
use candle_core::{DType, Device, Tensor};
use engobe_autograd::ops::HeadLoss;
use engobe_autograd::{Activations, Result, Tape, Var};
use engobe_kernels::attention::Segment;
use std::ops::Range;
use std::sync::Arc;

/// Rows of tokens laid end to end: no padding, and no attention from one row to another.
#[derive(Clone, Debug)]
pub struct TokenBatch {
    /// all tokens
    pub ids: Arc<[u32]>,
    /// position of each token within its row
    pub positions: Arc<[u32]>,
    /// where each row lies
    pub segments: Arc<[Segment]>,
    /// slot of each segment in a [`KvCache`]; empty without a cache
    pub slots: Vec<usize>,
    /// segments that begin a sequence: all, unless a cache holds what comes before
    pub starts: Arc<[bool]>,
    /// rows of each segment in the keys and values that a layer computes for this batch
    pub incoming: Arc<[Range<usize>]>,
    /// rows before a sequence's first token in the cache
    pub lead: usize,
    /// rows that [`Entry`](crate::Entry) put before each segment that begins a sequence
    pub inserted: usize,
    /// which text of a pair each token belongs to (BERT's `token_type_ids`); `None`: all to the first
    pub token_types: Option<Arc<[u32]>>,
}

impl TokenBatch {
    /// Rows at `ranges` of `ids`; positions start at 0 in each.
    pub fn packed(ids: &[u32], ranges: &[Range<usize>]) -> Self {
        let positions = ranges.iter().flat_map(|r| 0..r.len() as u32).collect();
        let segments = ranges.iter().map(|r| Segment { q: r.clone(), kv: r.clone() }).collect();
        Self {
            ids: ids.into(),
            positions,
            segments,
            slots: Vec::new(),
            starts: vec![true; ranges.len()].into(),
            incoming: ranges.into(),
            lead: 0,
            inserted: 0,
            token_types: None,
        }
    }

    /// The same tokens with a type each.
    ///
    /// # Errors
    /// There are not as many types as tokens.
    pub fn with_token_types(mut self, types: &[u32]) -> Result<Self> {
        if types.len() != self.len() {
            let what = format!("{} types for {} tokens", types.len(), self.len());
            return Err(engobe_autograd::Error::shape("token types", what));
        }
        self.token_types = Some(types.into());
        Ok(self)
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// Sizes that training and generation need.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Hugging Face's `model_type`
    pub model_type: String,
    /// tokens that the embedding knows
    pub vocab_size: usize,
    /// width of the hidden states
    pub hidden_size: usize,
    /// number of decoder blocks
    pub num_layers: usize,
    /// `kv_heads · head_dim`
    pub kv_width: usize,
    /// longest sequence that the model was trained for
    pub max_positions: usize,
    /// the output head is the embedding's matrix
    pub tied_head: bool,
    /// linear layers hold ggml's quantized blocks, beside which activations may be rounded
    pub blocks: bool,
}

/// A decoder-only language model.
pub trait CausalLm: ModuleTree + Send + Sync {
    /// Its sizes.
    fn info(&self) -> &ModelInfo;

    /// Where its weights are.
    fn device(&self) -> &Device;

    /// Rows before a sequence's first token in every layer's keys and values: [`Entry::lead`](crate::Entry::lead).
    fn lead(&self) -> usize {
        0
    }

    /// Hidden states of all tokens after the last block, before the final norm: `[n, d]`.
    fn hidden_states<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        batch: &TokenBatch,
        cache: Option<&mut KvCache>,
    ) -> Result<Var>;

    /// What the output head reads of `hidden`: behind the final norm, `[n, d]`.
    fn normed<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var) -> Result<Var>;

    /// Summed cross entropy of `hidden` (labelled rows only) against `targets`; final norm and head included.
    fn head_loss<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var, targets: Arc<[u32]>) -> Result<HeadLoss>;

    /// Logits of `hidden`: `[n, vocab]`; final norm and head included.
    fn logits<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var) -> Result<Tensor>;

    /// An empty cache for `slots` sequences with room for `capacity` tokens each. Where activations are rounded
    /// beside quantized blocks, keys and values are as well: to half precision.
    fn new_cache(&self, slots: usize, capacity: usize, activations: Activations) -> Result<KvCache> {
        let (info, device) = (self.info(), self.device());
        let rounded = info.blocks && activations == Activations::Rounded && device.is_cpu();
        let dtype = if rounded { DType::F16 } else { DType::F32 };
        let lead = self.lead();
        let cache = KvCache::new(info.num_layers, info.kv_width, slots, capacity + lead, dtype, device)?;
        Ok(cache.with_lead(lead))
    }
}
