//! How far a merged model is from its base with the adapter: measured on text, before anything is kept.
//!
//! A merge is exact until its last rounding. Where the result is quantized that rounding can be larger than what
//! the adapter learned, and over a quantized base nobody can tell beforehand. So the two models are run side by side.

use crate::Usage;
use crate::args::VerifyArgs;
use crate::dataset::{self, RowSettings};
use crate::scoring;
use crate::terminal::{Note, Progress};
use crate::workbench::{Bench, thousands};
use anyhow::{Result, bail};
use engobe_data::reader::{Content, Form, Row};
use engobe_data::{DataFile, EncodeOptions, Encoder, MicroBatch, Place, PromptStyle, TrainOn};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::tensor::Dtype;
use engobe_models::LoadOptions;
use engobe_train::{Comparison, compare};
use serde_json::{Value, json};
use std::path::Path;

/// Prose, dialogue, code, lists, JSON, three more languages; written for this purpose.
const TEXT: &str = include_str!("verification/text.txt");
/// Stands between its parts.
const BREAK: &str = "\n===\n";

/// Nats a token beyond which a merged model is refused unless `--max-kl` says otherwise.
///
/// Measured on SmolLM2-135M with the demo's adapter and the built-in text: 8 bits 0.006, 6 to 8 bits 0.014 (94 % of the
/// likeliest tokens are the same), 5 bits 0.14 (79 %), 4 bits 0.45 (64 %), and 0.41 for weights that go back to their
/// own 4-bit grid, on which the adapter is rounded away. 0.1 lies between what passes unnoticed and what does not.
pub const MAX_KL: f64 = 0.1;

/// What was measured, and on what.
#[derive(Clone, Debug)]
pub struct Verdict {
    found: Comparison,
    /// how far the adapter itself moves its base, nats a token: what the merge must not lose
    adapter_kl: Option<f64>,
    text: String,
}

impl Verdict {
    /// One line for a person.
    pub fn line(&self) -> String {
        let c = &self.found;
        let (reference, moved) = match self.adapter_kl {
            Some(kl) => ("base + adapter", format!(" (the adapter moves its base by {})", short(kl))),
            None => ("the base", String::new()),
        };
        format!(
            "{reference} and what is written, on {} tokens of {}: mean KL {} nats{moved}, perplexity {:.3} -> {:.3} ({:+.2} %), the same likeliest token at {:.1} %",
            thousands(c.tokens),
            self.text,
            short(c.mean_kl),
            c.reference_perplexity,
            c.candidate_perplexity,
            100.0 * (c.candidate_perplexity / c.reference_perplexity - 1.0),
            100.0 * c.top1_agreement
        )
    }

    /// What a distance beyond the limit means, and what would help.
    fn advice(&self) -> &'static str {
        match self.adapter_kl {
            Some(kl) if self.found.mean_kl > 0.5 * kl => {
                "most of what the adapter does was rounded away, as happens when weights go back to their own grid; a type of more bits keeps it, and a GGUF LoRA (engobe convert --to gguf-lora) loses nothing"
            }
            _ => "a type of more bits loses less",
        }
    }
}

/// A small number with three digits that mean something.
fn short(x: f64) -> String {
    if x < 1e-3 && x > 0.0 { format!("{x:.2e}") } else { format!("{x:.4}") }
}

/// Adds what was measured to what `--json` prints; nulls if nothing was.
pub fn add_to_json(verdict: Option<&Verdict>, json: &mut Value) {
    let of = |value: &dyn Fn(&Comparison) -> Value| verdict.map_or(Value::Null, |v| value(&v.found));
    json["mean_kl"] = of(&|c| json!(c.mean_kl));
    json["max_kl"] = of(&|c| json!(c.max_kl));
    json["perplexity_adapter"] = of(&|c| json!(c.reference_perplexity));
    json["perplexity_merged"] = of(&|c| json!(c.candidate_perplexity));
    json["top1_agreement"] = of(&|c| json!(c.top1_agreement));
    json["adapter_kl"] = json!(verdict.and_then(|v| v.adapter_kl));
    json["verified_tokens"] = of(&|c| json!(c.tokens));
}

/// Wrong uses, before any work is done.
pub fn check_args(args: &VerifyArgs) -> Result<()> {
    match args.max_kl {
        Some(x) if !(x.is_finite() && x >= 0.0) => {
            bail!(Usage(format!("--max-kl {x}: expected a number of nats, 0 or above")))
        }
        _ => Ok(()),
    }
}

/// True if a model's weights, or some of them, are quantized.
pub fn is_quantized(model: &Path) -> Result<bool> {
    let quantized = |dtype: &Dtype| match dtype {
        Dtype::Storage(storage) => storage.is_quantized(),
        Dtype::U8 | Dtype::I8 => true,
        Dtype::Other(_) => false,
    };
    Ok(Checkpoint::open(model)?.tensors().any(|t| quantized(&t.dtype)))
}

/// Runs `reference` (the base, with its adapter if it has one) beside the model in `candidate`. An error if they are
/// too far apart.
pub fn run(args: &VerifyArgs, reference: &Bench, candidate: &Path, note: &mut Note) -> Result<Verdict> {
    let (batches, text) = batches(args, reference, note)?;
    let beside = |path: &Path| -> Result<Comparison> {
        let other = Bench::load(path, None, &LoadOptions::default())?;
        let mut progress = Progress::new("batches", batches.len(), 0, note);
        let mut tell = |done| progress.update(done, || "verifying".to_string());
        Ok(compare(reference.model.as_ref(), other.model.as_ref(), &batches, &mut tell)?)
    };
    let found = beside(candidate)?;
    let adapter_kl = match reference.adapter {
        Some(_) => Some(beside(&reference.path)?.mean_kl),
        None => None,
    };
    let verdict = Verdict { found, adapter_kl, text };
    let most = args.max_kl.unwrap_or(MAX_KL);
    if found.mean_kl > most && !args.accept_drift {
        bail!(
            "{}: more than {most} nats a token (--max-kl), so nothing was written: {}; --accept-drift writes it all the same",
            verdict.line(),
            verdict.advice()
        );
    }
    Ok(verdict)
}

/// What both models read, and what to call it.
fn batches(args: &VerifyArgs, bench: &Bench, note: &mut Note) -> Result<(Vec<MicroBatch>, String)> {
    let vocab = bench.model.info().vocab_size;
    let most = bench.model.info().max_positions;
    if !args.verify_data.is_empty() {
        let settings = RowSettings { train_on: "completions", template: "auto", max_seq_len: most };
        let encoder = settings.encoder(bench.tokenizer.as_ref(), vocab)?;
        let rows = dataset::load(&args.verify_data, &encoder, note)?;
        let names: Vec<String> = args.verify_data.iter().map(|p| p.display().to_string()).collect();
        return Ok((scoring::eval_batches(&rows.samples), names.join(", ")));
    }
    if bench.tokenizer.is_none() {
        bail!(
            "{}: has no tokenizer, so that text cannot be read: give --verify-data with rows of input_ids, or --no-verify",
            bench.path.display()
        );
    }
    let options = EncodeOptions { train_on: TrainOn::All, style: PromptStyle::Plain, max_seq_len: most };
    let row = |(i, text): (usize, &str)| Row {
        place: Place { file: "built-in text".into(), number: i + 1, unit: "part" },
        content: Content::Text(text.trim_end().to_string()),
    };
    let file = DataFile {
        path: "built-in text".into(),
        form: Form::Text { key: "text".to_string() },
        ignored: Vec::new(),
        rows: TEXT.split(BREAK).enumerate().map(row).collect(),
    };
    let samples = Encoder::new(bench.tokenizer.as_ref(), vocab, options)?.encode(&[file])?;
    Ok((scoring::eval_batches(&samples), "built-in text".to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_parts_of_many_kinds() {
        let parts: Vec<&str> = TEXT.split(BREAK).collect();
        assert_eq!(parts.len(), 10);
        assert!(parts.iter().all(|p| p.len() > 150 && !p.contains("===")));
    }

    #[test]
    fn small_numbers_keep_their_digits() {
        for (x, text) in [(0.0, "0.0000"), (0.12345, "0.1235"), (3.1e-7, "3.10e-7")] {
            assert_eq!(short(x), text);
        }
    }
}
