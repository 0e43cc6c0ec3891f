//! What can go wrong in an op.

/// Result of an op.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An op was handed something that it cannot work with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// candle refused an operation
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// Shapes of an op's inputs do not fit each other.
    #[error("{op}: {what}")]
    Shape {
        /// the op
        op: &'static str,
        /// the shapes found and expected
        what: String,
    },
    /// A weight's bytes do not fit its shape.
    #[error(transparent)]
    Storage(#[from] engobe_kernels::storage::StorageError),
    /// A value that is kept for the backward has no place in f16.
    #[error(transparent)]
    OutOfRange(#[from] engobe_kernels::narrow::OutOfRange),
    /// Whoever watches the tape ([`crate::Tape::watch`]) ended the pass.
    #[error(transparent)]
    Stopped(Box<dyn std::error::Error + Send + Sync>),
    /// A tensor is not contiguous f32 on the CPU where the fast form of an op needs it.
    #[error("expected a contiguous f32 tensor on the CPU, found {0}")]
    NotHost(String),
}

impl Error {
    /// A shape error of op `op`.
    pub fn shape(op: &'static str, what: impl Into<String>) -> Self {
        Self::Shape { op, what: what.into() }
    }
}
