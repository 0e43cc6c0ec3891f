//! Each row with its neighbours of the same segment side by side: what turns a convolution over tokens into a product.

use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of};
use engobe_kernels::attention::Segment;
use std::sync::Arc;

/// Rows `i - size/2 … i + size/2` of `x` `[n, d]` for each row i, `[n, size·d]`; zeros where the segment ends. `size` is
/// odd.
pub fn neighbours<'m>(tape: &mut Tape<'m>, x: &Var, segments: Arc<[Segment]>, size: usize) -> Result<Var> {
    let (n, d) = dims2("neighbours", x.tensor())?;
    if size.is_multiple_of(2) || segments.iter().any(|s| s.q.end > n || s.q.start > s.q.end) {
        return Err(Error::shape("neighbours", format!("{size} rows around each of {n}")));
    }
    let device = x.tensor().device().clone();
    let mut out = vec![0f32; n * size * d];
    let src = x.tensor().to_device(&candle_core::Device::Cpu)?;
    let src = host(&src)?;
    each(&segments, size, |row, place, from| {
        out[(row * size + place) * d..][..d].copy_from_slice(&src[from * d..][..d]);
    });
    let y = tensor_of(out, (n, size * d))?.to_device(&device)?;
    let slot = x.slot();
    Ok(tape.record1(&[slot], y, move |dy, sink| {
        let dy = dy.to_device(&candle_core::Device::Cpu)?;
        let dy = host(&dy)?;
        let mut dx = vec![0f32; n * d];
        each(&segments, size, |row, place, from| {
            let part = &dy[(row * size + place) * d..][..d];
            dx[from * d..][..d].iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
        });
        sink.add(slot, tensor_of(dx, (n, d))?.to_device(&device)?)
    }))
}

/// Calls `f` on each row, each place beside it, and the row that stands there.
fn each(segments: &[Segment], size: usize, mut f: impl FnMut(usize, usize, usize)) {
    for s in segments {
        for row in s.q.clone() {
            for place in 0..size {
                let from = (row + place).checked_sub(size / 2).filter(|from| s.q.contains(from));
                if let Some(from) = from {
                    f(row, place, from);
                }
            }
        }
    }
}
