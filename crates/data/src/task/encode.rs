//! Rows to samples of a task other than next tokens.

use super::{LabelSet, Problem, Task};
use crate::encode::{Goal, Sample, encode_all};
use crate::reader::{Content, DataFile, Label, Row};
use crate::{Error, Result, TextTokenizer};

/// How rows are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskOptions {
    /// what for
    pub task: Task,
    /// tokens beyond this many are cut, special ones not counted out; of a pair, the longer text first
    pub max_seq_len: usize,
}

/// Turns rows into samples of a task.
#[derive(Debug)]
pub struct TaskEncoder<'t> {
    tokenizer: Option<&'t TextTokenizer>,
    labels: Option<&'t LabelSet>,
    vocab_size: usize,
    options: TaskOptions,
}

impl<'t> TaskEncoder<'t> {
    /// Without a tokenizer only token ids are read. `labels` are needed by tasks that have labels; `vocab_size` is the number of rows of the model's embedding.
    pub fn new(
        tokenizer: Option<&'t TextTokenizer>,
        labels: Option<&'t LabelSet>,
        vocab_size: usize,
        options: TaskOptions,
    ) -> Self {
        Self { tokenizer, labels, vocab_size, options }
    }

    /// Encodes all rows, in order, on all cores.
    pub fn encode(&self, files: &[DataFile]) -> Result<Vec<Sample>> {
        encode_all(files, |row| self.encode_row(row))
    }

    /// Encodes one row.
    ///
    /// # Errors
    /// A row that is not of the task's form, a label that is none of the classes.
    pub fn encode_row(&self, row: &Row) -> Result<Sample> {
        let mut sample = match (self.options.task, &row.content) {
            (Task::TokenCls, Content::Tagged { tokens, tags }) => {
                self.tagged(row, tokens, tags.as_deref())?
            }
            (Task::Seq2SeqLm, content @ (Content::Pair { .. } | Content::Alpaca { .. })) => {
                let (source, target) = content.as_pair().unwrap_or_default();
                let target = self.text(row, target, None)?;
                let mut sample = self.text(row, &source, None)?;
                sample.truncated += target.truncated;
                sample.goal = Goal::Sequence(target.ids);
                sample
            }
            (Task::SeqCls | Task::Regression, Content::Labelled { text, pair, label }) => {
                let mut sample = self.text(row, text, pair.as_deref())?;
                sample.goal = match label {
                    Some(label) => self.goal(row, label)?,
                    None => Goal::Nothing,
                };
                sample
            }
            (Task::Seq2SeqLm, Content::Tokens { ids, labels }) => self.ids(row, ids, labels.as_deref()),
            // sources to be answered
            (Task::Seq2SeqLm, Content::Text(text)) => self.text(row, text, None)?,
            (Task::Embedding, Content::Labelled { text, pair, .. }) => {
                self.text(row, text, pair.as_deref())?
            }
            (Task::SeqCls | Task::Regression | Task::Embedding, Content::Text(text)) => {
                self.text(row, text, None)?
            }
            (task, _) => {
                let needed = match task {
                    Task::SeqCls | Task::Regression => "text (and text_pair) and label",
                    Task::TokenCls => "tokens and tags",
                    Task::Seq2SeqLm => {
                        "source and target, prompt and completion, instruction and output, or input_ids and labels"
                    }
                    Task::Embedding | Task::CausalLm => "text",
                };
                return Err(row.place.error(format!("the task {task} needs columns {needed}")));
            }
        };
        if sample.goal == Goal::NextTokens {
            sample.goal = Goal::Nothing;
        }
        self.check_ids(row, &sample)?;
        Ok(sample)
    }

    fn text(&self, row: &Row, text: &str, pair: Option<&str>) -> Result<Sample> {
        let encoded = self.tokenizer()?.encode_pair(text, pair, self.options.max_seq_len)?;
        Ok(Sample {
            labels: vec![None; encoded.ids.len()],
            ids: encoded.ids,
            place: row.place.clone(),
            truncated: encoded.truncated,
            goal: Goal::NextTokens,
            second_type_from: encoded.second_type_from,
        })
    }

    /// A source and its target, which are tokens already.
    fn ids(&self, row: &Row, ids: &[u32], labels: Option<&[Option<u32>]>) -> Sample {
        let most = self.options.max_seq_len;
        let target: Vec<u32> = labels.unwrap_or_default().iter().flatten().copied().collect();
        let cut = |n: usize| n.saturating_sub(most);
        Sample {
            ids: ids[..ids.len().min(most)].to_vec(),
            labels: vec![None; ids.len().min(most)],
            place: row.place.clone(),
            truncated: cut(ids.len()) + cut(target.len()),
            goal: match labels {
                Some(_) => Goal::Sequence(target[..target.len().min(most)].to_vec()),
                None => Goal::Nothing,
            },
            second_type_from: None,
        }
    }

    fn tokenizer(&self) -> Result<&'t TextTokenizer> {
        let missing = "the model has no tokenizer.json, and texts need one: transformers' \
                       AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it";
        self.tokenizer.ok_or_else(|| Error::Options(missing.into()))
    }

    fn labels(&self) -> Result<&'t LabelSet> {
        let task = self.options.task;
        self.labels.ok_or_else(|| Error::Options(format!("the task {task} needs the names of its classes")))
    }

    fn goal(&self, row: &Row, label: &Label) -> Result<Goal> {
        let labels = self.labels()?;
        let unknown = |label: &Label| row.place.error(labels.unknown(label));
        match labels.problem {
            Problem::Regression => {
                let number = label.number().filter(|n| (*n as f32).is_finite());
                let number = number.ok_or_else(|| row.place.error(format!("label {label} is no number")))?;
                Ok(Goal::Value(number as f32))
            }
            Problem::SingleLabel => Ok(Goal::Class(labels.id(label).ok_or_else(|| unknown(label))?)),
            Problem::MultiLabel => {
                let mut holds = vec![false; labels.len()];
                for part in label.parts() {
                    holds[labels.id(part).ok_or_else(|| unknown(part))? as usize] = true;
                }
                Ok(Goal::Classes(holds))
            }
        }
    }

    /// The first token of each word has the word's tag, as in transformers' examples; words beyond the cut have none.
    fn tagged(&self, row: &Row, words: &[String], tags: Option<&[Label]>) -> Result<Sample> {
        let encoded = self.tokenizer()?.encode_words(words, self.options.max_seq_len)?;
        let mut labels = vec![None; encoded.ids.len()];
        if let Some(tags) = tags {
            let set = self.labels()?;
            for (tag, at) in tags.iter().zip(&encoded.first_tokens) {
                if *tag == Label::Whole(-100) {
                    continue;
                }
                let id = set.id(tag).ok_or_else(|| row.place.error(set.unknown(tag)))?;
                if let Some(at) = at {
                    labels[*at] = Some(id);
                }
            }
        }
        Ok(Sample {
            ids: encoded.ids,
            labels,
            place: row.place.clone(),
            truncated: encoded.truncated,
            goal: if tags.is_some() { Goal::Tags } else { Goal::Nothing },
            second_type_from: None,
        })
    }

    /// For each word of a row the position of its first token, `None` where it was cut or has no token.
    pub fn first_tokens(&self, words: &[String]) -> Result<Vec<Option<usize>>> {
        Ok(self.tokenizer()?.encode_words(words, self.options.max_seq_len)?.first_tokens)
    }

    fn check_ids(&self, row: &Row, sample: &Sample) -> Result<()> {
        let target: &[u32] = match &sample.goal {
            Goal::Sequence(ids) => ids,
            _ => &[],
        };
        match sample.ids.iter().chain(target).find(|id| **id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => Err(row.place.error(format!(
                "token {:?} has id {id}, the model's vocabulary ends at {}: tokenizer and model do not belong together",
                self.tokenizer.and_then(|t| t.token_str(*id)).unwrap_or_default(),
                self.vocab_size.saturating_sub(1)
            ))),
        }
    }
}
