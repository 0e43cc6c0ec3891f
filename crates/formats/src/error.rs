//! One error type for all formats.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A file that cannot be read, or is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refuses.
    #[error("{}: {source}", path.display())]
    Io {
        /// file or directory
        path: PathBuf,
        /// what the system says
        source: std::io::Error,
    },
    /// The file's structure is broken.
    #[error("{}: {what}", path.display())]
    Corrupt {
        /// file
        path: PathBuf,
        /// what is wrong
        what: String,
    },
    /// A tensor that should be there is not.
    #[error("{}: no tensor {name:?}{near}", path.display())]
    NoTensor {
        /// file or directory
        path: PathBuf,
        /// the tensor
        name: String,
        /// the nearest names, as a remark
        near: String,
    },
    /// A tensor is of a type that cannot be computed with.
    #[error("{}: {tensor} is stored as {dtype}, which is not supported here; supported: F32, F16, BF16, and ggml's Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K", path.display())]
    UnsupportedType {
        /// file
        path: PathBuf,
        /// tensor
        tensor: String,
        /// its type
        dtype: String,
    },
    /// A key is missing.
    #[error("{}: no key {key:?}{near}", path.display())]
    NoKey {
        /// file
        path: PathBuf,
        /// key
        key: String,
        /// the nearest keys, as a remark
        near: String,
    },
    /// A key has a value of the wrong kind.
    #[error("{}: {key} is {found}; expected {expected}", path.display())]
    BadValue {
        /// file
        path: PathBuf,
        /// key
        key: String,
        /// value
        found: String,
        /// what would be right
        expected: String,
    },
}

impl Error {
    /// Wraps a system error with the path that it is about.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn corrupt(path: &Path, what: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_path_buf(), what: what.into() }
    }
}

/// `; did you mean …` for the known name nearest to `name`, or nothing if none is near.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let scored = known.map(|k| (strsim::normalized_damerau_levenshtein(name, k), k));
    match scored.max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((score, k)) if score > 0.5 => format!("; did you mean {k:?}?"),
        _ => String::new(),
    }
}

/// The first few of a long list of problems, and how many more there are, for an error that people read.
pub fn shorten(mut problems: Vec<String>) -> Vec<String> {
    const SHOWN: usize = 8;
    let more = problems.len().saturating_sub(SHOWN);
    problems.truncate(SHOWN);
    if more > 0 {
        problems.push(format!("and {more} more"));
    }
    problems
}
