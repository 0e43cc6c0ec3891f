//! Rotary position embedding (Su et al. 2021), in Hugging Face's `rotate_half` form: the pair (i, i + half)
//! of each head is turned by its position's angle. A rotation is orthogonal, so the backward turns back.

use crate::{Result, Tape, Var, host, ops::dims2, tensor_of, uninit};
use candle_core::{D, Device, Tensor};
use engobe_kernels::rope::{self as kernel, RopeTable};
use std::sync::Arc;

/// The angles of the tokens at hand.
#[derive(Clone)]
pub struct RopeSpec {
    /// cosines and sines by position
    pub table: Arc<RopeTable>,
    /// position of each token within its row
    pub positions: Arc<[u32]>,
}

/// Rotates the heads of `x` `[n, heads · head_dim]`.
pub fn rope<'m>(tape: &mut Tape<'m>, x: &Var, spec: &RopeSpec, head_dim: usize) -> Result<Var> {
    let (_, width) = dims2("rope", x.tensor())?;
    let heads = width / head_dim;
    let fast = tape.fast(x.tensor());
    let y = turn(fast, x.tensor(), spec, heads, head_dim, false)?;
    let (slot, spec) = (x.slot(), spec.clone());
    Ok(tape
        .record1(&[slot], y, move |dy, sink| sink.add(slot, turn(fast, &dy, &spec, heads, head_dim, true)?)))
}

fn turn(
    fast: bool,
    x: &Tensor,
    spec: &RopeSpec,
    heads: usize,
    head_dim: usize,
    inverse: bool,
) -> Result<Tensor> {
    if fast {
        let mut out = uninit(x.elem_count());
        kernel::apply(&spec.table, &spec.positions, &host(x)?, heads, head_dim, inverse, &mut out);
        return tensor_of(out, x.shape().clone());
    }
    let (n, width) = x.dims2()?;
    let half = spec.table.half;
    let angles = |table: &[f32], sign: f32| -> Result<Tensor> {
        let rows = spec.positions.iter().flat_map(|p| {
            let at = *p as usize * half;
            table[at..at + half].iter().map(move |v| v * sign)
        });
        Ok(Tensor::from_vec(rows.collect::<Vec<f32>>(), (n, 1, half), &Device::Cpu)?.to_device(x.device())?)
    };
    let cos = angles(&spec.table.cos, 1.0)?;
    let sin = angles(&spec.table.sin, if inverse { -1.0 } else { 1.0 })?;
    let x3 = x.reshape((n, heads, head_dim))?;
    let (a, b) = (x3.narrow(D::Minus1, 0, half)?, x3.narrow(D::Minus1, half, half)?);
    let mut parts = vec![
        (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?,
        (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?,
    ];
    if head_dim > 2 * half {
        parts.push(x3.narrow(D::Minus1, 2 * half, head_dim - 2 * half)?);
    }
    Ok(Tensor::cat(&parts, D::Minus1)?.reshape((n, width))?)
}
