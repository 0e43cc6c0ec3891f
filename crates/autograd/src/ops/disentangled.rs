//! Disentangled attention (He et al. 2021): scores of contents, of contents and positions, and of positions and contents.
//!
//! With K_r and Q_r the projected embeddings of relative positions and δ the row of the distance i - j:
//!
//! ```text
//! S_ij = s·(q_i·k_j + q_i·K_r[δ(i,j)] + Q_r[δ(i,j)]·k_j)
//! ```
//!
//! Nothing but its inputs is saved: the backward makes the scores again. On the CPU a kernel does both
//! ([`engobe_kernels::disentangled`]); with candle's operations, on every device, they go segment by segment: what is there
//! at a time is `[heads, n, n]` of one segment, and gradients of the gathered terms are scattered back to the rows they
//! came from.

use super::attention::{check, heads_of, merge_heads};
use crate::ops::dims2;
use crate::var::Kept;
use crate::{Error, Result, Tape, Var, host, tensor_of, uninit};
use candle_core::{D, DType, Device, Tensor};
use engobe_kernels::attention::{AttentionShape, Segment};
use engobe_kernels::disentangled::{self as kernel, Positions};
use std::sync::Arc;

/// The terms of positions.
#[derive(Clone, Debug)]
pub struct PositionTerms {
    /// K_r `[rows, heads·head_dim]`: content to position
    pub keys: Option<Var>,
    /// Q_r, like it: position to content
    pub queries: Option<Var>,
    /// rows of the distances -zero, 1 - zero, …
    pub rows: Arc<[u32]>,
    /// index of distance 0 in `rows`
    pub zero: usize,
}

/// Attention of `q` over `k` and `v`, `[n, heads·head_dim]` each, with terms of positions; every token of a segment sees
/// all of its segment.
///
/// # Errors
/// Shapes that do not fit, or distances that the tables do not have.
pub fn disentangled_attention<'m>(
    tape: &mut Tape<'m>,
    q: &Var,
    k: &Var,
    v: &Var,
    shape: AttentionShape,
    segments: Arc<[Segment]>,
    terms: &PositionTerms,
) -> Result<Var> {
    check(q.tensor(), k.tensor(), v.tensor(), &shape, &segments)?;
    fits(&shape, &segments, terms)?;
    let tables = [&terms.keys, &terms.queries].map(Option::as_ref);
    let slots = [q.slot(), k.slot(), v.slot()];
    let table_slots = tables.map(|t| t.map(Var::slot).unwrap_or_default());
    let pairs = Pairs { rows: terms.rows.clone(), zero: terms.zero };
    let kept = [tape.keep(q)?, tape.keep(k)?, tape.keep(v)?];
    let mut kept_tables = [None, None];
    for (kept, table) in kept_tables.iter_mut().zip(tables) {
        *kept = table.map(|table| tape.keep(table)).transpose()?;
    }
    let now = tables.map(|t| t.map(Var::tensor));
    let all = [slots[0], slots[1], slots[2], table_slots[0], table_slots[1]];
    if tape.fast(q.tensor()) {
        let y = fast([q, k, v].map(Var::tensor), now, &shape, &segments, &pairs)?;
        return Ok(tape.record1(&all, y, move |dy, sink| {
            let (inputs, tables) = taken(kept, kept_tables)?;
            let grads = fast_backward(
                inputs.each_ref(),
                tables.each_ref().map(Option::as_ref),
                &dy,
                &shape,
                &segments,
                &pairs,
            )?;
            for (slot, grad) in all.into_iter().zip(grads) {
                if let Some(grad) = grad {
                    sink.add(slot, grad)?;
                }
            }
            Ok(())
        }));
    }
    let mut parts = Vec::with_capacity(segments.len());
    for s in segments.iter() {
        let seen = Seen::new(q.tensor(), k.tensor(), now, s, &shape, &pairs)?;
        let y = seen.probabilities(&shape)?.matmul(&heads_of(v.tensor(), &s.q, shape.heads, 1)?)?;
        parts.push(merge_heads(&y, shape.heads, 1)?);
    }
    let y = Tensor::cat(&parts, 0)?;
    Ok(tape.record1(&all, y, move |dy, sink| {
        let (inputs, tables) = taken(kept, kept_tables)?;
        let tables = [tables[0].as_ref(), tables[1].as_ref()];
        let mut rows: [Vec<Tensor>; 3] = Default::default();
        let mut sums: [Option<Tensor>; 2] = [None, None];
        for s in segments.iter() {
            let heads = |t: &Tensor| heads_of(t, &s.q, shape.heads, 1);
            let seen = Seen::new(&inputs[0], &inputs[1], tables, s, &shape, &pairs)?;
            let (of_rows, of_tables) = seen.backward(&shape, &heads(&inputs[2])?, &heads(&dy)?)?;
            for (all, grad) in rows.iter_mut().zip(of_rows) {
                all.push(merge_heads(&grad, shape.heads, 1)?);
            }
            for (sum, grad) in sums.iter_mut().zip(of_tables) {
                let Some(grad) = grad else { continue };
                let grad = merge_heads(&grad, shape.heads, 1)?;
                *sum = Some(match sum.take() {
                    Some(so_far) => (so_far + grad)?,
                    None => grad,
                });
            }
        }
        for (slot, grads) in slots.into_iter().zip(rows) {
            sink.add(slot, Tensor::cat(&grads, 0)?)?;
        }
        for (slot, grad) in table_slots.into_iter().zip(sums) {
            if let Some(grad) = grad {
                sink.add(slot, grad)?;
            }
        }
        Ok(())
    }))
}

/// q, k and v, and the tables that are there.
fn taken(kept: [Kept; 3], tables: [Option<Kept>; 2]) -> Result<([Tensor; 3], [Option<Tensor>; 2])> {
    let [q, k, v] = kept;
    let [keys, queries] = tables.map(|table| table.map(Kept::take).transpose());
    Ok(([q.take()?, k.take()?, v.take()?], [keys?, queries?]))
}

/// Calls `f` with what the kernel reads.
fn on_host<T>(
    qkv: [&Tensor; 3],
    tables: [Option<&Tensor>; 2],
    pairs: &Pairs,
    f: impl FnOnce([&[f32]; 3], Positions<'_>) -> Result<T>,
) -> Result<T> {
    let [q, k, v] = [host(qkv[0])?, host(qkv[1])?, host(qkv[2])?];
    let [keys, queries] = tables.map(|table| table.map(host).transpose());
    let (keys, queries) = (keys?, queries?);
    let (keys, queries) = (keys.as_deref(), queries.as_deref());
    f([&q, &k, &v], Positions { keys, queries, rows: &pairs.rows, zero: pairs.zero })
}

/// The output, by the kernel.
fn fast(
    qkv: [&Tensor; 3],
    tables: [Option<&Tensor>; 2],
    shape: &AttentionShape,
    segments: &[Segment],
    pairs: &Pairs,
) -> Result<Tensor> {
    let dims = qkv[0].dims2()?;
    on_host(qkv, tables, pairs, |qkv, positions| {
        let mut out = uninit(dims.0 * dims.1);
        kernel::disentangled(shape, segments, qkv, positions, &mut out);
        tensor_of(out, dims)
    })
}

/// Gradients of q, k, v, and of the tables that are there.
fn fast_backward(
    qkv: [&Tensor; 3],
    tables: [Option<&Tensor>; 2],
    dy: &Tensor,
    shape: &AttentionShape,
    segments: &[Segment],
    pairs: &Pairs,
) -> Result<[Option<Tensor>; 5]> {
    let (n, width) = qkv[0].dims2()?;
    on_host(qkv, tables, pairs, |qkv, positions| {
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| uninit(n * width));
        let of_table = |table: Option<&[f32]>| table.map(|t| uninit(t.len()));
        let [mut dkeys, mut dqueries] = [positions.keys, positions.queries].map(of_table);
        let dtables = [dkeys.as_deref_mut(), dqueries.as_deref_mut()];
        let dqkv = [&mut dq[..], &mut dk, &mut dv];
        kernel::disentangled_backward(shape, segments, qkv, positions, &host(dy)?, dqkv, dtables);
        let rows = |grad: Vec<f32>| {
            let rows = grad.len() / width;
            tensor_of(grad, (rows, width))
        };
        let all = [Some(dq), Some(dk), Some(dv), dkeys, dqueries].map(|grad| grad.map(rows).transpose());
        let [dq, dk, dv, dkeys, dqueries] = all;
        Ok([dq?, dk?, dv?, dkeys?, dqueries?])
    })
}

/// Refuses tables that do not cover the segments.
fn fits(shape: &AttentionShape, segments: &[Segment], terms: &PositionTerms) -> Result<()> {
    let wrong = |what: String| Err(Error::shape("disentangled attention", what));
    if shape.causal || shape.kv_heads != shape.heads || shape.window.is_some() || shape.soft_cap.is_some() {
        return wrong(format!("{shape:?} is not plain bidirectional attention"));
    }
    let last = terms.rows.iter().max().copied().unwrap_or(0) as usize;
    for table in [&terms.keys, &terms.queries].into_iter().flatten() {
        let (rows, width) = dims2("disentangled attention", table.tensor())?;
        if width != shape.heads * shape.head_dim || last >= rows {
            return wrong(format!("positions [{rows}, {width}] for row {last} and {} heads", shape.heads));
        }
    }
    if segments.windows(2).any(|s| s[0].q.end > s[1].q.start) {
        return wrong("segments that overlap, or not in their order".to_string());
    }
    for s in segments {
        let far = s.q.len().saturating_sub(1);
        if s.q != s.kv || terms.zero < far || terms.rows.len() < terms.zero + far + 1 {
            return wrong(format!("{} distances, 0 at {}, for {s:?}", terms.rows.len(), terms.zero));
        }
    }
    Ok(())
}

/// Which row belongs to a pair of tokens.
struct Pairs {
    rows: Arc<[u32]>,
    zero: usize,
}

/// A term of positions in one segment.
struct Term {
    /// `[heads, rows, head_dim]`
    table: Tensor,
    /// row of each pair's distance, `[heads, n, n]`; the side that meets the table comes first
    at: Tensor,
}

/// One segment's tensors, `[heads, n, head_dim]` each.
struct Seen {
    q: Tensor,
    k: Tensor,
    /// K_r, which queries meet
    keys: Option<Term>,
    /// Q_r, which keys meet
    queries: Option<Term>,
}

impl Seen {
    fn new(
        q: &Tensor,
        k: &Tensor,
        [keys, queries]: [Option<&Tensor>; 2],
        s: &Segment,
        shape: &AttentionShape,
        pairs: &Pairs,
    ) -> Result<Self> {
        let (heads, n) = (shape.heads, s.q.len());
        let each = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
        let rows: Vec<u32> = each.map(|(i, j)| pairs.rows[pairs.zero + i - j]).collect();
        let rows = Tensor::from_vec(rows, (1, n, n), &Device::Cpu)?.to_device(q.device())?;
        let term = |table: Option<&Tensor>, rows: &Tensor| -> Result<Option<Term>> {
            let Some(table) = table else { return Ok(None) };
            let table = heads_of(table, &(0..table.dim(0)?), heads, 1)?;
            Ok(Some(Term { table, at: rows.broadcast_as((heads, n, n))?.contiguous()? }))
        };
        Ok(Self {
            q: heads_of(q, &s.q, heads, 1)?,
            k: heads_of(k, &s.q, heads, 1)?,
            keys: term(keys, &rows)?,
            queries: term(queries, &rows.transpose(1, 2)?)?,
        })
    }

    fn probabilities(&self, shape: &AttentionShape) -> Result<Tensor> {
        let mut scores = self.q.matmul(&self.k.t()?)?;
        if let Some(term) = &self.keys {
            scores = (scores + term.scores(&self.q)?)?;
        }
        if let Some(term) = &self.queries {
            scores = (scores + term.scores(&self.k)?.t()?)?;
        }
        let scores = (scores * f64::from(shape.scale))?;
        let e = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        Ok(e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?)
    }

    /// Gradients of q, k and v, and of the terms' tables.
    ///
    /// With P the probabilities: dV = Pᵀ·dO, dP = dO·Vᵀ, dS = s·P ⊙ (dP - rowsum(dP ⊙ P)), dQ = dS·K, dK = dSᵀ·Q.
    fn backward(
        &self,
        shape: &AttentionShape,
        v: &Tensor,
        dy: &Tensor,
    ) -> Result<([Tensor; 3], [Option<Tensor>; 2])> {
        let p = self.probabilities(shape)?;
        let dv = p.t()?.matmul(dy)?;
        let dp = dy.matmul(&v.t()?)?;
        let mean = (&dp * &p)?.sum_keepdim(D::Minus1)?;
        let ds = ((&p * dp.broadcast_sub(&mean)?)? * f64::from(shape.scale))?;
        let across = ds.t()?.contiguous()?;
        let (mut dq, mut dk) = (ds.matmul(&self.k)?, across.matmul(&self.q)?);
        let (mut dkeys, mut dqueries) = (None, None);
        if let Some(term) = &self.keys {
            let (more, table) = term.backward(&ds, &self.q)?;
            (dq, dkeys) = ((dq + more)?, Some(table));
        }
        if let Some(term) = &self.queries {
            let (more, table) = term.backward(&across, &self.k)?;
            (dk, dqueries) = ((dk + more)?, Some(table));
        }
        Ok(([dq, dk, dv], [dkeys, dqueries]))
    }
}

impl Term {
    /// x_i·T[δ(i,j)]
    fn scores(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&self.table.t()?)?.gather(&self.at, D::Minus1)?)
    }

    /// Gradients of x and T: with dG the gradients `ds` summed by row of T, dX = dG·T and dT = dGᵀ·X.
    fn backward(&self, ds: &Tensor, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (heads, n, _) = ds.dims3()?;
        let zeros = Tensor::zeros((heads, n, self.table.dim(1)?), DType::F32, ds.device())?;
        let spread = zeros.scatter_add(&self.at, ds, D::Minus1)?;
        Ok((spread.matmul(&self.table)?, spread.t()?.matmul(x)?))
    }
}
