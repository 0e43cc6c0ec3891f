//! What one micro-batch holds at its fullest moment.
//!
//! With n tokens of width d, a = heads·head_dim, kv = kv_heads·head_dim, MLP width f and Σr the ranks of a block's
//! adapters, in floats:
//!
//! ```text
//! kept by a block     n·(2d + 2a + 2kv + 2f + heads + 2 + Σr)   its input, the sum after attention; q, k, v and the
//!                                                               attention's output; gate and up; log-sum-exps,
//!                                                               norms' factors; every u = x·Aᵀ
//! backward of a block, the largest of
//!   gated activation  n·(d + 3f)                 gradients of the residual, of f(gate)·up, of gate and of up
//!   down projection   n·(d + 2f)                 the product is made again, and its gradient
//!   attention         n·(2a + 2kv) + packed k, v + Σ of the parts' dk and dv - n·2f     gate and up are gone by then
//! output head         n·4d + parts of dH + logits of a block of the vocabulary
//! ```
//!
//! Where scores meet R rows of relative positions (DeBERTa), a block keeps 2R·a floats more, the embeddings that it projects;
//! a thread holds up to 4n² scores of one row and head, and the backward packs 4R·a and gathers 2R·a for each part of the
//! rows and once more.
//!
//! With `compute_dtype` bf16 or f16, what is kept takes 2 bytes a number (log-sum-exps and norms' factors 4). Ops of the
//! backward widen it: gate and up beside their gradients, q, k, v and the output beside theirs, a block's input when the
//! block runs again; the 16 bits go as the 32 come.
//!
//! What other adapters keep of each token is added to Σr (`AdapterSizes::kept`). A prompt lengthens rows; a prefix of p
//! lengthens keys and values alone, 2kv·(n + rows·p) of the above.
//!
//! A decoder's block behind an encoder attends to the encoder's states too: it keeps n·(d + 4a + heads) floats more, its
//! sum before that attention and its queries, keys, values and output. The encoder's states and the gradient that all these blocks
//! add to them are there from the first to the last.
//!
//! Blocks of other kinds keep `extra` floats more for each token (norms of heads, norms after sub-layers); a plain MLP
//! keeps f and not 2f. Norms, gated products and masked inputs are not kept: they are made again. Without checkpointing, all adapted blocks
//! are kept when the head or the last block's backward is at work. With it, each block keeps its input (n·d), and one
//! block at a time is kept in full. Gradients of the adapter grow while activations go; with accumulation they are there
//! from the second micro-batch on. The sums are linear in the block that the walk back has reached, so the fullest
//! moment is at one of its ends.

use super::Run;
use engobe_kernels::disentangled::PARTS;
use std::collections::BTreeMap;

/// Bytes of a float.
const F: usize = 4;
/// Columns in a panel of the kernels' products.
const PANEL: usize = 64;
/// Rows of hidden states, and rows of the vocabulary, that the head takes at once; parts of the vocabulary.
const HEAD_ROWS: usize = 512;
const HEAD_BLOCK: usize = 512;
const HEAD_PARTS: usize = 4;
/// Queries in a block of attention; fewest in a part, most parts.
const QUERY_BLOCK: usize = 48;
const QUERY_PART: usize = 128;
const QUERY_PARTS: usize = 4;
/// What a thread keeps for packed panels of the products.
const PRODUCT_SCRATCH: usize = 1 << 20;

/// Sizes of one micro-batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepSizes {
    /// rows
    pub rows: usize,
    /// tokens in a row
    pub len: usize,
    /// keys and values before those of a row
    pub prefix: usize,
    /// width of the hidden states
    pub d: usize,
    /// query heads
    pub heads: usize,
    /// key/value heads
    pub kv_heads: usize,
    /// width of a head
    pub head_dim: usize,
    /// width of the MLP
    pub f: usize,
    /// floats that a block keeps for each token beside those of a gated, pre-normed one
    pub extra: usize,
    /// the MLP has no gate
    pub plain_mlp: bool,
    /// rows of tables of relative positions that attention's scores meet; 0: none
    pub relative_rows: usize,
    /// blocks, the last ones, that attend to another stack's states
    pub cross_layers: usize,
    /// rows of the head
    pub vocab: usize,
    /// the head's matrix is not f32: tiles of it are decoded
    pub decoded_head: bool,
    /// ranks of each block's adapters, summed, from the lowest block with an adapter upwards
    pub ranks: Vec<usize>,
    /// what these blocks keep whatever the number of tokens
    pub fixed: Vec<usize>,
    /// inputs are masked for the adapters
    pub dropout: bool,
    /// the head itself is trained or adapted
    pub trained_head: bool,
    /// blocks keep their input alone
    pub checkpointing: bool,
    /// what is kept takes 16 bits
    pub half: bool,
    /// gradients are there from the second micro-batch on
    pub accumulates: bool,
    /// elements of the adapter
    pub parameters: usize,
    /// tokens of the longest batch that is evaluated
    pub eval_tokens: usize,
    /// threads
    pub threads: usize,
}

impl StepSizes {
    pub(super) fn new(run: &Run<'_>) -> Self {
        let (s, schedule) = (&run.sizes, &run.plan.schedule);
        let mut by_block: BTreeMap<usize, usize> = BTreeMap::new();
        let mut trained_head = false;
        let block_of = |path: &str| block_of(path, s.layers - s.cross_layers.min(s.layers), s.cross_layers);
        for layer in &run.adapter.layers {
            match block_of(&layer.path) {
                Some(block) => *by_block.entry(block).or_default() += layer.rank,
                None => trained_head = true,
            }
        }
        for (path, floats) in &run.adapter.kept {
            if let Some(block) = block_of(path) {
                *by_block.entry(block).or_default() += floats;
            }
        }
        let mut fixed: BTreeMap<usize, usize> = BTreeMap::new();
        for (path, floats) in &run.adapter.fixed {
            if let Some(block) = block_of(path) {
                *fixed.entry(block).or_default() += floats;
            }
        }
        // a bias or module that is trained in full may lie in any block, and what comes before a sequence reaches all
        let lowest = match run.adapter.full.is_empty() && run.adapter.other.is_empty() {
            true => by_block.keys().next().copied().unwrap_or(s.layers),
            false => 0,
        };
        Self {
            rows: schedule.batch_size,
            len: schedule.max_seq_len + run.adapter.lead,
            prefix: run.adapter.key_value_lead,
            d: s.hidden,
            heads: s.heads,
            kv_heads: s.kv_heads,
            head_dim: s.head_dim,
            f: s.mlp,
            extra: s.extra_kept,
            plain_mlp: s.plain_mlp,
            relative_rows: s.relative_rows.min(2 * (schedule.max_seq_len + run.adapter.lead)),
            cross_layers: s.cross_layers.min(s.layers - lowest.min(s.layers)),
            vocab: s.vocab,
            // (the embedding has as many rows as the head, if it is not the head itself)
            decoded_head: run.tensors.iter().any(|t| t.rows == s.vocab && t.storage != "F32"),
            ranks: (lowest..s.layers).map(|i| by_block.get(&i).copied().unwrap_or(0)).collect(),
            fixed: (lowest..s.layers).map(|i| fixed.get(&i).copied().unwrap_or(0)).collect(),
            dropout: run.adapter.dropout,
            trained_head,
            checkpointing: run.plan.compute.activation_checkpointing,
            half: run.plan.compute.compute_dtype.half().is_some(),
            accumulates: schedule.gradient_accumulation > 1,
            parameters: run.adapter.num_parameters(),
            eval_tokens: run.eval_tokens,
            threads: run.threads,
        }
    }

    fn n(&self) -> usize {
        self.rows * self.len
    }

    /// Keys of all rows.
    fn keys(&self) -> usize {
        self.rows * (self.len + self.prefix)
    }

    fn widths(&self) -> (usize, usize) {
        (self.heads * self.head_dim, self.kv_heads * self.head_dim)
    }

    /// Activations of width f that a block keeps of its MLP: gate and up, or up alone.
    fn inner(&self) -> usize {
        if self.plain_mlp { 1 } else { 2 }
    }

    /// What block `i` of the adapted ones keeps for its backward.
    fn kept(&self, i: usize) -> usize {
        let (a, kv) = self.widths();
        let values = 2 * self.d + 2 * a + self.inner() * self.f + self.extra + self.ranks[i];
        // what a block projects of relative positions is kept as well
        let whatever = self.fixed.get(i).copied().unwrap_or(0) + 2 * self.relative_rows * a;
        let cross = match self.attends_across(i) {
            true => self.n() * (self.each() * (self.d + 4 * a) + F * (self.heads + 1)),
            false => 0,
        };
        self.n() * (self.each() * values + F * (self.heads + 2))
            + cross
            + self.keys() * self.each() * 2 * kv
            + F * whatever
    }

    /// True if block `i` of the adapted ones attends to another stack's states.
    fn attends_across(&self, i: usize) -> bool {
        i + self.cross_layers >= self.ranks.len()
    }

    /// Another stack's states, and the gradient that is added up for them.
    fn states(&self) -> usize {
        if self.cross_layers > 0 { 2 * F * self.n() * self.d } else { 0 }
    }

    /// Bytes of a number that is kept.
    fn each(&self) -> usize {
        if self.half { F / 2 } else { F }
    }

    /// What `numbers` that were kept take when they are widened, less what is let go.
    fn widened(&self, numbers: usize) -> usize {
        if self.half { (F - F / 2) * numbers } else { 0 }
    }

    /// What the backward of a block holds on top of what was kept.
    fn backward(&self) -> usize {
        let (a, kv) = self.widths();
        let (n, d, f) = (self.n(), self.d, self.f);
        let down = n * (d + 2 * f) + if self.dropout { 2 * n * f } else { 0 };
        let gated = n * (d + (1 + self.inner()) * f) + self.widened(self.inner() * n * f) / F;
        let padded_rows = (self.len + self.prefix).next_multiple_of(PANEL) * self.rows;
        let packed =
            padded_rows * 2 * kv + self.keys() * self.kv_heads * self.head_dim.next_multiple_of(PANEL);
        let own = n * 2 * a + self.keys() * 2 * kv;
        let scores = self.scores(4) + 2 * (3 + self.rows.min(PARTS)) * self.relative_rows * a;
        let attention = F * (own + packed + scores + 2 * a * self.rows * self.seen()) + self.widened(own);
        // gate and up are gone by then
        (F * down.max(gated)).max(attention.saturating_sub(self.each() * self.inner() * n * f))
    }

    /// Keys that the parts of a row's queries see, summed: what their dk and dv take for each of a head's elements.
    fn seen(&self) -> usize {
        let parts = (self.len / QUERY_PART).clamp(1, QUERY_PARTS);
        // parts hold equally many scores: the i-th of p ends at √(i/p) of the row
        let queries = |i: usize| (self.len as f64 * (i as f64 / parts as f64).sqrt()) as usize;
        (1..=parts).map(|i| self.prefix + queries(i)).sum()
    }

    /// What a forward of a block without a tape, or the end of one with it, holds on top of its input.
    fn forward(&self, n: usize) -> usize {
        let (a, kv) = self.widths();
        // q and k before they are rotated live to the end of the block
        F * (n * (self.d + a + kv + 3 * self.f) + self.scores(3))
    }

    /// Matrices of one row's scores that each thread holds where these meet positions.
    fn scores(&self, matrices: usize) -> usize {
        if self.relative_rows > 0 { self.threads * matrices * self.len * self.len } else { 0 }
    }

    /// Hidden states, labelled ones, their norm, and the loss of `n` tokens.
    fn head(&self, n: usize, gradient: bool) -> usize {
        let rows = n.min(HEAD_ROWS);
        let tasks = self.threads.min(HEAD_PARTS.max(2 * self.threads));
        let logits = tasks * rows * HEAD_BLOCK.min(self.vocab);
        let parts = match (gradient, self.trained_head) {
            (false, _) => 0,
            (true, false) => HEAD_PARTS * rows * self.d,
            // every part's share of dH over all rows, and all rows' logits
            (true, true) => HEAD_PARTS * n * self.d + HEAD_PARTS * (n - rows) * HEAD_BLOCK,
        };
        F * (n * self.d * if gradient { 4 } else { 3 } + parts + logits)
    }

    /// The largest op's share of one token.
    pub(super) fn largest_op(&self) -> f64 {
        let n = self.n();
        self.backward().max(self.forward(n)).max(self.head(n, true)) as f64 / n.max(1) as f64
    }

    /// What threads keep between calls.
    fn scratch(&self) -> usize {
        let tile = if self.decoded_head { F * HEAD_BLOCK.min(self.vocab) * self.d } else { 0 };
        let scores = F * 2 * QUERY_BLOCK * (self.len + self.prefix + self.head_dim);
        self.threads * (tile + scores + PRODUCT_SCRATCH)
    }
}

/// Number of the block that a module lies in: the first number in its path; a decoder's `behind` an encoder's.
fn block_of(path: &str, behind: usize, cross_layers: usize) -> Option<usize> {
    let number: usize = path.split('.').find_map(|part| part.parse().ok())?;
    let is_behind = cross_layers > 0 && path.split('.').any(|part| part == "decoder");
    Some(if is_behind { behind + number } else { number })
}

/// Bytes of a step: the most of each part, and of all together at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// kept by blocks, and the block at hand
    pub activations: usize,
    /// the output head at work
    pub head: usize,
    /// gradients of the adapter
    pub gradients: usize,
    /// most of them at once
    pub peak: usize,
    /// what threads keep; there all the time
    pub scratch: usize,
}

/// The fullest moment of a step, or of an evaluation.
pub fn step(s: &StepSizes) -> Step {
    let (n, blocks) = (s.n(), s.ranks.len());
    let hidden = F * n * s.d;
    let gradients = F * s.parameters;
    let from_start = if s.accumulates { gradients } else { 0 };
    let input = s.each() * n * s.d;
    let kept = s.states()
        + match s.checkpointing {
            true => blocks * input,
            false => (0..blocks).map(|i| s.kept(i)).sum(),
        };
    let head = s.head(n, true);
    let (mut activations, mut peak) = (kept, kept + head + from_start);
    if blocks > 0 {
        // the hidden states that the head read are still there; the gradient of the block's output
        let around = 2 * hidden;
        // run again, a block reads its input in f32 and keeps it once more
        let around_input = if s.half { hidden } else { 0 };
        let block = |i: usize| match s.checkpointing {
            true => s.kept(i) - input + around_input + s.backward().max(s.forward(n)),
            false => s.backward(),
        };
        activations += around + block(blocks - 1);
        let left = if s.checkpointing { input } else { s.kept(0) };
        if s.half {
            // what flows through the last block is f32 beside what is kept of it
            peak = peak.max(kept + hidden + s.forward(n) + from_start);
        }
        peak = peak.max(activations + from_start).max(left + around + block(0) + gradients);
    }
    if s.eval_tokens > 0 {
        let e = s.eval_tokens;
        peak = peak.max(F * e * s.d + s.forward(e)).max(s.head(e, false));
    }
    Step { activations, head, gradients, peak, scratch: s.scratch() }
}
