//! The forms that rows have, by the names of their columns.

mod fields;

use self::fields::Fields;
use super::label::Label;
use super::raw::{Place, RawRow};
use crate::Result;
use serde_json::{Map, Value};

/// How a file's rows are read. The names are those of the file's columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// a list of `{role, content}`
    Messages {
        /// column of the list
        key: String,
    },
    /// ShareGPT: a list of `{from, value}`
    ShareGpt {
        /// column of the list
        key: String,
    },
    /// a prompt and what follows it; both strings, or both lists of messages
    PromptCompletion {
        /// column of the prompt
        prompt: String,
        /// column of the completion
        completion: String,
    },
    /// an instruction, an optional input, an output
    Alpaca {
        /// column of the input; rows may lack it
        input: String,
        /// column of the output
        output: String,
    },
    /// plain text
    Text {
        /// column of the text
        key: String,
    },
    /// a text, or two, and what it is
    Labelled {
        /// column of the text
        text: String,
        /// column of the second text
        pair: Option<String>,
        /// column of the label: a name, a number, or a list of either
        label: Option<String>,
    },
    /// words with a tag each
    Tagged {
        /// column of the words
        tokens: String,
        /// column of the tags
        tags: Option<String>,
    },
    /// token ids, with labels or without
    Tokenized {
        /// rows have `labels`
        labels: bool,
    },
}

/// A row in one of the forms.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// where it stands
    pub place: Place,
    /// what it says
    pub content: Content,
}

/// What a row says.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// a conversation in OpenAI's message format
    Chat {
        /// `{role, content, ...}` each
        messages: Vec<Value>,
        /// tool descriptions
        tools: Option<Value>,
        /// messages that belong to a prompt, in front; what the assistant says there is not learned
        prompt_messages: usize,
    },
    /// a prompt and what follows it
    Pair {
        /// not learned
        prompt: String,
        /// learned
        completion: String,
    },
    /// Alpaca
    Alpaca {
        /// the task
        instruction: String,
        /// what it is about; may be empty
        input: String,
        /// the answer
        output: String,
    },
    /// plain text
    Text(String),
    /// a text, or two, and what it is
    Labelled {
        /// the text
        text: String,
        /// the second text
        pair: Option<String>,
        /// what it is, if the row says so
        label: Option<Label>,
    },
    /// words with a tag each
    Tagged {
        /// the words
        tokens: Vec<String>,
        /// a tag a word, if the row has them
        tags: Option<Vec<Label>>,
    },
    /// token ids
    Tokens {
        /// the ids
        ids: Vec<u32>,
        /// label of each position, or the ids of a target; `None` where it is -100
        labels: Option<Vec<Option<u32>>>,
    },
}

impl Content {
    /// What is asked and what the answer is, if the row says both: an instruction stands before its input.
    pub fn as_pair(&self) -> Option<(String, &str)> {
        match self {
            Self::Pair { prompt, completion } => Some((prompt.clone(), completion)),
            Self::Alpaca { instruction, input, output } if input.is_empty() => {
                Some((instruction.clone(), output))
            }
            Self::Alpaca { instruction, input, output } => {
                Some((format!("{instruction}\n\n{input}"), output))
            }
            _ => None,
        }
    }
}

const MESSAGES: &[&str] = &["messages", "conversations", "conversation", "chat"];
const PROMPTS: &[&str] =
    &["prompt", "question", "query", "input", "problem", "source", "document", "article", "dialogue"];
const COMPLETIONS: &[&str] =
    &["completion", "response", "answer", "output", "solution", "target", "summary", "highlights"];
const OUTPUTS: &[&str] = &["output", "response", "completion", "answer"];
const INPUTS: &[&str] = &["input", "context"];

/// Columns of a text and of the second one that belongs to it, as GLUE's tasks name them too.
const TEXT_PAIRS: &[(&str, &str)] = &[
    ("text", "text_pair"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
];
const TEXTS: &[&str] = &["text", "sentence", "content"];
const LABELS: &[&str] = &["label", "labels", "score"];
const TOKENS: &[&str] = &["tokens", "words"];
const TAGS: &[&str] = &["tags", "ner_tags", "pos_tags", "chunk_tags", "labels"];

const FORMS: &str = "messages (chat), prompt + completion, source + target, instruction + output (Alpaca), text, \
                     text (+ text_pair) + label, tokens + tags, or input_ids";

impl Form {
    /// One line for a person.
    pub fn describe(&self) -> String {
        match self {
            Self::Messages { key } => format!("chat messages (column {key}: role, content)"),
            Self::ShareGpt { key } => format!("ShareGPT conversations (column {key}: from, value)"),
            Self::PromptCompletion { prompt, completion } => {
                format!("prompt and completion (columns {prompt}, {completion})")
            }
            Self::Alpaca { input, output } => {
                format!("Alpaca instructions (columns instruction, {input}, {output})")
            }
            Self::Text { key } => format!("plain text (column {key})"),
            Self::Labelled { text, pair, label } => {
                let columns = [Some(text), pair.as_ref(), label.as_ref()];
                let columns: Vec<&str> = columns.into_iter().flatten().map(String::as_str).collect();
                let what = match (pair, label) {
                    (None, _) => "labelled texts",
                    (Some(_), Some(_)) => "labelled pairs of texts",
                    (Some(_), None) => "pairs of texts",
                };
                format!("{what} (columns {})", columns.join(", "))
            }
            Self::Tagged { tokens, tags: Some(tags) } => format!("tagged words (columns {tokens}, {tags})"),
            Self::Tagged { tokens, tags: None } => format!("words (column {tokens})"),
            Self::Tokenized { labels: true } => "token ids (columns input_ids, labels)".into(),
            Self::Tokenized { labels: false } => "token ids (column input_ids, all of them labels)".into(),
        }
    }

    /// Recognises the form by a file's first row.
    pub(super) fn recognise(row: &RawRow) -> Result<Self> {
        let fields = &row.fields;
        let first = |names: &[&str]| {
            names.iter().find(|name| fields.contains_key(**name)).map(|name| (*name).to_owned())
        };
        if fields.contains_key("input_ids") {
            return Ok(Self::Tokenized { labels: has_labels(row) });
        }
        if let Some(key) = MESSAGES.iter().find(|key| fields.get(**key).is_some_and(Value::is_array)) {
            let share =
                fields[*key].get(0).is_some_and(|m| m.get("from").is_some() && m.get("role").is_none());
            let key = (*key).to_owned();
            return Ok(if share { Self::ShareGpt { key } } else { Self::Messages { key } });
        }
        if let Some(form) = Self::recognise_labelled(fields) {
            return Ok(form);
        }
        if fields.contains_key("instruction")
            && let Some(output) = first(OUTPUTS)
        {
            let input = first(INPUTS).unwrap_or_else(|| "input".to_owned());
            return Ok(Self::Alpaca { input, output });
        }
        if let (Some(prompt), Some(completion)) = (first(PROMPTS), first(COMPLETIONS)) {
            return Ok(Self::PromptCompletion { prompt, completion });
        }
        // before plain text, which would be one of the two alone
        if let Some((text, pair)) = text_pair(fields) {
            return Ok(Self::Labelled { text, pair: Some(pair), label: None });
        }
        if let Some(key) = first(TEXTS) {
            return Ok(Self::Text { key });
        }
        if let Some(tokens) = first(TOKENS) {
            return Ok(Self::Tagged { tokens, tags: None });
        }
        Err(row.place.error(unrecognised(fields)))
    }

    /// Words with tags, or texts with a label.
    fn recognise_labelled(fields: &Map<String, Value>) -> Option<Self> {
        let first = |names: &[&str]| names.iter().find(|n| fields.contains_key(**n)).map(|n| (*n).to_owned());
        if let (Some(tokens), Some(tags)) = (first(TOKENS), first(TAGS)) {
            return Some(Self::Tagged { tokens, tags: Some(tags) });
        }
        // an answer to a prompt may have a score beside it
        if fields.contains_key("instruction") || first(PROMPTS).is_some_and(|p| p != "question") {
            return None;
        }
        let label = Some(first(LABELS)?);
        if let Some((text, pair)) = text_pair(fields) {
            return Some(Self::Labelled { text, pair: Some(pair), label });
        }
        let text = first(TEXTS).filter(|_| label.as_deref() != Some("score"))?;
        Some(Self::Labelled { text, pair: None, label })
    }

    /// As this form, with what all rows of the file show: labels may begin after the first row.
    pub(super) fn widened(self, rows: &[RawRow]) -> Self {
        match self {
            Self::Tokenized { .. } => Self::Tokenized { labels: rows.iter().any(has_labels) },
            other => other,
        }
    }

    /// Columns of `row` that this form does not read.
    pub(super) fn ignored(&self, row: &RawRow) -> Vec<String> {
        let used: Vec<&str> = match self {
            Self::Messages { key } => vec![key, "tools"],
            Self::ShareGpt { key } => vec![key, "tools", "system"],
            Self::PromptCompletion { prompt, completion } => vec![prompt, completion, "tools"],
            Self::Alpaca { input, output } => vec!["instruction", input, output],
            Self::Text { key } => vec![key],
            Self::Labelled { text, pair, label } => [Some(text), pair.as_ref(), label.as_ref()]
                .into_iter()
                .flatten()
                .map(String::as_str)
                .collect(),
            Self::Tagged { tokens, tags } => {
                [Some(tokens), tags.as_ref()].into_iter().flatten().map(String::as_str).collect()
            }
            Self::Tokenized { .. } => vec!["input_ids", "labels"],
        };
        row.fields.keys().filter(|key| !used.contains(&key.as_str())).cloned().collect()
    }

    /// Reads one row.
    pub(super) fn row(&self, raw: RawRow) -> Result<Row> {
        let RawRow { place, fields } = raw;
        let read = Fields { fields: &fields, place: &place, form: self };
        let content = match self {
            Self::Messages { key } => {
                Content::Chat { messages: read.messages(key)?, tools: read.tools()?, prompt_messages: 0 }
            }
            Self::ShareGpt { key } => read.share_gpt(key)?,
            Self::PromptCompletion { prompt, completion } => read.pair(prompt, completion)?,
            Self::Alpaca { input, output } => Content::Alpaca {
                instruction: read.text("instruction")?,
                input: read.optional_text(input)?.unwrap_or_default(),
                output: read.text(output)?,
            },
            Self::Text { key } => Content::Text(read.text(key)?),
            Self::Labelled { text, pair, label } => Content::Labelled {
                text: read.text(text)?,
                pair: pair.as_ref().map(|key| read.text(key)).transpose()?,
                label: label.as_ref().and_then(|key| read.label(key).transpose()).transpose()?,
            },
            Self::Tagged { tokens, tags } => read.tagged(tokens, tags.as_deref())?,
            Self::Tokenized { .. } => read.tokens()?,
        };
        Ok(Row { place, content })
    }
}

/// The columns of a pair of texts, if there are two.
fn text_pair(fields: &Map<String, Value>) -> Option<(String, String)> {
    let both = |(a, b): &&(&str, &str)| fields.contains_key(*a) && fields.contains_key(*b);
    TEXT_PAIRS.iter().find(both).map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
}

fn has_labels(row: &RawRow) -> bool {
    row.fields.get("labels").is_some_and(|v| !v.is_null())
}

fn unrecognised(fields: &Map<String, Value>) -> String {
    let names: Vec<&str> = fields.keys().map(String::as_str).collect();
    let known =
        ["messages", "conversations", "prompt", "completion", "instruction", "output", "text", "input_ids"];
    let near = names.iter().find_map(|name| {
        let near = |known: &&&str| strsim::damerau_levenshtein(name, known) <= 2;
        known.iter().find(near).map(|known| format!("; is {name:?} meant to be {known:?}?"))
    });
    let found = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    format!(
        "the columns do not tell what to learn: found {found}; needed are {FORMS}{}",
        near.unwrap_or_default()
    )
}
