//! What can be wrong with an adapter.

use std::borrow::Cow;
use std::path::PathBuf;

/// Result of attaching, loading or saving an adapter.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An adapter that cannot be attached, loaded or saved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration names no target.
    #[error("target_modules is missing: give a list of module names, a regex, or \"all-linear\"")]
    NoTargets,
    /// A pattern is no regular expression.
    #[error("{key}: {pattern:?} is not a valid pattern: {reason}")]
    Pattern {
        /// setting
        key: &'static str,
        /// what was given
        pattern: String,
        /// what the regex engine says
        reason: String,
    },
    /// Settings that exclude each other.
    #[error("{keys} {reason}")]
    Conflict {
        /// the settings
        keys: &'static str,
        /// why
        reason: Cow<'static, str>,
    },
    /// No module of the model matches.
    #[error("{key} matches no module of this model: {given}; it has {available}")]
    NothingMatches {
        /// setting
        key: &'static str,
        /// what was given
        given: String,
        /// kinds of modules there are
        available: String,
    },
    /// A target is neither a linear layer nor an embedding.
    #[error("target_modules: {path} is {kind}; LoRA attaches to linear layers and embeddings")]
    Unsupported {
        /// module
        path: String,
        /// what it is
        kind: &'static str,
    },
    /// A layer whose matrix lies transposed in files cannot be a saved module.
    #[error(
        "modules_to_save: {path} is a Conv1D layer (its matrix lies as [in, out] in files); it can be adapted, but not trained in full"
    )]
    Conv1d {
        /// module
        path: String,
    },
    /// Tensors of an adapter's file do not fit the model.
    #[error("{}: the adapter does not fit this model: {}", path.display(), problems.join("; "))]
    DoesNotFit {
        /// the adapter's file
        path: PathBuf,
        /// one entry a tensor
        problems: Vec<String>,
    },
    /// A tensor holds an infinity or a NaN.
    #[error("{}: {tensor} holds a value that is not finite", path.display())]
    NotFinite {
        /// the adapter's file
        path: PathBuf,
        /// tensor
        tensor: String,
    },
    /// The adapter is no change of the base's weights.
    #[error("{method} adapters can't be merged: {reason}")]
    CannotMerge {
        /// method
        method: &'static str,
        /// why
        reason: &'static str,
    },
    /// The model lacks a place at which the method attaches.
    #[error("{method} needs {needs}, which this model does not offer")]
    NoSite {
        /// method
        method: &'static str,
        /// the place
        needs: &'static str,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    Format(#[from] engobe_formats::Error),
    /// A weight could not be encoded.
    #[error(transparent)]
    Encode(#[from] engobe_kernels::codec::EncodeError),
    /// An op failed.
    #[error(transparent)]
    Op(#[from] engobe_autograd::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
