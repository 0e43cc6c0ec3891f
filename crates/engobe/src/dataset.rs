//! Rows on their way to samples, with what is said about them.

use crate::Usage;
use crate::terminal::Note;
use anyhow::{Result, bail};
use engobe_data::{
    DataFile, EncodeOptions, Encoder, LintContext, LintKind, LintReport, Sample, TextTokenizer, lint, reader,
};
use std::path::PathBuf;

/// How rows become samples.
pub struct RowSettings<'a> {
    /// `--train-on`
    pub train_on: &'a str,
    /// `--template`
    pub template: &'a str,
    /// `--max-seq-len`
    pub max_seq_len: usize,
}

impl RowSettings<'_> {
    fn options(&self) -> Result<EncodeOptions> {
        let usage = |e: engobe_data::Error| Usage(e.to_string());
        Ok(EncodeOptions {
            train_on: self.train_on.parse().map_err(usage)?,
            style: self.template.parse().map_err(usage)?,
            max_seq_len: self.max_seq_len,
        })
    }

    /// The encoder for a model's tokenizer and vocabulary.
    pub fn encoder<'t>(
        &self,
        tokenizer: Option<&'t TextTokenizer>,
        vocab_size: usize,
    ) -> Result<Encoder<'t>> {
        Ok(Encoder::new(tokenizer, vocab_size, self.options()?)?)
    }
}

/// Files read and encoded: one sample a row, in the same order.
#[derive(Default)]
pub struct Dataset {
    /// the files, row by row
    pub files: Vec<DataFile>,
    /// their rows as tokens and labels
    pub samples: Vec<Sample>,
}

impl Dataset {
    /// Takes out the rows that are `chosen`.
    pub fn take(&mut self, chosen: &[bool]) -> Self {
        let mut at = chosen.iter().copied();
        let mut taken = Self::default();
        for file in &mut self.files {
            let rows = std::mem::take(&mut file.rows);
            let (out, stay): (Vec<_>, Vec<_>) = rows.into_iter().partition(|_| at.next().unwrap_or(false));
            file.rows = stay;
            taken.files.push(DataFile {
                path: file.path.clone(),
                form: file.form.clone(),
                ignored: Vec::new(),
                rows: out,
            });
        }
        let mut at = chosen.iter().copied();
        let samples = std::mem::take(&mut self.samples);
        (taken.samples, self.samples) = samples.into_iter().partition(|_| at.next().unwrap_or(false));
        taken
    }
}

/// Reads and encodes rows, and says what they were taken for.
pub fn load(paths: &[PathBuf], encoder: &Encoder<'_>, note: &mut Note) -> Result<Dataset> {
    let files = reader::read(paths)?;
    for file in &files {
        note.line(&file.describe());
    }
    let samples = encoder.encode(&files)?;
    let cut: usize = samples.iter().filter(|s| s.truncated > 0).count();
    if cut > 0 {
        let tokens: usize = samples.iter().map(|s| s.truncated).sum();
        note.line(&format!(
            "{cut} of {} rows are cut at max_seq_len: {tokens} tokens are lost",
            samples.len()
        ));
    }
    Ok(Dataset { files, samples })
}

/// Names of `--allow`.
pub fn allowed(names: &[String]) -> Result<Vec<LintKind>> {
    Ok(names
        .iter()
        .map(|n| n.parse().map_err(|e: engobe_data::Error| Usage(e.to_string())))
        .collect::<Result<_, _>>()?)
}

/// Looks at the rows as training would.
pub fn check(
    train: &Dataset,
    val: &[Sample],
    encoder: &Encoder<'_>,
    tokenizer: Option<&TextTokenizer>,
    max_seq_len: usize,
) -> LintReport {
    let context = LintContext::of(encoder, &train.files, tokenizer, max_seq_len);
    lint(&train.samples, val, &context)
}

/// Prints findings; errors that are not allowed end the run.
pub fn enforce(report: &LintReport, allow: &[LintKind], note: &mut Note) -> Result<()> {
    let errors: Vec<_> = report.errors(allow).collect();
    for finding in &report.findings {
        if !errors.iter().any(|e| std::ptr::eq(*e, finding)) {
            note.line(&format!("{}: {}", finding.kind.name(), finding.message));
        }
    }
    match errors.as_slice() {
        [] => Ok(()),
        [first, rest @ ..] => {
            let others: Vec<&str> = rest.iter().map(|f| f.kind.name()).collect();
            let more =
                if others.is_empty() { String::new() } else { format!(" (also: {})", others.join(", ")) };
            let name = first.kind.name();
            bail!("the rows: {name}: {}{more}; --allow {name} trains all the same", first.message)
        }
    }
}
