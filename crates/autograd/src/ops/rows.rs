//! Picks rows of an activation; the backward puts their gradients back between zeros.

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of, uninit};
use candle_core::{Device, Tensor};
use std::sync::Arc;

/// Rows `rows` (ascending, without repetition) of `x` `[n, d]`: `[rows.len(), d]`.
pub fn select_rows<'m>(tape: &mut Tape<'m>, x: &Var, rows: Arc<[u32]>) -> Result<Var> {
    let (n, d) = dims2("select_rows", x.tensor())?;
    let ascending = rows.windows(2).all(|w| w[0] < w[1]);
    if !ascending || rows.last().is_some_and(|r| *r as usize >= n) {
        return Err(Error::shape("select_rows", format!("rows must ascend and lie below {n}")));
    }
    let fast = tape.fast(x.tensor());
    let index = |device: &Device| Tensor::from_slice(&rows, rows.len(), device);
    let y = if fast {
        let src = host(x.tensor())?;
        let mut out = uninit(rows.len() * d);
        for (dst, r) in out.chunks_exact_mut(d).zip(rows.iter()) {
            dst.copy_from_slice(&src[*r as usize * d..][..d]);
        }
        tensor_of(out, (rows.len(), d))?
    } else {
        x.tensor().index_select(&index(x.tensor().device())?, 0)?
    };
    let slot = x.slot();
    Ok(tape.record1(&[slot], y, move |dy, sink| {
        let dx = if fast {
            let src = host(&dy)?;
            let mut out = vec![0f32; n * d];
            for (row, r) in src.chunks_exact(d).zip(rows.iter()) {
                out[*r as usize * d..][..d].copy_from_slice(row);
            }
            tensor_of(out, (n, d))?
        } else {
            let index = Tensor::from_slice(&rows, rows.len(), dy.device())?;
            Tensor::zeros((n, d), dy.dtype(), dy.device())?.index_add(&index, &dy, 0)?
        };
        sink.add(slot, dx)
    }))
}
