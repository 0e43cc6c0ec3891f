//! Product with a constant.

use crate::{Result, Tape, Var};

/// `s · x`.
pub fn scale<'m>(tape: &mut Tape<'m>, x: &Var, s: f32) -> Result<Var> {
    let y = (x.tensor() * f64::from(s))?;
    let slot = x.slot();
    Ok(tape.record1(&[slot], y, move |dy, sink| sink.add(slot, (dy * f64::from(s))?)))
}
