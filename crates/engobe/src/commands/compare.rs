//! `engobe compare`: several methods under one budget, over one load of the frozen base.
//!
//! What a method came to is kept beside its adapter (`compare.json`), so that `--resume` goes on with the next.

use crate::Usage;
use crate::args::CompareArgs;
use crate::memory::bytes_text;
use crate::report::{self, Curve};
use crate::settings::Given;
use crate::terminal::{Note, Progress, print, print_json, seconds_text};
use crate::training::{self, Setup};
use crate::workbench::{self, Bench, thousands};
use crate::{allocator, scoring};
use anyhow::{Context, Result, bail};
use engobe_formats::atomic::write_atomic;
use engobe_train::{StepMetrics, metrics};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Where a method's row is kept, in its directory.
const KEPT: &str = "compare.json";

/// What a method came to.
#[derive(Serialize, Deserialize)]
pub struct Row {
    /// the method
    pub method: String,
    /// trained elements
    #[serde(rename = "trainable_parameters")]
    pub parameters: usize,
    /// size of the adapter's file
    pub file_bytes: u64,
    /// most memory held in training: the base's, and the largest buffers beside it
    pub peak_bytes: u64,
    /// seconds in steps
    pub seconds: f64,
    /// loss on the validation rows after the last step
    pub eval_loss: Option<f64>,
    /// share of prompts whose greedy continuation is the row's completion
    pub exact_match: Option<f64>,
    /// all steps
    #[serde(skip)]
    pub history: Vec<StepMetrics>,
}

/// A row as it is kept, and what it is the answer to.
#[derive(Serialize, Deserialize)]
struct Kept {
    asked: String,
    row: Row,
}

/// What the base comes to as it is.
struct Base {
    eval_loss: Option<f64>,
    exact_match: Option<f64>,
}

/// Trains each method and compares them.
pub fn run(args: &CompareArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    let all = args.settings.given()?;
    let runs = each(&all, &args.methods, &args.only)?;
    let missing = |name: &str| Usage(format!("--{name} is missing"));
    let model = all.text("model").ok_or_else(|| missing("model"))?.to_string();
    let out = all.path("out").ok_or_else(|| missing("out"))?;
    if all.paths("data").is_empty() {
        bail!(missing("data"));
    }
    for (method, given) in &runs {
        given.plan()?;
        given.adapter(&model).with_context(|| format!("--methods {method}"))?;
    }
    workbench::set_threads(all.whole("threads"))?;
    let options = all.load_options()?;
    let path = workbench::resolve(&model, &args.common, &mut note)?;
    let mut bench = Bench::load(&path, None, &options)?;
    workbench::set_chat_template(bench.tokenizer.as_mut(), all.text("chat_template"))?;
    let base_bytes = weight_bytes(&path, &options)?;
    let mut rows = Vec::new();
    let exact_match = test(args, &all, &bench, &mut note)?;
    let base = Base { eval_loss: training::validation_loss(&all, &bench)?, exact_match };
    for (method, given) in &runs {
        let dir = given.path("out").context("out is missing")?;
        let asked = asked(args, given)?;
        if let Some(row) = kept(&dir, &asked).filter(|_| args.resume) {
            note.line(&format!("{method}: done before"));
            rows.push(row);
            continue;
        }
        note.line(&format!("{method}:"));
        let row = one(args, method, given, &mut bench, &path, base_bytes, &mut note)?;
        bench.model.detach_all();
        let kept = Kept { asked, row };
        write_atomic(&dir.join(KEPT), serde_json::to_string_pretty(&kept)?.as_bytes())?;
        rows.push(kept.row);
    }
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let curves: Vec<Curve<'_>> =
        rows.iter().map(|r| Curve { name: &r.method, history: &r.history }).collect();
    let svg = report::compare_svg(&curves)?;
    write_atomic(&out.join("compare.md"), table(&rows, &base).as_bytes())?;
    write_atomic(&out.join("compare.svg"), svg.as_bytes())?;
    if args.common.json {
        return print_json(&to_json(&rows, &base, &out));
    }
    print(&table(&rows, &base))?;
    print(&format!("\nadapters, compare.md and compare.svg are in {}\n", out.display()))
}

/// The settings of each method's run: those of all, and its own.
fn each(all: &Given, methods: &[String], only: &[String]) -> Result<Vec<(String, Given)>> {
    if let Some(name) = ["method", "init_adapter"].iter().find(|name| all.has(name)) {
        bail!("{name} has no place in a comparison: --methods says which methods to train");
    }
    let mut own: Vec<(&str, &str)> = Vec::new();
    for text in only {
        let (method, set) = text.split_once('.').with_context(|| {
            format!("--only {text}: expected METHOD.NAME=VALUE, such as lora.learning_rate=1e-3")
        })?;
        if !methods.iter().any(|m| m == method) {
            bail!(Usage(format!("--only {text}: {method} is none of --methods {}", methods.join(","))));
        }
        own.push((method, set));
    }
    let out = all.path("out").unwrap_or_default();
    let with = |method: &String| -> Result<(String, Given)> {
        let mut sets = vec![format!("method={method}"), format!("out={}", out.join(method).display())];
        sets.extend(own.iter().filter(|(m, _)| m == method).map(|(_, set)| (*set).to_string()));
        Ok((method.clone(), all.with_sets(&sets)?))
    };
    methods.iter().map(with).collect()
}

/// What a method's row depends on: its settings, and what the files hold.
fn asked(args: &CompareArgs, given: &Given) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!("{given:?} {}", args.max_new_tokens));
    for file in given.paths("data").iter().chain(&given.paths("val_data")).chain(&args.test_data) {
        let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
        hash.update(bytes.len().to_le_bytes());
        hash.update(bytes);
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// The row that an earlier comparison kept, if it was asked the same.
fn kept(dir: &Path, asked: &str) -> Option<Row> {
    let text = std::fs::read_to_string(dir.join(KEPT)).ok()?;
    let Kept { asked: before, mut row } = serde_json::from_str(&text).ok()?;
    row.history = metrics::read(&dir.join("metrics.jsonl")).ok()?;
    (before == asked).then_some(row)
}

/// Bytes of the base as it is held: its own copies, and what stays mapped.
fn weight_bytes(path: &Path, options: &engobe_models::LoadOptions) -> Result<u64> {
    let outline = engobe_models::Outline::read(path, options)?;
    let held = |t: &engobe_models::TensorUse| t.owned + if t.stays_mapped { t.mapped } else { 0 };
    Ok(outline.tensors.iter().map(held).sum::<usize>() as u64)
}

/// Trains one method and tests it.
fn one(
    args: &CompareArgs,
    method: &str,
    given: &Given,
    bench: &mut Bench,
    path: &Path,
    base_bytes: u64,
    note: &mut Note,
) -> Result<Row> {
    let before = allocator::large_bytes();
    allocator::forget_peak();
    let setup = Setup::new(given, path, args.resume)?;
    let out = given.path("out").context("out is missing")?;
    training::prepare_out(&out, args.resume)?;
    let trained = training::train(bench, setup, note)?;
    let peak = allocator::peak_large_bytes().saturating_sub(before) as u64;
    let summary = &trained.summary;
    if summary.outcome.interrupted {
        bail!("stopped after step {} of {method}: --resume goes on", summary.outcome.steps);
    }
    training::tell(summary, note);
    let size = |name: &str| std::fs::metadata(out.join(name)).ok().map(|m| m.len());
    let last = summary.history.iter().rev().find_map(|m| m.eval_loss);
    Ok(Row {
        method: method.to_string(),
        parameters: summary.trainable_parameters,
        file_bytes: size("adapter_model.safetensors").or_else(|| size("adapter.safetensors")).unwrap_or(0),
        peak_bytes: base_bytes + peak,
        seconds: summary.outcome.seconds,
        eval_loss: last,
        exact_match: test(args, given, bench, note)?,
        history: trained.summary.history,
    })
}

/// Exact match on the rows of `--test-data`, of the model as it stands.
fn test(args: &CompareArgs, given: &Given, bench: &Bench, note: &mut Note) -> Result<Option<f64>> {
    if args.test_data.is_empty() {
        return Ok(None);
    }
    let prompts = training::prompts(given, bench, &args.test_data)?;
    if prompts.is_empty() {
        bail!("--test-data: exact match needs rows with a prompt and a completion; these have none");
    }
    let mut progress = Progress::new("rows", prompts.len(), 0, note);
    let mut tell = |done| progress.update(done, || "answering".to_string());
    let (_, hits) = scoring::exact_matches(bench, &prompts, args.max_new_tokens, &mut tell)?;
    Ok(Some(hits as f64 / prompts.len() as f64))
}

/// The table, as people read it and as Markdown.
fn table(rows: &[Row], base: &Base) -> String {
    let percent = |v: Option<f64>| v.map_or("-".to_string(), |v| format!("{:.1} %", 100.0 * v));
    let loss = |v: Option<f64>| v.map_or("-".to_string(), |v| format!("{v:.4}"));
    let mut lines = vec![
        ["method", "trained", "file", "peak memory", "time", "validation loss", "exact match"]
            .map(str::to_string),
    ];
    if base.eval_loss.is_some() || base.exact_match.is_some() {
        let [none, loss] = ["-".to_string(), loss(base.eval_loss)];
        let name = "base".to_string();
        let nones = [(); 4].map(|()| none.clone());
        let [parameters, file, peak, time] = nones;
        lines.push([name, parameters, file, peak, time, loss, percent(base.exact_match)]);
    }
    lines.extend(rows.iter().map(|r| {
        [
            r.method.clone(),
            thousands(r.parameters),
            bytes_text(r.file_bytes),
            bytes_text(r.peak_bytes),
            seconds_text(r.seconds),
            loss(r.eval_loss),
            percent(r.exact_match),
        ]
    }));
    let widths: Vec<usize> =
        (0..7).map(|i| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0)).collect();
    let line = |cells: &[String; 7]| {
        let cells = cells.iter().zip(widths.iter().copied()).enumerate().map(|(i, (c, w))| match i {
            0 => format!("{c:<w$}"),
            _ => format!("{c:>w$}"),
        });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let rule = widths.iter().copied().enumerate().map(|(i, w)| match i {
        0 => "-".repeat(w + 2),
        _ => format!("{}:", "-".repeat(w + 1)),
    });
    let mut text = line(&lines[0]);
    text += &format!("|{}|\n", rule.collect::<Vec<_>>().join("|"));
    lines[1..].iter().for_each(|cells| text += &line(cells));
    text
}

fn to_json(rows: &[Row], base: &Base, out: &Path) -> Value {
    json!({
        "out": out,
        "base_eval_loss": base.eval_loss,
        "base_exact_match": base.exact_match,
        "methods": rows,
    })
}
