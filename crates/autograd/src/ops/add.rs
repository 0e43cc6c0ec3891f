//! Sum of two activations (residual connection): the gradient passes to both unchanged.

use crate::{Error, Result, Tape, Var, host, tensor_of, uninit};
use engobe_kernels::elementwise;

/// `a + b`, of one shape.
pub fn add<'m>(tape: &mut Tape<'m>, a: &Var, b: &Var) -> Result<Var> {
    if a.tensor().dims() != b.tensor().dims() {
        return Err(Error::shape("add", format!("{:?} + {:?}", a.tensor().dims(), b.tensor().dims())));
    }
    let y = if tape.fast(a.tensor()) {
        let mut out = uninit(a.tensor().elem_count());
        elementwise::add(&host(a.tensor())?, &host(b.tensor())?, &mut out);
        tensor_of(out, a.tensor().shape().clone())?
    } else {
        (a.tensor() + b.tensor())?
    };
    let slots = [a.slot(), b.slot()];
    Ok(tape.record1(&slots, y, move |dy, sink| {
        sink.add_shared(slots[0], dy.clone())?;
        sink.add_shared(slots[1], dy)
    }))
}
