//! What an attention layer is, and which keys a query sees.

use std::ops::Range;

/// Sizes and rules of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// query heads
    pub heads: usize,
    /// key/value heads; divides `heads`
    pub kv_heads: usize,
    /// width of a head
    pub head_dim: usize,
    /// factor on the scores
    pub scale: f32,
    /// a query sees keys up to its own position only
    pub causal: bool,
    /// a query sees keys less than this many positions away only
    pub window: Option<usize>,
    /// scores are squashed into ±this
    pub soft_cap: Option<f32>,
}

impl AttentionShape {
    /// Attention without a window or a cap.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize, scale: f32, causal: bool) -> Self {
        Self { heads, kv_heads, head_dim, scale, causal, window: None, soft_cap: None }
    }

    /// Where query `row` of `nq` sits among `nkv` keys.
    pub fn place(&self, nq: usize, nkv: usize, row: usize) -> usize {
        match (self.causal, self.window) {
            (true, _) => nkv - nq + row,
            // keys before the queries' own are a prefix
            (false, Some(_)) => nkv.saturating_sub(nq) + row,
            (false, None) => row,
        }
    }

    /// The keys, of `nkv`, that query `row` of `nq` may see.
    pub fn visible(&self, nq: usize, nkv: usize, row: usize) -> Range<usize> {
        let at = self.place(nq, nkv, row);
        let end = if self.causal { at + 1 } else { nkv };
        match self.window {
            None => 0..end,
            Some(window) => (at + 1).saturating_sub(window).min(end)..end.min(at + window),
        }
    }
}

/// One row of the batch: its queries, and the keys that they may see. With causal attention or a window the last
/// query sits at the last key: keys before the queries' own are a prefix or a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// rows of q
    pub q: Range<usize>,
    /// rows of k and v
    pub kv: Range<usize>,
}
