//! Scores of texts that a model made, and what `eval` prints of a model that makes texts.

use crate::args::EvalArgs;
use crate::terminal::{print, print_json};
use crate::{Usage, memory};
use anyhow::{Result, bail};
use engobe_formats::atomic::write_atomic;
use engobe_metrics::text;
use engobe_train::Evaluation;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Scores of completions; the others need no generation.
const OF_TEXTS: [&str; 3] = ["exact_match", "bleu", "rouge_l"];
const OF_TOKENS: [&str; 3] = ["loss", "perplexity", "token_accuracy"];

/// The scores that need completions, of those that were asked for.
///
/// # Errors
/// A score that there is none of; `of` is what is scored, in words.
pub fn wanted(args: &EvalArgs, of: &str) -> Result<Vec<&'static str>> {
    let known = [&OF_TOKENS[..], &OF_TEXTS].concat();
    if let Some(name) = args.metrics.iter().find(|m| !known.iter().any(|k| is_called(k, m))) {
        bail!(Usage(format!("--metrics {name}: for {of} there are {}", known.join(", "))));
    }
    let asked = |name: &&str| {
        args.metrics.iter().any(|m| is_called(name, m)) || (*name == "exact_match" && args.exact_match)
    };
    Ok(OF_TEXTS.into_iter().filter(|name| asked(name)).collect())
}

/// True if somebody who writes `typed` means the score `name`: rouge-l and rougeL are rouge_l.
fn is_called(name: &str, typed: &str) -> bool {
    let letters = |s: &str| -> Vec<char> {
        s.chars().filter(|c| !"-_ ".contains(*c)).map(|c| c.to_ascii_lowercase()).collect()
    };
    letters(name) == letters(typed)
}

/// For each row its own completion, if it has one, and the model's.
#[derive(Default)]
pub struct Completed(pub Vec<(Option<String>, String)>);

impl Completed {
    /// Number of rows that can be scored.
    pub fn scored(&self) -> usize {
        self.0.iter().filter(|(expected, _)| expected.is_some()).count()
    }

    /// Scores by name.
    pub fn scores(&self, wanted: &[&'static str]) -> Vec<(&'static str, f64)> {
        let both = |(expected, said): &'_ (Option<String>, String)| Some((expected.clone()?, said.clone()));
        let (expected, said): (Vec<String>, Vec<String>) = self.0.iter().filter_map(both).unzip();
        let score = |name: &'static str| match name {
            "exact_match" => text::exact_match(&expected, &said),
            "bleu" => text::bleu(&expected, &said),
            _ => text::rouge_l(&expected, &said),
        };
        wanted.iter().map(|name| (*name, score(name))).collect()
    }

    /// Writes a line of JSON a row.
    pub fn write(&self, file: &Path) -> Result<()> {
        let line = |(expected, said): &(Option<String>, String)| {
            format!("{}\n", json!({ "completion": expected, "prediction": said }))
        };
        let lines: String = self.0.iter().map(line).collect();
        Ok(write_atomic(file, lines.as_bytes())?)
    }
}

/// Prints what was found of `rows` rows; `scores` are of `completions` of them.
pub fn show(
    as_json: bool,
    found: &Evaluation,
    rows: usize,
    scores: &[(&'static str, f64)],
    completions: usize,
) -> Result<()> {
    if as_json {
        let mut json = json!({
            "loss": found.loss,
            "perplexity": found.perplexity,
            "token_accuracy": found.token_accuracy,
            "label_tokens": found.label_tokens,
            "rows": rows,
            "peak_rss_bytes": memory::peak_resident_bytes(),
            "exact_match": Value::Null,
        });
        let scores = scores.iter().map(|(name, score)| ((*name).to_string(), json!(score)));
        json.as_object_mut().unwrap_or(&mut Map::new()).extend(scores);
        return print_json(&json);
    }
    let mut text = format!(
        "loss {:.4} · perplexity {:.3} · token accuracy {:.2} % · {rows} rows, {} labels\n",
        found.loss,
        found.perplexity,
        100.0 * found.token_accuracy,
        found.label_tokens
    );
    for (name, score) in scores {
        text += &match *name {
            "exact_match" => {
                let hits = score * completions as f64;
                format!("exact match {hits:.0} of {completions} ({:.1} %)\n", 100.0 * score)
            }
            "bleu" => format!("BLEU {score:.2}\n"),
            _ => format!("ROUGE-L {:.2} %\n", 100.0 * score),
        };
    }
    print(&text)
}
