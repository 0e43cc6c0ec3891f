//! Gated activation of an MLP: `silu(gate) ⊙ up` (SwiGLU, Shazeer 2020). Its own backward recomputes silu, and
//! the product is cheap enough to be made again by the op that reads it.

use crate::{Error, Result, Tape, Var, host, tensor_of, uninit};
use candle_core::Tensor;
use engobe_kernels::activation;

/// `silu(gate) ⊙ up`.
pub fn silu_mul<'m>(tape: &mut Tape<'m>, gate: &Var, up: &Var) -> Result<Var> {
    let (g, u) = (gate.tensor().clone(), up.tensor().clone());
    if g.dims() != u.dims() {
        return Err(Error::shape("silu_mul", format!("gate {:?}, up {:?}", g.dims(), u.dims())));
    }
    let fast = tape.fast(&g);
    let forward = move |g: &Tensor, u: &Tensor| -> Result<Tensor> {
        if !fast {
            return Ok((g.silu()? * u)?);
        }
        let mut out = uninit(g.elem_count());
        activation::silu_mul(&host(g)?, &host(u)?, &mut out);
        tensor_of(out, g.shape().clone())
    };
    let y = forward(&g, &u)?;
    let slots = [gate.slot(), up.slot()];
    let again = (g.clone(), u.clone());
    let y = tape.record1(&slots, y, move |dy, sink| {
        let (dg, du) = if fast { backward_fast(&g, &u, &dy)? } else { backward_composed(&g, &u, &dy)? };
        sink.add(slots[0], dg)?;
        sink.add(slots[1], du)
    });
    Ok(y.made_by(move || forward(&again.0, &again.1)))
}

fn backward_fast(g: &Tensor, u: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let n = g.elem_count();
    let (mut dg, mut du) = (uninit(n), uninit(n));
    activation::silu_mul_backward(&host(g)?, &host(u)?, &host(dy)?, &mut dg, &mut du);
    Ok((tensor_of(dg, g.shape().clone())?, tensor_of(du, g.shape().clone())?))
}

/// With s = σ(g): d silu/dg = s·(1 + g·(1-s)).
fn backward_composed(g: &Tensor, u: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let s = (g.neg()?.exp()? + 1.0)?.recip()?;
    let slope = (&s * ((g * (1.0 - &s)?)? + 1.0)?)?;
    Ok(((dy * u)?.mul(&slope)?, (dy * (g * s)?)?))
}
