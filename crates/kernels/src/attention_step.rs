//! Attention of one query a segment over keys and values that are already there: what generating a token does.
//!
//! Every key and value is used once by each query head of its group, so the time is that of reading them: nothing is
//! packed or copied, and the heads of a group go through together. For a query q of one head, over the keys j:
//!
//! ```text
//! s_j = scale·q·k_j        o = Σ_j e^{s_j}·v_j / Σ_j e^{s_j}
//! ```
//!
//! (with a soft cap c, s_j = c·tanh(scale·q·k_j / c); with a window, only its keys are read).
//!
//! Keys are taken in blocks of 256. A block b gives its largest score m_b, its sum l_b = Σ e^{s_j - m_b} and
//! a_b = Σ e^{s_j - m_b}·v_j; with M the largest m_b, o = Σ_b e^{m_b - M}·a_b / Σ_b e^{m_b - M}·l_b (Dao et al.
//! 2023, "Flash-Decoding"). The blocks are fixed, so results do not depend on the number of threads.

use crate::attention::{AttentionShape, Segment};
use crate::exp;
use crate::lanes::{Backend, Lanes, by_backend};
use crate::mat::MatMut;
use crate::matmul::SharedMat;
use crate::team;
use half::f16;

/// Keys of a block.
const KEYS: usize = 256;
/// Floats of keys and values below which one thread does it all: half a microsecond of work.
const SERIAL_FLOATS: usize = 1 << 15;

/// Keys or values of all sequences, as a cache holds them.
#[derive(Clone, Copy, Debug)]
pub enum Cached<'a> {
    /// as they were computed
    F32(&'a [f32]),
    /// rounded to half precision, at half the bytes to read
    F16(&'a [f16]),
}

impl Cached<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
        }
    }
}

/// The keys of a segment that one head's queries meet in one go.
struct Task {
    segment: usize,
    kv_head: usize,
    block: usize,
}

/// Attention of the segments' queries in `q` `[_, heads·hd]` over `k`, `v` `[_, kv_heads·hd]` into their rows of `out`
/// (like q); other rows are left alone.
///
/// Panics if lengths do not fit, k and v are not of one kind, a segment has not exactly one query, no key, or lies
/// outside the buffers.
pub fn attend(
    shape: &AttentionShape,
    segments: &[Segment],
    q: &[f32],
    k: Cached<'_>,
    v: Cached<'_>,
    out: &mut [f32],
) {
    attend_on(Backend::best(), shape, segments, q, k, v, out);
}

fn attend_on(
    backend: Backend,
    shape: &AttentionShape,
    segments: &[Segment],
    q: &[f32],
    k: Cached<'_>,
    v: Cached<'_>,
    out: &mut [f32],
) {
    let AttentionShape { heads, kv_heads, head_dim: hd, .. } = *shape;
    assert!(out.len() == q.len() && v.len() == k.len());
    assert!(segments.iter().all(|s| s.q.len() == 1 && !s.kv.is_empty()), "one query and some keys a segment");
    let in_window = |s: &Segment| {
        let seen = shape.visible(1, s.kv.len(), 0);
        Segment { q: s.q.clone(), kv: s.kv.start + seen.start..s.kv.start + seen.end }
    };
    let segments: Vec<Segment> = segments.iter().map(in_window).collect();
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
            let rows = |data| Rows { data, from, n: to - from, width, at: kv_head * hd };
            let q = &q[(s.q.start * heads + kv_head * group) * hd..][..group * hd];
            // SAFETY: row i is this task's alone, and has `each` elements.
            let into = unsafe { std::slice::from_raw_parts_mut(shared.pointer(i, 0), each) };
            // SAFETY: the segment's keys and values are in the buffers, as was checked.
            unsafe {
                match (k, v) {
                    (Cached::F32(k), Cached::F32(v)) => {
                        attend_block(backend, q, shape, &rows(k), &rows(v), into);
                    }
                    (Cached::F16(k), Cached::F16(v)) => {
                        let rows = |data| Rows { data, from, n: to - from, width, at: kv_head * hd };
                        attend_block(backend, q, shape, &rows(k), &rows(v), into);
                    }
                    _ => panic!("keys and values of two kinds"),
                }
            }
        }
    });
    let mut parts = partial.chunks_exact(each);
    for s in &segments {
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
struct Rows<'a, E> {
    data: &'a [E],
    from: usize,
    n: usize,
    width: usize,
    at: usize,
}

impl<'a, E> Rows<'a, E> {
    /// The head's elements of row j, and what follows.
    #[inline(always)]
    fn row(&self, j: usize) -> &'a [E] {
        &self.data[(self.from + j) * self.width + self.at..]
    }
}

/// An element of keys and values.
trait Element: Copy {
    /// Sixteen of them, from `p`.
    ///
    /// # Safety
    /// Readable; else as for [`Lanes`].
    unsafe fn load<L: Lanes>(p: *const Self) -> L::Floats;
    /// As an f32.
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Self) -> L::Floats {
        // SAFETY: passed on.
        unsafe { L::floats(p) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Self) -> L::Floats {
        // SAFETY: passed on.
        unsafe { L::floats_of_f16(p.cast()) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

by_backend!(
    /// a, l and m of every head in `q` `[group, hd]`, into `[group, hd + 2]`.
    ///
    /// # Safety
    /// `k` and `v` lie in their buffers, with 1 to [`KEYS`] rows.
    unsafe fn attend_block<E: Element>(
        q: &[f32],
        shape: &AttentionShape,
        k: &Rows<'_, E>,
        v: &Rows<'_, E>,
        into: &mut [f32],
    ) = block
);

/// # Safety
/// As for [`attend_block`] and [`Lanes`].
#[inline(always)]
unsafe fn block<L: Lanes, E: Element>(
    q: &[f32],
    shape: &AttentionShape,
    k: &Rows<'_, E>,
    v: &Rows<'_, E>,
    into: &mut [f32],
) {
    let hd = shape.head_dim;
    // two heads share what they read
    for (q, into) in q.chunks(2 * hd).zip(into.chunks_mut(2 * (hd + 2))) {
        let mut scores = [[0f32; KEYS]; 2];
        // SAFETY: passed on.
        unsafe {
            match q.len() / hd {
                1 => heads::<L, E, 1>([q], shape, k, v, &mut scores, into),
                _ => heads::<L, E, 2>([&q[..hd], &q[hd..]], shape, k, v, &mut scores, into),
            }
        }
    }
}

/// Calls `$f::<L, E, G, C>(.., at)` for columns at..at + 16·C of `$hd`, up to the last whole sixteen; gives the rest's
/// start.
macro_rules! by_columns {
    ($hd:expr, $f:ident::<$l:ident, $e:ident, $g:ident>($($arg:expr),*)) => {{
        let mut at = 0;
        while $hd - at >= 16 {
            at += match ($hd - at) / 16 {
                8.. => $f::<$l, $e, $g, 8>($($arg,)* at),
                4..8 => $f::<$l, $e, $g, 4>($($arg,)* at),
                2..4 => $f::<$l, $e, $g, 2>($($arg,)* at),
                _ => $f::<$l, $e, $g, 1>($($arg,)* at),
            };
        }
        at
    }};
}

/// [`attend_block`] for G heads.
///
/// # Safety
/// As for [`attend_block`].
#[inline(always)]
unsafe fn heads<L: Lanes, E: Element, const G: usize>(
    q: [&[f32]; G],
    shape: &AttentionShape,
    k: &Rows<'_, E>,
    v: &Rows<'_, E>,
    scores: &mut [[f32; KEYS]; 2],
    into: &mut [f32],
) {
    let hd = shape.head_dim;
    // SAFETY: passed on.
    let rest = unsafe { by_columns!(hd, add_scores::<L, E, G>(&q, k, scores)) };
    for (q, scores) in q.iter().zip(scores.iter_mut()) {
        let scores = &mut scores[..k.n];
        for (j, score) in scores.iter_mut().enumerate() {
            let key = &k.row(j)[rest..hd];
            *score += q[rest..].iter().zip(key).map(|(q, k)| q * k.widen()).sum::<f32>();
            *score *= shape.scale;
        }
        if let Some(cap) = shape.soft_cap {
            exp::soft_cap(scores, cap);
        }
    }
    for (scores, into) in scores.iter_mut().zip(into.chunks_exact_mut(hd + 2)) {
        let (mut most, mut total) = (f32::NEG_INFINITY, 0.0);
        exp::max(&scores[..k.n], &mut most);
        exp::exp_shifted(&mut scores[..k.n], most, &mut total);
        into[hd..].copy_from_slice(&[total, most]);
    }
    // SAFETY: passed on.
    let rest = unsafe { by_columns!(hd, sum_values::<L, E, G>(scores, v, into, hd)) };
    for (scores, into) in scores.iter().zip(into.chunks_exact_mut(hd + 2)) {
        for (c, sum) in into[..hd].iter_mut().enumerate().skip(rest) {
            *sum = scores[..v.n].iter().enumerate().map(|(j, p)| p * v.row(j)[c].widen()).sum();
        }
    }
}

/// Adds the products of columns at..at + 16·C to the scores; 16·C.
///
/// # Safety
/// As for [`attend_block`]; the columns are the head's.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // j counts rows of keys as well, g queries as well
unsafe fn add_scores<L: Lanes, E: Element, const G: usize, const C: usize>(
    q: &[&[f32]; G],
    k: &Rows<'_, E>,
    scores: &mut [[f32; KEYS]; 2],
    at: usize,
) -> usize {
    // SAFETY: as for `Lanes`; columns of the head.
    unsafe {
        for j in 0..k.n {
            let row = k.row(j).as_ptr().add(at);
            let mut key = [L::zero_floats(); C];
            for (c, key) in key.iter_mut().enumerate() {
                *key = E::load::<L>(row.add(16 * c));
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
/// As for [`attend_block`]; the columns are the head's.
#[inline(always)]
unsafe fn sum_values<L: Lanes, E: Element, const G: usize, const C: usize>(
    p: &[[f32; KEYS]; 2],
    v: &Rows<'_, E>,
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
                *value = E::load::<L>(row.add(16 * c));
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
    use crate::test_numbers::numbers;

    /// What `attend` gives, from f32 or f16, and what `attention` does.
    fn step(
        backend: Backend,
        shape: &AttentionShape,
        lens: &[usize],
        seed: u64,
        half: bool,
    ) -> (Vec<f32>, Vec<f32>) {
        let AttentionShape { heads, kv_heads, head_dim: hd, .. } = *shape;
        // a gap between the segments' keys, as in a cache
        let mut at = 3;
        let mut segments = Vec::new();
        for (i, len) in lens.iter().enumerate() {
            segments.push(Segment { q: i..i + 1, kv: at..at + len });
            at += len + 5;
        }
        let q = numbers(seed, lens.len() * heads * hd);
        let (mut k, mut v) = (numbers(seed + 1, at * kv_heads * hd), numbers(seed + 2, at * kv_heads * hd));
        let halves = |x: &[f32]| x.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>();
        let (mut found, mut expected) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len()]);
        if half {
            let (k16, v16) = (halves(&k), halves(&v));
            let (k16, v16) = (Cached::F16(&k16), Cached::F16(&v16));
            attend_on(backend, shape, &segments, &q, k16, v16, &mut found);
            k.iter_mut().chain(&mut v).for_each(|x| *x = f16::from_f32(*x).to_f32());
        } else {
            attend_on(backend, shape, &segments, &q, Cached::F32(&k), Cached::F32(&v), &mut found);
        }
        attention(shape, &segments, &q, &k, &v, None, &mut expected, None);
        (found, expected)
    }

    /// `attention` is itself tested against the definition.
    #[test]
    fn agrees_with_attention_of_many_queries() {
        for (heads, kv_heads, hd) in [(1, 1, 8), (4, 2, 20), (9, 3, 64), (6, 1, 33), (2, 1, 256), (8, 8, 112)]
        {
            let plain = AttentionShape::new(heads, kv_heads, hd, 0.7, true);
            let capped = AttentionShape { window: Some(KEYS + 3), soft_cap: Some(1.5), ..plain };
            for (backend, shape) in Backend::all().flat_map(|b| [(b, plain), (b, capped)]) {
                let lens = [1, 2, KEYS - 1, KEYS, KEYS + 1, 3 * KEYS + 7];
                for half in [false, true] {
                    let (found, expected) = step(backend, &shape, &lens, 5, half);
                    for (a, b) in found.iter().zip(&expected) {
                        // means of numbers below 1
                        assert!((a - b).abs() < 1e-5, "{backend:?} {shape:?} {half}: {a} {b}");
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let shape = AttentionShape::new(6, 2, 32, 0.2, true);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| step(Backend::best(), &shape, &[2000, 30], 9, false).0)
        };
        assert_eq!(run(1), run(4));
    }

    #[test]
    fn scores_far_apart_neither_overflow_nor_vanish() {
        let shape = AttentionShape::new(1, 1, 1, 1.0, true);
        let n = 2 * KEYS;
        let k: Vec<f32> = (0..n).map(|j| if j == 5 { 300.0 } else { -300.0 }).collect();
        let v: Vec<f32> = (0..n).map(|j| j as f32).collect();
        let mut out = [0.0];
        let (k, v) = (Cached::F32(&k), Cached::F32(&v));
        attend(&shape, &[Segment { q: 0..1, kv: 0..n }], &[1.0], k, v, &mut out);
        assert_eq!(out, [5.0]);
    }
}
