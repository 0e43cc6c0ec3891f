//! Checks before the first step, for what spoils a run without an error message.
//!
//! A model that never learns to stop, rows without labels, a doubled BOS: each has cost people days (PROMISES 8
//! and 9). Errors stop a run unless `--allow` names them; warnings are printed.

use crate::{Error, Result, Sample, TextTokenizer};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::str::FromStr;

/// What can be wrong with rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LintKind {
    /// rows without a single label
    AllMaskedRows,
    /// no row has an end-of-turn token or EOS as a label: the model will not learn to stop
    EotNeverLabel,
    /// the template ends turns with a token at which generation does not stop
    EotNotAStopToken,
    /// rows that begin with BOS twice
    DoubleBos,
    /// rows cut by `max_seq_len`
    TruncatedRows,
    /// rows of fewer than two tokens
    EmptyRows,
    /// rows whose only label is the end of the turn
    EmptyCompletions,
    /// rows that stand there more than once
    DuplicateRows,
    /// training rows that are validation rows too
    ValOverlap,
    /// all rows have one label
    OneClass,
    /// nearly all rows have one label
    ClassImbalance,
    /// validation rows with a label that no training row has
    UnseenLabel,
    /// a text that has two labels
    ConflictingLabels,
}

/// What a finding does to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// stops it, unless allowed
    Error,
    /// is printed
    Warning,
}

impl LintKind {
    /// All kinds.
    pub const ALL: [Self; 13] = [
        Self::AllMaskedRows,
        Self::EotNeverLabel,
        Self::EotNotAStopToken,
        Self::DoubleBos,
        Self::TruncatedRows,
        Self::EmptyRows,
        Self::EmptyCompletions,
        Self::DuplicateRows,
        Self::ValOverlap,
        Self::OneClass,
        Self::ClassImbalance,
        Self::UnseenLabel,
        Self::ConflictingLabels,
    ];

    /// Its name for `--allow`. Names do not change.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllMaskedRows => "all-masked-rows",
            Self::EotNeverLabel => "eot-never-label",
            Self::EotNotAStopToken => "eot-not-a-stop-token",
            Self::DoubleBos => "double-bos",
            Self::TruncatedRows => "truncated-rows",
            Self::EmptyRows => "empty-rows",
            Self::EmptyCompletions => "empty-completions",
            Self::DuplicateRows => "duplicate-rows",
            Self::ValOverlap => "val-overlap",
            Self::OneClass => "one-class",
            Self::ClassImbalance => "class-imbalance",
            Self::UnseenLabel => "unseen-label",
            Self::ConflictingLabels => "conflicting-labels",
        }
    }

    /// What a finding of this kind does to a run.
    pub fn severity(self) -> Severity {
        match self {
            Self::AllMaskedRows
            | Self::EotNeverLabel
            | Self::DoubleBos
            | Self::EmptyRows
            | Self::ValOverlap
            | Self::OneClass
            | Self::UnseenLabel => Severity::Error,
            _ => Severity::Warning,
        }
    }
}

impl FromStr for LintKind {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == s).ok_or_else(|| {
            let distance = |kind: &Self| strsim::damerau_levenshtein(kind.name(), s);
            let near = Self::ALL.into_iter().min_by_key(distance).map_or("", Self::name);
            let names = Self::ALL.map(Self::name).join(", ");
            Error::Options(format!("--allow {s:?}: is {near:?} meant? Known are {names}"))
        })
    }
}

/// What the checks need to know beside the rows.
#[derive(Clone, Debug, Default)]
pub struct LintContext {
    /// EOS and the end-of-turn tokens of the chat template; empty where unknown
    pub eot_ids: Vec<u32>,
    /// ids at which generation stops; empty where unknown
    pub stop_ids: Vec<u32>,
    /// end-of-turn tokens of the chat template, if the rows are chats
    pub template_eot_ids: Option<Vec<u32>>,
    /// beginning of sequence
    pub bos: Option<u32>,
    /// where rows are cut
    pub max_seq_len: usize,
    /// the rows came as token ids: how they end is the user's own doing, and only a warning
    pub tokenized: bool,
}

impl LintContext {
    /// The context of rows that `encoder` made of `files`.
    pub fn of(
        encoder: &crate::Encoder,
        files: &[crate::DataFile],
        tokenizer: Option<&TextTokenizer>,
        max_seq_len: usize,
    ) -> Self {
        let contents = || files.iter().flat_map(|file| &file.rows).map(|row| &row.content);
        let tokenized = contents().all(|c| matches!(c, crate::Content::Tokens { .. }));
        let is_chat = contents().any(|c| encoder.is_chat(c));
        let template_eot_ids = is_chat.then(|| encoder.end_of_turn());
        let mut eot_ids: Vec<u32> = tokenizer.and_then(TextTokenizer::eos).into_iter().collect();
        eot_ids.extend(template_eot_ids.iter().flatten());
        Self {
            eot_ids,
            stop_ids: tokenizer.map(|t| t.end_ids().to_vec()).unwrap_or_default(),
            template_eot_ids,
            bos: tokenizer.and_then(TextTokenizer::bos),
            max_seq_len,
            tokenized,
        }
    }
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// what
    pub kind: LintKind,
    /// how bad
    pub severity: Severity,
    /// rows concerned
    pub count: usize,
    /// places of the first few
    pub rows: Vec<String>,
    /// one line for a person
    pub message: String,
}

/// Everything found, errors first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LintReport {
    /// the findings
    pub findings: Vec<Finding>,
}

impl LintReport {
    /// The errors that `allow` does not name.
    pub fn errors<'a>(&'a self, allow: &'a [LintKind]) -> impl Iterator<Item = &'a Finding> {
        self.findings.iter().filter(|f| f.severity == Severity::Error && !allow.contains(&f.kind))
    }
}

/// Rows named in a finding.
const NAMED: usize = 3;

/// Checks the rows to be trained on, and that none of them is a validation row.
pub fn lint(samples: &[Sample], val_samples: &[Sample], context: &LintContext) -> LintReport {
    let mut report = Reporter::new(samples.len());
    let is_empty = |s: &&Sample| s.ids.len() < 2;
    let is_masked = |s: &&Sample| s.label_tokens() == 0;
    report.rows(
        LintKind::EmptyRows,
        samples.iter().filter(is_empty),
        "have fewer than two tokens: there is nothing to predict",
    );
    let masked: Vec<&Sample> = samples.iter().filter(|s| !is_empty(s) && is_masked(s)).collect();
    let cut = masked.iter().filter(|s| s.truncated > 0).count();
    let why = match cut {
        0 => "have no label: nothing is learned from them".to_owned(),
        n => format!(
            "have no label, {n} of them because max_seq_len {} cuts the completion off",
            context.max_seq_len
        ),
    };
    report.rows(LintKind::AllMaskedRows, masked.into_iter(), &why);
    stopping(&mut report, samples, context);
    let double = |s: &&Sample| context.bos.is_some_and(|bos| s.ids.starts_with(&[bos, bos]));
    report.rows(
        LintKind::DoubleBos,
        samples.iter().filter(double),
        "begin with BOS twice; remove it from the data or the chat template",
    );
    report.truncated(samples, context.max_seq_len);
    repeats(&mut report, samples, val_samples);
    report.finish()
}

/// Will the model learn to stop?
fn stopping(report: &mut Reporter, samples: &[Sample], context: &LintContext) {
    let ends = |label: &Option<u32>| label.is_some_and(|id| context.eot_ids.contains(&id));
    let knows = !context.eot_ids.is_empty() || !context.tokenized;
    let labelled: Vec<&Sample> = samples.iter().filter(|s| s.label_tokens() > 0).collect();
    if knows && !labelled.is_empty() && !labelled.iter().any(|s| s.labels.iter().skip(1).any(ends)) {
        let why = match &context.template_eot_ids {
            Some(ids) if ids.is_empty() => {
                "the chat template ends the assistant's turns with no special token of this tokenizer"
            }
            Some(_) if labelled.iter().all(|s| s.truncated > 0) => "max_seq_len cuts the end off every row",
            Some(_) => "the chat template's labels leave it out",
            None if context.eot_ids.is_empty() => "the tokenizer has no EOS",
            None => "no row has EOS as a label",
        };
        let message =
            format!("the end of a turn is never a label, so the model will not learn to stop: {why}");
        let severity = if context.tokenized { Severity::Warning } else { LintKind::EotNeverLabel.severity() };
        report.push(LintKind::EotNeverLabel, severity, labelled.iter().copied(), message);
    }
    if let Some(eot) = context.template_eot_ids.as_ref().filter(|ids| !ids.is_empty())
        && !context.stop_ids.is_empty()
        && !eot.iter().any(|id| context.stop_ids.contains(id))
    {
        let message = format!(
            "the chat template ends turns with token {}, but generation stops at {:?}: it will run on; set eos_token_id \
             in generation_config.json",
            eot[0], context.stop_ids
        );
        report.push(LintKind::EotNotAStopToken, Severity::Warning, samples.iter(), message);
    }
    let only_end = |s: &&Sample| {
        s.label_tokens() > 0 && s.truncated == 0 && s.labels.iter().skip(1).filter(|l| l.is_some()).all(ends)
    };
    report.rows(
        LintKind::EmptyCompletions,
        samples.iter().filter(only_end),
        "have nothing but the end of the turn as label: they teach to say nothing",
    );
}

/// Rows that stand there twice, and validation rows that are training rows.
pub(crate) fn repeats(report: &mut Reporter, samples: &[Sample], val_samples: &[Sample]) {
    let mut seen: HashMap<u64, Vec<&Sample>> = HashMap::new();
    let mut duplicates = Vec::new();
    for sample in samples.iter().filter(|s| s.ids.len() >= 2) {
        let same = seen.entry(hash(sample)).or_default();
        match same.iter().find(|other| same_row(other, sample)) {
            Some(_) => duplicates.push(sample),
            None => same.push(sample),
        }
    }
    report.rows(LintKind::DuplicateRows, duplicates.into_iter(), "repeat an earlier row");
    let in_training =
        |val: &&Sample| seen.get(&hash(val)).is_some_and(|same| same.iter().any(|s| same_row(s, val)));
    let overlap: Vec<&Sample> = val_samples.iter().filter(in_training).collect();
    if !overlap.is_empty() {
        let message = format!(
            "{} of {} validation rows are training rows too ({}): the validation loss would measure memory",
            overlap.len(),
            val_samples.len(),
            places(&overlap)
        );
        report.push(LintKind::ValOverlap, LintKind::ValOverlap.severity(), overlap.into_iter(), message);
    }
}

fn same_row(a: &Sample, b: &Sample) -> bool {
    a.ids == b.ids && a.labels == b.labels && a.goal == b.goal
}

fn hash(sample: &Sample) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&sample.ids, &sample.labels).hash(&mut hasher);
    hasher.finish()
}

fn places(rows: &[&Sample]) -> String {
    let more = if rows.len() > NAMED { ", ..." } else { "" };
    rows.iter().take(NAMED).map(|s| s.place.to_string()).collect::<Vec<_>>().join(", ") + more
}

/// Collects findings.
pub(crate) struct Reporter {
    findings: Vec<Finding>,
    total: usize,
}

impl Reporter {
    /// Of `total` rows.
    pub(crate) fn new(total: usize) -> Self {
        Self { findings: Vec::new(), total }
    }

    /// The report, errors first.
    pub(crate) fn finish(mut self) -> LintReport {
        self.findings.sort_by_key(|f| f.severity == Severity::Warning);
        LintReport { findings: self.findings }
    }

    /// Rows that were cut.
    pub(crate) fn truncated(&mut self, samples: &[Sample], max_seq_len: usize) {
        let tokens: usize = samples.iter().map(|s| s.truncated).sum();
        let why = format!("are longer than max_seq_len {max_seq_len}: {tokens} tokens are cut off");
        self.rows(LintKind::TruncatedRows, samples.iter().filter(|s| s.truncated > 0), &why);
    }

    /// A finding about rows, if there are any.
    pub(crate) fn rows<'a>(&mut self, kind: LintKind, rows: impl Iterator<Item = &'a Sample>, what: &str) {
        let rows: Vec<&Sample> = rows.collect();
        if !rows.is_empty() {
            let message = format!("{} of {} rows {what} ({})", rows.len(), self.total, places(&rows));
            self.push(kind, kind.severity(), rows.into_iter(), message);
        }
    }

    /// A finding with its own words.
    pub(crate) fn push<'a>(
        &mut self,
        kind: LintKind,
        severity: Severity,
        rows: impl Iterator<Item = &'a Sample>,
        message: String,
    ) {
        let rows: Vec<&Sample> = rows.collect();
        let named = rows.iter().take(NAMED).map(|s| s.place.to_string()).collect();
        self.findings.push(Finding { kind, severity, count: rows.len(), rows: named, message });
    }
}

/// A row's tokens as text, each with whether it is a label. Halves of characters show as their bytes.
pub fn show(sample: &Sample, tokenizer: Option<&TextTokenizer>) -> Vec<(String, bool)> {
    let text = |id: u32| match tokenizer.and_then(|t| t.token_bytes(id)) {
        None => format!("[{id}]"),
        Some(bytes) => String::from_utf8(bytes)
            .unwrap_or_else(|e| e.as_bytes().iter().map(|b| format!("\\x{b:02x}")).collect::<String>()),
    };
    sample.ids.iter().zip(&sample.labels).map(|(&id, label)| (text(id), label.is_some())).collect()
}
