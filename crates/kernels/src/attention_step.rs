//! Attention of one query a segment over keys and values that are already there: what generating a token does.
//!
//! Every key and value is used once by each query head of its group, so the time is that of reading them: nothing is
//! packed or copied, and the heads of a group go through together. For a query q of one head, over the keys j:
//!
//! ```text
//! s_j = scale·q·k_j        o = Σ_j e^{s_j}·v_j / Σ_j e^{s_j}
//! ```
//!
//! Keys are taken in blocks of [`KEYS`]. A block b gives its largest score m_b, its sum l_b = Σ e^{s_j - m_b} and
//! a_b = Σ e^{s_j - m_b}·v_j; with M the largest m_b, o = Σ_b e^{m_b - M}·a_b / Σ_b e^{m_b - M}·l_b (Dao et al.
//! 2023, "Flash-Decoding"). The blocks are fixed, so results do not depend on the number of threads.

use crate::attention::{AttentionShape, Segment};
use crate::exp;
use crate::lanes::{Backend, Lanes, by_backend};
use crate::mat::MatMut;
use crate::matmul::SharedMat;
use crate::team;

/// Keys of a block.
const KEYS: usize = 256;
/// Floats of keys and values below which one thread does it all: half a microsecond of work.
const SERIAL_FLOATS: usize = 1 << 15;

/// True if every segment has one query: then [`attend`] does what [`crate::attention::attention`] does.
pub fn applies(segments: &[Segment]) -> bool {
    segments.iter().all(|s| s.q.len() == 1)
}

/// The keys of a segment that one head's queries meet in one go.
struct Task {
    segment: usize,
    kv_head: usize,
    block: usize,
}

/// Attention of `q` `[segments, heads·hd]` over `k`, `v` `[_, kv_heads·hd]` into `out` (like q).
///
/// Panics if lengths do not fit, a segment has not exactly one query, or lies outside the buffers.
pub fn attend(
    shape: &AttentionShape,
    segments: &[Segment],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
) {
    attend_on(Backend::best(), shape, segments, q, k, v, out);
}

fn attend_on(
    backend: Backend,
    shape: &AttentionShape,
    segments: &[Segment],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
) {
    let AttentionShape { heads, kv_heads, head_dim: hd, .. } = *shape;
    assert!(applies(segments) && out.len() == q.len() && v.len() == k.len());
    assert!(segments.iter().all(|s| s.kv.end * kv_heads * hd <= k.len()), "segments outside the keys");
    let mut tasks = Vec::new();
    for (segment, s) in segments.iter().enumerate() {
        for kv_head in 0..kv_heads {
            let blocks = s.kv.len().div_ceil(KEYS);
            tasks.extend((0..blocks).map(|block| Task { segment, kv_head, block }));
        }
    }
    let (group, width) = (heads / kv_heads.max(1), kv_heads * hd);
    let floats: usize = segments.iter().map(|s| s.kv.len() * width).sum();
    // one row a task; of each head of its group: the sums a, then l and m
    let each = group * (hd + 2);
    let mut partial = vec![0f32; tasks.len() * each];
    let mut partials = MatMut::new(&mut partial, tasks.len(), each);
    let shared = SharedMat::new(&mut partials);
    let least = if floats < SERIAL_FLOATS { tasks.len() } else { 1 };
    team::split(tasks.len(), least, &|range| {
        for i in range {
            let Task { segment, kv_head, block } = tasks[i];
            let s = &segments[segment];
            let from = s.kv.start + block * KEYS;
            let to = s.kv.end.min(from + KEYS);
            let rows = Rows { data: k, from, n: to - from, width, at: kv_head * hd };
            let q = &q[(s.q.start * heads + kv_head * group) * hd..][..group * hd];
            // SAFETY: row i is this task's alone, and has `each` elements.
            let into = unsafe { std::slice::from_raw_parts_mut(shared.pointer(i, 0), each) };
            // SAFETY: the segment's keys and values are in the buffers, as was checked.
            unsafe { block_of(backend, q, hd, shape.scale, rows, Rows { data: v, ..rows }, into) };
        }
    });
    let mut parts = partial.chunks_exact(each);
    for s in segments {
        let blocks = s.kv.len().div_ceil(KEYS);
        for kv_head in 0..kv_heads {
            let parts: Vec<&[f32]> = parts.by_ref().take(blocks).collect();
            let out = &mut out[(s.q.start * heads + kv_head * group) * hd..][..group * hd];
            for (g, out) in out.chunks_exact_mut(hd).enumerate() {
                merge(&parts, g * (hd + 2), out);
            }
        }
    }
}

/// Some keys, or values, of one head.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    from: usize,
    n: usize,
    width: usize,
    at: usize,
}

impl<'a> Rows<'a> {
    /// The head's elements of row j, and what follows.
    #[inline(always)]
    fn row(&self, j: usize) -> &'a [f32] {
        &self.data[(self.from + j) * self.width + self.at..]
    }
}

by_backend!(
    /// a, l and m of every head in `q` `[group, hd]`, into `[group, hd + 2]`.
    ///
    /// # Safety
    /// `k` and `v` lie in their buffers, with 1 to [`KEYS`] rows.
    unsafe fn block_of(q: &[f32], hd: usize, scale: f32, k: Rows<'_>, v: Rows<'_>, into: &mut [f32]) = block
);

/// # Safety
/// As for [`block_of`] and [`Lanes`].
#[inline(always)]
unsafe fn block<L: Lanes>(q: &[f32], hd: usize, scale: f32, k: Rows<'_>, v: Rows<'_>, into: &mut [f32]) {
    // two heads share what they read
    for (q, into) in q.chunks(2 * hd).zip(into.chunks_mut(2 * (hd + 2))) {
        let mut scores = [[0f32; KEYS]; 2];
        // SAFETY: passed on.
        unsafe {
            match q.len() / hd {
                1 => heads::<L, 1>([q], hd, scale, k, v, &mut scores, into),
                _ => heads::<L, 2>([&q[..hd], &q[hd..]], hd, scale, k, v, &mut scores, into),
            }
        }
    }
}

/// Calls `$f::<L, G, C>(.., at)` for columns at..at + 16·C of `$hd`, up to the last whole sixteen; gives the rest's
/// start.
macro_rules! by_columns {
    ($hd:expr, $f:ident::<$l:ident, $g:ident>($($arg:expr),*)) => {{
        let mut at = 0;
        while $hd - at >= 16 {
            at += match ($hd - at) / 16 {
                8.. => $f::<$l, $g, 8>($($arg,)* at),
                4..8 => $f::<$l, $g, 4>($($arg,)* at),
                2..4 => $f::<$l, $g, 2>($($arg,)* at),
                _ => $f::<$l, $g, 1>($($arg,)* at),
            };
        }
        at
    }};
}

/// [`block`] for G heads.
///
/// # Safety
/// As for [`block`].
#[inline(always)]
unsafe fn heads<L: Lanes, const G: usize>(
    q: [&[f32]; G],
    hd: usize,
    scale: f32,
    k: Rows<'_>,
    v: Rows<'_>,
    scores: &mut [[f32; KEYS]; 2],
    into: &mut [f32],
) {
    // SAFETY: passed on.
    let rest = unsafe { by_columns!(hd, add_scores::<L, G>(&q, &k, scores)) };
    for (q, scores) in q.iter().zip(scores.iter_mut()) {
        let scores = &mut scores[..k.n];
        for (j, score) in scores.iter_mut().enumerate() {
            let key = &k.row(j)[rest..hd];
            *score += q[rest..].iter().zip(key).map(|(q, k)| q * k).sum::<f32>();
            *score *= scale;
        }
    }
    for (scores, into) in scores.iter_mut().zip(into.chunks_exact_mut(hd + 2)) {
        let (mut most, mut total) = (f32::NEG_INFINITY, 0.0);
        exp::max(&scores[..k.n], &mut most);
        exp::exp_shifted(&mut scores[..k.n], most, &mut total);
        into[hd..].copy_from_slice(&[total, most]);
    }
    // SAFETY: passed on.
    let rest = unsafe { by_columns!(hd, sum_values::<L, G>(scores, &v, into, hd)) };
    for (scores, into) in scores.iter().zip(into.chunks_exact_mut(hd + 2)) {
        for (c, sum) in into[..hd].iter_mut().enumerate().skip(rest) {
            *sum = scores[..v.n].iter().enumerate().map(|(j, p)| p * v.row(j)[c]).sum();
        }
    }
}

/// Adds the products of columns at..at + 16·C to the scores; 16·C.
///
/// # Safety
/// As for [`block`]; the columns are the head's.
#[inline(always)]
unsafe fn add_scores<L: Lanes, const G: usize, const C: usize>(
    q: &[&[f32]; G],
    k: &Rows<'_>,
    scores: &mut [[f32; KEYS]; 2],
    at: usize,
) -> usize {
    // SAFETY: as for `Lanes`; columns of the head.
    unsafe {
        for j in 0..k.n {
            let row = k.row(j).as_ptr().add(at);
            let mut key = [L::zero_floats(); C];
            for (c, key) in key.iter_mut().enumerate() {
                *key = L::floats(row.add(16 * c));
            }
            for g in 0..G {
                let mut sum = L::zero_floats();
                for (c, key) in key.iter().enumerate() {
                    sum = L::multiply_add(sum, L::floats(q[g].as_ptr().add(at + 16 * c)), *key);
                }
                scores[g][j] += L::total(sum);
            }
        }
    }
    16 * C
}

/// Columns at..at + 16·C of Σ p_j·v_j; 16·C.
///
/// # Safety
/// As for [`block`]; the columns are the head's.
#[inline(always)]
unsafe fn sum_values<L: Lanes, const G: usize, const C: usize>(
    p: &[[f32; KEYS]; 2],
    v: &Rows<'_>,
    into: &mut [f32],
    hd: usize,
    at: usize,
) -> usize {
    // SAFETY: as for `Lanes`; columns of the head.
    unsafe {
        let mut sums = [[L::zero_floats(); C]; G];
        for j in 0..v.n {
            let row = v.row(j).as_ptr().add(at);
            let mut value = [L::zero_floats(); C];
            for (c, value) in value.iter_mut().enumerate() {
                *value = L::floats(row.add(16 * c));
            }
            for g in 0..G {
                let p = L::splat(p[g][j]);
                for c in 0..C {
                    sums[g][c] = L::multiply_add(sums[g][c], p, value[c]);
                }
            }
        }
        for (g, sums) in sums.iter().enumerate() {
            for (c, sum) in sums.iter().enumerate() {
                L::store(*sum, into[g * (hd + 2) + at + 16 * c..][..16].as_mut_ptr());
            }
        }
    }
    16 * C
}

/// The output of one head, whose share of each part begins at `at`.
fn merge(parts: &[&[f32]], at: usize, out: &mut [f32]) {
    let hd = out.len();
    let ends = |part: &[f32]| (part[at + hd], part[at + hd + 1]);
    let most = parts.iter().map(|p| ends(p).1).fold(f32::NEG_INFINITY, f32::max);
    out.fill(0.0);
    let mut total = 0.0;
    for part in parts {
        let (l, m) = ends(part);
        let weight = (m - most).exp();
        total += weight * l;
        for (out, a) in out.iter_mut().zip(&part[at..]) {
            *out += weight * a;
        }
    }
    out.iter_mut().for_each(|v| *v /= total);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::attention;
    use crate::dropout::mix;

    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| (mix(seed, i) >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    fn step(backend: Backend, shape: &AttentionShape, lens: &[usize], seed: u64) -> (Vec<f32>, Vec<f32>) {
        let AttentionShape { heads, kv_heads, head_dim: hd, .. } = *shape;
        // a gap between the segments' keys, as in a cache
        let mut at = 3;
        let mut segments = Vec::new();
        for (i, len) in lens.iter().enumerate() {
            segments.push(Segment { q: i..i + 1, kv: at..at + len });
            at += len + 5;
        }
        let q = numbers(seed, lens.len() * heads * hd);
        let (k, v) = (numbers(seed + 1, at * kv_heads * hd), numbers(seed + 2, at * kv_heads * hd));
        let (mut found, mut expected) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len()]);
        attend_on(backend, shape, &segments, &q, &k, &v, &mut found);
        attention(shape, &segments, &q, &k, &v, &mut expected, None);
        (found, expected)
    }

    /// `attention` is itself tested against the definition.
    #[test]
    fn agrees_with_attention_of_many_queries() {
        for (heads, kv_heads, hd) in [(1, 1, 8), (4, 2, 20), (9, 3, 64), (6, 1, 33), (2, 1, 256), (8, 8, 112)]
        {
            let shape = AttentionShape { heads, kv_heads, head_dim: hd, scale: 0.7, causal: true };
            for backend in Backend::all() {
                let lens = [1, 2, KEYS - 1, KEYS, KEYS + 1, 3 * KEYS + 7];
                let (found, expected) = step(backend, &shape, &lens, 5);
                for (a, b) in found.iter().zip(&expected) {
                    assert!((a - b).abs() < 1e-5, "{backend:?} {hd}: {a} {b}"); // means of numbers below 1
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 32, scale: 0.2, causal: true };
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| step(Backend::best(), &shape, &[2000, 30], 9).0)
        };
        assert_eq!(run(1), run(4));
    }

    #[test]
    fn scores_far_apart_neither_overflow_nor_vanish() {
        let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 1, scale: 1.0, causal: true };
        let n = 2 * KEYS;
        let k: Vec<f32> = (0..n).map(|j| if j == 5 { 300.0 } else { -300.0 }).collect();
        let v: Vec<f32> = (0..n).map(|j| j as f32).collect();
        let mut out = [0.0];
        attend(&shape, &[Segment { q: 0..1, kv: 0..n }], &[1.0], &k, &v, &mut out);
        assert_eq!(out, [5.0]);
    }
}
