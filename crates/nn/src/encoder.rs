//! What an encoder offers to task heads and embeddings.

use crate::causal::{ModelInfo, TokenBatch};
use crate::modules::ModuleTree;
use candle_core::Device;
use engobe_autograd::{Result, Tape, Var};

/// A bidirectional encoder: every token of a segment sees all the others of its segment, and nothing else. What other
/// programs mask as padding is not there.
pub trait Encoder: ModuleTree + Send + Sync {
    /// Its sizes; no head is counted.
    fn info(&self) -> &ModelInfo;

    /// Where its weights are.
    fn device(&self) -> &Device;

    /// Hidden states of all tokens as transformers' `last_hidden_state` has them: `[n, d]`. A final norm is included.
    fn hidden_states<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> Result<Var>;

    /// What the model's own pooler makes of `firsts` `[segments, d]`, the hidden states of each segment's first token;
    /// `None` if the model has no pooler, or its checkpoint none.
    fn pooled<'m>(&'m self, _tape: &mut Tape<'m>, _firsts: &Var) -> Result<Option<Var>> {
        Ok(None)
    }
}
