//! The tape: reverse-mode differentiation that knows that most weights are frozen.
//!
//! An op whose inputs are all untracked records nothing; an op saves only what the gradients of its
//! *tracked* inputs need; a frozen weight never gets a gradient. Ops are few and large, one file each under
//! [`ops`], with two forms: a fast one on the slices of CPU tensors (crate `engobe-kernels`), and one
//! composed of candle operations that runs on every candle device. [`Tape::composed`] forces the latter, so
//! that one body of test covers both.
//!
//! Must not know: layers, adapters, file formats.

mod error;
mod host;
pub mod ops;
mod param;
mod tape;
mod var;
mod weight;

pub use engobe_kernels::matmul::Activations;
pub use engobe_kernels::narrow::Half;
pub use error::{Error, Result};
pub use host::{Element, Host, host, host_as, tensor_of, uninit, update, update_as};
pub use param::{Gradients, Param, ParamId};
pub use tape::{GradSink, OutGrads, Slot, Tape, Watch};
pub use var::Var;
pub use weight::{FrozenWeight, HostBytes, HostScales};
