//! Activations of an MLP, alone and gated (`f(gate) ⊙ up`, Shazeer 2020). Their backward computes f again, and their
//! output is cheap enough to be made again by the op that reads it.

use crate::{Error, Result, Tape, Var, host, tensor_of, uninit};
use candle_core::Tensor;
use engobe_kernels::activation::{self, Activation};

/// `f(x)`.
pub fn activate<'m>(tape: &mut Tape<'m>, f: Activation, x: &Var) -> Result<Var> {
    let fast = tape.fast(x.tensor());
    let forward = move |x: &Tensor| -> Result<Tensor> {
        if !fast {
            return Ok(composed(f, x)?.0);
        }
        let mut out = uninit(x.elem_count());
        activation::activate(f, &host(x)?, &mut out);
        tensor_of(out, x.shape().clone())
    };
    let y = forward(x.tensor())?;
    let (slot, kept) = (x.slot(), tape.keep(x)?);
    let again = kept.clone();
    let y = tape.record1(&[slot], y, move |dy, sink| {
        let xs = kept.take()?;
        if !fast {
            return sink.add(slot, (composed(f, &xs)?.1 * dy)?);
        }
        let mut dx = uninit(xs.elem_count());
        activation::activate_backward(f, &host(&xs)?, &host(&dy)?, &mut dx);
        sink.add(slot, tensor_of(dx, xs.shape().clone())?)
    });
    Ok(y.made_by(move || forward(&again.value()?)))
}

/// `f(gate) ⊙ up`.
pub fn gated<'m>(tape: &mut Tape<'m>, f: Activation, gate: &Var, up: &Var) -> Result<Var> {
    let (g, u) = (gate.tensor(), up.tensor());
    if g.dims() != u.dims() {
        return Err(Error::shape("gated", format!("gate {:?}, up {:?}", g.dims(), u.dims())));
    }
    let fast = tape.fast(g);
    let forward = move |g: &Tensor, u: &Tensor| -> Result<Tensor> {
        if !fast {
            return Ok((composed(f, g)?.0 * u)?);
        }
        let mut out = uninit(g.elem_count());
        activation::gated(f, &host(g)?, &host(u)?, &mut out);
        tensor_of(out, g.shape().clone())
    };
    let y = forward(g, u)?;
    let slots = [gate.slot(), up.slot()];
    let kept = (tape.keep(gate)?, tape.keep(up)?);
    let again = kept.clone();
    let y = tape.record1(&slots, y, move |dy, sink| {
        let (g, u) = (kept.0.take()?, kept.1.take()?);
        let (dg, du) = if fast {
            let (mut dg, mut du) = (uninit(g.elem_count()), uninit(g.elem_count()));
            activation::gated_backward(f, &host(&g)?, &host(&u)?, &host(&dy)?, &mut dg, &mut du);
            (tensor_of(dg, g.shape().clone())?, tensor_of(du, g.shape().clone())?)
        } else {
            let (value, slope) = composed(f, &g)?;
            (((&dy * u)? * slope)?, (dy * value)?)
        };
        sink.add(slots[0], dg)?;
        sink.add(slots[1], du)
    });
    Ok(y.made_by(move || forward(&again.0.value()?, &again.1.value()?)))
}

/// Value and slope of f (formulas: `engobe_kernels::activation`).
fn composed(f: Activation, x: &Tensor) -> Result<(Tensor, Tensor)> {
    Ok(match f {
        Activation::Silu => {
            let s = (x.neg()?.exp()? + 1.0)?.recip()?;
            ((x * &s)?, (&s * ((x * (1.0 - &s)?)? + 1.0)?)?)
        }
        Activation::Gelu => {
            let phi = (((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
            let density =
                ((x.sqr()? * -0.5)?.exp()? * (0.5 * std::f64::consts::FRAC_2_SQRT_PI / 2f64.sqrt()))?;
            ((x * &phi)?, (&phi + (x * density)?)?)
        }
        Activation::GeluTanh => {
            let (c, a) = ((2.0 / std::f64::consts::PI).sqrt(), 0.044_715);
            let t = ((x + (x.powf(3.0)? * a)?)? * c)?.tanh()?;
            let half = ((&t + 1.0)? * 0.5)?;
            let inner = ((x.sqr()? * (3.0 * a * c))? + c)?;
            let rest = ((x * (1.0 - t.sqr()?)?)? * (inner * 0.5)?)?;
            ((x * &half)?, (half + rest)?)
        }
        Activation::Relu => (x.relu()?, x.gt(0.0)?.to_dtype(x.dtype())?),
        Activation::Tanh => {
            let t = x.tanh()?;
            let slope = (1.0 - t.sqr()?)?;
            (t, slope)
        }
    })
}
