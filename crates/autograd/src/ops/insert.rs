//! Puts the same rows into a token stream at several places: trained prompts before each sequence, trained keys and
//! values before those of its tokens.
//!
//! With rows P `[p, d]`, input x `[n, d]` and m places, the output has n + m·p rows. Each of them is a copy, so the
//! backward hands the rows of x their gradients and sums those of the m copies of P, in the order of the places.

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of, uninit};
use candle_core::Tensor;
use engobe_kernels::elementwise;
use std::sync::Arc;

/// `x` `[n, d]` with `rows` `[p, d]` before each of its rows `at` (ascending; n stands for the end): `[n + |at|·p, d]`.
pub fn insert_rows<'m>(tape: &mut Tape<'m>, x: &Var, rows: &Var, at: Arc<[usize]>) -> Result<Var> {
    let ((n, d), (p, width)) = (dims2("insert_rows", x.tensor())?, dims2("insert_rows", rows.tensor())?);
    if width != d {
        return Err(Error::shape("insert_rows", format!("rows of width {width} into rows of width {d}")));
    }
    if !at.windows(2).all(|w| w[0] < w[1]) || at.last().is_some_and(|last| *last > n) {
        return Err(Error::shape("insert_rows", format!("places must ascend and lie in 0..={n}")));
    }
    let fast = tape.fast(x.tensor());
    let y = if fast {
        let (xs, ps) = (host(x.tensor())?, host(rows.tensor())?);
        let mut out = uninit((n + at.len() * p) * d);
        let mut to = out.as_mut_slice();
        for part in parts(&at, n) {
            let from = match &part {
                Part::Inserted => &ps[..],
                Part::Own(range) => &xs[range.start * d..range.end * d],
            };
            let (head, rest) = to.split_at_mut(from.len());
            head.copy_from_slice(from);
            to = rest;
        }
        tensor_of(out, (n + at.len() * p, d))?
    } else {
        let pieces = parts(&at, n).map(|part| match part {
            Part::Inserted => Ok(rows.tensor().clone()),
            Part::Own(range) => Ok(x.tensor().narrow(0, range.start, range.len())?),
        });
        Tensor::cat(&pieces.collect::<Result<Vec<_>>>()?, 0)?
    };
    let slots = [x.slot(), rows.slot()];
    Ok(tape.record1(&slots, y, move |dy, sink| {
        let (dx, dp) = match fast {
            true => backward(&dy, &at, n, p, d, slots[0].is_tracked())?,
            false => backward_composed(&dy, &at, n, p)?,
        };
        if let Some(dx) = dx {
            sink.add(slots[0], dx)?;
        }
        sink.add(slots[1], dp)
    }))
}

/// A stretch of the output.
enum Part {
    /// the inserted rows
    Inserted,
    /// these rows of x
    Own(std::ops::Range<usize>),
}

/// The stretches of the output, in order; stretches of x without rows are left out.
fn parts(at: &[usize], n: usize) -> impl Iterator<Item = Part> {
    let starts = std::iter::once(0).chain(at.iter().copied());
    let ends = at.iter().copied().chain([n]);
    starts.zip(ends).enumerate().flat_map(|(i, (start, end))| {
        let inserted = (i > 0).then_some(Part::Inserted);
        inserted.into_iter().chain((start < end).then_some(Part::Own(start..end)))
    })
}

fn backward(
    dy: &Tensor,
    at: &[usize],
    n: usize,
    p: usize,
    d: usize,
    wants_x: bool,
) -> Result<(Option<Tensor>, Tensor)> {
    let from = host(dy)?;
    let mut dx = if wants_x { uninit(n * d) } else { Vec::new() };
    let mut dp = vec![0f32; p * d];
    let mut row = 0;
    for part in parts(at, n) {
        match part {
            Part::Inserted => {
                elementwise::add_assign(&mut dp, &from[row * d..][..p * d]);
                row += p;
            }
            Part::Own(range) => {
                if wants_x {
                    dx[range.start * d..range.end * d].copy_from_slice(&from[row * d..][..range.len() * d]);
                }
                row += range.len();
            }
        }
    }
    let dx = wants_x.then(|| tensor_of(dx, (n, d))).transpose()?;
    Ok((dx, tensor_of(dp, (p, d))?))
}

fn backward_composed(dy: &Tensor, at: &[usize], n: usize, p: usize) -> Result<(Option<Tensor>, Tensor)> {
    let mut own = Vec::new();
    let mut dp = Tensor::zeros((p, dy.dim(1)?), dy.dtype(), dy.device())?;
    let mut row = 0;
    for part in parts(at, n) {
        match part {
            Part::Inserted => {
                dp = (dp + dy.narrow(0, row, p)?)?;
                row += p;
            }
            Part::Own(range) => {
                own.push(dy.narrow(0, row, range.len())?);
                row += range.len();
            }
        }
    }
    let dx = if own.is_empty() { None } else { Some(Tensor::cat(&own, 0)?) };
    Ok((dx, dp))
}
