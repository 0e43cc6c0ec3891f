//! What an attention module puts before the keys and values of each sequence: seam 3.

use crate::TokenBatch;
use engobe_autograd::{Result, Tape, Var, ops};
use std::fmt::Debug;
use std::sync::Arc;

/// Trained keys and values of one attention module.
pub trait KeyValueRows: Debug + Send + Sync {
    /// Number of rows; the same in all modules of a model.
    fn count(&self) -> usize;

    /// Keys (as attention takes them: rotary positions, if any, are in them) and values, `[count, kv_width]` each.
    fn rows(&self, tape: &mut Tape<'_>) -> Result<[Var; 2]>;
}

/// The place in an attention module where keys and values are ready.
#[derive(Debug)]
pub struct KvPrefix {
    path: String,
    kv_heads: usize,
    head_dim: usize,
    rows: Option<Arc<dyn KeyValueRows>>,
}

impl KvPrefix {
    /// The place in the attention module at a path, with `kv_heads` heads of keys.
    pub fn new(path: impl Into<String>, kv_heads: usize, head_dim: usize) -> Self {
        Self { path: path.into(), kv_heads, head_dim, rows: None }
    }

    /// Path of the attention module.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// `kv_heads · head_dim`.
    pub fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Puts rows before each sequence. The model's [`Entry`](crate::Entry) must be told as well
    /// ([`attach_key_values`](crate::Entry::attach_key_values)).
    pub fn attach(&mut self, rows: Arc<dyn KeyValueRows>) {
        self.rows = Some(rows);
    }

    /// Takes away what was attached.
    pub fn detach(&mut self) {
        self.rows = None;
    }

    /// Keys `k` and values `v` of the tokens at hand with the attached rows before each sequence that starts here,
    /// laid out as `entered.incoming` says (the batch that [`Entry::enter`](crate::Entry::enter) returned). Call it
    /// where keys are rotated and not yet in a cache.
    pub fn extend<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        k: Var,
        v: Var,
        entered: &TokenBatch,
    ) -> Result<(Var, Var)> {
        let Some(rows) = self.rows.as_ref().filter(|rows| rows.count() > 0) else { return Ok((k, v)) };
        let starting = entered.segments.iter().zip(entered.starts.iter()).filter(|(_, starts)| **starts);
        let at: Arc<[usize]> = starting.map(|(s, _)| s.q.start).collect();
        if at.is_empty() {
            return Ok((k, v));
        }
        let [keys, values] = rows.rows(tape)?;
        Ok((ops::insert_rows(tape, &k, &keys, at.clone())?, ops::insert_rows(tape, &v, &values, at)?))
    }
}
