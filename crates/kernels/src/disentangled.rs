//! Disentangled attention (He et al. 2021) over segments of a token stream: scores of contents, of contents and
//! positions, and of positions and contents.
//!
//! Per segment and head, with K_r and Q_r the projected embeddings of relative positions and δ(i, j) the row of the
//! distance i - j:
//!
//! ```text
//! S_ij = s·(q_i·k_j + C[i, δ(i,j)] + D[j, δ(i,j)])     C = Q·K_rᵀ    D = K·Q_rᵀ     P = softmax(S)    O = P·V
//!
//! dV = Pᵀ·dO    dP = dO·Vᵀ    dS = s·P ⊙ (dP - rowsum(dP ⊙ P))
//! dC[i, r] = Σ dS_ij over the j with δ(i,j) = r         dD[j, r] = Σ dS_ij over the i with δ(i,j) = r
//! dQ = dS·K + dC·K_r    dK = dSᵀ·Q + dD·Q_r    dK_r = dCᵀ·Q    dQ_r = dDᵀ·K
//! ```
//!
//! Nothing but q, k, v and the tables is read by the backward: the scores are made again. Of the tables a segment meets
//! the rows of its own distances only, from a whole panel on.
//!
//! A task is one head of a part of the segments. There are at most [`PARTS`] parts, by the lengths of the segments alone, and
//! the tables' gradients are added up over parts in their order, so results do not depend on the number of threads.

use crate::attention::{AttentionShape, Segment};
use crate::exp;
use crate::heads::{Shared, multiply, panels, resize, view};
use crate::mat::MatRef;
use crate::matmul::micro::{Isa, NR};
use crate::norm::dot;
use rayon::prelude::*;
use std::ops::Range;

/// Parts of the segments whose share in the tables' gradients is held apart.
pub const PARTS: usize = 4;

/// The terms of positions.
#[derive(Clone, Copy, Debug)]
pub struct Positions<'a> {
    /// K_r `[table_rows, heads·head_dim]`: content to position
    pub keys: Option<&'a [f32]>,
    /// Q_r, like it: position to content
    pub queries: Option<&'a [f32]>,
    /// rows of the tables, by distance: -zero, 1 - zero, …
    pub rows: &'a [u32],
    /// index of distance 0 in `rows`
    pub zero: usize,
}

impl Positions<'_> {
    /// Rows by the distances of a segment of `n` tokens: from 1 - n to n - 1.
    fn of(&self, n: usize) -> &[u32] {
        &self.rows[self.zero + 1 - n..self.zero + n]
    }
}

/// One head's part of the tables, packed.
#[derive(Default)]
struct Table {
    /// s·Tᵀ: panels of table rows, `[head_dim, NR]` each
    transposed: Vec<f32>,
    /// T: panels of columns, `[table_rows, NR]` each; backward only
    plain: Vec<f32>,
}

/// The call's inputs.
struct Call<'a> {
    isa: Isa,
    shape: &'a AttentionShape,
    segments: &'a [Segment],
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    positions: Positions<'a>,
    table_rows: usize,
    /// K_r and Q_r of each head
    tables: Vec<[Table; 2]>,
}

/// Matrices of one segment and head, kept between segments.
#[derive(Default)]
struct Room {
    /// `[n, n]`
    p: Vec<f32>,
    ds: Vec<f32>,
    /// `[n, width]`: C or D, or the gradient of one of both
    terms: Vec<f32>,
}

/// Where a segment's head lies.
struct Place<'a> {
    rows: Range<usize>,
    head: usize,
    /// the table's rows by distance
    at: &'a [u32],
    /// the first table row that the segment meets, rounded down to a whole panel
    base: usize,
    /// how many rows from there on
    width: usize,
}

impl Place<'_> {
    fn n(&self) -> usize {
        self.rows.len()
    }

    /// Rows of the distances of query i to each key, from `base` on.
    fn of_query(&self, i: usize) -> impl Iterator<Item = usize> {
        self.at[i..i + self.n()].iter().rev().map(|row| *row as usize - self.base)
    }

    /// Rows of the distances of each query to key j, from `base` on.
    fn of_key(&self, j: usize) -> impl Iterator<Item = usize> {
        let first = self.n() - 1 - j;
        self.at[first..first + self.n()].iter().map(|row| *row as usize - self.base)
    }
}

/// Gradients of a part's head for both tables, `[table_rows, head_dim]` each; empty where there is no table.
type Share = [Vec<f32>; 2];

impl<'a> Call<'a> {
    fn new(
        shape: &'a AttentionShape,
        segments: &'a [Segment],
        [q, k, v]: [&'a [f32]; 3],
        positions: Positions<'a>,
        backward: bool,
    ) -> Self {
        let AttentionShape { heads, head_dim: hd, scale, .. } = *shape;
        let width = heads * hd;
        assert!(shape.kv_heads == heads && !shape.causal && k.len() == q.len() && v.len() == q.len());
        let table = positions.keys.or(positions.queries).unwrap_or_default();
        let table_rows = table.len() / width.max(1);
        for table in [positions.keys, positions.queries].into_iter().flatten() {
            assert_eq!(table.len(), table_rows * width);
            assert!(positions.rows.iter().all(|row| (*row as usize) < table_rows), "a row beyond the table");
        }
        // no two tasks may write the same rows
        let apart = segments.windows(2).all(|s| s[0].q.end <= s[1].q.start);
        assert!(
            apart && segments.iter().all(|s| s.q == s.kv),
            "segments of their own rows, one after the other"
        );
        let isa = Isa::best();
        let pack = |table: Option<&[f32]>, head: usize| match table {
            None => Table::default(),
            Some(table) => {
                let t = view(table, 0..table_rows, head, heads, hd);
                let plain = if backward { panels(isa, t, 1.0) } else { Vec::new() };
                Table { transposed: panels(isa, t.t(), scale), plain }
            }
        };
        let of_head = |head| [pack(positions.keys, head), pack(positions.queries, head)];
        let tables = (0..heads).into_par_iter().map(of_head).collect();
        Self { isa, shape, segments, q, k, v, positions, table_rows, tables }
    }

    /// Parts of the segments, each with a head.
    fn tasks(&self) -> Vec<(Range<usize>, usize)> {
        let cost = |s: &Segment| s.q.len() * (s.q.len() + NR);
        let all: usize = self.segments.iter().map(cost).sum();
        let mut cuts = vec![0];
        let mut so_far = 0;
        for (i, s) in self.segments.iter().enumerate() {
            so_far += cost(s);
            if so_far * PARTS >= all * cuts.len() && cuts.len() < PARTS {
                cuts.push(i + 1);
            }
        }
        cuts.push(self.segments.len());
        let parts = cuts.windows(2).map(|c| c[0]..c[1]).filter(|part| !part.is_empty());
        parts.flat_map(|part| (0..self.shape.heads).map(move |head| (part.clone(), head))).collect()
    }

    fn places(&self, part: &Range<usize>, head: usize) -> impl Iterator<Item = Place<'_>> {
        let segments = self.segments[part.clone()].iter().filter(|s| !s.q.is_empty());
        segments.map(move |s| {
            let at = self.positions.of(s.q.len());
            let [first, last] =
                [at.iter().min(), at.iter().max()].map(|row| row.copied().unwrap_or(0) as usize);
            let base = first / NR * NR;
            Place { rows: s.q.clone(), head, at, base, width: last + 1 - base }
        })
    }

    fn of<'b>(&self, data: &'b [f32], place: &Place<'_>) -> MatRef<'b> {
        view(data, place.rows.clone(), place.head, self.shape.heads, self.shape.head_dim)
    }

    /// Index of the place's first element in a buffer like q.
    fn index(&self, place: &Place<'_>) -> usize {
        (place.rows.start * self.shape.heads + place.head) * self.shape.head_dim
    }

    /// `x·s·Tᵀ` for the rows of T that the segment meets: `[n, width]` into `room.terms`.
    fn terms(&self, x: MatRef, table: &Table, place: &Place<'_>, terms: &mut Vec<f32>) {
        let (hd, width) = (self.shape.head_dim, place.width);
        resize(terms, x.rows * width);
        let from = &table.transposed[place.base * hd..];
        // SAFETY: the room has as many rows of `width` elements.
        unsafe { multiply(self.isa, x, from, hd, 0, width, terms.as_mut_ptr(), width, false) };
    }

    /// P of a place, into `room.p`.
    fn probabilities(&self, place: &Place<'_>, room: &mut Room) {
        let (n, width, hd) = (place.n(), place.width, self.shape.head_dim);
        let (q, k) = (self.of(self.q, place), self.of(self.k, place));
        let [keys, queries] = &self.tables[place.head];
        resize(&mut room.p, n * n);
        let keys_t = panels(self.isa, k.t(), self.shape.scale);
        // SAFETY: the room has n rows of n elements.
        unsafe { multiply(self.isa, q, &keys_t, hd, 0, n, room.p.as_mut_ptr(), n, false) };
        if self.positions.keys.is_some() {
            self.terms(q, keys, place, &mut room.terms);
            for (i, scores) in room.p[..n * n].chunks_exact_mut(n).enumerate() {
                let terms = &room.terms[i * width..][..width];
                scores.iter_mut().zip(place.of_query(i)).for_each(|(s, row)| *s += terms[row]);
            }
        }
        if self.positions.queries.is_some() {
            self.terms(k, queries, place, &mut room.terms);
            for j in 0..n {
                let terms = &room.terms[j * width..][..width];
                let scores = room.p[j..n * n].iter_mut().step_by(n);
                scores.zip(place.of_key(j)).for_each(|(s, row)| *s += terms[row]);
            }
        }
        for scores in room.p[..n * n].chunks_exact_mut(n) {
            let (mut most, mut sum) = (f32::NEG_INFINITY, 0.0);
            exp::max(scores, &mut most);
            exp::exp_shifted(scores, most, &mut sum);
            let factor = 1.0 / sum;
            scores.iter_mut().for_each(|p| *p *= factor);
        }
    }

    fn forward(&self, (part, head): &(Range<usize>, usize), out: Shared) {
        let (heads, hd) = (self.shape.heads, self.shape.head_dim);
        let mut room = Room::default();
        for place in self.places(part, *head) {
            let n = place.n();
            self.probabilities(&place, &mut room);
            let values = panels(self.isa, self.of(self.v, &place), 1.0);
            let (p, out) = (MatRef::new(&room.p, n, n), out.at(self.index(&place)));
            // SAFETY: the segment's rows of this head are this task's alone.
            unsafe { multiply(self.isa, p, &values, n, 0, hd, out, heads * hd, false) };
        }
    }

    /// Gradients of q, k and v into place; those of the tables are given back.
    fn backward(
        &self,
        (part, head): &(Range<usize>, usize),
        dout: &[f32],
        [dq, dk, dv]: [Shared; 3],
    ) -> Share {
        let AttentionShape { heads, head_dim: hd, scale, .. } = *self.shape;
        let (isa, row) = (self.isa, heads * hd);
        let (mut room, has) = (Room::default(), [self.positions.keys, self.positions.queries]);
        let mut share = has.map(|table| vec![0f32; table.map_or(0, |_| self.table_rows * hd)]);
        for place in self.places(part, *head) {
            let (n, width) = (place.n(), place.width);
            self.probabilities(&place, &mut room);
            let [q, k, v, dout] = [self.q, self.k, self.v, dout].map(|data| self.of(data, &place));
            let [q_panels, k_panels, dout_panels] = [q, k, dout].map(|m| panels(isa, m, 1.0));
            let Room { p, ds, terms } = &mut room;
            resize(ds, n * n);
            // SAFETY: the room has n rows of n elements.
            unsafe { multiply(isa, dout, &panels(isa, v.t(), 1.0), hd, 0, n, ds.as_mut_ptr(), n, false) };
            for (p, ds) in p[..n * n].chunks_exact(n).zip(ds.chunks_exact_mut(n)) {
                let mean = dot(p, ds);
                ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = scale * p * (*ds - mean));
            }
            let (p, grad) = (MatRef::new(p, n, n), MatRef::new(ds, n, n));
            let [dq, dk, dv] = [dq, dk, dv].map(|shared| shared.at(self.index(&place)));
            // SAFETY: the segment's rows of this head are this task's alone.
            unsafe {
                multiply(isa, p.t(), &dout_panels, n, 0, hd, dv, row, false);
                multiply(isa, grad, &k_panels, n, 0, hd, dq, row, false);
                multiply(isa, grad.t(), &q_panels, n, 0, hd, dk, row, false);
            }
            let sides = [(dq, &q_panels), (dk, &k_panels)];
            for (side, (dx, x_panels)) in
                sides.into_iter().enumerate().filter(|(side, _)| has[*side].is_some())
            {
                resize(terms, n * width);
                terms[..n * width].fill(0.0);
                for (i, spread) in terms[..n * width].chunks_exact_mut(width).enumerate() {
                    match side {
                        0 => ds[i * n..][..n]
                            .iter()
                            .zip(place.of_query(i))
                            .for_each(|(ds, at)| spread[at] += ds),
                        _ => {
                            let column = ds[i..n * n].iter().step_by(n);
                            column.zip(place.of_key(i)).for_each(|(ds, at)| spread[at] += ds);
                        }
                    }
                }
                let (spread, table) = (MatRef::new(terms, n, width), &self.tables[place.head][side]);
                let own = share[side][place.base * hd..].as_mut_ptr();
                // SAFETY: as above; the share has `width` rows from there on.
                unsafe {
                    multiply(isa, spread, &table.plain, self.table_rows, place.base, hd, dx, row, true);
                    multiply(isa, spread.t(), x_panels, n, 0, hd, own, hd, true);
                }
            }
        }
        share
    }
}

/// Disentangled attention of `q` over `k` and `v`, `[n, heads·head_dim]` each, into `out`; every token of a segment sees all
/// of its segment.
///
/// Panics if lengths do not fit, segments overlap or lie outside the buffers, or `positions` lacks a distance or a row.
pub fn disentangled(
    shape: &AttentionShape,
    segments: &[Segment],
    qkv: [&[f32]; 3],
    positions: Positions<'_>,
    out: &mut [f32],
) {
    let call = Call::new(shape, segments, qkv, positions, false);
    assert_eq!(out.len(), call.q.len());
    out.fill(0.0);
    let out = Shared::new(out);
    call.tasks().par_iter().with_max_len(1).for_each(|task| call.forward(task, out));
}

/// Gradients of q, k and v, overwritten, and of K_r and Q_r where there is room for them.
///
/// Panics as [`disentangled`] does.
pub fn disentangled_backward(
    shape: &AttentionShape,
    segments: &[Segment],
    qkv: [&[f32]; 3],
    positions: Positions<'_>,
    dout: &[f32],
    dqkv: [&mut [f32]; 3],
    dtables: [Option<&mut [f32]>; 2],
) {
    let call = Call::new(shape, segments, qkv, positions, true);
    assert!(dout.len() == call.q.len() && dqkv.iter().all(|d| d.len() == call.q.len()));
    let dqkv = dqkv.map(|d| {
        d.fill(0.0);
        Shared::new(d)
    });
    let tasks = call.tasks();
    let parts: Vec<Share> =
        tasks.par_iter().with_max_len(1).map(|task| call.backward(task, dout, dqkv)).collect();
    let (heads, hd) = (shape.heads, shape.head_dim);
    for (side, table) in dtables.into_iter().enumerate() {
        let Some(table) = table else { continue };
        assert_eq!(table.len(), call.table_rows * heads * hd);
        table.fill(0.0);
        for ((_, head), share) in tasks.iter().zip(&parts) {
            let rows = table.chunks_exact_mut(heads * hd).zip(share[side].chunks_exact(hd));
            for (row, part) in rows {
                row[head * hd..][..hd].iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
        }
    }
}

#[cfg(test)]
#[path = "disentangled_tests.rs"]
mod tests;
