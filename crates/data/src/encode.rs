//! Rows to token ids and labels.
//!
//! A row's text is tokenized as a whole, as it will be at inference, and the labels follow from the bytes that each
//! token covers. A token that holds bytes of both the prompt and the completion is a label.

use crate::reader::{Content, DataFile, Place, Row};
use crate::template::{Span, SpanKind, message};
use crate::{ChatTemplate, Error, Result, TextTokenizer};
use serde_json::Value;
use std::str::FromStr;

/// Which tokens are labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// what the assistant says, or completions, each with its end of turn
    #[default]
    Completions,
    /// everything
    All,
    /// the assistant's last turn
    Last,
}

/// How rows of prompt and completion (and Alpaca) become text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptStyle {
    /// as chat if the model has a chat template, else plain
    #[default]
    Auto,
    /// as a user's and an assistant's turn
    Chat,
    /// one after the other, EOS at the end; Alpaca rows in Alpaca's own words
    Plain,
}

impl FromStr for TrainOn {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "completions" => Ok(Self::Completions),
            "all" => Ok(Self::All),
            "last" => Ok(Self::Last),
            _ => Err(Error::Options(format!("train_on {s:?} is not completions, all or last"))),
        }
    }
}

impl FromStr for PromptStyle {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Auto),
            "chat" => Ok(Self::Chat),
            "plain" => Ok(Self::Plain),
            _ => Err(Error::Options(format!("template {s:?} is not auto, chat or plain"))),
        }
    }
}

/// How rows are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// which tokens are labels
    pub train_on: TrainOn,
    /// how prompts and completions become text
    pub style: PromptStyle,
    /// tokens beyond this many are cut
    pub max_seq_len: usize,
}

/// What a row teaches.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Goal {
    /// next tokens, where `labels` has one
    #[default]
    NextTokens,
    /// a class for the tokens where `labels` has one
    Tags,
    /// the row's class
    Class(u32),
    /// for each class whether it holds
    Classes(Vec<bool>),
    /// a number
    Value(f32),
    /// a text to be made of the row's: ids without the token that a decoder starts with
    Sequence(Vec<u32>),
    /// nothing: the row has no label
    Nothing,
}

impl Goal {
    /// Labels that a row with this goal has beside those of its tokens.
    pub fn count(&self) -> usize {
        match self {
            Self::NextTokens | Self::Tags | Self::Nothing => 0,
            Self::Class(_) | Self::Value(_) => 1,
            Self::Classes(holds) => holds.len(),
            Self::Sequence(ids) => ids.len(),
        }
    }
}

/// A row ready to be trained on.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// token ids
    pub ids: Vec<u32>,
    /// as in transformers: the label AT each position (the model predicts `labels[i]` from `ids[..i]`), `None`
    /// where transformers has -100
    pub labels: Vec<Option<u32>>,
    /// where the row stands
    pub place: Place,
    /// tokens cut off the end
    pub truncated: usize,
    /// what the row teaches
    pub goal: Goal,
    /// the first token of the second text of a pair, where the tokenizer tells the two apart
    pub second_type_from: Option<usize>,
}

impl Sample {
    /// Labels that can be predicted; those of next tokens begin after the first position.
    pub fn label_tokens(&self) -> usize {
        match &self.goal {
            Goal::NextTokens => self.labels.iter().skip(1).flatten().count(),
            Goal::Tags => self.labels.iter().flatten().count(),
            other => other.count(),
        }
    }
}

/// The beginning of a row and what should follow, for exact-match evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// ids to generate from
    pub ids: Vec<u32>,
    /// the text that the row has next
    pub completion: String,
}

/// Turns rows into [`Sample`]s.
#[derive(Debug)]
pub struct Encoder<'t> {
    tokenizer: Option<&'t TextTokenizer>,
    template: Option<ChatTemplate>,
    vocab_size: usize,
    options: EncodeOptions,
}

impl<'t> Encoder<'t> {
    /// `vocab_size` is the number of rows of the model's embedding. Without a tokenizer only token ids are read.
    pub fn new(
        tokenizer: Option<&'t TextTokenizer>,
        vocab_size: usize,
        options: EncodeOptions,
    ) -> Result<Self> {
        if options.max_seq_len < 2 {
            let what =
                format!("max_seq_len {} is too short: a label needs a token before it", options.max_seq_len);
            return Err(Error::Options(what));
        }
        let mut template = tokenizer.map(TextTokenizer::compile_chat_template).transpose()?.flatten();
        if let Some(template) = &mut template {
            template.stop_the_clock();
        }
        if options.style == PromptStyle::Chat && template.is_none() {
            return Err(no_template());
        }
        Ok(Self { tokenizer, template, vocab_size, options })
    }

    /// The model's chat template.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Makes templates that print the date print this one (`2026-01-31`), so that a resumed run sees the same rows.
    pub fn fix_date(&mut self, date: &str) -> Result<()> {
        self.template.as_mut().map_or(Ok(()), |template| template.fix_date(date))
    }

    /// Encodes all rows, in order, on all cores.
    pub fn encode(&self, files: &[DataFile]) -> Result<Vec<Sample>> {
        encode_all(files, |row| self.encode_row(row))
    }

    /// Encodes one row.
    pub fn encode_row(&self, row: &Row) -> Result<Sample> {
        let (mut ids, mut labels) = self.ids_and_labels(row).map_err(|e| at(&row.place, e))?;
        self.check_ids(row, &ids, &labels)?;
        let truncated = ids.len().saturating_sub(self.options.max_seq_len);
        ids.truncate(self.options.max_seq_len);
        labels.truncate(self.options.max_seq_len);
        let place = row.place.clone();
        Ok(Sample { ids, labels, place, truncated, goal: Goal::NextTokens, second_type_from: None })
    }

    /// The beginning of a row before its last completion. `None` for plain text and token ids.
    pub fn prompt(&self, row: &Row) -> Result<Option<Prompt>> {
        self.prompt_of(row).map_err(|e| at(&row.place, e))
    }

    /// Ids that end an assistant's turn in this model's chats: the special tokens that its template puts after the
    /// content. Empty without template, and if what the template puts there is no token of this tokenizer.
    pub fn end_of_turn(&self) -> Vec<u32> {
        let probe = [message("user", "a"), message("assistant", "b")];
        let (Some(tokenizer), Ok((ids, mask))) =
            (self.tokenizer, self.chat(&probe, None, 0, TrainOn::Completions))
        else {
            return Vec::new();
        };
        let ids = ids.into_iter().zip(mask).filter(|(id, label)| *label && tokenizer.is_special(*id));
        ids.map(|(id, _)| id).collect()
    }

    /// True if rows of `content` are rendered by the chat template.
    pub fn is_chat(&self, content: &Content) -> bool {
        match content {
            Content::Chat { .. } => true,
            Content::Pair { .. } | Content::Alpaca { .. } => match self.options.style {
                PromptStyle::Chat => true,
                PromptStyle::Plain => false,
                PromptStyle::Auto => self.template.is_some(),
            },
            Content::Text(_) | Content::Tokens { .. } | Content::Labelled { .. } | Content::Tagged { .. } => {
                false
            }
        }
    }

    fn ids_and_labels(&self, row: &Row) -> Result<(Vec<u32>, Vec<Option<u32>>)> {
        let train_on = self.options.train_on;
        let (ids, mask) = match &row.content {
            Content::Tokens { ids, labels: Some(labels) } if labels.len() != ids.len() => {
                let (n, of) = (labels.len(), ids.len());
                return Err(row.place.error(format!("{n} labels for {of} input_ids; one label a token")));
            }
            Content::Tokens { ids, labels } => {
                let all = || ids.iter().copied().map(Some).collect();
                return Ok((ids.clone(), labels.clone().unwrap_or_else(all)));
            }
            Content::Chat { messages, tools, prompt_messages } => {
                self.chat(messages, tools.as_ref(), *prompt_messages, train_on)?
            }
            Content::Text(text) => self.plain("", text, TrainOn::All)?,
            // to learn next tokens from texts, their labels do not matter
            Content::Labelled { text, pair: None, .. } => self.plain("", text, TrainOn::All)?,
            Content::Labelled { pair: Some(_), .. } | Content::Tagged { .. } => {
                let what = "pairs of texts and tagged words are for the tasks seq-cls, regression, token-cls and embedding";
                return Err(Error::Options(what.into()));
            }
            content if self.is_chat(content) => self.chat(&turns(content), None, 0, train_on)?,
            Content::Pair { prompt, completion } => self.plain(prompt, completion, train_on)?,
            Content::Alpaca { instruction, input, output } => {
                self.plain(&alpaca(instruction, input), output, train_on)?
            }
        };
        let labels = ids.iter().zip(mask).map(|(&id, label)| label.then_some(id)).collect();
        Ok((ids, labels))
    }

    fn tokenizer(&self) -> Result<&'t TextTokenizer> {
        self.tokenizer.ok_or_else(|| {
            Error::Options(
                "the model has no tokenizer, so rows must be token ids (input_ids, optionally labels)".into(),
            )
        })
    }

    /// Ids of a conversation, and which of them are labels.
    fn chat(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        prompt_messages: usize,
        train_on: TrainOn,
    ) -> Result<(Vec<u32>, Vec<bool>)> {
        let tokenizer = self.tokenizer()?;
        let template = self.template.as_ref().ok_or_else(no_template)?;
        if train_on == TrainOn::All {
            let ids = tokenizer.encode(&template.render(messages, tools, false)?, false)?;
            let mask = vec![true; ids.len()];
            return Ok((ids, mask));
        }
        let rendered = template.render_with_spans(messages, tools)?;
        let (ids, offsets) = tokenizer.encode_with_offsets(&rendered.text)?;
        let last = rendered.spans.iter().map(|span| span.message).max();
        let learned = |span: &&Span| {
            span.message >= prompt_messages && (train_on != TrainOn::Last || Some(span.message) == last)
        };
        let mut mask = vec![false; ids.len()];
        for span in rendered.spans.iter().filter(learned) {
            let end = label_end(span, &rendered.text, &ids, &offsets, tokenizer);
            for (label, offset) in mask.iter_mut().zip(&offsets) {
                *label |= offset.start < end && offset.end > span.range.start && !offset.is_empty();
            }
        }
        Ok((ids, mask))
    }

    /// Ids of a prompt and its completion, one after the other: BOS as the model says, EOS at the end.
    fn plain(&self, prompt: &str, completion: &str, train_on: TrainOn) -> Result<(Vec<u32>, Vec<bool>)> {
        let tokenizer = self.tokenizer()?;
        let (ids, offsets) = tokenizer.encode_with_offsets(&format!("{prompt}{completion}"))?;
        let all = train_on == TrainOn::All;
        let mut mask: Vec<bool> = offsets.iter().map(|offset| all || offset.end > prompt.len()).collect();
        let before = if ids.starts_with(tokenizer.prefix()) { &[] } else { tokenizer.prefix() };
        let mut out = before.to_vec();
        mask.splice(0..0, std::iter::repeat_n(all, before.len()));
        out.extend(ids);
        if let Some(eos) = tokenizer.eos()
            && out.last() != Some(&eos)
        {
            out.push(eos);
            mask.push(true);
        }
        Ok((out, mask))
    }

    fn prompt_of(&self, row: &Row) -> Result<Option<Prompt>> {
        let plain = |prompt: &str, completion: &str| -> Result<Option<Prompt>> {
            let ids = self.tokenizer()?.encode_start(prompt)?;
            Ok(Some(Prompt { ids, completion: completion.to_owned() }))
        };
        let chat = |messages: &[Value], tools: Option<&Value>| -> Result<Option<Prompt>> {
            let template = self.template.as_ref().ok_or_else(no_template)?;
            let Some(last) = messages.iter().rposition(|m| m["role"] == "assistant") else { return Ok(None) };
            let Some(completion) = messages[last]["content"].as_str() else { return Ok(None) };
            let ids = self.tokenizer()?.encode(&template.render(&messages[..last], tools, true)?, false)?;
            Ok(Some(Prompt { ids, completion: completion.to_owned() }))
        };
        match &row.content {
            Content::Text(_) | Content::Tokens { .. } | Content::Labelled { .. } | Content::Tagged { .. } => {
                Ok(None)
            }
            Content::Chat { messages, tools, .. } => chat(messages, tools.as_ref()),
            content if self.is_chat(content) => chat(&turns(content), None),
            Content::Pair { prompt, completion } => plain(prompt, completion),
            Content::Alpaca { instruction, input, output } => plain(&alpaca(instruction, input), output),
        }
    }

    fn check_ids(&self, row: &Row, ids: &[u32], labels: &[Option<u32>]) -> Result<()> {
        let beyond = |id: &u32| *id as usize >= self.vocab_size;
        let Some(id) =
            ids.iter().find(|id| beyond(id)).or_else(|| labels.iter().flatten().find(|id| beyond(id)))
        else {
            return Ok(());
        };
        let n = self.vocab_size;
        Err(row.place.error(match self.tokenizer.and_then(|t| t.token_str(*id)) {
            Some(token) if !matches!(row.content, Content::Tokens { .. }) => format!(
                "token {token:?} has id {id}, the model's vocabulary ends at {}: tokenizer and model do not belong together",
                n.saturating_sub(1)
            ),
            _ => format!("id {id} is beyond the model's vocabulary of {n}; ids go from 0 to {}", n.saturating_sub(1)),
        }))
    }
}

/// Encodes all rows with `encode_row`, in order, on all cores.
pub(crate) fn encode_all(
    files: &[DataFile],
    encode_row: impl Fn(&Row) -> Result<Sample> + Sync,
) -> Result<Vec<Sample>> {
    let rows: Vec<&Row> = files.iter().flat_map(|file| &file.rows).collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let share = rows.len().div_ceil(threads).max(64);
    let encode = |rows: &[&Row]| rows.iter().map(|row| encode_row(row)).collect::<Result<Vec<_>>>();
    if share >= rows.len() {
        return encode(&rows);
    }
    std::thread::scope(|scope| {
        let encode = &encode;
        let parts: Vec<_> = rows.chunks(share).map(|part| scope.spawn(move || encode(part))).collect();
        let mut samples = Vec::with_capacity(rows.len());
        for part in parts {
            samples.extend(part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(samples)
    })
}

/// Byte at which the labels of a span end.
fn label_end(
    span: &Span,
    text: &str,
    ids: &[u32],
    offsets: &[std::ops::Range<usize>],
    tokenizer: &TextTokenizer,
) -> usize {
    let range = &span.range;
    match span.kind {
        SpanKind::Block => range.end,
        // whitespace after the end-of-turn token separates turns: the model has stopped by then
        SpanKind::Turn => {
            let inside =
                |offset: &std::ops::Range<usize>| offset.start >= range.start && offset.end <= range.end;
            let special = (0..ids.len()).rev().find(|&i| inside(&offsets[i]) && tokenizer.is_special(ids[i]));
            match special.map(|i| offsets[i].end) {
                Some(end) if text[end..range.end].trim().is_empty() => end,
                _ => range.end,
            }
        }
        SpanKind::Content => {
            let next = (0..ids.len()).find(|&i| offsets[i].start >= range.end && !offsets[i].is_empty());
            match next {
                Some(i) if tokenizer.is_special(ids[i]) => offsets[i].end,
                _ => range.end,
            }
        }
    }
}

/// A prompt and completion, or an Alpaca row, as two turns.
fn turns(content: &Content) -> [Value; 2] {
    let (user, assistant) = content.as_pair().unwrap_or_default();
    [message("user", &user), message("assistant", assistant)]
}

/// The prompt of Stanford Alpaca.
fn alpaca(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n\
             ### Input:\n{input}\n\n### Response:\n"
        )
    }
}

fn no_template() -> Error {
    Error::Options("the model has no chat template; give one with --chat-template (a file, or chatml)".into())
}

/// An error of a row, with its place.
fn at(place: &Place, error: Error) -> Error {
    match error {
        Error::Row { .. } => error,
        other => place.error(other.to_string()),
    }
}
