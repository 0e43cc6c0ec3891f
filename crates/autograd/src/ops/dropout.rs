//! Dropout; the mask is a hash of seed and index (`engobe_kernels::dropout`), so nothing is saved.

use crate::{Result, Tape, Var, host, tensor_of, uninit};
use candle_core::{Device, Tensor};
use engobe_kernels::dropout as kernel;

/// Drops elements of `x` with probability `p` and scales the others by 1/(1-p), if the tape trains with
/// dropout; else returns `x`.
pub fn dropout<'m>(tape: &mut Tape<'m>, x: &Var, p: f32) -> Result<Var> {
    if p == 0.0 {
        return Ok(x.clone());
    }
    let Some(seed) = tape.next_dropout_seed() else { return Ok(x.clone()) };
    let y = apply(seed, p, x.tensor())?;
    let slot = x.slot();
    Ok(tape.record1(&[slot], y, move |dy, sink| sink.add(slot, apply(seed, p, &dy)?)))
}

/// The masked and scaled tensor.
pub(crate) fn apply(seed: u64, p: f32, x: &Tensor) -> Result<Tensor> {
    let on_host = x.to_device(&Device::Cpu)?.contiguous()?;
    let mut out = uninit(x.elem_count());
    kernel::dropout(seed, p, &host(&on_host)?, &mut out);
    Ok(tensor_of(out, x.shape().clone())?.to_device(x.device())?)
}
