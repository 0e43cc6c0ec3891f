//! What can end a run.

use std::path::PathBuf;

/// Result of training and evaluation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a run ended early, or could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting cannot be meant.
    #[error(transparent)]
    Plan(#[from] crate::plan::PlanError),
    /// The loss left the numbers.
    #[error(
        "the loss of step {step} is {value} (rows {rows}): lower learning_rate, or look for broken weights or data"
    )]
    NotFinite {
        /// optimizer step, from 1
        step: usize,
        /// NaN or an infinity
        value: f64,
        /// rows of the window, the first few
        rows: String,
    },
    /// The loss of an evaluation is no number.
    #[error("the loss over these rows is {value}: the model's weights, or the adapter's, are broken")]
    EvalNotFinite {
        /// NaN or an infinity
        value: f64,
    },
    /// A checkpoint does not belong to this run.
    #[error("cannot resume: {what}")]
    Resume {
        /// what differs or is missing
        what: String,
    },
    /// The output directory holds another run.
    #[error("{} already holds a run: add --resume to go on with it, or choose another --out", path.display())]
    OutExists {
        /// the directory
        path: PathBuf,
    },
    /// The limit on memory would be passed.
    #[error(
        "step {step}: {cause}; the last whole step is saved in {}: go on with --resume and more memory, or with --activation-checkpointing", saved.display()
    )]
    OverLimit {
        /// step that was not done, from 1
        step: usize,
        /// the checkpoint
        saved: PathBuf,
        /// what was seen
        cause: crate::memory::guard::OverLimit,
    },
    /// The limit on memory would be passed by an evaluation.
    #[error(
        "the evaluation after step {step}: {cause}; the step is saved in {}: go on with --resume and more memory", saved.display()
    )]
    EvalOverLimit {
        /// step that was done and saved, from 1
        step: usize,
        /// the checkpoint
        saved: PathBuf,
        /// what was seen
        cause: crate::memory::guard::OverLimit,
    },
    /// No label in the data.
    #[error("no row has a label to learn from")]
    NoLabels,
    /// Labels of another kind than the head's.
    #[error("a row's label does not fit the task: {problem} is what the head was made for")]
    Labels {
        /// the head's kind of labels
        problem: &'static str,
    },
    /// A name of a score that the task does not have.
    #[error("metric_for_best_model {name:?}: this task's scores are {known}")]
    Metric {
        /// what was asked for
        name: String,
        /// what there is
        known: String,
    },
    /// Two models that cannot be compared.
    #[error("the models have vocabularies of {reference} and {candidate} tokens: they cannot be compared")]
    Vocabulary {
        /// of the first
        reference: usize,
        /// of the second
        candidate: usize,
    },
    /// Logits that are NaN or infinite.
    #[error("a model's logits are no finite numbers: its weights are broken")]
    NoNumbers,
    /// A file operation failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// the file
        path: PathBuf,
        /// what the system says
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {what}", path.display())]
    BadFile {
        /// the file
        path: PathBuf,
        /// what is wrong
        what: String,
    },
    /// The adapter failed.
    #[error(transparent)]
    Adapter(#[from] engobe_adapters::Error),
    /// A file format failed.
    #[error(transparent)]
    Format(#[from] engobe_formats::Error),
    /// The data failed.
    #[error(transparent)]
    Data(#[from] engobe_data::Error),
    /// An op failed.
    #[error(transparent)]
    Op(#[from] engobe_autograd::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// Wraps a file error with its path.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
