//! Generation: the key/value cache at work, sampling, and when to stop.
//!
//! Must not know: the training loop.

mod batch;
mod generate;
mod sampling;
mod seq2seq;
mod stop;

pub use batch::complete_all;
pub use engobe_autograd::Activations;
pub use generate::{Generated, Generator, StopReason};
pub use sampling::{Sampler, Sampling, SamplingError};
pub use seq2seq::{answer_all, generate_from};
pub use stop::{Emit, StopStrings};

/// What can go wrong while generating.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting cannot be meant.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The prompt is empty.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// Logits left the numbers.
    #[error("the model's logits hold NaN or infinity: its weights, or the adapter's, are broken")]
    NotFinite,
    /// An op failed.
    #[error(transparent)]
    Op(#[from] engobe_autograd::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
