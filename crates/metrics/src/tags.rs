//! Spans in sequences of tags (`B-PER`, `I-PER`, `O`): seqeval's F1 in its default, conlleval's, reading.
//!
//! A span that begins with `I-` counts, as does one whose type changes in the middle; `E-` and `S-` of the other
//! schemes are understood.

use crate::{Counts, Score, mean};
use std::collections::{BTreeMap, BTreeSet};

/// F1 of spans.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SpanScores {
    /// over all spans alike
    pub micro: Score,
    /// over types alike
    pub macro_: Score,
    /// each type that was there or predicted, in order
    pub per_type: Vec<(String, Score)>,
    /// share of tags that are right
    pub accuracy: f64,
}

/// A span: type, first and last tag.
type Span<'a> = (&'a str, usize, usize);

/// Scores sequences of tags against the labels; pairs of sequences have one length.
pub fn score<L: AsRef<str>, P: AsRef<str>>(labels: &[Vec<L>], predicted: &[Vec<P>]) -> SpanScores {
    let mut counts: BTreeMap<&str, Counts> = BTreeMap::new();
    let (mut right, mut tags) = (0, 0);
    for (labels, guesses) in labels.iter().zip(predicted) {
        let labels: Vec<&str> = labels.iter().map(AsRef::as_ref).collect();
        let guesses: Vec<&str> = guesses.iter().map(AsRef::as_ref).collect();
        right += labels.iter().zip(&guesses).filter(|(a, b)| a == b).count();
        tags += labels.len();
        let (actual, found) = (spans(&labels), spans(&guesses));
        for span in &actual {
            counts.entry(span.0).or_default().actual += 1;
        }
        for span in &found {
            let count = counts.entry(span.0).or_default();
            count.predicted += 1;
            count.hits += usize::from(actual.contains(span));
        }
    }
    let mut all = Counts::default();
    counts.values().for_each(|c| all.add(*c));
    let per_type: Vec<(String, Score)> =
        counts.into_iter().map(|(t, c)| (t.to_string(), c.score())).collect();
    let scores: Vec<Score> = per_type.iter().map(|(_, s)| *s).collect();
    SpanScores {
        micro: all.score(),
        macro_: mean(&scores),
        per_type,
        accuracy: right as f64 / tags.max(1) as f64,
    }
}

/// The spans of one sequence.
fn spans<'a>(tags: &[&'a str]) -> BTreeSet<Span<'a>> {
    let mut found = BTreeSet::new();
    let (mut before, mut type_before, mut begun) = ('O', "", 0);
    for (i, tag) in tags.iter().copied().chain(["O"]).enumerate() {
        let (prefix, kind) = split(tag);
        if ends(before, prefix, type_before, kind) {
            found.insert((type_before, begun, i - 1));
        }
        if begins(before, prefix, type_before, kind) {
            begun = i;
        }
        (before, type_before) = (prefix, kind);
    }
    found
}

/// Prefix and type of a tag: `B-LOC-x` is `B` and `LOC-x`; a tag without type has the type `_`.
fn split(tag: &str) -> (char, &str) {
    let mut chars = tag.chars();
    let prefix = chars.next().unwrap_or('O');
    let rest = chars.as_str();
    let kind = rest.split_once('-').map_or(rest, |(_, kind)| kind);
    (prefix, if kind.is_empty() { "_" } else { kind })
}

fn ends(before: char, tag: char, type_before: &str, kind: &str) -> bool {
    matches!((before, tag), ('E' | 'S', _) | ('B' | 'I', 'B' | 'S' | 'O'))
        || (before != 'O' && before != '.' && type_before != kind)
}

fn begins(before: char, tag: char, type_before: &str, kind: &str) -> bool {
    matches!((before, tag), (_, 'B' | 'S') | ('E' | 'S' | 'O', 'E' | 'I'))
        || (tag != 'O' && tag != '.' && type_before != kind)
}
