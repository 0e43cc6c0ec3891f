//! Training: the plan of a run, the step, the optimizer, checkpoints, evaluation.
//!
//! Must not know: command lines, terminals, how anything is printed. Whoever runs a [`Trainer`] watches it
//! through an [`Observer`].

pub mod checkpoint;
mod compare;
mod error;
mod evaluate;
pub mod memory;
pub mod metrics;
mod model;
mod optimizer;
pub mod plan;
mod schedule;
pub mod scores;
pub mod step;
mod trainer;

pub use compare::{Comparison, compare};
pub use error::{Error, Result};
pub use evaluate::{Evaluation, evaluate, predict};
pub use metrics::StepMetrics;
pub use model::{Model, likeliest};
pub use optimizer::{Optimizer, Saved, StateBytes, StateData, StateTensor, moments_bytes};
pub use plan::Plan;
pub use schedule::learning_rate;
pub use trainer::{Observer, Outcome, Silent, Trainer};
