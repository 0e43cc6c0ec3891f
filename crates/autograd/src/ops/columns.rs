//! Factors on columns and rows, and matrices side by side: what adapters make their terms of.

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of, uninit};
use candle_core::Tensor;
use engobe_kernels::columns;

/// `gain ⊙ z (+ bias) (+ residual)` for z `[n, d]`, gain and bias `[d]`, residual `[n, d]`.
///
/// Saves z if the gain wants a gradient, and nothing else.
pub fn scale_columns<'m>(
    tape: &mut Tape<'m>,
    z: &Var,
    gain: &Var,
    bias: Option<&Var>,
    residual: Option<&Var>,
) -> Result<Var> {
    let (n, d) = dims2("scale_columns", z.tensor())?;
    for vector in [Some(gain), bias].into_iter().flatten() {
        if vector.tensor().dims() != [d] {
            let what = format!("a vector {:?} for columns of [{n}, {d}]", vector.tensor().dims());
            return Err(Error::shape("scale_columns", what));
        }
    }
    if let Some(r) = residual.filter(|r| r.tensor().dims() != [n, d]) {
        let what = format!("residual {:?} beside [{n}, {d}]", r.tensor().dims());
        return Err(Error::shape("scale_columns", what));
    }
    let fast = tape.fast(z.tensor());
    let y = forward(fast, z.tensor(), gain.tensor(), bias.map(Var::tensor), residual.map(Var::tensor))?;
    let (z_slot, g_slot) = (z.slot(), gain.slot());
    let bias_slot = bias.map(Var::slot).unwrap_or_default();
    let residual_slot = residual.map(Var::slot).unwrap_or_default();
    let g = gain.tensor().clone();
    let kept = g_slot.is_tracked().then(|| tape.keep(z)).transpose()?;
    Ok(tape.record1(&[z_slot, g_slot, bias_slot, residual_slot], y, move |dy, sink| {
        sink.add_shared(residual_slot, dy.clone())?;
        if bias_slot.is_tracked() {
            sink.add(bias_slot, dy.sum(0)?)?;
        }
        if let Some(kept) = kept {
            let z = kept.take()?;
            let dg = if fast {
                let mut dg = uninit(d);
                columns::column_products(&host(&dy.contiguous()?)?, &host(&z)?, &mut dg);
                tensor_of(dg, d)?
            } else {
                (&dy * z)?.sum(0)?
            };
            sink.add(g_slot, dg)?;
        }
        match z_slot.is_tracked() {
            true => sink.add(z_slot, forward(fast, &dy.contiguous()?, &g, None, None)?),
            false => Ok(()),
        }
    }))
}

pub(super) fn forward(
    fast: bool,
    z: &Tensor,
    gain: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    if !fast {
        let mut y = z.broadcast_mul(gain)?;
        if let Some(bias) = bias {
            y = y.broadcast_add(bias)?;
        }
        return Ok(match residual {
            Some(residual) => (y + residual)?,
            None => y,
        });
    }
    let mut y = uninit(z.elem_count());
    let (bias, residual) = (bias.map(host).transpose()?, residual.map(host).transpose()?);
    columns::scale_columns(&host(z)?, &host(gain)?, bias.as_deref(), residual.as_deref(), &mut y);
    tensor_of(y, z.shape().clone())
}

/// Row i of `x` (`[n, d]` or `[n]`) times `gain[i]`; `gain` is `[n]` or `[n, 1]`.
pub fn scale_rows<'m>(tape: &mut Tape<'m>, x: &Var, gain: &Var) -> Result<Var> {
    let (elements, n) = (x.tensor().elem_count(), gain.tensor().elem_count());
    if x.tensor().dims().first() != Some(&n) || n == 0 {
        let what = format!("{n} factors for the rows of {:?}", x.tensor().dims());
        return Err(Error::shape("scale_rows", what));
    }
    let (x_shape, g_shape) = (x.tensor().shape().clone(), gain.tensor().shape().clone());
    let (rows, column) = (x.tensor().reshape((n, elements / n))?, gain.tensor().reshape((n, 1))?);
    let y = rows.broadcast_mul(&column)?.reshape(&x_shape)?;
    let (x_slot, g_slot) = (x.slot(), gain.slot());
    Ok(tape.record1(&[x_slot, g_slot], y, move |dy, sink| {
        let dy = dy.reshape((n, elements / n))?;
        if g_slot.is_tracked() {
            sink.add(g_slot, (&dy * rows)?.sum(1)?.reshape(g_shape)?)?;
        }
        match x_slot.is_tracked() {
            true => sink.add(x_slot, dy.broadcast_mul(&column)?.reshape(x_shape)?),
            false => Ok(()),
        }
    }))
}

/// Matrices of `n` rows side by side: `[n, Σ dᵢ]`.
pub fn concat_columns<'m>(tape: &mut Tape<'m>, parts: &[Var]) -> Result<Var> {
    let widths =
        parts.iter().map(|p| Ok(dims2("concat_columns", p.tensor())?.1)).collect::<Result<Vec<_>>>()?;
    let tensors: Vec<&Tensor> = parts.iter().map(Var::tensor).collect();
    let y = Tensor::cat(&tensors, 1)?;
    let slots: Vec<_> = parts.iter().map(Var::slot).collect();
    let inputs = slots.clone();
    Ok(tape.record1(&inputs, y, move |dy, sink| {
        let mut at = 0;
        for (slot, width) in slots.into_iter().zip(widths) {
            if slot.is_tracked() {
                sink.add(slot, dy.narrow(1, at, width)?.contiguous()?.copy()?)?;
            }
            at += width;
        }
        Ok(())
    }))
}

/// All elements in one row: `[n]`.
pub fn flatten(tape: &mut Tape<'_>, x: &Var) -> Result<Var> {
    let (slot, shape) = (x.slot(), x.tensor().shape().clone());
    let y = x.tensor().flatten_all()?;
    Ok(tape.record1(&[slot], y, move |dy, sink| sink.add_shared(slot, dy.reshape(shape)?)))
}
