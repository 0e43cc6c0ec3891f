//! Where token embeddings enter the blocks: seam 2. Trained rows may come before each sequence here.
//!
//! A model calls [`Entry::enter`] between its embedding and whatever it does to embedded tokens (scaling, positions,
//! norms), goes on with the batch that this returns, and calls [`Entry::leave`] on what its last block made. Nothing
//! outside sees that there were more rows.

use crate::TokenBatch;
use engobe_autograd::{Result, Tape, Var, ops};
use engobe_kernels::attention::Segment;
use std::fmt::Debug;
use std::sync::Arc;

/// Trained rows that stand before each sequence, as if they were embedded tokens.
pub trait InputRows: Debug + Send + Sync {
    /// Number of rows.
    fn count(&self) -> usize;

    /// The rows `[count, d]`.
    fn rows(&self, tape: &mut Tape<'_>) -> Result<Var>;
}

/// The way into the blocks of a model.
///
/// It knows all that comes before a sequence's first token: the rows that are attached here, and how many key/value
/// rows its attention modules put there ([`KvPrefix`](crate::KvPrefix)), for those take up positions too.
#[derive(Debug)]
pub struct Entry {
    path: String,
    width: usize,
    takes: Takes,
    rows: Option<Arc<dyn InputRows>>,
    key_values: usize,
}

/// What may come before the sequences of a stack of blocks. An encoder-decoder has rows before its sources, and keys and
/// values before its targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// rows, and keys and values
    Both,
    /// rows alone
    Rows,
    /// keys and values alone
    KeyValues,
}

impl Entry {
    /// The way in behind the embedding at a module path, of width `d`.
    pub fn new(path: impl Into<String>, width: usize) -> Self {
        Self { path: path.into(), width, takes: Takes::Both, rows: None, key_values: 0 }
    }

    /// The same for one side of an encoder-decoder. What it does not take is not attached.
    pub fn taking(self, takes: Takes) -> Self {
        Self { takes, ..self }
    }

    /// True if rows may be attached.
    pub fn takes_rows(&self) -> bool {
        self.takes != Takes::KeyValues
    }

    /// Path of the token embedding.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Width of an embedded token.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Puts rows before each sequence; they take the place of others.
    pub fn attach(&mut self, rows: Arc<dyn InputRows>) {
        self.rows = Some(rows).filter(|_| self.takes_rows());
    }

    /// Says that every attention module of this model puts `count` key/value rows before each sequence.
    pub fn attach_key_values(&mut self, count: usize) {
        self.key_values = if self.takes == Takes::Rows { 0 } else { count };
    }

    /// Takes away what was attached.
    pub fn detach(&mut self) {
        (self.rows, self.key_values) = (None, 0);
    }

    /// Rows before a sequence's first token in every layer's keys and values: what a cache must have room for.
    pub fn lead(&self) -> usize {
        self.key_values + self.inserted()
    }

    fn inserted(&self) -> usize {
        self.rows.as_ref().map_or(0, |rows| rows.count())
    }

    /// Embedded tokens `x` `[n, d]`, with the attached rows before each sequence that starts here, and the batch as
    /// the blocks see it: positions count from the first row, segments hold all rows.
    ///
    /// # Errors
    /// The batch is of a cache that was made without this model's lead.
    pub fn enter<'m>(&'m self, tape: &mut Tape<'m>, x: Var, batch: &TokenBatch) -> Result<(Var, TokenBatch)> {
        if !batch.slots.is_empty() && batch.lead != self.lead() {
            let what = format!("the cache has a lead of {} rows, the model of {}", batch.lead, self.lead());
            return Err(engobe_autograd::Error::shape("entry", what));
        }
        if self.lead() == 0 {
            return Ok((x, batch.clone()));
        }
        let (inserted, entered) = (self.inserted(), self.laid_out(batch));
        let x = match &self.rows {
            Some(rows) if inserted > 0 && batch.starts.contains(&true) => {
                let rows = rows.rows(tape)?;
                let starting = batch.segments.iter().zip(batch.starts.iter()).filter(|(_, starts)| **starts);
                ops::insert_rows(tape, &x, &rows, starting.map(|(s, _)| s.q.start).collect())?
            }
            _ => x,
        };
        Ok((x, entered))
    }

    /// The batch with the attached rows in it.
    fn laid_out(&self, batch: &TokenBatch) -> TokenBatch {
        let (inserted, lead) = (self.inserted(), self.lead() as u32);
        let mut positions = Vec::with_capacity(batch.len() + inserted * batch.segments.len());
        let (mut segments, mut incoming, mut types) = (Vec::new(), Vec::new(), Vec::new());
        let mut key = 0;
        for (segment, starts) in batch.segments.iter().zip(batch.starts.iter()) {
            let first = positions.len();
            let keys = if *starts { self.key_values } else { 0 };
            if *starts {
                positions.extend(self.key_values as u32..lead);
            }
            positions.extend(batch.positions[segment.q.clone()].iter().map(|p| p + lead));
            if let Some(own) = &batch.token_types {
                // inserted rows belong to the first text
                types.resize(positions.len() - segment.q.len(), 0);
                types.extend_from_slice(&own[segment.q.clone()]);
            }
            let rows = key..key + keys + positions.len() - first;
            key = rows.end;
            let kv = if batch.slots.is_empty() { rows.clone() } else { segment.kv.clone() };
            segments.push(Segment { q: first..positions.len(), kv });
            incoming.push(rows);
        }
        TokenBatch {
            ids: batch.ids.clone(),
            positions: positions.into(),
            segments: segments.into(),
            slots: batch.slots.clone(),
            starts: batch.starts.clone(),
            incoming: incoming.into(),
            lead: batch.lead,
            inserted,
            token_types: batch.token_types.as_ref().map(|_| types.into()),
        }
    }

    /// The rows of `x` that are tokens: `entered` is the batch that [`Entry::enter`] returned.
    pub fn leave<'m>(&'m self, tape: &mut Tape<'m>, x: Var, entered: &TokenBatch) -> Result<Var> {
        if entered.inserted == 0 {
            return Ok(x);
        }
        let tokens = entered.segments.iter().zip(entered.starts.iter()).flat_map(|(segment, starts)| {
            let skip = if *starts { entered.inserted } else { 0 };
            segment.q.start as u32 + skip as u32..segment.q.end as u32
        });
        ops::select_rows(tape, &x, tokens.collect())
    }
}
