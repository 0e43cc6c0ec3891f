//! `engobe eval`

use crate::args::EvalArgs;
use crate::dataset::{self, Dataset, RowSettings};
use crate::terminal::{Note, Progress, print, print_json};
use crate::workbench::{self, Bench};
use crate::{Usage, memory, scoring, tasks};
use anyhow::{Result, bail};
use engobe_data::{Encoder, Prompt, Task};
use engobe_formats::atomic::write_atomic;
use engobe_metrics::text;
use engobe_train::evaluate;
use serde_json::{Map, Value, json};

/// Scores of completions; the others need no generation.
const OF_TEXTS: [&str; 3] = ["exact_match", "bleu", "rouge_l"];
const OF_TOKENS: [&str; 3] = ["loss", "perplexity", "token_accuracy"];

/// Scores a model on rows.
pub fn run(args: &EvalArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    workbench::set_threads(args.model.threads)?;
    let path = workbench::resolve(&args.model.model, &args.common, &mut note)?;
    let adapter = workbench::one_adapter(&args.model)?;
    let hints = tasks::Hints {
        asked: args.task.as_deref(),
        model: &path,
        adapter: adapter.as_deref(),
        data: &args.rows.data,
    };
    match tasks::choose(&hints, &mut note)? {
        Task::CausalLm => next_tokens(args, &mut note),
        task => {
            let options = workbench::options_of(&args.model)?;
            tasks::eval::run(args, task, &path, adapter.as_deref(), &options, &mut note)
        }
    }
}

/// Scores a decoder.
fn next_tokens(args: &EvalArgs, note: &mut Note) -> Result<()> {
    let known = [&OF_TOKENS[..], &OF_TEXTS].concat();
    if let Some(name) = args.metrics.iter().find(|m| !known.contains(&m.as_str())) {
        bail!(Usage(format!("--metrics {name}: for next tokens there are {}", known.join(", "))));
    }
    let mut bench = Bench::open(&args.model, &args.common, note)?;
    workbench::set_chat_template(bench.tokenizer.as_mut(), args.rows.chat_template.as_deref())?;
    let settings = RowSettings {
        train_on: &args.rows.train_on,
        template: &args.rows.template,
        max_seq_len: args.max_seq_len,
    };
    let encoder = settings.encoder(bench.tokenizer.as_ref(), bench.model.info().vocab_size)?;
    let rows = dataset::load(&args.rows.data, &encoder, note)?;
    let batches = scoring::eval_batches(&rows.samples);
    let mut progress = Progress::new("batches", batches.len(), 0, note);
    let found = evaluate(bench.model.as_ref(), &batches, None, &mut |done| {
        progress.update(done, || "measuring the loss".to_string())
    })?;
    drop(progress);
    let of_texts =
        |name: &&str| args.metrics.iter().any(|m| m == name) || (*name == "exact_match" && args.exact_match);
    let wanted: Vec<&str> = OF_TEXTS.into_iter().filter(|name| of_texts(name)).collect();
    let scores = match wanted.is_empty() && args.predictions.is_none() {
        true => Vec::new(),
        false => completions(args, &bench, &rows, &encoder, &wanted, note)?,
    };
    if args.common.json {
        let mut json = json!({
            "loss": found.loss,
            "perplexity": found.perplexity,
            "token_accuracy": found.token_accuracy,
            "label_tokens": found.label_tokens,
            "rows": rows.samples.len(),
            "peak_rss_bytes": memory::peak_resident_bytes(),
            "exact_match": Value::Null,
        });
        let scores = scores.iter().map(|(name, score)| ((*name).to_string(), json!(score)));
        json.as_object_mut().unwrap_or(&mut Map::new()).extend(scores);
        return print_json(&json);
    }
    let mut text = format!(
        "loss {:.4} · perplexity {:.3} · token accuracy {:.2} % · {} rows, {} labels\n",
        found.loss,
        found.perplexity,
        100.0 * found.token_accuracy,
        rows.samples.len(),
        found.label_tokens
    );
    for (name, score) in scores {
        text += &match name {
            "exact_match" => {
                let of = prompts_of(&rows, &encoder)?.len();
                format!("exact match {:.0} of {of} ({:.1} %)\n", score * of as f64, 100.0 * score)
            }
            "bleu" => format!("BLEU {score:.2}\n"),
            _ => format!("ROUGE-L {:.2} %\n", 100.0 * score),
        };
    }
    print(&text)
}

fn prompts_of(rows: &Dataset, encoder: &Encoder<'_>) -> Result<Vec<Prompt>> {
    let mut prompts = Vec::new();
    for row in rows.files.iter().flat_map(|f| &f.rows) {
        prompts.extend(encoder.prompt(row)?);
    }
    Ok(prompts)
}

/// Generates the rows' completions, scores them, and writes them if they were asked for.
fn completions(
    args: &EvalArgs,
    bench: &Bench,
    rows: &Dataset,
    encoder: &Encoder<'_>,
    wanted: &[&'static str],
    note: &Note,
) -> Result<Vec<(&'static str, f64)>> {
    let prompts = prompts_of(rows, encoder)?;
    if prompts.is_empty() {
        let flag = if args.exact_match { "--exact-match" } else { "completions' scores and --predictions" };
        let needs = if args.exact_match { "needs" } else { "need" };
        bail!("{flag} {needs} rows with a prompt and a completion; these have none");
    }
    let mut progress = Progress::new("rows", prompts.len(), 0, note);
    let mut tell = |done| progress.update(done, || "completing".to_string());
    let texts = match wanted {
        // what runs on beyond the completion is wrong already
        ["exact_match"] if args.predictions.is_none() => {
            scoring::exact_matches(bench, &prompts, args.max_new_tokens, &mut tell)?.0
        }
        _ => scoring::complete(bench, &prompts, args.max_new_tokens, &mut tell)?,
    };
    drop(progress);
    if let Some(file) = &args.predictions {
        let line = |(prompt, text): (&Prompt, &String)| {
            format!("{}\n", json!({ "completion": prompt.completion, "prediction": text }))
        };
        let lines: String = prompts.iter().zip(&texts).map(line).collect();
        write_atomic(file, lines.as_bytes())?;
    }
    let references: Vec<&str> = prompts.iter().map(|p| p.completion.as_str()).collect();
    let score = |name: &'static str| match name {
        "exact_match" => text::exact_match(&references, &texts),
        "bleu" => text::bleu(&references, &texts),
        _ => text::rouge_l(&references, &texts),
    };
    Ok(wanted.iter().map(|name| (*name, score(name))).collect())
}
