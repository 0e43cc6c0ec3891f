//! What can go wrong between a data file and a micro-batch.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One line for a person: it names the file, row or key and says what would be right.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// what was opened
        path: PathBuf,
        /// what the system said
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{}: {what}", path.display())]
    File {
        /// the file
        path: PathBuf,
        /// what is wrong and what would be right
        what: String,
    },
    /// One row is bad.
    #[error("{place}: {what}")]
    Row {
        /// file and line, as [`crate::Place`] prints it
        place: String,
        /// what is wrong and what would be right
        what: String,
    },
    /// There are no rows.
    #[error("{paths}: no rows: training needs at least one")]
    Empty {
        /// the files read
        paths: String,
    },
    /// The tokenizer cannot be built or refuses a text.
    #[error("tokenizer {origin}: {what}")]
    Tokenizer {
        /// file it comes from
        origin: String,
        /// what is wrong
        what: String,
    },
    /// A chat template does not compile or raises.
    #[error("chat template{}: {what}", line.map(|l| format!(" line {l}")).unwrap_or_default())]
    Template {
        /// line of the template
        line: Option<usize>,
        /// what the template or its compiler said
        what: String,
    },
    /// A model file cannot be read.
    #[error(transparent)]
    Formats(#[from] engobe_formats::Error),
    /// Options that do not fit the data or each other.
    #[error("{0}")]
    Options(String),
}

impl Error {
    pub(crate) fn tokenizer(origin: impl Into<String>, what: impl ToString) -> Self {
        Self::Tokenizer { origin: origin.into(), what: what.to_string() }
    }
}
