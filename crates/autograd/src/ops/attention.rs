//! Scaled dot-product attention over segments of a token stream, with grouped key/value heads.
//!
//! Saves q, k, v, its output and one log-sum-exp a row and head; probabilities are computed again in the
//! backward (Dao et al. 2022). Segments never see each other, so rows need no padding.

use crate::var::Kept;
use crate::{Error, Result, Tape, Var, host, host_as, ops::dims2, tensor_of, uninit};
use candle_core::{D, DType, Device, Tensor};
use engobe_kernels::attention::{self as kernel, AttentionShape, RelativeBias, Segment};
use engobe_kernels::attention_step::{self, Cached};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::sync::Arc;

/// A bias on the scores by the distance of key and query ([`engobe_kernels::attention::RelativeBias`]).
#[derive(Clone, Debug)]
pub struct ScoreBias {
    /// `[heads, distances]`
    pub table: Var,
    /// index of distance 0
    pub zero: usize,
}

/// Attention of `q` `[nq, heads·head_dim]` over `k` and `v` `[nkv, kv_heads·head_dim]`: like `q`.
pub fn attention<'m>(
    tape: &mut Tape<'m>,
    q: &Var,
    k: &Var,
    v: &Var,
    shape: AttentionShape,
    segments: Arc<[Segment]>,
) -> Result<Var> {
    biased_attention(tape, q, k, v, shape, segments, None)
}

/// [`attention`] with a bias on the scores.
pub fn biased_attention<'m>(
    tape: &mut Tape<'m>,
    q: &Var,
    k: &Var,
    v: &Var,
    shape: AttentionShape,
    segments: Arc<[Segment]>,
    bias: Option<&ScoreBias>,
) -> Result<Var> {
    let (nq, nkv) = check(q.tensor(), k.tensor(), v.tensor(), &shape, &segments)?;
    if let Some(bias) = bias {
        let table = bias.table.tensor().to_device(&Device::Cpu)?;
        let table = host(&table)?;
        if !(RelativeBias { table: &table, zero: bias.zero }).covers(&shape, &segments) {
            let what = format!("a bias of {:?}, zero at {}", bias.table.tensor().dims(), bias.zero);
            return Err(Error::shape("attention", format!("{what}, does not cover the segments")));
        }
    }
    let slots = [q.slot(), k.slot(), v.slot(), bias.map(|b| b.table.slot()).unwrap_or_default()];
    let (qt, kt, vt) = (q.tensor(), k.tensor(), v.tensor());
    // small, and one for all layers: kept as it is
    let bias = bias.map(|b| (b.table.tensor().clone(), b.zero));
    if tape.generating().is_some() && tape.fast(qt) {
        return generate(qt, kt, vt, &shape, &segments, bias.as_ref());
    }
    let kept = [tape.keep(q)?, tape.keep(k)?, tape.keep(v)?];
    if !tape.fast(qt) {
        let y = composed(qt, kt, vt, &shape, &segments, bias.as_ref())?;
        return Ok(tape.record1(&slots, y, move |dy, sink| {
            let [qt, kt, vt] = taken(kept)?;
            let grads = composed_backward(&qt, &kt, &vt, &dy, &shape, &segments, bias.as_ref())?;
            for (slot, grad) in slots.into_iter().zip(grads) {
                sink.add(slot, grad)?;
            }
            Ok(())
        }));
    }
    let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let tracked = slots.iter().any(|s| s.is_tracked());
    let mut out = uninit(nq * width);
    let mut lse = if tracked { uninit(shape.heads * nq) } else { Vec::new() };
    with_bias(bias.as_ref(), |bias| {
        kernel::attention(
            &shape,
            &segments,
            &host(qt)?,
            &host(kt)?,
            &host(vt)?,
            bias,
            &mut out,
            tracked.then_some(&mut lse),
        );
        Ok(())
    })?;
    let y = tensor_of(out, (nq, width))?;
    tape.record_keeping(&slots, y, move |saved, dy, sink| {
        let [qt, kt, vt] = taken(kept)?;
        let saved = saved.take()?;
        let (mut dq, mut dk, mut dv) = (uninit(nq * width), uninit(nkv * kv_width), uninit(nkv * kv_width));
        let dims = bias.as_ref().map(|(table, _)| table.dims2()).transpose()?.unwrap_or_default();
        let mut dbias = slots[3].is_tracked().then(|| uninit(dims.0 * dims.1));
        with_bias(bias.as_ref(), |bias| {
            kernel::attention_backward(
                &shape,
                &segments,
                &host(&qt)?,
                &host(&kt)?,
                &host(&vt)?,
                bias,
                &host(&saved)?,
                &lse,
                &host(&dy)?,
                &mut dq,
                &mut dk,
                &mut dv,
                dbias.as_deref_mut(),
            );
            Ok(())
        })?;
        sink.add(slots[0], tensor_of(dq, (nq, width))?)?;
        sink.add(slots[1], tensor_of(dk, (nkv, kv_width))?)?;
        sink.add(slots[2], tensor_of(dv, (nkv, kv_width))?)?;
        match dbias {
            Some(dbias) => sink.add(slots[3], tensor_of(dbias, dims)?),
            None => Ok(()),
        }
    })
}

fn taken(kept: [Kept; 3]) -> Result<[Tensor; 3]> {
    let [q, k, v] = kept;
    Ok([q.take()?, k.take()?, v.take()?])
}

/// A table and the index of distance 0.
type Bias = (Tensor, usize);

/// Runs `f` on the bias as a slice.
fn with_bias<R>(bias: Option<&Bias>, f: impl FnOnce(Option<RelativeBias<'_>>) -> Result<R>) -> Result<R> {
    match bias {
        None => f(None),
        Some((table, zero)) => f(Some(RelativeBias { table: &host(table)?, zero: *zero })),
    }
}

/// Attention without a record, over keys and values in f32 or f16. Segments with one query go their own way.
fn generate(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    segments: &[Segment],
    bias: Option<&Bias>,
) -> Result<Var> {
    let mut out = uninit(q.elem_count());
    let (steps, others): (Vec<Segment>, Vec<Segment>) =
        segments.iter().cloned().partition(|s| s.q.len() == 1 && bias.is_none());
    if !steps.is_empty() {
        let q = host(q)?;
        if k.dtype() == DType::F16 {
            let (k, v) = (host_as(k)?, host_as(v)?);
            attention_step::attend(shape, &steps, &q, Cached::F16(&k), Cached::F16(&v), &mut out);
        } else {
            let (k, v) = (host(k)?, host(v)?);
            attention_step::attend(shape, &steps, &q, Cached::F32(&k), Cached::F32(&v), &mut out);
        }
    }
    if !others.is_empty() {
        let (k, v) = (widened(k, &others)?, widened(v, &others)?);
        with_bias(bias, |bias| {
            kernel::attention(shape, &others, &host(q)?, &host(&k)?, &host(&v)?, bias, &mut out, None);
            Ok(())
        })?;
    }
    Ok(Var::constant(tensor_of(out, q.shape().clone())?))
}

/// Keys or values in f32; of those in f16, the rows that the segments see.
fn widened(t: &Tensor, segments: &[Segment]) -> Result<Tensor> {
    if t.dtype() != DType::F16 {
        return Ok(t.clone());
    }
    let (_, width) = dims2("attention", t)?;
    let half = host_as::<f16>(t)?;
    let mut out = uninit(half.len());
    for s in segments {
        let range = s.kv.start * width..s.kv.end * width;
        half[range.clone()].convert_to_f32_slice(&mut out[range]);
    }
    tensor_of(out, t.shape().clone())
}

/// Number of queries and of keys.
pub(super) fn check(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    segments: &[Segment],
) -> Result<(usize, usize)> {
    let ((nq, width), (nkv, kv_width)) = (dims2("attention", q)?, dims2("attention", k)?);
    let AttentionShape { heads, kv_heads, head_dim, .. } = *shape;
    if width != heads * head_dim || kv_width != kv_heads * head_dim || v.dims() != k.dims() {
        let what = format!(
            "q {:?}, k {:?}, v {:?} for {heads} heads over {kv_heads} of {head_dim}",
            q.dims(),
            k.dims(),
            v.dims()
        );
        return Err(Error::shape("attention", what));
    }
    if kv_heads == 0 || heads % kv_heads != 0 {
        return Err(Error::shape("attention", format!("{heads} heads over {kv_heads} key/value heads")));
    }
    if shape.window == Some(0) {
        return Err(Error::shape("attention", "a window of 0 shows no key"));
    }
    let mut next = 0;
    for s in segments {
        if s.q.start != next
            || s.q.end > nq
            || s.kv.end > nkv
            || ((shape.causal || shape.window.is_some()) && s.kv.len() < s.q.len())
        {
            return Err(Error::shape("attention", format!("segment {s:?} of {nq} queries, {nkv} keys")));
        }
        next = s.q.end;
    }
    if next != nq {
        return Err(Error::shape("attention", format!("segments cover {next} of {nq} queries")));
    }
    Ok((nq, nkv))
}

/// `[rows, heads·hd]` rows of a segment as `[heads, rows, hd]`, key/value heads repeated for their group.
pub(super) fn heads_of(
    t: &Tensor,
    rows: &std::ops::Range<usize>,
    heads: usize,
    group: usize,
) -> Result<Tensor> {
    let hd = t.dim(1)? / heads;
    let t = t.narrow(0, rows.start, rows.len())?.reshape((rows.len(), heads, 1, hd))?;
    let t = t.broadcast_as((rows.len(), heads, group, hd))?.reshape((rows.len(), heads * group, hd))?;
    Ok(t.transpose(0, 1)?.contiguous()?)
}

/// Inverse of [`heads_of`] for gradients: groups are summed.
pub(super) fn merge_heads(t: &Tensor, heads: usize, group: usize) -> Result<Tensor> {
    let (_, rows, hd) = t.dims3()?;
    let t = t.transpose(0, 1)?.reshape((rows, heads, group, hd))?;
    Ok(t.sum(2)?.reshape((rows, heads * hd))?)
}

/// Probabilities of one segment, `[heads, q, kv]`.
fn probabilities(q: &Tensor, k: &Tensor, shape: &AttentionShape, bias: Option<&Bias>) -> Result<Tensor> {
    softmax_of(scores(q, k, shape)?, shape, bias)
}

/// Indices into a table of distances of all pairs of one segment, `[q·kv]`. What causal attention hides may point
/// anywhere.
fn distances(shape: &AttentionShape, nq: usize, nkv: usize, (table, zero): &Bias) -> Result<Tensor> {
    let last = table.dim(1)?.saturating_sub(1);
    let of = |i: usize, j: usize| (zero + j - shape.place(nq, nkv, i)).min(last) as u32;
    let all: Vec<u32> = (0..nq).flat_map(|i| (0..nkv).map(move |j| of(i, j))).collect();
    Ok(Tensor::from_vec(all, nq * nkv, table.device())?)
}

/// Scores before the mask, squashed if they shall be: `[heads, q, kv]`.
fn scores(q: &Tensor, k: &Tensor, shape: &AttentionShape) -> Result<Tensor> {
    let scores = (q.matmul(&k.t()?)? * f64::from(shape.scale))?;
    match shape.soft_cap {
        Some(cap) => Ok(((scores / f64::from(cap))?.tanh()? * f64::from(cap))?),
        None => Ok(scores),
    }
}

/// Probabilities of the keys that each query may see.
fn softmax_of(mut scores: Tensor, shape: &AttentionShape, bias: Option<&Bias>) -> Result<Tensor> {
    let (heads, nq, nkv) = scores.dims3()?;
    if let Some(bias) = bias {
        let values = bias.0.index_select(&distances(shape, nq, nkv, bias)?, 1)?;
        scores = (scores + values.reshape((heads, nq, nkv))?)?;
    }
    if shape.causal || shape.window.is_some() {
        let mask = (0..nq).flat_map(|i| {
            let visible = shape.visible(nq, nkv, i);
            (0..nkv).map(move |j| if visible.contains(&j) { 0.0 } else { f32::NEG_INFINITY })
        });
        let mask = Tensor::from_vec(mask.collect::<Vec<f32>>(), (1, nq, nkv), &Device::Cpu)?;
        scores = scores.broadcast_add(&mask.to_device(scores.device())?)?;
    }
    let e = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?)
}

fn composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    segments: &[Segment],
    bias: Option<&Bias>,
) -> Result<Tensor> {
    let group = shape.heads / shape.kv_heads;
    let mut parts = Vec::new();
    for s in segments {
        let p = probabilities(
            &heads_of(q, &s.q, shape.heads, 1)?,
            &heads_of(k, &s.kv, shape.kv_heads, group)?,
            shape,
            bias,
        )?;
        let y = p.matmul(&heads_of(v, &s.kv, shape.kv_heads, group)?)?;
        parts.push(merge_heads(&y, shape.heads, 1)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// With P the probabilities: dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ⊙ (dP - rowsum(dP ⊙ P)), dQ = s·dS·K, dK = s·dSᵀ·Q.
fn composed_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    dy: &Tensor,
    shape: &AttentionShape,
    segments: &[Segment],
    bias: Option<&Bias>,
) -> Result<Vec<Tensor>> {
    let group = shape.heads / shape.kv_heads;
    let mut dq = Vec::new();
    let mut dk = Tensor::zeros(k.dims(), DType::F32, k.device())?;
    let mut dv = dk.clone();
    let mut dbias = bias.map(|(table, _)| table.zeros_like()).transpose()?;
    for s in segments {
        let (qs, ks) = (heads_of(q, &s.q, shape.heads, 1)?, heads_of(k, &s.kv, shape.kv_heads, group)?);
        let vs = heads_of(v, &s.kv, shape.kv_heads, group)?;
        let dys = heads_of(dy, &s.q, shape.heads, 1)?;
        let capped = scores(&qs, &ks, shape)?;
        let p = softmax_of(capped.clone(), shape, bias)?;
        let dp = dys.matmul(&vs.t()?)?;
        let mean = (&dp * &p)?.sum_keepdim(D::Minus1)?;
        let ds = (&p * dp.broadcast_sub(&mean)?)?;
        if let (Some(sum), Some(bias)) = (&mut dbias, bias) {
            let (heads, nq, nkv) = ds.dims3()?;
            *sum = sum.index_add(&distances(shape, nq, nkv, bias)?, &ds.reshape((heads, nq * nkv))?, 1)?;
        }
        let mut ds = (ds * f64::from(shape.scale))?;
        if let Some(cap) = shape.soft_cap {
            // the slope of c·tanh(S/c)
            ds = (&ds - (ds.clone() * (capped / f64::from(cap))?.sqr()?)?)?;
        }
        dq.push(merge_heads(&ds.matmul(&ks)?, shape.heads, 1)?);
        let rows = Tensor::arange(s.kv.start as u32, s.kv.end as u32, k.device())?;
        let dks = merge_heads(&ds.t()?.matmul(&qs)?, shape.kv_heads, group)?;
        let dvs = merge_heads(&p.t()?.matmul(&dys)?, shape.kv_heads, group)?;
        dk = dk.index_add(&rows, &dks, 0)?;
        dv = dv.index_add(&rows, &dvs, 0)?;
    }
    Ok([Tensor::cat(&dq, 0)?, dk, dv].into_iter().chain(dbias).collect())
}
