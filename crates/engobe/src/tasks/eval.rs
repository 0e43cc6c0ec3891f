//! Scores of labelled rows, and predictions.

use super::{TaskBench, known_names, tell_files, tell_fresh};
use crate::args::EvalArgs;
use crate::terminal::{Note, Progress, print, print_json};
use crate::{Usage, memory, scoring};
use anyhow::{Context, Result, bail};
use engobe_data::{Content, DataFile, Goal, LabelSet, Problem, Row, Sample, Task, reader};
use engobe_formats::atomic::write_atomic;
use engobe_models::LoadOptions;
use engobe_train::scores::{Prediction, less_is_better};
use engobe_train::{Evaluation, evaluate, predict};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Seed of a head that the model lacks: without an adapter its scores are those of chance.
const SEED: u64 = 42;

/// Scores a model with a head.
pub fn run(
    args: &EvalArgs,
    task: Task,
    path: &Path,
    adapter: Option<&Path>,
    options: &LoadOptions,
    note: &mut Note,
) -> Result<()> {
    let mut files = reader::read(&args.rows.data)?;
    let bench = match adapter {
        Some(dir) => TaskBench::with_adapter(path, task, dir, &files, options)?,
        None => {
            let known = known_names(path)?;
            let labels = match LabelSet::of_rows(task, &files, &known) {
                Ok(labels) => labels,
                // rows to be labelled
                Err(_) if !known.is_empty() => LabelSet::new(task, Problem::SingleLabel, known),
                Err(error) => return Err(error.into()),
            };
            let bench = TaskBench::load(path, task, Some(labels), options, SEED)?;
            tell_fresh(&bench, note);
            bench
        }
    };
    let labels = bench.labels().cloned().context("a task without labels")?;
    let samples = bench.encoder(args.max_seq_len).encode(&files)?;
    tell_files(&files, &samples, note);
    let labelled: Vec<Sample> = samples.iter().filter(|s| s.goal != Goal::Nothing).cloned().collect();
    if labelled.len() < samples.len() {
        note.line(&format!(
            "{} of {} rows have no label and are not scored",
            samples.len() - labelled.len(),
            samples.len()
        ));
    }
    let found = match labelled.is_empty() {
        true => None,
        false => {
            let batches = scoring::eval_batches(&labelled);
            let mut progress = Progress::new("batches", batches.len(), 0, note);
            Some(evaluate(bench.model(), &batches, None, &mut |done| {
                progress.update(done, || "scoring".to_string())
            })?)
        }
    };
    if let Some(file) = &args.predictions {
        strip_labels(&mut files);
        write_predictions(&bench, &labels, &files, args.max_seq_len, file, note)?;
    }
    match (found, &args.predictions) {
        (Some(found), _) => show(&found, task, labelled.len(), &args.metrics, args.common.json),
        (None, Some(_)) => Ok(()),
        (None, None) => bail!("no row has a label: --predictions FILE writes what the model says of them"),
    }
}

/// Prints the scores that were asked for, all of them if none were named.
fn show(found: &Evaluation, task: Task, rows: usize, wanted: &[String], as_json: bool) -> Result<()> {
    for name in wanted {
        if name != "loss" && !found.scores.iter().any(|(n, _)| n == name) {
            let known: Vec<&str> = found.scores.iter().map(|(n, _)| n.as_str()).collect();
            bail!(Usage(format!("--metrics {name}: the task {task} has loss, {}", known.join(", "))));
        }
    }
    let shown = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    if as_json {
        let mut json = Map::new();
        json.insert("task".into(), json!(task));
        json.insert("loss".into(), json!(found.loss));
        json.insert("rows".into(), json!(rows));
        json.insert("label_tokens".into(), json!(found.label_tokens));
        json.insert("peak_rss_bytes".into(), json!(memory::peak_resident_bytes()));
        let scores = found.scores.iter().filter(|(n, _)| shown(n));
        json.extend(scores.map(|(name, value)| (name.clone(), json!(value))));
        return print_json(&Value::Object(json));
    }
    let mut text = format!("loss {:.4} · {rows} rows, {} labels\n", found.loss, found.label_tokens);
    for (name, value) in found.scores.iter().filter(|(n, _)| shown(n)) {
        let value = match value {
            None => "not defined (one side is constant)".to_string(),
            Some(v) if less_is_better(name) => format!("{v:.4}"),
            Some(v) => format!("{:.2} %", 100.0 * v),
        };
        text += &format!("{name:<16} {value}\n");
    }
    print(&text)
}

/// Predictions are made of texts alone.
fn strip_labels(files: &mut [DataFile]) {
    for row in files.iter_mut().flat_map(|f| &mut f.rows) {
        match &mut row.content {
            Content::Labelled { label, .. } => *label = None,
            Content::Tagged { tags, .. } => *tags = None,
            _ => {}
        }
    }
}

/// A line of JSON a row, in the order of the rows.
fn write_predictions(
    bench: &TaskBench,
    labels: &LabelSet,
    files: &[DataFile],
    max_seq_len: usize,
    file: &Path,
    note: &mut Note,
) -> Result<()> {
    let encoder = bench.encoder(max_seq_len);
    let batches = scoring::eval_batches(&encoder.encode(files)?);
    let mut progress = Progress::new("batches", batches.len(), 0, note);
    let mut found =
        predict(bench.model(), &batches, &mut |done| progress.update(done, || "predicting".to_string()))?;
    drop(progress);
    found.sort_by_key(|p| p.row);
    let rows: Vec<&Row> = files.iter().flat_map(|f| &f.rows).collect();
    let mut text = String::new();
    for prediction in &found {
        let row = rows.get(prediction.row).context("a prediction without its row")?;
        let line = match &row.content {
            Content::Tagged { tokens, .. } => {
                let classes = prediction.classes();
                let tag = |at: &Option<usize>| at.and_then(|at| classes.get(at)).map(|c| labels.name(*c));
                let tags: Vec<Option<&str>> = encoder.first_tokens(tokens)?.iter().map(tag).collect();
                json!({ "row": row.place.number, "tokens": tokens, "tags": tags })
            }
            _ => of_text(labels, row, prediction),
        };
        text += &format!("{line}\n");
    }
    write_atomic(file, text.as_bytes())?;
    note.line(&format!("predictions of {} rows: {}", found.len(), file.display()));
    Ok(())
}

fn of_text(labels: &LabelSet, row: &Row, prediction: &Prediction) -> Value {
    let number = row.place.number;
    let logits = prediction.logits.first().map_or(&[][..], Vec::as_slice);
    let by_name = |values: Vec<f64>| -> Map<String, Value> {
        labels.names().iter().cloned().zip(values.into_iter().map(Value::from)).collect()
    };
    match labels.problem {
        Problem::Regression => json!({ "row": number, "prediction": prediction.value() }),
        Problem::SingleLabel => {
            let class = prediction.classes().first().copied().unwrap_or_default();
            json!({ "row": number, "prediction": labels.name(class), "scores": by_name(softmax(logits)) })
        }
        Problem::MultiLabel => {
            let names: Vec<&str> = prediction.set().into_iter().map(|c| labels.name(c)).collect();
            let each = logits.iter().map(|z| 1.0 / (1.0 + f64::from(-z).exp())).collect();
            json!({ "row": number, "prediction": names, "scores": by_name(each) })
        }
    }
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f64> = logits.iter().map(|z| f64::from(z - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.into_iter().map(|v| v / sum).collect()
}
