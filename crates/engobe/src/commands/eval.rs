//! `engobe eval`

use crate::args::EvalArgs;
use crate::dataset::{self, RowSettings};
use crate::terminal::{Note, Progress, print, print_json};
use crate::workbench::{self, Bench};
use crate::{memory, scoring};
use anyhow::{Result, bail};
use engobe_data::Prompt;
use engobe_train::evaluate;
use serde_json::json;

/// Scores a model on rows.
pub fn run(args: &EvalArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    let mut bench = Bench::open(&args.model, &args.common, &mut note)?;
    workbench::set_chat_template(bench.tokenizer.as_mut(), args.rows.chat_template.as_deref())?;
    let settings = RowSettings {
        train_on: &args.rows.train_on,
        template: &args.rows.template,
        max_seq_len: args.max_seq_len,
    };
    let encoder = settings.encoder(bench.tokenizer.as_ref(), bench.model.info().vocab_size)?;
    let rows = dataset::load(&args.rows.data, &encoder, &mut note)?;
    let batches = scoring::eval_batches(&rows.samples);
    let mut progress = Progress::new("batches", batches.len(), 0, &note);
    let found = evaluate(bench.model.as_ref(), &batches, None, &mut |done| {
        progress.update(done, || "measuring the loss".to_string())
    })?;
    drop(progress);
    let exact = match args.exact_match {
        true => {
            let mut prompts: Vec<Prompt> = Vec::new();
            for row in rows.files.iter().flat_map(|f| &f.rows) {
                prompts.extend(encoder.prompt(row)?);
            }
            if prompts.is_empty() {
                bail!("--exact-match needs rows with a prompt and a completion; these have none");
            }
            let mut progress = Progress::new("rows", prompts.len(), 0, &note);
            let mut tell = |done| progress.update(done, || "completing".to_string());
            let (_, hits) = scoring::exact_matches(&bench, &prompts, args.max_new_tokens, &mut tell)?;
            Some((hits, prompts.len()))
        }
        false => None,
    };
    if args.common.json {
        return print_json(&json!({
            "loss": found.loss,
            "perplexity": found.perplexity,
            "token_accuracy": found.token_accuracy,
            "label_tokens": found.label_tokens,
            "rows": rows.samples.len(),
            "peak_rss_bytes": memory::peak_resident_bytes(),
            "exact_match": exact.map(|(hits, of)| hits as f64 / of as f64),
        }));
    }
    let mut text = format!(
        "loss {:.4} · perplexity {:.3} · token accuracy {:.2} % · {} rows, {} labels\n",
        found.loss,
        found.perplexity,
        100.0 * found.token_accuracy,
        rows.samples.len(),
        found.label_tokens
    );
    if let Some((hits, of)) = exact {
        text += &format!("exact match {hits} of {of} ({:.1} %)\n", 100.0 * hits as f64 / of as f64);
    }
    print(&text)
}
