//! What cannot be converted, and why.

use std::path::PathBuf;

/// Result of a conversion.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A conversion that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source holds something that the target cannot.
    #[error("{}: {what} cannot be converted: {why}", path.display())]
    Cannot {
        /// source
        path: PathBuf,
        /// tensor or setting
        what: String,
        /// why, and what would be right
        why: String,
    },
    /// Tensors of an adapter do not fit the model, or each other.
    #[error("{}: the adapter does not fit: {}", path.display(), problems.join("; "))]
    DoesNotFit {
        /// the adapter
        path: PathBuf,
        /// one entry a tensor
        problems: Vec<String>,
    },
    /// A value that is infinite or NaN, or too large for the target's type.
    #[error("{}: {tensor} holds a value that {} cannot hold", path.display(), storage)]
    NotFinite {
        /// source
        path: PathBuf,
        /// tensor
        tensor: String,
        /// type of the target
        storage: String,
    },
    /// No adapter lies there.
    #[error(
        "{}: is no adapter: expected a PEFT directory (adapter_model.safetensors), an mlx-lm directory (adapters.safetensors), or a GGUF LoRA (.gguf)",
        path.display()
    )]
    NoAdapter {
        /// what was given
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    Format(#[from] engobe_formats::Error),
    /// The model is not one that we know.
    #[error(transparent)]
    Model(#[from] engobe_models::Error),
    /// The adapter's rules are broken, or merging failed.
    #[error(transparent)]
    Adapter(#[from] engobe_adapters::Error),
    /// The tokenizer cannot be written.
    #[error(transparent)]
    Tokenizer(#[from] engobe_data::Error),
    /// A weight could not be encoded.
    #[error(transparent)]
    Encode(#[from] engobe_kernels::codec::EncodeError),
    /// An op failed.
    #[error(transparent)]
    Op(#[from] engobe_autograd::Error),
}
