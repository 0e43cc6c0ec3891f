//! `engobe demo`: a real model learns a real skill while you watch.

use crate::args::DemoArgs;
use crate::demo_rows::{DemoRow, demo_rows};
use crate::memory::bytes_text;
use crate::settings::Given;
use crate::terminal::{Note, Progress, print, print_json, seconds_text, sparkline};
use crate::workbench::{self, Bench};
use crate::{scoring, training};
use anyhow::{Context, Result, bail};
use engobe_data::{Content, EncodeOptions, Encoder, Prompt, PromptStyle, TrainOn, reader};
use engobe_formats::atomic::write_atomic;
use engobe_models::LoadOptions;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

const MODEL: &str = "smollm2-135m";
/// rows to train on, to validate on, and for the final test
const ROWS: [usize; 3] = [600, 24, 60];
const STEPS: usize = 80;
const MAX_SEQ_LEN: usize = 512;
const SHOWN: usize = 2;

/// Where the demo's files lie.
struct Files {
    train: PathBuf,
    val: PathBuf,
    test: PathBuf,
    adapter: PathBuf,
}

/// Shows the base model fail at a task, trains it, and shows it succeed.
pub fn run(args: &DemoArgs) -> Result<()> {
    let started = Instant::now();
    let mut note = Note::new(&args.common);
    workbench::set_threads(args.threads)?;
    let files = write_rows(&args.out, args.seed)?;
    let model = workbench::resolve(MODEL, &args.common, &mut note)?;
    let fetched = started.elapsed();
    let say = |text: &str| if args.common.json { Ok(()) } else { print(text) };
    say(&format!(
        "The task: turn an order in plain English into strict JSON.\n\
         {} rows to learn from, {} held-out rows that it never sees, all made by a generator (seed {}).\n\n\
         Before training, {MODEL} on the held-out rows:\n",
        ROWS[0], ROWS[2], args.seed
    ))?;
    let before = score(&model, None, &files.test, &note)?;
    say(&before.text())?;
    say("\nTraining a LoRA adapter (r 16 on all linear layers) over the frozen 4-bit weights:\n")?;
    let given = Given::collect(None, &settings(args, &files), &[])?;
    let summary = training::run(&given, false, &args.common)?;
    let losses: Vec<f64> = summary.history.iter().map(|m| m.loss).collect();
    say(&format!("\nloss {} {:.3}\n", sparkline(&losses, 64), losses.last().copied().unwrap_or(f64::NAN)))?;
    if summary.outcome.interrupted {
        bail!(
            "the demo was stopped; {} holds the adapter of {} steps",
            files.adapter.display(),
            summary.outcome.steps
        );
    }
    say("\nAfter training, the same rows:\n")?;
    let after = score(&model, Some(&files.adapter), &files.test, &note)?;
    say(&after.text())?;
    let seconds = started.elapsed().as_secs_f64();
    let size = fs::metadata(files.adapter.join("adapter_model.safetensors")).map_or(0, |m| m.len());
    say(&closing(&before, &after, &files, &args.out, size, seconds - fetched.as_secs_f64()))?;
    if args.common.json {
        print_json(&json!({
            "exact_match_before": before.exact_match(),
            "exact_match_after": after.exact_match(),
            "seconds": seconds,
            "train_seconds": summary.outcome.seconds,
            "tokens_per_second": summary.tokens_per_second(),
            "peak_rss_bytes": summary.peak_rss_bytes,
            "adapter": files.adapter,
            "adapter_bytes": size,
        }))?;
    }
    Ok(())
}

/// The training run's settings, as flags of `engobe train`.
fn settings(args: &DemoArgs, files: &Files) -> Vec<(String, String)> {
    let path = |p: &Path| p.display().to_string();
    let mut given = vec![
        ("model", MODEL.to_string()),
        ("data", path(&files.train)),
        ("val_data", path(&files.val)),
        ("out", path(&files.adapter)),
        ("max_steps", args.max_steps.unwrap_or(STEPS).to_string()),
        ("max_seq_len", MAX_SEQ_LEN.to_string()),
        ("learning_rate", "1e-3".to_string()),
        ("warmup_steps", "5".to_string()),
        ("eval_steps", "40".to_string()),
        ("seed", args.seed.to_string()),
    ];
    if let Some(threads) = args.threads {
        given.push(("threads", threads.to_string()));
    }
    given.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

/// Writes the rows. A directory that an earlier demo made is made anew; any other that has files is left alone.
fn write_rows(out: &Path, seed: u64) -> Result<Files> {
    let files = Files {
        train: out.join("train.jsonl"),
        val: out.join("val.jsonl"),
        test: out.join("test.jsonl"),
        adapter: out.join("adapter"),
    };
    let is_empty = fs::read_dir(out).map_or(true, |mut entries| entries.next().is_none());
    if !is_empty && !files.test.exists() {
        bail!("{}: exists and is not from an earlier demo: choose another --out", out.display());
    }
    if files.adapter.join("run.toml").exists() {
        fs::remove_dir_all(&files.adapter).with_context(|| files.adapter.display().to_string())?;
    }
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let [train, val, test] = demo_rows(seed, ROWS);
    for (path, rows) in [(&files.test, test), (&files.val, val), (&files.train, train)] {
        let lines: String = rows.iter().map(|row: &DemoRow| format!("{}\n", row.to_json())).collect();
        write_atomic(path, lines.as_bytes())?;
    }
    Ok(files)
}

/// Exact match on the held-out rows.
struct Score {
    hits: usize,
    prompts: Vec<(String, Prompt)>,
    texts: Vec<String>,
}

impl Score {
    fn exact_match(&self) -> f64 {
        self.hits as f64 / self.prompts.len().max(1) as f64
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for ((asked, prompt), answer) in self.prompts.iter().zip(&self.texts).take(SHOWN) {
            let mark = if answer.trim() == prompt.completion.trim() { "right" } else { "wrong" };
            text += &format!("  order  {asked}\n  {mark}  {}\n", shorten(answer.trim()));
        }
        text + &format!(
            "  exact match {} of {} ({:.0} %)\n",
            self.hits,
            self.prompts.len(),
            100.0 * self.exact_match()
        )
    }
}

/// One line of what was said.
fn shorten(text: &str) -> String {
    const MOST: usize = 160;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MOST) {
        Some((at, _)) => format!("{} …", &line[..at]),
        None => line,
    }
}

fn score(model: &Path, adapter: Option<&Path>, rows: &Path, note: &Note) -> Result<Score> {
    let bench = Bench::load(model, adapter, &LoadOptions::default())?;
    let options =
        EncodeOptions { train_on: TrainOn::Completions, style: PromptStyle::Auto, max_seq_len: MAX_SEQ_LEN };
    let encoder = Encoder::new(bench.tokenizer.as_ref(), bench.model.info().vocab_size, options)?;
    let mut prompts = Vec::new();
    for row in reader::read(&[rows.to_path_buf()])?.iter().flat_map(|f| &f.rows) {
        if let (Content::Pair { prompt: asked, .. }, Some(prompt)) = (&row.content, encoder.prompt(row)?) {
            prompts.push((asked.clone(), prompt));
        }
    }
    let mut progress = Progress::new("rows", prompts.len(), 0, note);
    let only: Vec<Prompt> = prompts.iter().map(|(_, p)| p.clone()).collect();
    let mut tell = |done| progress.update(done, || "answering".to_string());
    let (texts, hits) = scoring::exact_matches(&bench, &only, 128, &mut tell)?;
    Ok(Score { hits, prompts, texts })
}

fn closing(before: &Score, after: &Score, files: &Files, out: &Path, size: u64, seconds: f64) -> String {
    let adapter = files.adapter.display();
    let ask = after.prompts.first().map_or_else(String::new, |(asked, _)| asked.replace('"', "'"));
    format!(
        "\nexact match {:.0} % -> {:.0} % in {} (downloads aside); the adapter is {}.\n\
         Everything is in {}: {adapter}/report.html has the curve and samples.\n\n\
         Go on:\n  \
         engobe generate --model {MODEL} --adapter {adapter} --chat --prompt \"{ask}\"\n  \
         engobe eval --model {MODEL} --adapter {adapter} --data {} --exact-match\n  \
         engobe lint --model {MODEL} --data {} --show 2\n  \
         engobe merge --model {MODEL} --adapter {adapter} --out {}\n  \
         engobe train --model {MODEL} --data your-rows.jsonl --out your-adapter\n",
        100.0 * before.exact_match(),
        100.0 * after.exact_match(),
        seconds_text(seconds),
        bytes_text(size),
        out.display(),
        files.test.display(),
        files.train.display(),
        out.join("merged").display(),
    )
}
