//! Columns of an activation as activations of their own, and the same elements in another shape.

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of, uninit};
use candle_core::{D, Tensor};
use engobe_kernels::elementwise::{Columns, copy_columns};

/// Cuts `x` `[n, groups·Σwidths]` into N activations `[n, groups·widthᵢ]`: each group of columns holds `widths[0]`
/// columns of the first, then `widths[1]` of the second, and so on. The backward puts their gradients side by side.
pub fn split_columns<'m, const N: usize>(
    tape: &mut Tape<'m>,
    x: &Var,
    groups: usize,
    widths: [usize; N],
) -> Result<[Var; N]> {
    let (n, width) = dims2("split_columns", x.tensor())?;
    let group: usize = widths.iter().sum();
    if group * groups != width {
        let what = format!("{groups} groups of {widths:?} columns of an activation of width {width}");
        return Err(Error::shape("split_columns", what));
    }
    let fast = tape.fast(x.tensor());
    let mut outs = Vec::with_capacity(N);
    let mut at = 0;
    for piece in widths {
        outs.push(if fast {
            let mut out = uninit(n * groups * piece);
            let columns = Columns { groups, width: piece, from: (group, at), to: (piece, 0) };
            copy_columns(columns, &host(x.tensor())?, &mut out);
            tensor_of(out, (n, groups * piece))?
        } else {
            let grouped = x.tensor().reshape((n, groups, group))?;
            grouped.narrow(D::Minus1, at, piece)?.contiguous()?.reshape((n, groups * piece))?
        });
        at += piece;
    }
    let (slot, like) = (x.slot(), x.tensor().device().clone());
    let outs = tape.record(&[slot], outs, move |mut grads, sink| {
        let grads: Vec<Option<Tensor>> = (0..N).map(|i| grads.take(i)).collect();
        if !fast {
            let part = |(i, grad): (usize, &Option<Tensor>)| match grad {
                Some(grad) => Ok(grad.reshape((n, groups, widths[i]))?),
                None => Ok(Tensor::zeros((n, groups, widths[i]), candle_core::DType::F32, &like)?),
            };
            let parts = grads.iter().enumerate().map(part).collect::<Result<Vec<_>>>()?;
            return sink.add(slot, Tensor::cat(&parts, D::Minus1)?.reshape((n, width))?);
        }
        let whole = grads.iter().all(Option::is_some);
        let mut dx = if whole { uninit(n * width) } else { vec![0f32; n * width] };
        let mut at = 0;
        for (grad, piece) in grads.into_iter().zip(widths) {
            if let Some(grad) = grad {
                let columns = Columns { groups, width: piece, from: (piece, 0), to: (group, at) };
                copy_columns(columns, &host(&grad)?, &mut dx);
            }
            at += piece;
        }
        sink.add(slot, tensor_of(dx, (n, width))?)
    });
    outs.try_into().map_err(|_| Error::shape("split_columns", "one output a piece"))
}

/// The elements of `x` as `[rows, cols]`.
pub fn reshape<'m>(tape: &mut Tape<'m>, x: &Var, shape: (usize, usize)) -> Result<Var> {
    let (n, width) = dims2("reshape", x.tensor())?;
    if n * width != shape.0 * shape.1 {
        return Err(Error::shape("reshape", format!("[{n}, {width}] as {shape:?}")));
    }
    let (y, slot) = (x.tensor().reshape(shape)?, x.slot());
    Ok(tape.record1(&[slot], y, move |dy, sink| sink.add_shared(slot, dy.reshape((n, width))?)))
}

/// `x` `[n, d]` as `[d, n]`.
pub fn transpose<'m>(tape: &mut Tape<'m>, x: &Var) -> Result<Var> {
    dims2("transpose", x.tensor())?;
    let (y, slot) = (x.tensor().t()?.contiguous()?, x.slot());
    Ok(tape.record1(&[slot], y, move |dy, sink| sink.add(slot, dy.t()?.contiguous()?)))
}
