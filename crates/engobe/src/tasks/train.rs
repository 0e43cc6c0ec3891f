//! Training on labels, and on texts out of texts.

use super::{
    TaskBench, for_task, head_kind, head_of, known_names, labels_of_adapter, tell_files, tell_fresh,
};
use crate::forecast::Forecast;
use crate::settings::Given;
use crate::terminal::{Note, since_start};
use crate::training::{Run, Summary, Watcher, attach, fingerprint, go_on, loader_options, split_rows};
use crate::{dataset, report, scoring};
use anyhow::Result;
use engobe_data::task::lint_task;
use engobe_data::{DataFile, Goal, LabelSet, Loader, Sample, Task, TextTokenizer, reader};
use engobe_formats::adapter_hub::heads::{self, Head};
use engobe_formats::atomic::write_atomic;
use engobe_formats::peft::PeftConfig;
use engobe_models::{config_of, task_class};
use engobe_train::{Plan, Trainer};
use std::sync::Arc;

/// Trains an adapter, and a head where rows have labels.
pub fn run(given: &Given, task: Task, plan: &Plan, run: &Run<'_>, note: &mut Note) -> Result<Summary> {
    let mut plan = plan.clone();
    if !given.has("packing") {
        // a batch is so many rows: the loss is their mean, as everywhere else
        plan.schedule.packing = false;
    }
    let rate = given.method()?.card().head_learning_rate.filter(|_| task.is_labelled());
    if let (false, Some(rate)) = (given.has("learning_rate"), rate) {
        plan.optimization.learning_rate = rate;
    }
    let init = given.path("init_adapter");
    let files = reader::read(&given.paths("data"))?;
    let labels = match &init {
        _ if !task.is_labelled() => None,
        Some(dir) => Some(labels_of_adapter(task, run.path, dir, &files)?),
        None => Some(LabelSet::of_rows(task, &files, &known_names(run.path)?)?),
    };
    if let Some(labels) = &labels {
        note.line(&format!("labels: {}", describe(labels)));
    }
    let mut guard = None;
    if let Some(limit) = plan.compute.memory_limit.filter(|_| run.options.device.is_cpu()) {
        let head = head_of(task, labels.as_ref().map_or(0, LabelSet::len))?;
        let forecast = Forecast::new(given, &plan, run.path, &run.options, head)?;
        plan = forecast.fit(limit, note)?;
        guard = Some(forecast.guard(&plan, limit));
    }
    let mut bench = TaskBench::load(run.path, task, labels, &run.options, plan.schedule.seed)?;
    tell_fresh(&bench, note);
    let asked = for_task(given, run.name, &bench)?;
    let needs = if init.is_some() { None } else { given.method()?.needs_text(&asked) };
    let (seed, device, text) = (plan.schedule.seed, &run.options.device, bench.start_text(needs)?);
    let adapter = attach(given, bench.kind.tree(), asked, &text, seed, device, note)?;
    bench.lead = adapter.lead();
    let line = bench.trainable_line(&adapter);
    note.line(&line);
    let (train, val) = read_rows(given, &plan, &bench, files, note)?;
    let table = given.resolved(&plan, &adapter.config())?;
    let settings = toml::to_string(&table)?;
    write_atomic(&run.out.join("run.toml"), settings.as_bytes())?;
    if let Some(labels) = bench.labels() {
        labels.save(&run.out)?;
        describe_head(run, &bench, labels, &adapter.config())?;
    }
    let fingerprint = fingerprint(&table, run.path, &train)?;
    let loader = Loader::new(Arc::new(train), loader_options(&plan, &adapter));
    let eval = scoring::eval_batches(&val);
    let mut trainer = Trainer::new(bench.model(), &adapter, &plan, loader, eval, &run.out, fingerprint)?;
    trainer = trainer.guarded_by(guard);
    if run.resume {
        go_on(&mut trainer, note)?;
    }
    let startup_seconds = since_start().as_secs_f64();
    let mut watcher = Watcher::new(&trainer, note);
    let outcome = trainer.run(&mut watcher)?;
    drop((watcher, trainer));
    let summary = Summary::new(outcome, startup_seconds, &adapter, run.out.clone())?;
    let title = run.name.to_string();
    report::write(
        &summary.out,
        &report::RunReport { title, summary: &summary, settings, shown: Vec::new() },
    )?;
    Ok(summary)
}

/// Writes what other programs must be told of the head beside their adapters.
fn describe_head(run: &Run<'_>, bench: &TaskBench, labels: &LabelSet, config: &PeftConfig) -> Result<()> {
    let Some(kind) = head_kind(bench.task)? else { return Ok(()) };
    let (class, info) = (task_class(&config_of(run.path)?, kind)?, bench.info());
    let (model_type, hidden_size) = (&info.model_type[..], info.hidden_size);
    let head = Head { model_class: &class, model_type, hidden_size, labels: labels.names() };
    Ok(heads::describe(&run.out, config, &head)?)
}

fn describe(labels: &LabelSet) -> String {
    const SHOWN: usize = 12;
    if labels.problem == engobe_data::Problem::Regression {
        return "numbers".to_string();
    }
    let mut names: Vec<&str> = labels.names().iter().take(SHOWN).map(String::as_str).collect();
    if labels.len() > SHOWN {
        names.push("...");
    }
    format!("{} ({}; {})", labels.len(), names.join(", "), labels.problem.name())
}

/// Samples to train on and to validate on, checked.
fn read_rows(
    given: &Given,
    plan: &Plan,
    bench: &TaskBench,
    files: Vec<DataFile>,
    note: &mut Note,
) -> Result<(Vec<Sample>, Vec<Sample>)> {
    let max_seq_len = plan.schedule.max_seq_len;
    let encoder = bench.encoder(max_seq_len);
    let allow = dataset::allowed(&given.names("allow"))?;
    let mut train = dataset::Dataset { samples: encoder.encode(&files)?, files };
    tell_files(&train.files, &train.samples, note);
    let mut val = dataset::Dataset::default();
    let (val_paths, share) = (given.paths("val_data"), given.number("val_split").unwrap_or(0.0));
    if !val_paths.is_empty() {
        val.files = reader::read(&val_paths)?;
        val.samples = encoder.encode(&val.files)?;
        tell_files(&val.files, &val.samples, note);
    } else if share != 0.0 {
        val = split_rows(&mut train, share, plan.schedule.seed)?;
    }
    let special = bench.tokenizer.as_ref().map_or(0, TextTokenizer::special_around);
    let report = lint_task(&train.samples, &val.samples, bench.labels(), special, max_seq_len);
    dataset::enforce(&report, &allow, note)?;
    // rows without a label or a target were allowed: they are left out
    let labelled = |samples: Vec<Sample>| samples.into_iter().filter(|s| s.goal != Goal::Nothing).collect();
    Ok((labelled(train.samples), labelled(val.samples)))
}
