//! Feed-forward sub-layers, without their norm and their residual.

use crate::{Linear, ModuleMut, Result, linear_group};
use engobe_autograd::{Tape, Var, ops};
use engobe_kernels::activation::Activation;

/// What comes before the activation.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // a few a model
pub enum Up {
    /// f(x·Wᵀ)
    Plain(Linear),
    /// f(gate) ⊙ up, a layer each (Shazeer 2020)
    Gated {
        /// what the activation takes
        gate: Linear,
        /// what it gates
        up: Linear,
    },
    /// the same from one layer whose output is the gate, then what it gates (Phi-3)
    JoinedGate(Linear),
}

/// A feed-forward sub-layer.
#[derive(Debug)]
pub struct Mlp {
    /// from the hidden width to the inner one
    pub up: Up,
    /// the activation
    pub activation: Activation,
    /// back to the hidden width
    pub down: Linear,
}

impl Mlp {
    /// The inner activation of `x` `[n, d]`, before `down`.
    pub fn inner<'m>(&'m self, tape: &mut Tape<'m>, x: &Var) -> Result<Var> {
        match &self.up {
            Up::Plain(up) => {
                let up = up.forward(tape, x)?;
                ops::activate(tape, self.activation, &up)
            }
            Up::Gated { gate, up } => {
                let [gate, up] = linear_group(tape, x, [gate, up])?;
                ops::gated(tape, self.activation, &gate, &up)
            }
            Up::JoinedGate(both) => {
                let both_out = both.forward(tape, x)?;
                let half = both.out_features() / 2;
                let [gate, up] = ops::split_columns(tape, &both_out, 1, [half, half])?;
                ops::gated(tape, self.activation, &gate, &up)
            }
        }
    }

    /// Calls `f` on every module.
    pub fn visit(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        match &mut self.up {
            Up::Plain(up) | Up::JoinedGate(up) => f(ModuleMut::Linear(up)),
            Up::Gated { gate, up } => {
                f(ModuleMut::Linear(gate));
                f(ModuleMut::Linear(up));
            }
        }
        f(ModuleMut::Linear(&mut self.down));
    }
}
