//! Rows and columns that are looked up: what adapters of embeddings are made of.

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of, uninit};
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// Columns `ids` of `a` `[r, vocab]`, as rows: `[n, r]`.
pub fn select_columns<'m>(tape: &mut Tape<'m>, a: &Var, ids: Arc<[u32]>) -> Result<Var> {
    let (r, vocab) = dims2("select_columns", a.tensor())?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
        return Err(Error::shape("select_columns", format!("column {id} of {vocab}")));
    }
    let (n, slot, fast) = (ids.len(), a.slot(), tape.fast(a.tensor()));
    let y = if fast {
        let src = host(a.tensor())?;
        let mut out = uninit(n * r);
        for (row, id) in out.chunks_exact_mut(r.max(1)).zip(ids.iter()) {
            row.iter_mut().enumerate().for_each(|(k, v)| *v = src[k * vocab + *id as usize]);
        }
        tensor_of(out, (n, r))?
    } else {
        let index = Tensor::from_slice(&ids, n, a.tensor().device())?;
        a.tensor().index_select(&index, 1)?.t()?.contiguous()?
    };
    Ok(tape.record1(&[slot], y, move |dy, sink| {
        let da = if fast {
            let dy = host(&dy)?;
            let mut da = vec![0f32; r * vocab];
            for (row, id) in dy.chunks_exact(r.max(1)).zip(ids.iter()) {
                row.iter().enumerate().for_each(|(k, v)| da[k * vocab + *id as usize] += v);
            }
            tensor_of(da, (r, vocab))?
        } else {
            let index = Tensor::from_slice(&ids, n, dy.device())?;
            let zeros = Tensor::zeros((r, vocab), DType::F32, dy.device())?;
            zeros.index_add(&index, &dy.t()?.contiguous()?, 1)?
        };
        sink.add(slot, da)
    }))
}

/// `x` `[n, d]` with row `rows[i].0` replaced by row `rows[i].1` of `by` `[k, d]`. No row of x stands twice in `rows`.
pub fn replace_rows<'m>(tape: &mut Tape<'m>, x: &Var, by: &Var, rows: Arc<[(u32, u32)]>) -> Result<Var> {
    let ((n, d), (k, width)) = (dims2("replace_rows", x.tensor())?, dims2("replace_rows", by.tensor())?);
    if width != d || rows.iter().any(|(to, from)| *to as usize >= n || *from as usize >= k) {
        return Err(Error::shape("replace_rows", format!("rows of [{k}, {width}] into [{n}, {d}]")));
    }
    if rows.is_empty() && !by.is_tracked() {
        return Ok(x.clone());
    }
    // (without a row, `by` still gets a gradient of zeros: optimizers go on with what they remember)
    let (x_slot, by_slot) = (x.slot(), by.slot());
    // rows kept (1) and where the others come from, as matrices for other devices
    let selection = |like: &Tensor| -> Result<(Tensor, Tensor)> {
        let (mut keep, mut pick) = (vec![1f32; n], vec![0f32; n * k]);
        for (to, from) in rows.iter() {
            keep[*to as usize] = 0.0;
            pick[*to as usize * k + *from as usize] = 1.0;
        }
        let device = like.device();
        Ok((Tensor::from_vec(keep, (n, 1), device)?, Tensor::from_vec(pick, (n, k), device)?))
    };
    if !tape.fast(x.tensor()) {
        let (keep, pick) = selection(x.tensor())?;
        let y = (x.tensor().broadcast_mul(&keep)? + pick.matmul(by.tensor())?)?;
        return Ok(tape.record1(&[x_slot, by_slot], y, move |dy, sink| {
            if by_slot.is_tracked() {
                sink.add(by_slot, pick.t()?.matmul(&dy)?)?;
            }
            sink.add(x_slot, dy.broadcast_mul(&keep)?)
        }));
    }
    let mut out = host(x.tensor())?.to_vec();
    {
        let by = host(by.tensor())?;
        for (to, from) in rows.iter() {
            out[*to as usize * d..][..d].copy_from_slice(&by[*from as usize * d..][..d]);
        }
    }
    let y = tensor_of(out, (n, d))?;
    Ok(tape.record1(&[x_slot, by_slot], y, move |dy, sink| {
        let grads = host(&dy)?;
        if by_slot.is_tracked() {
            let mut dby = vec![0f32; k * d];
            for (to, from) in rows.iter() {
                let row = &grads[*to as usize * d..][..d];
                dby[*from as usize * d..][..d].iter_mut().zip(row).for_each(|(s, v)| *s += v);
            }
            sink.add(by_slot, tensor_of(dby, (k, d))?)?;
        }
        if x_slot.is_tracked() {
            let mut dx = grads.to_vec();
            rows.iter().for_each(|(to, _)| dx[*to as usize * d..][..d].fill(0.0));
            sink.add(x_slot, tensor_of(dx, (n, d))?)?;
        }
        Ok(())
    }))
}
