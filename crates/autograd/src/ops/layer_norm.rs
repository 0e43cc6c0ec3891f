//! Layer norm (Ba et al. 2016): `y = w ⊙ (x - mean) / sqrt(variance + eps) + b`, row by row.
//!
//! Saves its input and two numbers a row; ops that read its output make it again from them.

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of, uninit};
use candle_core::{D, Tensor};
use engobe_kernels::layer_norm::{self as kernel, RowStats};

/// Layer norm of `x` `[n, d]` with a weight and perhaps a bias, `[d]` (constants or parameters).
pub fn layer_norm<'m>(
    tape: &mut Tape<'m>,
    x: &Var,
    weight: &Var,
    bias: Option<&Var>,
    eps: f32,
) -> Result<Var> {
    let (n, d) = dims2("layer_norm", x.tensor())?;
    for vector in [Some(weight), bias].into_iter().flatten() {
        if vector.tensor().dims() != [d] {
            let what = format!("weight or bias {:?} for input [{n}, {d}]", vector.tensor().dims());
            return Err(Error::shape("layer_norm", what));
        }
    }
    let (xs, w, b) = (x.tensor(), weight.tensor().clone(), bias.map(|b| b.tensor().clone()));
    let slots = [x.slot(), weight.slot(), bias.map(Var::slot).unwrap_or_default()];
    if !tape.fast(xs) {
        let centred = xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)?;
        let rstd = ((centred.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?).recip()?;
        let normed = centred.broadcast_mul(&rstd)?;
        let mut y = normed.broadcast_mul(&w)?;
        if let Some(b) = &b {
            y = y.broadcast_add(b)?;
        }
        return Ok(tape.record1(&slots, y, move |dy, sink| {
            // dx = rstd·(g - mean(g) - x̂·mean(g ⊙ x̂)) with g = dy ⊙ w
            let g = dy.broadcast_mul(&w)?;
            let along = (&g * &normed)?.mean_keepdim(D::Minus1)?;
            let dx = g.broadcast_sub(&g.mean_keepdim(D::Minus1)?)?;
            let dx = (dx - normed.broadcast_mul(&along)?)?.broadcast_mul(&rstd)?;
            sink.add(slots[0], dx)?;
            sink.add(slots[1], (&dy * &normed)?.sum(0)?)?;
            sink.add(slots[2], dy.sum(0)?)
        }));
    }
    let forward = move |x: &Tensor, w: &Tensor, b: Option<&Tensor>| -> Result<(Tensor, Vec<RowStats>)> {
        let (mut y, mut stats) = (uninit(n * d), vec![RowStats::default(); n]);
        let b = b.map(host).transpose()?;
        kernel::layer_norm(&host(x)?, &host(w)?, b.as_deref(), eps, &mut y, &mut stats);
        Ok((tensor_of(y, (n, d))?, stats))
    };
    let (y, stats) = forward(xs, &w, b.as_ref())?;
    let kept = tape.keep(x)?;
    let again = (kept.clone(), w.clone());
    let y = tape.record1(&slots, y, move |dy, sink| {
        let xs = kept.take()?;
        let mut dx = uninit(n * d);
        let wanted = |i: usize| slots[i].is_tracked().then(|| vec![0f32; d]);
        let (mut dw, mut db) = (wanted(1), wanted(2));
        kernel::layer_norm_backward(
            &host(&xs)?,
            &host(&w)?,
            &stats,
            &host(&dy)?,
            &mut dx,
            dw.as_deref_mut(),
            db.as_deref_mut(),
        );
        sink.add(slots[0], tensor_of(dx, (n, d))?)?;
        for (slot, grad) in [(slots[1], dw), (slots[2], db)] {
            if let Some(grad) = grad {
                sink.add(slot, tensor_of(grad, d)?)?;
            }
        }
        Ok(())
    });
    Ok(y.made_by(move || Ok(forward(&again.0.value()?, &again.1, b.as_ref())?.0)))
}
