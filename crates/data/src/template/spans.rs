//! Where the assistant speaks in a rendered chat.
//!
//! Templates with `{% generation %}` blocks say it themselves. For the others it follows from two renderings of the
//! beginning of the conversation: the messages before an assistant's turn, with the generation prompt, end where the
//! turn begins; the messages up to and with the turn end where it ends. Both must be beginnings of the whole text.
//! Templates that break this (they drop the thoughts of earlier turns, or move the system prompt to the last user
//! turn) are asked in a second way: the turn's content is rendered between two marks; if the text without the marks
//! is the same, the marks tell where it stands.

use super::{ChatTemplate, Json, normalized};
use crate::{Error, Result};
use std::ops::Range;

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// the whole text
    pub text: String,
    /// what the assistant says, in order
    pub spans: Vec<Span>,
}

/// One stretch of the assistant's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// index of the message
    pub message: usize,
    /// bytes of the text
    pub range: Range<usize>,
    /// how it was found, and so where it ends
    pub kind: SpanKind,
}

/// How a span was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// a `{% generation %}` block: exactly what is to be learned
    Block,
    /// the whole turn, up to where the next one begins: whitespace may follow its end-of-turn token
    Turn,
    /// its content: the end-of-turn token that follows belongs to the turn too
    Content,
}

impl ChatTemplate {
    /// Renders a conversation and finds the assistant's turns in it.
    pub fn render_with_spans(&self, messages: &[Json], tools: Option<&Json>) -> Result<Rendered> {
        let messages = normalized(messages);
        let text = self.render_marked(&messages, tools, false, None)?;
        let assistants: Vec<usize> =
            (0..messages.len()).filter(|&i| messages[i]["role"].as_str() == Some("assistant")).collect();
        let spans = if self.has_generation {
            self.turns_of_blocks(&messages, tools, &text, &assistants)?
        } else {
            let find = |&i: &usize| self.turn(&messages, tools, &text, i);
            assistants.iter().map(find).collect::<Result<Vec<_>>>()?
        };
        Ok(Rendered { text, spans })
    }

    /// Spans of `{% generation %}` blocks. A turn can have several.
    fn turns_of_blocks(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        text: &str,
        assistants: &[usize],
    ) -> Result<Vec<Span>> {
        let ranges = self.blocks(messages, tools)?;
        let span =
            |message, range: &Range<usize>| Span { message, range: range.clone(), kind: SpanKind::Block };
        debug_assert!(ranges.iter().all(|r| r.end <= text.len()));
        if ranges.len() == assistants.len() {
            return Ok(assistants
                .iter()
                .zip(&ranges)
                .map(|(&message, range)| span(message, range))
                .collect());
        }
        // several blocks a turn, or none: count them in the beginnings of the conversation
        let mut spans = Vec::with_capacity(ranges.len());
        for &message in assistants {
            let until = match message + 1 == messages.len() {
                true => ranges.len(),
                false => self.blocks(&messages[..=message], tools)?.len().min(ranges.len()),
            };
            spans.extend(ranges[spans.len().min(until)..until].iter().map(|range| span(message, range)));
        }
        Ok(spans)
    }

    fn blocks(&self, messages: &[Json], tools: Option<&Json>) -> Result<Vec<Range<usize>>> {
        let (open, close) = unused_marks(messages);
        let marked = self.render_marked(messages, tools, false, Some((&open, &close)))?;
        let mut ranges = Vec::new();
        let (mut at, mut rest) = (0, marked.as_str());
        while let Some((before, after)) = rest.split_once(&open) {
            let Some((body, after)) = after.split_once(&close) else { break };
            let start = at + before.len();
            at = start + body.len();
            ranges.push(start..at);
            rest = after;
        }
        Ok(ranges)
    }

    /// The turn of message `i`.
    fn turn(&self, messages: &[Json], tools: Option<&Json>, text: &str, i: usize) -> Result<Span> {
        let beginning = |messages: &[Json], prompt: bool| -> Option<usize> {
            let part = self.render_marked(messages, tools, prompt, None).ok()?;
            text.starts_with(&part).then_some(part.len())
        };
        let last = i + 1 == messages.len();
        let start = if i == 0 { None } else { beginning(&messages[..i], true) };
        let end = if last { Some(text.len()) } else { beginning(&messages[..=i], false) };
        if let (Some(start), Some(end)) = (start, end)
            && start <= end
        {
            return Ok(Span { message: i, range: start..end, kind: SpanKind::Turn });
        }
        let content = self.content(messages, tools, text, i);
        // that the text ends with the last turn is known only if it also begins as it should
        let end = end.filter(|_| !last);
        let kind = if end.is_some() { SpanKind::Turn } else { SpanKind::Content };
        let (start, end) = (start.or(content.start), end.or(content.end));
        match (start, end) {
            (Some(start), Some(end)) if start <= end => Ok(Span { message: i, range: start..end, kind }),
            _ => Err(Error::Template {
                line: None,
                what: format!(
                    "cannot tell which part of the text is message {} (an assistant's): the template renders it \
                     differently within the conversation; put {{% generation %}} ... {{% endgeneration %}} around \
                     the assistant's output in the template, or use --train-on all",
                    i + 1
                ),
            }),
        }
    }

    /// Where the content of message `i` begins and ends in `text`, each as far as it can be told.
    fn content(&self, messages: &[Json], tools: Option<&Json>, text: &str, i: usize) -> Ends {
        let mut ends = Ends::default();
        let Some(content) = messages[i]["content"].as_str() else { return ends };
        let (open, close) = unused_marks(messages);
        // as it is, and without the outer whitespace that many templates strip
        for content in [content, content.trim()] {
            let position = |before: &str, after: &str, mark: &str| {
                let mut marked = messages.to_vec();
                marked[i]["content"] = Json::from(format!("{before}{content}{after}"));
                let rendered = self.render_marked(&marked, tools, false, None).ok()?;
                let at = rendered.find(mark)?;
                (rendered.replacen(mark, "", 1) == text).then_some(at)
            };
            ends.start = ends.start.or_else(|| position(&open, "", &open));
            ends.end = ends.end.or_else(|| position("", &close, &close));
        }
        ends
    }
}

#[derive(Default)]
struct Ends {
    start: Option<usize>,
    end: Option<usize>,
}

/// Two marks that the conversation does not contain. U+FDD0 and U+FDD1 are set aside by Unicode for internal use.
fn unused_marks(messages: &[Json]) -> (String, String) {
    let text = messages.iter().map(ToString::to_string).collect::<String>();
    let mut n = 1;
    loop {
        let (open, close) = ("\u{fdd0}".repeat(n), "\u{fdd1}".repeat(n));
        if !text.contains(&open) && !text.contains(&close) {
            return (open, close);
        }
        n += 1;
    }
}
