//! A limit on memory that is kept: a run is stopped before it passes it.
//!
//! The process' resident memory is looked at before each block, forward and in evaluations too, and before each op of the
//! backward. What may be added until the next look is the margin. Pages that a step has used stay with the process, so a
//! micro-batch no larger than one that went through adds nothing, and a larger one adds in proportion to what it is
//! larger by. An evaluation takes no more than a step of as many tokens; a step may take more than an evaluation.

use super::resident;
use engobe_autograd::Watch;
use std::fmt;
use std::sync::Arc;

type Resident = Arc<dyn Fn() -> Option<u64> + Send + Sync>;

/// Watches over a run's memory.
#[derive(Clone)]
pub struct Guard {
    limit: u64,
    /// bytes that one token may add between two looks
    margin_per_token: f64,
    resident: Resident,
    /// tokens of the largest micro-batch that went through forward and backward
    trained: usize,
    /// tokens of the largest one that went through forward
    evaluated: usize,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guard {} B", self.limit)
    }
}

/// More memory would be taken than is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the process holds {} and needs up to {} more for {tokens} tokens; the limit is {}",
    resident::bytes_text(*.held), resident::bytes_text(*.margin), resident::bytes_text(*.limit)
)]
pub struct OverLimit {
    /// resident bytes
    pub held: u64,
    /// bytes that might have been added before the next look
    pub margin: u64,
    /// the limit
    pub limit: u64,
    /// tokens of the micro-batch
    pub tokens: usize,
}

impl Guard {
    /// A guard over this process. `margin_per_token` is what an op may take for each token.
    pub fn new(limit: u64, margin_per_token: f64) -> Self {
        Self::over(limit, margin_per_token, Arc::new(resident::resident_bytes))
    }

    /// A guard over whatever `resident` measures.
    pub fn over(limit: u64, margin_per_token: f64, resident: Resident) -> Self {
        Self { limit, margin_per_token, resident, trained: 0, evaluated: 0 }
    }

    /// What looks after a step over `tokens` tokens.
    pub(crate) fn watch_step(&self, tokens: usize) -> Watch {
        self.watch(tokens, self.trained)
    }

    /// What looks after an evaluation of `tokens` tokens.
    pub(crate) fn watch_evaluation(&self, tokens: usize) -> Watch {
        self.watch(tokens, self.evaluated)
    }

    /// `done` tokens have gone through in this way before.
    fn watch(&self, tokens: usize, done: usize) -> Watch {
        let (limit, resident) = (self.limit, self.resident.clone());
        let margin = (self.margin_per_token * tokens.saturating_sub(done) as f64) as u64;
        Arc::new(move || match resident() {
            Some(held) if held.saturating_add(margin) > limit => {
                Err(Box::new(OverLimit { held, margin, limit, tokens }))
            }
            _ => Ok(()),
        })
    }

    /// A step over `tokens` tokens went through.
    pub(crate) fn stepped(&mut self, tokens: usize) {
        self.trained = self.trained.max(tokens);
        self.evaluated = self.evaluated.max(tokens);
    }

    /// An evaluation of `tokens` tokens went through.
    pub(crate) fn evaluated(&mut self, tokens: usize) {
        self.evaluated = self.evaluated.max(tokens);
    }
}
