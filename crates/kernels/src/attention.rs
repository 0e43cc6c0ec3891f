//! Scaled dot-product attention over segments of a token stream, with grouped key/value heads.
//!
//! Per segment and head, with S = s·Q·Kᵀ (masked), L the log-sum-exp of its rows and P = exp(S - L):
//!
//! ```text
//! O = P·V                                  D = rowsum(dO ⊙ O) = rowsum(dP ⊙ P)
//! dV = Pᵀ·dO    dP = dO·Vᵀ    dS = s·P ⊙ (dP - D)    dQ = dS·K    dK = dSᵀ·Q
//! ```
//!
//! With a soft cap c (Gemma 2), c·tanh(S/c) takes the place of S, and dS is multiplied by that function's slope,
//! 1 - tanh²(S/c) = 1 - (capped/c)².
//!
//! P is computed again in the backward (Dao et al. 2022). Keys and values are packed once for all the query heads of
//! their group, as the products' inner loops read them. Queries go through in blocks of 48 rows; a block meets only
//! the keys from the first that its first row sees to the last that its last row does (from a whole panel on), so that
//! what lies above the diagonal or outside the window costs nothing.
//!
//! A task is a part of the queries of one head of one segment. The parts hold about equally many scores, and how
//! many there are depends on the segment's length alone. In the backward each part sums its own dK and dV; they are
//! added up over parts and the heads of a group in a fixed order, so results do not depend on the number of threads.

mod bias;
mod shape;

pub use bias::RelativeBias;
pub use shape::{AttentionShape, Segment};

use crate::exp;
use crate::heads::{Shared, multiply, panels, resize, view};
use crate::mat::MatRef;
use crate::matmul::micro::{Isa, NR};
use crate::matmul::pack::{self, Right};
use crate::norm::dot;
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;

/// Queries that go through together: a multiple of a tile's height. Half a block of scores a row is wasted above
/// the diagonal; shorter blocks would read and write dK and dV more often.
const BLOCK: usize = 48;
/// Queries in a part, at least; there are at most [`MOST_PARTS`] parts.
const PART: usize = 128;
const MOST_PARTS: usize = 4;
/// Keys whose gradients are summed up by one worker.
const SUM_ROWS: usize = 64;

thread_local! {
    /// Scores, their gradients, and packed queries, kept between calls.
    static SCRATCH: Cell<[Vec<f32>; 4]> = const { Cell::new([const { Vec::new() }; 4]) };
}

/// Keys and values of one head of one segment, packed.
struct Packed {
    /// s·Kᵀ: panels of keys, `[head_dim, NR]` each
    keys_t: Vec<f32>,
    /// V: panels of columns, `[keys, NR]` each
    values: Vec<f32>,
    /// K: like `values`; backward only
    keys: Vec<f32>,
    /// Vᵀ: like `keys_t`; backward only
    values_t: Vec<f32>,
}

/// The call's inputs.
struct Call<'a> {
    isa: Isa,
    shape: &'a AttentionShape,
    segments: &'a [Segment],
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    bias: Option<RelativeBias<'a>>,
    /// rows of q
    queries: usize,
}

/// What a task adds to the gradients of its head's keys and values: rows from `first` of the segment on.
struct Share {
    first: usize,
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// and of the head's bias, if it is wanted
    dbias: Vec<f32>,
}

/// A part of one head's queries.
struct Task {
    segment: usize,
    head: usize,
    /// rows, counted from the segment's first
    rows: Range<usize>,
}

impl<'a> Call<'a> {
    fn new(
        shape: &'a AttentionShape,
        segments: &'a [Segment],
        q: &'a [f32],
        k: &'a [f32],
        v: &'a [f32],
        bias: Option<RelativeBias<'a>>,
    ) -> Self {
        let queries = q.len() / (shape.heads * shape.head_dim).max(1);
        assert!(v.len() == k.len() && bias.is_none_or(|b| b.covers(shape, segments)));
        Self { isa: Isa::best(), shape, segments, q, k, v, bias, queries }
    }

    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// The tasks, those of a segment and head next to each other.
    fn tasks(&self) -> Vec<Task> {
        let mut tasks = Vec::new();
        for (segment, s) in self.segments.iter().enumerate() {
            let cuts = self.cuts(s);
            for head in 0..self.shape.heads {
                tasks.extend(cuts.windows(2).map(|c| Task { segment, head, rows: c[0]..c[1] }));
            }
        }
        tasks
    }

    /// Where the queries of a segment are cut: parts of about as many scores.
    fn cuts(&self, s: &Segment) -> Vec<usize> {
        let (n, ahead) = (s.q.len(), s.kv.len() - if self.shape.causal { s.q.len() } else { 0 });
        let parts = (n / PART).clamp(1, MOST_PARTS);
        let scores = |rows: usize| match (self.shape.window, self.shape.causal) {
            (Some(_), _) => rows,
            (None, true) => rows * ahead + rows * rows / 2,
            (None, false) => rows * ahead,
        };
        let mut cuts = vec![0];
        for part in 1..parts {
            let wanted = scores(n) * part / parts;
            let last = cuts[cuts.len() - 1];
            let cut = (last..n).step_by(BLOCK).find(|rows| scores(*rows) >= wanted).unwrap_or(n);
            if cut > last && cut < n {
                cuts.push(cut);
            }
        }
        cuts.push(n);
        cuts
    }

    /// Keys and values of every segment and key/value head.
    fn packed(&self, backward: bool) -> Vec<Packed> {
        let AttentionShape { kv_heads, head_dim: hd, scale, .. } = *self.shape;
        (0..self.segments.len() * kv_heads)
            .into_par_iter()
            .map(|i| {
                let (s, head) = (&self.segments[i / kv_heads], i % kv_heads);
                let k = view(self.k, s.kv.clone(), head, kv_heads, hd);
                let v = view(self.v, s.kv.clone(), head, kv_heads, hd);
                let only =
                    |wanted: bool, b: MatRef| if wanted { panels(self.isa, b, 1.0) } else { Vec::new() };
                Packed {
                    keys_t: panels(self.isa, k.t(), scale),
                    values: only(!backward, v),
                    keys: only(backward, k),
                    values_t: only(backward, v.t()),
                }
            })
            .collect()
    }

    fn of<'p>(&self, packed: &'p [Packed], task: &Task) -> &'p Packed {
        &packed[task.segment * self.shape.kv_heads + task.head / self.group()]
    }

    /// Blocks of a task's queries, and the keys that each meets: from a whole panel on.
    fn blocks<'t>(&'t self, task: &'t Task) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + 't {
        task.rows.clone().step_by(BLOCK).map(move |start| {
            let end = (start + BLOCK).min(task.rows.end);
            let first = self.visible(task, start).start / NR * NR;
            (start..end, first..self.visible(task, end - 1).end)
        })
    }

    /// The keys that a row of the task's segment may see.
    fn visible(&self, task: &Task, row: usize) -> Range<usize> {
        let s = &self.segments[task.segment];
        self.shape.visible(s.q.len(), s.kv.len(), row)
    }

    /// Squashes scores, if they shall be.
    fn cap(&self, scores: &mut [f32]) {
        if let Some(cap) = self.shape.soft_cap {
            exp::soft_cap(scores, cap);
        }
    }

    /// Rows `rows` of the task's head in a buffer like q.
    fn queries<'b>(&self, data: &'b [f32], task: &Task, rows: &Range<usize>) -> MatRef<'b> {
        let first = self.segments[task.segment].q.start;
        view(data, first + rows.start..first + rows.end, task.head, self.shape.heads, self.shape.head_dim)
    }

    /// Index of the first element of row `row` of the task's head in a buffer like q.
    fn index(&self, task: &Task, row: usize) -> usize {
        let AttentionShape { heads, head_dim, .. } = *self.shape;
        ((self.segments[task.segment].q.start + row) * heads + task.head) * head_dim
    }

    /// Output and log-sum-exp of a task.
    fn forward(&self, task: &Task, packed: &Packed, out: Shared, lse: Option<Shared>) {
        let (heads, hd) = (self.shape.heads, self.shape.head_dim);
        let nkv = self.segments[task.segment].kv.len();
        let [mut scores, s1, s2, s3] = SCRATCH.take();
        for (block, keys) in self.blocks(task) {
            let (n, seen) = (block.len(), keys.len());
            resize(&mut scores, n * seen);
            let (q, keys_t) = (self.queries(self.q, task, &block), &packed.keys_t[keys.start * hd..]);
            // SAFETY: the scratch has n rows of `seen` elements.
            unsafe { multiply(self.isa, q, keys_t, hd, 0, seen, scores.as_mut_ptr(), seen, false) };
            let mut sums = [0f32; BLOCK];
            for (row, scores) in scores[..n * seen].chunks_exact_mut(seen).enumerate() {
                let scores = self.shown(task, block.start + row, &keys, scores);
                self.cap(scores);
                self.add_bias(task, block.start + row, scores);
                let mut most = f32::NEG_INFINITY;
                exp::max(scores, &mut most);
                exp::exp_shifted(scores, most, &mut sums[row]);
                if let Some(lse) = lse {
                    let at =
                        task.head * self.queries + self.segments[task.segment].q.start + block.start + row;
                    // SAFETY: a row of this task.
                    unsafe { *lse.at(at) = most + sums[row].ln() };
                }
            }
            let p = MatRef::new(&scores, n, seen);
            let first = out.at(self.index(task, block.start));
            // SAFETY: the block's rows of `out` are this task's alone.
            unsafe { multiply(self.isa, p, &packed.values, nkv, keys.start, hd, first, heads * hd, false) };
            for (row, sum) in sums[..n].iter().enumerate() {
                // SAFETY: as above; each row has `hd` elements.
                let out = unsafe { std::slice::from_raw_parts_mut(first.wrapping_add(row * heads * hd), hd) };
                let factor = 1.0 / sum;
                out.iter_mut().for_each(|v| *v *= factor);
            }
        }
        SCRATCH.set([scores, s1, s2, s3]);
    }

    /// The scores, of those of a block's `keys`, that a row may see; the others become zeros.
    fn shown<'s>(
        &self,
        task: &Task,
        row: usize,
        keys: &Range<usize>,
        scores: &'s mut [f32],
    ) -> &'s mut [f32] {
        let visible = self.visible(task, row);
        let (start, end) = (visible.start - keys.start, visible.end - keys.start);
        scores[..start].fill(0.0);
        scores[end..].fill(0.0);
        &mut scores[start..end]
    }

    /// dq of a task, into place; its share of dk and dv `[seen, hd]` each.
    fn backward(&self, task: &Task, packed: &Packed, x: &Given, dq: Shared) -> Share {
        let (heads, hd, s) = (self.shape.heads, self.shape.head_dim, self.shape.scale);
        let nkv = self.segments[task.segment].kv.len();
        let first = self.blocks(task).map(|(_, keys)| keys.start).min().unwrap_or(0);
        let last = self.blocks(task).map(|(_, keys)| keys.end).max().unwrap_or(0);
        let (mut dk, mut dv) = (vec![0f32; (last - first) * hd], vec![0f32; (last - first) * hd]);
        let mut slopes = Vec::new();
        let mut dbias = match self.bias.filter(|_| x.wants_bias) {
            Some(bias) => vec![0f32; bias.head(task.head, heads).len()],
            None => Vec::new(),
        };
        let [mut p, mut ds, mut q_panels, mut dout_panels] = SCRATCH.take();
        let padded = hd.next_multiple_of(NR);
        for (block, keys) in self.blocks(task) {
            let (n, seen) = (block.len(), keys.len());
            let q = self.queries(self.q, task, &block);
            let (dout, out) = (self.queries(x.dout, task, &block), self.queries(x.out, task, &block));
            resize(&mut p, n * seen);
            resize(&mut ds, n * seen);
            // SAFETY: the scratch has n rows of `seen` elements.
            unsafe {
                let from = keys.start * hd;
                multiply(self.isa, q, &packed.keys_t[from..], hd, 0, seen, p.as_mut_ptr(), seen, false);
                multiply(self.isa, dout, &packed.values_t[from..], hd, 0, seen, ds.as_mut_ptr(), seen, false);
            }
            let rows = p[..n * seen].chunks_exact_mut(seen).zip(ds[..n * seen].chunks_exact_mut(seen));
            for (row, (p, ds)) in rows.enumerate() {
                let p = self.shown(task, block.start + row, &keys, p);
                let ds = self.shown(task, block.start + row, &keys, ds);
                let lse =
                    x.lse[task.head * self.queries + self.segments[task.segment].q.start + block.start + row];
                let at = row * out.row_stride;
                let d = dot(&out.data[at..at + hd], &dout.data[at..at + hd]);
                self.cap(p);
                if let Some(cap) = self.shape.soft_cap {
                    slopes.clear();
                    slopes.extend(p.iter().map(|p| 1.0 - (p / cap) * (p / cap)));
                }
                self.add_bias(task, block.start + row, p);
                exp::probabilities_and_gradient(p, ds, lse, d, s);
                if let Some((range, _)) = self.bias_of(task, block.start + row).filter(|_| x.wants_bias) {
                    dbias[range].iter_mut().zip(&*ds).for_each(|(db, ds)| *db += ds / s);
                }
                ds.iter_mut().zip(&slopes).for_each(|(ds, slope)| *ds *= slope);
            }
            let (p, ds) = (MatRef::new(&p, n, seen), MatRef::new(&ds, n, seen));
            for (m, panels) in [(q, &mut q_panels), (dout, &mut dout_panels)] {
                resize(panels, n * padded);
                pack::pack(self.isa, &Right::Dense(m), 1.0, 0..n, 0..hd, &mut panels[..n * padded], &mut []);
            }
            let at = (keys.start - first) * hd;
            // SAFETY: the block's rows of dq are this task's alone; dk and dv have `seen` rows from there on.
            unsafe {
                let dq = dq.at(self.index(task, block.start));
                multiply(self.isa, ds, &packed.keys, nkv, keys.start, hd, dq, heads * hd, false);
                multiply(self.isa, ds.t(), &q_panels, n, 0, hd, dk[at..].as_mut_ptr(), hd, true);
                multiply(self.isa, p.t(), &dout_panels, n, 0, hd, dv[at..].as_mut_ptr(), hd, true);
            }
        }
        SCRATCH.set([p, ds, q_panels, dout_panels]);
        Share { first, dk, dv, dbias }
    }
}

/// Attention of `q` `[nq, heads·hd]` over `k`, `v` `[nkv, kv_heads·hd]` into `out` (like q); `lse`
/// `[heads, nq]` is what the backward needs.
///
/// Panics if lengths do not fit, a segment lies outside the buffers, or the bias does not cover it.
pub fn attention(
    shape: &AttentionShape,
    segments: &[Segment],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    bias: Option<RelativeBias<'_>>,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    let call = Call::new(shape, segments, q, k, v, bias);
    assert!(out.len() == q.len() && lse.as_ref().is_none_or(|l| l.len() == shape.heads * call.queries));
    let packed = call.packed(false);
    let (out, lse) = (Shared::new(out), lse.map(Shared::new));
    call.tasks().par_iter().with_max_len(1).for_each(|t| call.forward(t, call.of(&packed, t), out, lse));
}

/// What the backward reads beside q, k and v.
struct Given<'a> {
    out: &'a [f32],
    lse: &'a [f32],
    dout: &'a [f32],
    wants_bias: bool,
}

/// Gradients of q, k and v, overwritten; keys that no segment shows get zero. That of the bias' table is overwritten too,
/// if there is room for it.
///
/// Panics if lengths do not fit, a segment lies outside the buffers, or the bias does not cover it.
pub fn attention_backward(
    shape: &AttentionShape,
    segments: &[Segment],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    bias: Option<RelativeBias<'_>>,
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    dbias: Option<&mut [f32]>,
) {
    let call = Call::new(shape, segments, q, k, v, bias);
    assert!(out.len() == q.len() && dout.len() == q.len() && dq.len() == q.len());
    assert!(dk.len() == k.len() && dv.len() == k.len() && lse.len() == shape.heads * call.queries);
    let packed = call.packed(true);
    let tasks = call.tasks();
    let wants_bias = dbias.is_some();
    let (given, dq) = (Given { out, lse, dout, wants_bias }, Shared::new(dq));
    let parts: Vec<Share> =
        tasks.par_iter().with_max_len(1).map(|t| call.backward(t, call.of(&packed, t), &given, dq)).collect();
    if let Some(dbias) = dbias {
        assert!(bias.is_some_and(|b| b.table.len() == dbias.len()));
        bias::sum(&tasks, &parts, dbias);
    }
    dk.fill(0.0);
    dv.fill(0.0);
    // some rows of a key/value head are one worker's, who adds what the tasks have for them in order (segments may
    // share keys)
    let (dk, dv) = (Shared::new(dk), Shared::new(dv));
    let rows = k.len() / (shape.kv_heads * shape.head_dim).max(1);
    (0..shape.kv_heads * rows.div_ceil(SUM_ROWS)).into_par_iter().for_each(|i| {
        let (kv_head, start) = (i % shape.kv_heads, i / shape.kv_heads * SUM_ROWS);
        let range = start..rows.min(start + SUM_ROWS);
        for (task, part) in tasks.iter().zip(&parts) {
            if task.head / call.group() == kv_head {
                let first = segments[task.segment].kv.start + part.first;
                add_rows(&part.dk, first, &range, kv_head, shape, dk);
                add_rows(&part.dv, first, &range, kv_head, shape, dv);
            }
        }
    });
}

/// Adds those of a head's rows, which begin at row `first`, that lie in `range` to a buffer `[_, kv_heads·hd]`.
fn add_rows(
    part: &[f32],
    first: usize,
    range: &Range<usize>,
    kv_head: usize,
    shape: &AttentionShape,
    whole: Shared,
) {
    let AttentionShape { kv_heads, head_dim: hd, .. } = *shape;
    let (start, end) = (range.start.max(first), range.end.min(first + part.len() / hd));
    for row in start..end {
        let at = (row * kv_heads + kv_head) * hd;
        assert!(at + hd <= whole.len());
        // SAFETY: inside the buffer; nobody else touches these rows of this head.
        let to = unsafe { std::slice::from_raw_parts_mut(whole.at(at), hd) };
        to.iter_mut().zip(&part[(row - first) * hd..]).for_each(|(d, v)| *d += v);
    }
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
