//! Scaled dot-product attention over segments of a token stream, with grouped key/value heads.
//!
//! Per segment and head, with S = s·Q·Kᵀ (masked), L the log-sum-exp of its rows and P = exp(S - L):
//!
//! ```text
//! O = P·V                                  D = rowsum(dO ⊙ O) = rowsum(dP ⊙ P)
//! dV = Pᵀ·dO    dP = dO·Vᵀ    dS = P ⊙ (dP - D)    dQ = s·dS·K    dK = s·dSᵀ·Q
//! ```
//!
//! P is computed again in the backward (Dao et al. 2022). Queries go through in blocks of rows; a causal
//! block meets only the keys that its last row sees, so that blocks above the diagonal cost nothing. One task
//! is one head of one segment; the gradients of shared key/value heads are summed over the group afterwards,
//! in a fixed order.

use crate::exp;
use crate::mat::{MatMut, MatRef};
use crate::matmul::sgemm_serial;
use crate::norm::dot;
use rayon::prelude::*;
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
}

/// One row of the batch: its queries, and the keys that they may see. With causal attention the last query
/// sits at the last key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// rows of q
    pub q: Range<usize>,
    /// rows of k and v
    pub kv: Range<usize>,
}

/// Queries that go through together.
const BLOCK: usize = 64;

/// One head of one segment.
struct Task<'a> {
    shape: &'a AttentionShape,
    segment: &'a Segment,
    head: usize,
}

/// The tasks of a call, heads of a segment next to each other.
fn tasks<'a>(shape: &'a AttentionShape, segments: &'a [Segment]) -> Vec<Task<'a>> {
    let each = |segment| (0..shape.heads).map(move |head| Task { shape, segment, head });
    segments.iter().flat_map(each).collect()
}

impl Task<'_> {
    /// Blocks of queries, and how many keys each may see.
    fn blocks(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let (nq, nkv, causal) = (self.segment.q.len(), self.segment.kv.len(), self.shape.causal);
        (0..nq).step_by(BLOCK).map(move |start| {
            let end = (start + BLOCK).min(nq);
            (start..end, if causal { nkv - nq + end } else { nkv })
        })
    }

    /// Rows `rows` (within the segment) of this head in a buffer of queries.
    fn queries<'b>(&self, q: &'b [f32], rows: &Range<usize>) -> MatRef<'b> {
        view(
            q,
            self.segment.q.start + rows.start,
            rows.len(),
            self.head,
            self.shape.heads,
            self.shape.head_dim,
        )
    }

    /// The first `n` keys or values of this head's group.
    fn keys<'b>(&self, k: &'b [f32], n: usize) -> MatRef<'b> {
        let group = self.shape.heads / self.shape.kv_heads;
        view(k, self.segment.kv.start, n, self.head / group, self.shape.kv_heads, self.shape.head_dim)
    }

    /// Sets the scores of row `row` (of a block's scores) that it may not see to minus infinity.
    fn visible(&self, block: &Range<usize>, row: usize, seen: usize) -> usize {
        if self.shape.causal { seen - (block.len() - 1 - row) } else { seen }
    }

    /// Output `[nq, hd]` and log-sum-exp `[nq]`.
    fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (nq, hd) = (self.segment.q.len(), self.shape.head_dim);
        let mut out = vec![0f32; nq * hd];
        let mut lse = vec![0f32; nq];
        let mut scores = Vec::new();
        for (block, seen) in self.blocks() {
            self.scores(q, k, &block, seen, &mut scores);
            let mut sums = [0f32; BLOCK];
            for (row, scores) in scores.chunks_exact_mut(seen).enumerate() {
                let visible = self.visible(&block, row, seen);
                let mut most = f32::NEG_INFINITY;
                exp::max(&scores[..visible], &mut most);
                exp::exp_shifted(&mut scores[..visible], most, &mut sums[row]);
                scores[visible..].fill(0.0);
                lse[block.start + row] = most + sums[row].ln();
            }
            let out = &mut out[block.start * hd..block.end * hd];
            let p = MatRef::new(&scores, block.len(), seen);
            sgemm_serial(1.0, p, self.keys(v, seen), 0.0, &mut MatMut::new(out, block.len(), hd));
            for (row, sum) in out.chunks_exact_mut(hd).zip(sums) {
                row.iter_mut().for_each(|v| *v /= sum);
            }
        }
        (out, lse)
    }

    /// `scores = s·Q·Kᵀ` of a block, `[block, seen]`.
    fn scores(&self, q: &[f32], k: &[f32], block: &Range<usize>, seen: usize, scores: &mut Vec<f32>) {
        scores.resize(block.len() * seen, 0.0);
        let mut into = MatMut::new(scores, block.len(), seen);
        sgemm_serial(self.shape.scale, self.queries(q, block), self.keys(k, seen).t(), 0.0, &mut into);
    }

    /// dq `[nq, hd]`, dk and dv `[nkv, hd]` of this head alone.
    fn backward(&self, x: &Inputs<'_>) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (nq, nkv, hd) = (self.segment.q.len(), self.segment.kv.len(), self.shape.head_dim);
        let mut dq = vec![0f32; nq * hd];
        let (mut dk, mut dv) = (vec![0f32; nkv * hd], vec![0f32; nkv * hd]);
        let (mut p, mut ds) = (Vec::new(), Vec::new());
        for (block, seen) in self.blocks() {
            let n = block.len();
            let (q, dout) = (self.queries(x.q, &block), self.queries(x.dout, &block));
            let out = self.queries(x.out, &block);
            self.scores(x.q, x.k, &block, seen, &mut p);
            ds.resize(n * seen, 0.0);
            sgemm_serial(1.0, dout, self.keys(x.v, seen).t(), 0.0, &mut MatMut::new(&mut ds, n, seen));
            for (row, (p, ds)) in p.chunks_exact_mut(seen).zip(ds.chunks_exact_mut(seen)).enumerate() {
                let visible = self.visible(&block, row, seen);
                let lse = x.lse[self.head * x.queries + self.segment.q.start + block.start + row];
                exp::exp_shifted(&mut p[..visible], lse, &mut 0.0);
                p[visible..].fill(0.0);
                let at = row * out.row_stride;
                let d = dot(&out.data[at..at + hd], &dout.data[at..at + hd]);
                for (ds, p) in ds.iter_mut().zip(p.iter()) {
                    *ds = p * (*ds - d);
                }
            }
            let (p, ds) = (MatRef::new(&p, n, seen), MatRef::new(&ds, n, seen));
            let s = self.shape.scale;
            let dq = &mut dq[block.start * hd..block.end * hd];
            sgemm_serial(s, ds, self.keys(x.k, seen), 0.0, &mut MatMut::new(dq, n, hd));
            sgemm_serial(s, ds.t(), q, 1.0, &mut MatMut::new(&mut dk[..seen * hd], seen, hd));
            sgemm_serial(1.0, p.t(), dout, 1.0, &mut MatMut::new(&mut dv[..seen * hd], seen, hd));
        }
        (dq, dk, dv)
    }
}

/// `n` rows from `start` of head `head` in a buffer `[_, heads·hd]`.
fn view(data: &[f32], start: usize, n: usize, head: usize, heads: usize, hd: usize) -> MatRef<'_> {
    let width = heads * hd;
    if n == 0 {
        return MatRef::strided(&[], 0, hd, width);
    }
    let from = start * width + head * hd;
    MatRef::strided(&data[from..from + (n - 1) * width + hd], n, hd, width)
}

/// Writes (`add` = false) or adds a head's rows into a buffer `[_, heads·hd]`.
fn put(part: &[f32], start: usize, head: usize, heads: usize, hd: usize, into: &mut [f32], add: bool) {
    for (i, row) in part.chunks_exact(hd).enumerate() {
        let dst = &mut into[(start + i) * heads * hd + head * hd..][..hd];
        if add {
            dst.iter_mut().zip(row).for_each(|(d, v)| *d += v);
        } else {
            dst.copy_from_slice(row);
        }
    }
}

/// Attention of `q` `[nq, heads·hd]` over `k`, `v` `[nkv, kv_heads·hd]` into `out` (like q); `lse`
/// `[heads, nq]` is what the backward needs.
///
/// Panics if lengths do not fit or a segment lies outside the buffers.
pub fn attention(
    shape: &AttentionShape,
    segments: &[Segment],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    let (heads, hd) = (shape.heads, shape.head_dim);
    let nq = q.len() / (heads * hd).max(1);
    assert!(out.len() == q.len() && v.len() == k.len());
    let tasks = tasks(shape, segments);
    let parts: Vec<(Vec<f32>, Vec<f32>)> = tasks.par_iter().map(|t| t.forward(q, k, v)).collect();
    for (task, (part, _)) in tasks.iter().zip(&parts) {
        put(part, task.segment.q.start, task.head, heads, hd, out, false);
    }
    if let Some(lse) = lse {
        assert_eq!(lse.len(), heads * nq);
        for (task, (_, part)) in tasks.iter().zip(&parts) {
            lse[task.head * nq + task.segment.q.start..][..part.len()].copy_from_slice(part);
        }
    }
}

/// What the backward reads.
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    dout: &'a [f32],
    queries: usize,
}

/// Gradients of q, k and v, overwritten; keys that no segment shows get zero.
///
/// Panics if lengths do not fit or a segment lies outside the buffers.
pub fn attention_backward(
    shape: &AttentionShape,
    segments: &[Segment],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let AttentionShape { heads, kv_heads, head_dim: hd, .. } = *shape;
    let queries = q.len() / (heads * hd).max(1);
    assert!(out.len() == q.len() && dout.len() == q.len() && dq.len() == q.len());
    assert!(v.len() == k.len() && dk.len() == k.len() && dv.len() == k.len() && lse.len() == heads * queries);
    dk.fill(0.0);
    dv.fill(0.0);
    let inputs = Inputs { q, k, v, out, lse, dout, queries };
    let tasks = tasks(shape, segments);
    let parts: Vec<_> = tasks.par_iter().map(|t| t.backward(&inputs)).collect();
    for (task, (dq_part, dk_part, dv_part)) in tasks.iter().zip(&parts) {
        let (start, kv_head) = (task.segment.kv.start, task.head / (heads / kv_heads));
        put(dq_part, task.segment.q.start, task.head, heads, hd, dq, false);
        put(dk_part, start, kv_head, kv_heads, hd, dk, true);
        put(dv_part, start, kv_head, kv_heads, hd, dv, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dropout::mix;

    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| (mix(seed, i) >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    /// Straight from the definition, in f64.
    fn reference(shape: &AttentionShape, segments: &[Segment], q: &[f32], k: &[f32], v: &[f32]) -> Vec<f64> {
        let AttentionShape { heads, kv_heads, head_dim: hd, scale, causal } = *shape;
        let mut out = vec![0f64; q.len()];
        for s in segments {
            for (i, qi) in s.q.clone().enumerate() {
                for h in 0..heads {
                    let g = h / (heads / kv_heads);
                    let last = if causal { s.kv.len() - s.q.len() + i + 1 } else { s.kv.len() };
                    let at = |buffer: &[f32], j: usize, c: usize| {
                        f64::from(buffer[(s.kv.start + j) * kv_heads * hd + g * hd + c])
                    };
                    let score = |j: usize| -> f64 {
                        (0..hd).map(|c| f64::from(q[qi * heads * hd + h * hd + c]) * at(k, j, c)).sum::<f64>()
                            * f64::from(scale)
                    };
                    let scores: Vec<f64> = (0..last).map(score).collect();
                    let total: f64 = scores.iter().map(|s| s.exp()).sum();
                    for c in 0..hd {
                        out[qi * heads * hd + h * hd + c] =
                            (0..last).map(|j| scores[j].exp() / total * at(v, j, c)).sum();
                    }
                }
            }
        }
        out
    }

    fn segment(q: Range<usize>, kv: Range<usize>) -> Segment {
        Segment { q, kv }
    }

    #[test]
    fn forward_agrees_with_the_definition() {
        for causal in [true, false] {
            for (heads, kv_heads, hd) in [(1, 1, 8), (4, 2, 16), (9, 3, 64)] {
                let shape = AttentionShape { heads, kv_heads, head_dim: hd, scale: 0.2, causal };
                let segments = [segment(0..70, 0..70), segment(70..71, 70..71), segment(71..80, 71..230)];
                let (q, k, v) = (
                    numbers(1, 80 * heads * hd),
                    numbers(2, 230 * kv_heads * hd),
                    numbers(3, 230 * kv_heads * hd),
                );
                let mut out = vec![0.0; q.len()];
                attention(&shape, &segments, &q, &k, &v, &mut out, None);
                for (a, b) in out.iter().zip(reference(&shape, &segments, &q, &k, &v)) {
                    assert!((f64::from(*a) - b).abs() < 1e-5, "{a} {b}"); // means of numbers below 1
                }
            }
        }
    }

    #[test]
    fn backward_agrees_with_finite_differences() {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 8, scale: 0.4, causal: true };
        let segments = [segment(0..67, 0..67), segment(67..70, 67..75)];
        let (q, k, v, dout) =
            (numbers(1, 70 * 32), numbers(2, 80 * 16), numbers(3, 80 * 16), numbers(4, 70 * 32));
        let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; 4 * 70]);
        attention(&shape, &segments, &q, &k, &v, &mut out, Some(&mut lse));
        let (mut dq, mut dk, mut dv) = (vec![9.0; q.len()], vec![9.0; k.len()], vec![9.0; v.len()]);
        attention_backward(&shape, &segments, &q, &k, &v, &out, &lse, &dout, &mut dq, &mut dk, &mut dv);
        let loss = |q: &[f32], k: &[f32], v: &[f32]| -> f64 {
            reference(&shape, &segments, q, k, v).iter().zip(&dout).map(|(o, g)| o * f64::from(*g)).sum()
        };
        let h = 1e-3f32;
        for which in 0..3 {
            let grads = [&dq, &dk, &dv][which];
            for i in (0..grads.len()).step_by(97) {
                let moved = |delta: f32| {
                    let mut parts = [q.clone(), k.clone(), v.clone()];
                    parts[which][i] += delta;
                    loss(&parts[0], &parts[1], &parts[2])
                };
                let slope = (moved(h) - moved(-h)) / (2.0 * f64::from(h));
                let got = f64::from(grads[i]);
                // the step's own rounding in f32 is 1e-4 of it
                assert!((slope - got).abs() < 1e-3 * slope.abs().max(0.1), "{which} {i}: {slope} {got}");
            }
        }
        assert!(dk[75 * 16..].iter().all(|v| *v == 0.0), "keys that nobody sees");
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 16, scale: 0.25, causal: true };
        let segments = [segment(0..100, 0..100), segment(100..130, 100..130)];
        let (q, k, v) = (numbers(1, 130 * 96), numbers(2, 130 * 32), numbers(3, 130 * 32));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; 6 * 130]);
                attention(&shape, &segments, &q, &k, &v, &mut out, Some(&mut lse));
                let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
                attention_backward(&shape, &segments, &q, &k, &v, &out, &lse, &q, &mut dq, &mut dk, &mut dv);
                (out, dq, dk, dv)
            })
        };
        assert_eq!(run(1), run(2));
    }
}
