//! What a model is trained for, and the labels that go with it.

mod encode;
mod labels;
mod lint;

pub use encode::{TaskEncoder, TaskOptions};
pub use labels::{LABELS_FILE, LabelSet, Problem};
pub use lint::lint_task;

use crate::{Content, DataFile, Error, Result};
use std::str::FromStr;

/// What a model is trained for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// the next token of a decoder
    #[default]
    CausalLm,
    /// a text out of a text, with an encoder-decoder
    Seq2SeqLm,
    /// classes of texts or pairs of texts
    SeqCls,
    /// a class for each word
    TokenCls,
    /// a number for a text or a pair of texts
    Regression,
    /// a vector for a text
    Embedding,
}

impl Task {
    /// All tasks.
    pub const ALL: [Self; 6] =
        [Self::CausalLm, Self::Seq2SeqLm, Self::SeqCls, Self::TokenCls, Self::Regression, Self::Embedding];

    /// Name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::CausalLm => "causal-lm",
            Self::Seq2SeqLm => "seq2seq-lm",
            Self::SeqCls => "seq-cls",
            Self::TokenCls => "token-cls",
            Self::Regression => "regression",
            Self::Embedding => "embedding",
        }
    }

    /// PEFT's `task_type`.
    pub fn peft_name(self) -> &'static str {
        match self {
            Self::CausalLm => "CAUSAL_LM",
            Self::Seq2SeqLm => "SEQ_2_SEQ_LM",
            Self::SeqCls | Self::Regression => "SEQ_CLS",
            Self::TokenCls => "TOKEN_CLS",
            Self::Embedding => "FEATURE_EXTRACTION",
        }
    }

    /// True if rows have a label of their own, or a tag a word.
    pub fn is_labelled(self) -> bool {
        matches!(self, Self::SeqCls | Self::TokenCls | Self::Regression)
    }

    /// The task that rows of this content are made for; `None` where several are possible.
    pub fn of_rows(files: &[DataFile]) -> Option<Self> {
        let mut contents = files.iter().flat_map(|f| &f.rows).map(|row| &row.content);
        match contents.next()? {
            Content::Tagged { tags: Some(_), .. } => Some(Self::TokenCls),
            Content::Labelled { label: Some(first), .. } => {
                let is_real = |c: &Content| {
                    matches!(c, Content::Labelled { label: Some(crate::reader::Label::Number(_)), .. })
                };
                let real = matches!(first, crate::reader::Label::Number(_)) || contents.any(is_real);
                Some(if real { Self::Regression } else { Self::SeqCls })
            }
            _ => None,
        }
    }
}

impl FromStr for Task {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|task| task.name() == s).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::Options(format!("task {s:?} is not one of {names}"))
        })
    }
}

impl std::fmt::Display for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
