//! Root-mean-square norm (Zhang & Sennrich 2019): `y = w ⊙ x / sqrt(mean(x²) + eps)`, row by row.
//!
//! Saves its input and one number a row; ops that read its output make it again from them.

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of, uninit};
use candle_core::{D, Tensor};
use engobe_kernels::norm;

/// RMSNorm of `x` `[n, d]` with weight `[d]` (a constant or a parameter).
pub fn rms_norm<'m>(tape: &mut Tape<'m>, x: &Var, weight: &Var, eps: f32) -> Result<Var> {
    let (n, d) = dims2("rms_norm", x.tensor())?;
    if weight.tensor().dims() != [d] {
        return Err(Error::shape(
            "rms_norm",
            format!("weight {:?} for input [{n}, {d}]", weight.tensor().dims()),
        ));
    }
    let (xs, w) = (x.tensor(), weight.tensor().clone());
    let (kept, slots) = (tape.keep(x)?, [x.slot(), weight.slot()]);
    if !tape.fast(xs) {
        let rstd = ((xs.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?).recip()?;
        let y = xs.broadcast_mul(&rstd)?.broadcast_mul(&w)?;
        return Ok(tape.record1(&slots, y, move |dy, sink| {
            let (dx, dw) = backward_composed(&kept.take()?, &w, &rstd, &dy)?;
            sink.add(slots[0], dx)?;
            sink.add(slots[1], dw)
        }));
    }
    let (mut y, mut rstd) = (uninit(n * d), uninit(n));
    norm::rms_norm(&host(xs)?, &host(&w)?, eps, &mut y, &mut rstd);
    let y = tensor_of(y, (n, d))?;
    let again = (kept.clone(), w.clone());
    let y = tape.record1(&slots, y, move |dy, sink| {
        let xs = kept.take()?;
        let mut dx = uninit(n * d);
        let mut dw = slots[1].is_tracked().then(|| vec![0f32; d]);
        norm::rms_norm_backward(&host(&xs)?, &host(&w)?, &rstd, &host(&dy)?, &mut dx, dw.as_deref_mut());
        sink.add(slots[0], tensor_of(dx, (n, d))?)?;
        if let Some(dw) = dw {
            sink.add(slots[1], tensor_of(dw, d)?)?;
        }
        Ok(())
    });
    Ok(y.made_by(move || {
        let (mut y, mut rstd) = (uninit(n * d), uninit(n));
        norm::rms_norm(&host(&again.0.value()?)?, &host(&again.1)?, eps, &mut y, &mut rstd);
        tensor_of(y, (n, d))
    }))
}

/// With x̂ = x·rstd and g = dy ⊙ w: dx = rstd·(g - x̂·mean(g ⊙ x̂)), dw = Σ_rows dy ⊙ x̂.
fn backward_composed(x: &Tensor, w: &Tensor, rstd: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let normed = x.broadcast_mul(rstd)?;
    let g = dy.broadcast_mul(w)?;
    let mean = (&g * &normed)?.mean_keepdim(D::Minus1)?;
    let dx = (g - normed.broadcast_mul(&mean)?)?.broadcast_mul(rstd)?;
    Ok((dx, (dy * normed)?.sum(0)?))
}
