//! Data: from files to micro-batches.
//!
//! rows ([`reader`]) -> text (by [`ChatTemplate`]) -> ids and labels ([`Encoder`]) -> checks ([`lint()`]) ->
//! micro-batches ([`Loader`]). This crate knows no model and no device, and prints nothing.

pub mod encode;
pub mod error;
pub mod lint;
pub mod pack;
pub mod reader;
pub mod task;
pub mod template;
pub mod tokenizer;

pub use encode::{EncodeOptions, Encoder, Goal, Prompt, PromptStyle, Sample, TrainOn};
pub use error::{Error, Result};
pub use lint::{Finding, LintContext, LintKind, LintReport, Severity, lint, show};
pub use pack::{Cursor, Loader, LoaderOptions, MicroBatch};
pub use reader::{Content, DataFile, Form, Label, Place, Row};
pub use task::{LabelSet, Problem, Task, TaskEncoder, TaskOptions};
pub use template::ChatTemplate;
pub use tokenizer::TextTokenizer;
