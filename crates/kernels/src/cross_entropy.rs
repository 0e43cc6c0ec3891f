//! Output head and cross entropy over labelled rows, without ever holding the logits whole.
//!
//! For hidden states H `[n, d]`, head W `[V, d]` and targets t, with logits Z = H·Wᵀ (+ bias + u·Bᵀ),
//! L = logsumexp(Z) by row and P = exp(Z - L):
//!
//! ```text
//! lossᵢ = Lᵢ - Z[i, tᵢ]       dZ = P - onehot(t)
//! dH = dZ·W     dW = dZᵀ·H     dbias = Σ_rows dZ     du = dZ·B     dB = dZᵀ·u
//! ```
//!
//! [`cross_entropy`] takes the vocabulary in blocks that stay in cache and keeps, by row, the largest logit m
//! so far, s = Σ exp(z - m) and G = Σ exp(z - m)·W, all rescaled when m grows (the online softmax of Milakov &
//! Gimelshein 2018, with the gradient carried along): at the end `dH = G/s - W[t]`, and W was read once. The
//! vocabulary is split into parts that run in parallel and are merged in order; their number depends on its
//! size alone, so results do not depend on the number of threads.
//!
//! With a soft cap c (Gemma 2), c·tanh(Z/c) takes the place of Z, and dZ is multiplied by its slope 1 - (capped/c)².
//!
//! [`cross_entropy_backward`] serves heads that are themselves trained: with L known, one more pass gives
//! every gradient.

use crate::exp;
use crate::mat::{MatMut, MatRef};
use crate::matmul::sgemm_serial;
use crate::storage::WeightView;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// A low-rank delta beside the head: logits += u·bᵀ.
#[derive(Clone, Copy, Debug)]
pub struct HeadLowRank<'a> {
    /// u, scale included: `[n, r]`
    pub a_out: &'a [f32],
    /// `[V, r]`
    pub b: &'a [f32],
    /// rank
    pub r: usize,
}

/// What the loss says of one labelled token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenStats {
    /// cross entropy, nats
    pub loss: f32,
    /// the label had the largest logit (of equal ones, the lowest id counts)
    pub correct: bool,
}

/// Vocabulary rows of a block: 512 rows of 576 floats are 1.2 MB, and their logits for 512 tokens 1 MB.
const BLOCK: usize = 512;
/// Parts of the vocabulary that run in parallel: each has a share of dH of its own, so few. Where there are more
/// threads, the rows are shared out as well, which changes no bit.
const PARTS: usize = 4;
/// Rows of hidden states that go through the vocabulary together.
const ROWS: usize = 512;
/// Fewest rows for which the vocabulary is read (and decoded) once more.
const LEAST_ROWS: usize = 96;

thread_local! {
    /// Decoded rows of the head, kept from call to call.
    static TILE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// An output head: what makes logits of hidden states.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// `[V, d]`
    pub weight: WeightView<'a>,
    /// `[V]`
    pub bias: Option<&'a [f32]>,
    /// a delta beside the weight
    pub low_rank: Option<HeadLowRank<'a>>,
    /// logits are squashed into ±this
    pub soft_cap: Option<f32>,
}

impl<'a> Head<'a> {
    /// A head that is a matrix alone.
    pub fn plain(weight: WeightView<'a>) -> Self {
        Self { weight, bias: None, low_rank: None, soft_cap: None }
    }

    /// Slope of the cap where the capped logit is z: 1 without one.
    #[inline(always)]
    fn slope(&self, z: f32) -> f32 {
        self.soft_cap.map_or(1.0, |cap| 1.0 - (z / cap) * (z / cap))
    }

    /// The vocabulary cut into at most [`PARTS`] ranges of whole blocks.
    fn parts(&self) -> Vec<Range<usize>> {
        let vocab = self.weight.rows();
        let blocks = vocab.div_ceil(BLOCK);
        let per_part = blocks.div_ceil(PARTS).max(1) * BLOCK;
        (0..vocab).step_by(per_part).map(|start| start..(start + per_part).min(vocab)).collect()
    }

    /// Runs `f` on the rows `range` of the weight in f32.
    fn with_rows<R>(&self, range: &Range<usize>, f: impl FnOnce(&[f32]) -> R) -> R {
        let d = self.weight.cols();
        if let Some(all) = self.weight.as_f32() {
            return f(&all[range.start * d..range.end * d]);
        }
        TILE.with_borrow_mut(|tile| {
            tile.resize(range.len() * d, 0.0);
            self.weight.decode_rows(range.clone(), tile);
            f(tile)
        })
    }

    /// Logits of the vocabulary rows `range`, whose weights are `w`, for the rows `rows`: `[rows, range]`.
    fn logits(&self, hidden: &[f32], rows: &Range<usize>, range: &Range<usize>, w: &[f32], z: &mut [f32]) {
        let (n, m, d) = (rows.len(), range.len(), self.weight.cols());
        let h = MatRef::new(hidden, n, d);
        sgemm_serial(1.0, h, MatRef::new(w, m, d).t(), 0.0, &mut MatMut::new(z, n, m));
        if let Some(lr) = &self.low_rank {
            let u = MatRef::new(&lr.a_out[rows.start * lr.r..rows.end * lr.r], n, lr.r);
            let b = MatRef::new(&lr.b[range.start * lr.r..range.end * lr.r], m, lr.r);
            sgemm_serial(1.0, u, b.t(), 1.0, &mut MatMut::new(z, n, m));
        }
        if let Some(bias) = self.bias {
            for z in z.chunks_exact_mut(m) {
                z.iter_mut().zip(&bias[range.clone()]).for_each(|(z, b)| *z += b);
            }
        }
        if let Some(cap) = self.soft_cap {
            exp::soft_cap(z, cap);
        }
    }
}

/// What one part of the vocabulary knows of each row.
struct Part {
    /// largest logit and its token
    best: Vec<(f32, u32)>,
    /// Σ exp(z - best)
    sum: Vec<f32>,
    /// logit of the target, if the part holds it
    target: Vec<Option<f32>>,
    /// Σ exp(z - best)·W `[n, d]`; empty if no gradient is wanted
    grad: Vec<f32>,
}

impl Part {
    fn run(
        head: &Head<'_>,
        hidden: &[f32],
        rows: &Range<usize>,
        targets: &[u32],
        vocab: Range<usize>,
        gradient: bool,
    ) -> Self {
        let (n, d) = (rows.len(), head.weight.cols());
        let mut part = Self {
            best: vec![(f32::NEG_INFINITY, 0); n],
            sum: vec![0.0; n],
            target: vec![None; n],
            grad: vec![0.0; if gradient { n * d } else { 0 }],
        };
        let mut z = vec![0f32; n * BLOCK.min(vocab.len())];
        let mut slopes = Vec::new();
        for start in vocab.clone().step_by(BLOCK) {
            let range = start..(start + BLOCK).min(vocab.end);
            let m = range.len();
            let z = &mut z[..n * m];
            head.with_rows(&range, |w| {
                head.logits(hidden, rows, &range, w, z);
                for (i, z) in z.chunks_exact_mut(m).enumerate() {
                    if gradient && head.soft_cap.is_some() {
                        slopes.clear();
                        slopes.extend(z.iter().map(|z| head.slope(*z)));
                    }
                    part.absorb(i, d, z, &range, targets[i]);
                    z.iter_mut().zip(&slopes).for_each(|(z, slope)| *z *= slope);
                }
                if gradient {
                    let mut into = MatMut::new(&mut part.grad, n, d);
                    sgemm_serial(1.0, MatRef::new(z, n, m), MatRef::new(w, m, d), 1.0, &mut into);
                }
            });
        }
        part
    }

    /// Takes a block of logits of row `i` in, and leaves exp(z - best) in its place.
    fn absorb(&mut self, i: usize, d: usize, z: &mut [f32], range: &Range<usize>, target: u32) {
        if range.contains(&(target as usize)) {
            self.target[i] = Some(z[target as usize - range.start]);
        }
        let mut most = f32::NEG_INFINITY;
        exp::max(z, &mut most);
        let (best, _) = self.best[i];
        if most > best {
            let at = z.iter().position(|v| *v == most).unwrap_or(0);
            self.best[i] = (most, (range.start + at) as u32);
            let shrink = exp::exp(best - most);
            self.sum[i] *= shrink;
            if let Some(grad) = self.grad.get_mut(i * d..(i + 1) * d) {
                grad.iter_mut().for_each(|g| *g *= shrink);
            }
        }
        exp::exp_shifted(z, self.best[i].0, &mut self.sum[i]);
    }
}

/// Loss of every row of `hidden` `[n, d]` against `targets` `[n]`, its log-sum-exp (`lse` `[n]`) and, in the
/// same pass, the gradient of the summed loss by the hidden states (`d_hidden`, overwritten).
///
/// Panics if lengths do not fit or a target is not in the vocabulary.
pub fn cross_entropy(
    hidden: &[f32],
    head: &Head<'_>,
    targets: &[u32],
    stats: &mut [TokenStats],
    mut lse: Option<&mut [f32]>,
    mut d_hidden: Option<&mut [f32]>,
) {
    let (n, d) = (targets.len(), head.weight.cols());
    assert!(hidden.len() == n * d && stats.len() == n);
    assert!(targets.iter().all(|t| (*t as usize) < head.weight.rows()));
    let gradient = d_hidden.is_some();
    let vocab_parts = head.parts();
    for start in (0..n).step_by(ROWS) {
        let chunk = start..(start + ROWS).min(n);
        let blocks = row_blocks(&chunk, vocab_parts.len());
        let tasks: Vec<(&Range<usize>, &Range<usize>)> =
            blocks.iter().flat_map(|rows| vocab_parts.iter().map(move |vocab| (rows, vocab))).collect();
        let run = |(rows, vocab): &(&Range<usize>, &Range<usize>)| {
            let (rows, vocab): (&Range<usize>, Range<usize>) = (rows, (*vocab).clone());
            Part::run(
                head,
                &hidden[rows.start * d..rows.end * d],
                rows,
                &targets[rows.clone()],
                vocab,
                gradient,
            )
        };
        let parts: Vec<Part> = tasks.par_iter().with_max_len(1).map(run).collect();
        for (rows, parts) in blocks.iter().zip(parts.chunks(vocab_parts.len().max(1))) {
            for (i, row) in rows.clone().enumerate() {
                let (value, log_sum) = merge_row(parts, i, targets[row]);
                stats[row] = value;
                if let Some(lse) = lse.as_deref_mut() {
                    lse[row] = log_sum;
                }
            }
            if let Some(out) = d_hidden.as_deref_mut() {
                let out = &mut out[rows.start * d..rows.end * d];
                out.par_chunks_mut(d.max(1)).enumerate().with_min_len(16).for_each(|(i, out)| {
                    merge_gradient(parts, head, i, targets[rows.start + i], out);
                });
            }
        }
    }
}

/// Shares the rows of a chunk out if the parts of the vocabulary are too few for all threads.
fn row_blocks(chunk: &Range<usize>, parts: usize) -> Vec<Range<usize>> {
    let wanted = (2 * rayon::current_num_threads()).div_ceil(parts.max(1));
    let blocks = wanted.clamp(1, (chunk.len() / LEAST_ROWS).max(1));
    let height = chunk.len().div_ceil(blocks).max(1);
    chunk.clone().step_by(height).map(|top| top..chunk.end.min(top + height)).collect()
}

/// The largest logit of row `i` over all parts.
fn best_of(parts: &[Part], i: usize) -> (f32, u32) {
    let first = (f32::NEG_INFINITY, 0);
    parts.iter().map(|p| p.best[i]).fold(first, |a, b| if b.0 > a.0 { b } else { a })
}

/// Σ over parts of exp(best of part - best), times what `of` says of the part.
fn total(parts: &[Part], i: usize, best: f32) -> f32 {
    parts.iter().map(|p| p.sum[i] * exp::exp(p.best[i].0 - best)).sum()
}

fn merge_row(parts: &[Part], i: usize, target: u32) -> (TokenStats, f32) {
    let (best, token) = best_of(parts, i);
    let log_sum = best + total(parts, i, best).ln();
    let logit = parts.iter().find_map(|p| p.target[i]).unwrap_or(f32::NEG_INFINITY);
    // with NaN among the logits nothing compares as larger: the sum carries it into the loss
    (TokenStats { loss: log_sum - logit, correct: token == target }, log_sum)
}

fn merge_gradient(parts: &[Part], head: &Head<'_>, i: usize, target: u32, out: &mut [f32]) {
    let d = out.len();
    let (best, _) = best_of(parts, i);
    let sum = total(parts, i, best);
    let slope = parts.iter().find_map(|p| p.target[i]).map_or(1.0, |z| head.slope(z));
    head.with_rows(&(target as usize..target as usize + 1), |w| {
        out.iter_mut().zip(w).for_each(|(o, w)| *o = -slope * w);
    });
    for p in parts {
        let factor = exp::exp(p.best[i].0 - best) / sum;
        for (o, g) in out.iter_mut().zip(&p.grad[i * d..(i + 1) * d]) {
            *o += factor * g;
        }
    }
}

/// Every gradient of `row_scale` times the summed loss, given each row's log-sum-exp. `d_hidden` `[n, d]` and
/// `d_u` `[n, r]` are overwritten; `d_weight` `[V, d]`, `d_bias` `[V]` and `d_b` `[V, r]` are added to.
///
/// Panics if lengths do not fit.
pub fn cross_entropy_backward(
    hidden: &[f32],
    head: &Head<'_>,
    targets: &[u32],
    lse: &[f32],
    row_scale: f32,
    d_hidden: Option<&mut [f32]>,
    d_weight: Option<&mut [f32]>,
    d_bias: Option<&mut [f32]>,
    d_u: Option<&mut [f32]>,
    d_b: Option<&mut [f32]>,
) {
    let (n, d) = (targets.len(), head.weight.cols());
    let r = head.low_rank.map_or(0, |l| l.r);
    assert!(hidden.len() == n * d && lse.len() == n);
    let parts = head.parts();
    let size = parts.first().map_or(1, ExactSizeIterator::len);
    let pass =
        Pass { head, hidden, targets, lse, row_scale, want_h: d_hidden.is_some(), want_u: d_u.is_some() };
    // each part owns its rows of the head's gradients
    let slices = split(d_weight, size * d, parts.len());
    let biases = split(d_bias, size, parts.len());
    let bs = split(d_b, size * r, parts.len());
    let shares: Vec<Share> = parts
        .into_par_iter()
        .zip(slices)
        .zip(biases)
        .zip(bs)
        .map(|(((vocab, dw), dbias), db)| pass.part(vocab, dw, dbias, db))
        .collect();
    sum_into(d_hidden, shares.iter().map(|s| &s.dh));
    sum_into(d_u, shares.iter().map(|s| &s.du));
}

/// One part's share of the gradients that all parts add up to.
struct Share {
    dh: Vec<f32>,
    du: Vec<f32>,
}

/// `out` = Σ of the shares, in order.
fn sum_into<'a>(out: Option<&mut [f32]>, shares: impl Iterator<Item = &'a Vec<f32>>) {
    if let Some(out) = out {
        out.fill(0.0);
        for share in shares {
            out.iter_mut().zip(share).for_each(|(o, v)| *o += v);
        }
    }
}

/// `data` in `parts` pieces of `size` elements (the last may be shorter); `None` for each if there is none.
fn split(data: Option<&mut [f32]>, size: usize, parts: usize) -> Vec<Option<&mut [f32]>> {
    match data {
        Some(data) if size > 0 => data.chunks_mut(size).map(Some).collect(),
        _ => (0..parts).map(|_| None).collect(),
    }
}

/// The second pass over the vocabulary.
struct Pass<'a> {
    head: &'a Head<'a>,
    hidden: &'a [f32],
    targets: &'a [u32],
    lse: &'a [f32],
    row_scale: f32,
    want_h: bool,
    want_u: bool,
}

impl Pass<'_> {
    /// This part's share of dH and du; its rows of dW, dbias and dB are added to in place.
    fn part(
        &self,
        vocab: Range<usize>,
        mut dw: Option<&mut [f32]>,
        mut dbias: Option<&mut [f32]>,
        mut db: Option<&mut [f32]>,
    ) -> Share {
        let (n, d) = (self.targets.len(), self.head.weight.cols());
        let r = self.head.low_rank.map_or(0, |l| l.r);
        let mut dh = vec![0f32; if self.want_h { n * d } else { 0 }];
        let mut du = vec![0f32; if self.want_u { n * r } else { 0 }];
        let mut z = vec![0f32; n * BLOCK.min(vocab.len())];
        for start in vocab.clone().step_by(BLOCK) {
            let range = start..(start + BLOCK).min(vocab.end);
            let (m, at) = (range.len(), range.start - vocab.start);
            let z = &mut z[..n * m];
            self.head.with_rows(&range, |w| {
                self.head.logits(self.hidden, &(0..n), &range, w, z);
                self.to_gradient(&range, z);
                if self.want_h {
                    let mut into = MatMut::new(&mut dh, n, d);
                    sgemm_serial(1.0, MatRef::new(z, n, m), MatRef::new(w, m, d), 1.0, &mut into);
                }
            });
            let dz = MatRef::new(z, n, m);
            if let Some(dw) = dw.as_deref_mut() {
                let mut into = MatMut::new(&mut dw[at * d..(at + m) * d], m, d);
                sgemm_serial(1.0, dz.t(), MatRef::new(self.hidden, n, d), 1.0, &mut into);
            }
            if let Some(dbias) = dbias.as_deref_mut() {
                for z in z.chunks_exact(m) {
                    dbias[at..at + m].iter_mut().zip(z).for_each(|(b, z)| *b += z);
                }
            }
            let Some(lr) = &self.head.low_rank else { continue };
            if let Some(db) = db.as_deref_mut() {
                let mut into = MatMut::new(&mut db[at * r..(at + m) * r], m, r);
                sgemm_serial(1.0, dz.t(), MatRef::new(lr.a_out, n, r), 1.0, &mut into);
            }
            if self.want_u {
                let b = MatRef::new(&lr.b[range.start * r..range.end * r], m, r);
                sgemm_serial(1.0, dz, b, 1.0, &mut MatMut::new(&mut du, n, r));
            }
        }
        Share { dh, du }
    }

    /// Logits to row_scale·(P - onehot).
    fn to_gradient(&self, range: &Range<usize>, z: &mut [f32]) {
        let m = range.len();
        let mut slopes = Vec::new();
        for ((z, lse), target) in z.chunks_exact_mut(m).zip(self.lse).zip(self.targets) {
            if self.head.soft_cap.is_some() {
                slopes.clear();
                slopes.extend(z.iter().map(|z| self.head.slope(*z)));
            }
            exp::exp_shifted(z, *lse, &mut 0.0);
            if range.contains(&(*target as usize)) {
                z[*target as usize - range.start] -= 1.0;
            }
            z.iter_mut().for_each(|v| *v *= self.row_scale);
            z.iter_mut().zip(&slopes).for_each(|(z, slope)| *z *= slope);
        }
    }
}

#[cfg(test)]
#[path = "cross_entropy_tests.rs"]
mod tests;
