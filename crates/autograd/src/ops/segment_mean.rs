//! Mean of the rows of each segment: a text's embedding out of its tokens'.

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of};
use candle_core::{Device, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// The mean of rows `segments[i]` of `x` `[n, d]`, a row each: `[segments, d]`. No segment may be empty.
pub fn segment_mean<'m>(tape: &mut Tape<'m>, x: &Var, segments: Arc<[Range<usize>]>) -> Result<Var> {
    let (n, d) = dims2("segment_mean", x.tensor())?;
    if let Some(s) = segments.iter().find(|s| s.is_empty() || s.end > n) {
        return Err(Error::shape("segment_mean", format!("segment {s:?} of {n} rows")));
    }
    let fast = tape.fast(x.tensor());
    let y = if fast {
        let xs = host(x.tensor())?;
        let mut out = vec![0f32; segments.len() * d];
        for (out, s) in out.chunks_exact_mut(d).zip(segments.iter()) {
            for row in xs[s.start * d..s.end * d].chunks_exact(d) {
                out.iter_mut().zip(row).for_each(|(o, x)| *o += x);
            }
            out.iter_mut().for_each(|o| *o /= s.len() as f32);
        }
        tensor_of(out, (segments.len(), d))?
    } else {
        weights(&segments, n, x.tensor().device())?.matmul(x.tensor())?
    };
    let slot = x.slot();
    Ok(tape.record1(&[slot], y, move |dy, sink| {
        if !fast {
            return sink.add(slot, weights(&segments, n, dy.device())?.t()?.matmul(&dy)?);
        }
        let dy = host(&dy)?;
        let mut dx = vec![0f32; n * d];
        for (dy, s) in dy.chunks_exact(d).zip(segments.iter()) {
            for row in dx[s.start * d..s.end * d].chunks_exact_mut(d) {
                row.iter_mut().zip(dy).for_each(|(x, dy)| *x += dy / s.len() as f32);
            }
        }
        sink.add(slot, tensor_of(dx, (n, d))?)
    }))
}

/// The matrix `[segments, n]` whose product with x is the means.
fn weights(segments: &[Range<usize>], n: usize, device: &Device) -> Result<Tensor> {
    let mut w = vec![0f32; segments.len() * n];
    for (row, s) in w.chunks_exact_mut(n.max(1)).zip(segments) {
        row[s.clone()].fill(1.0 / s.len() as f32);
    }
    Ok(Tensor::from_vec(w, (segments.len(), n), device)?)
}
