//! A training run, from settings to files: what `train` and `demo` share.

mod watcher;

pub use watcher::Watcher;

use crate::args::Common;
use crate::dataset::{self, RowSettings};
use crate::forecast::Forecast;
use crate::report::{self, RunReport, Shown};
use crate::settings::Given;
use crate::terminal::{Note, seconds_text, since_start};
use crate::workbench::{self, Bench};
use crate::{Usage, memory, scoring, tasks};
use anyhow::{Context, Result, bail};
use candle_core::Device;
use engobe_adapters::method::StartText;
use engobe_adapters::{Adapter, Start};
use engobe_data::{ChatTemplate, Encoder, Goal, Loader, LoaderOptions, Prompt, Sample, Task};
use engobe_formats::atomic::write_atomic;
use engobe_formats::peft::PeftConfig;
use engobe_models::{LoadOptions, WeightDtype};
use engobe_nn::ModuleTree;
use engobe_train::memory::guard::Guard;
use engobe_train::{Outcome, Plan, StepMetrics, Trainer, metrics};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a run left.
pub struct Summary {
    /// how the loop ended
    pub outcome: Outcome,
    /// the directory with the adapter and all else
    pub out: PathBuf,
    /// from the start of the process to the first step
    pub startup_seconds: f64,
    /// most memory held, before samples were made
    pub peak_rss_bytes: Option<u64>,
    /// trained elements
    pub trainable_parameters: usize,
    /// all steps of the run, those before a resume included
    pub history: Vec<StepMetrics>,
}

impl Summary {
    /// Of a run that ended like this and wrote into `out`.
    pub fn new(outcome: Outcome, startup_seconds: f64, adapter: &Adapter, out: PathBuf) -> Result<Self> {
        Ok(Self {
            outcome,
            startup_seconds,
            peak_rss_bytes: memory::peak_resident_bytes(),
            trainable_parameters: adapter.num_parameters(),
            history: metrics::read(&out.join("metrics.jsonl"))?,
            out,
        })
    }

    /// Tokens a second, over all steps.
    pub fn tokens_per_second(&self) -> f64 {
        self.outcome.tokens as f64 / self.outcome.seconds.max(1e-9)
    }

    /// Labels a second, over all steps.
    pub fn label_tokens_per_second(&self) -> f64 {
        self.outcome.label_tokens as f64 / self.outcome.seconds.max(1e-9)
    }
}

/// The date that templates print in this run: the same in all its parts, or its rows would change with the day.
fn template_date(given: &Given, out: &Path, resume: bool) -> Result<String> {
    if let Some(date) = given.text("date") {
        return Ok(date.to_string());
    }
    let path = out.join("run.toml");
    if resume && path.exists() {
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        // a file of older settings is none of our business here
        let table = toml::from_str::<toml::Table>(&text).unwrap_or_default();
        if let Some(date) = table.get("date").and_then(toml::Value::as_str) {
            return Ok(date.to_string());
        }
    }
    Ok(ChatTemplate::today())
}

/// Rows ready for a run.
struct Rows {
    train: Arc<Vec<Sample>>,
    val: Vec<Sample>,
    /// a few prompts to show what the model does with them
    shown: Vec<Prompt>,
    /// the chat template prints the date
    uses_date: bool,
}

/// A run over a model that is there.
pub struct Setup<'a> {
    given: &'a Given,
    plan: Plan,
    model: String,
    out: PathBuf,
    path: &'a Path,
    device: Device,
    guard: Option<Guard>,
    resume: bool,
}

impl<'a> Setup<'a> {
    /// The run that `given` describes over the model at `path`.
    pub fn new(given: &'a Given, path: &'a Path, resume: bool) -> Result<Self> {
        let needed = |name: &str| given.text(name).map(str::to_string).context(format!("{name} is missing"));
        Ok(Self {
            given,
            plan: given.plan()?,
            model: needed("model")?,
            out: PathBuf::from(needed("out")?),
            path,
            device: given.load_options()?.device,
            guard: None,
            resume,
        })
    }
}

/// A run that is done; its adapter is still attached.
pub struct Trained {
    /// what it left
    pub summary: Summary,
    /// all of its settings
    table: toml::Table,
    /// a few prompts to show what the model does with them
    shown: Vec<Prompt>,
}

/// Trains as `given` says.
pub fn run(given: &Given, resume: bool, common: &Common) -> Result<Summary> {
    let mut note = Note::new(common);
    let plan = given.plan()?;
    let needed = |name: &str| {
        let why = format!("--{} is missing", name.replace('_', "-"));
        given.text(name).map(str::to_string).ok_or(Usage(why))
    };
    let (model, out) = (needed("model")?, PathBuf::from(needed("out")?));
    if given.paths("data").is_empty() {
        bail!(Usage("--data is missing: a file of rows to train on".to_string()));
    }
    given.adapter(&model)?;
    workbench::set_threads(given.whole("threads"))?;
    let options = given.load_options()?;
    prepare_out(&out, resume)?;
    let path = workbench::resolve(&model, common, &mut note)?;
    let task = tasks::of_training(given, &path, &mut note)?;
    if task != Task::CausalLm {
        let run = Run { name: &model, path: &path, out, options, resume };
        return tasks::train::run(given, task, &plan, &run, &mut note);
    }
    let mut setup = Setup::new(given, &path, resume)?;
    if let Some(limit) = plan.compute.memory_limit.filter(|_| options.device.is_cpu()) {
        let forecast = Forecast::new(given, &plan, &path, &options, None)?;
        setup.plan = forecast.fit(limit, &mut note)?;
        setup.guard = Some(forecast.guard(&setup.plan, limit));
    }
    let mut bench = Bench::load(&path, None, &options)?;
    workbench::set_chat_template(bench.tokenizer.as_mut(), given.text("chat_template"))?;
    let Trained { summary, table, shown } = train(&mut bench, setup, &mut note)?;
    let init = given.path("init_adapter");
    let shown = show(bench, &path, init.as_deref(), &options, shown)?;
    let settings = toml::to_string(&table)?;
    report::write(&summary.out, &RunReport { title: model, summary: &summary, settings, shown })?;
    Ok(summary)
}

/// The adapter of a run, on the model: a new one that starts from `text`, or the one that the run starts from.
pub fn attach(
    given: &Given,
    model: &mut dyn ModuleTree,
    asked: PeftConfig,
    text: &StartText,
    seed: u64,
    device: &Device,
    note: &mut Note,
) -> Result<Adapter> {
    let adapter = match given.path("init_adapter") {
        Some(dir) => {
            let changes = given.training_changes(&asked);
            let adapter = Adapter::load_to_train(model, &dir, &changes, device)?;
            given.check_against(&adapter, &dir)?;
            adapter
        }
        None => Adapter::attach_with(model, asked, Start { seed }, text, device)?,
    };
    for name in adapter.unmatched_targets() {
        note.line(&format!("target_modules: {name:?} matches no module of this model"));
    }
    Ok(adapter)
}

/// Attaches an adapter to the model on the bench and trains it.
pub fn train(bench: &mut Bench, setup: Setup<'_>, note: &mut Note) -> Result<Trained> {
    let Setup { given, plan, model, out, path, device, guard, resume } = setup;
    let asked = given.adapter(&model)?;
    let needs = if given.has("init_adapter") { None } else { given.method()?.needs_text(&asked) };
    let text = workbench::start_text(bench, needs)?;
    let adapter = attach(given, bench.model.as_mut(), asked, &text, plan.schedule.seed, &device, note)?;
    note.line(&workbench::trainable_line(bench.model.as_mut(), &adapter));
    let date = template_date(given, &out, resume)?;
    let rows = read_rows(given, &plan, bench, &date, note)?;
    let given = given.with_date(rows.uses_date.then_some(date));
    let table = given.resolved(&plan, &adapter.config())?;
    write_atomic(&out.join("run.toml"), toml::to_string(&table)?.as_bytes())?;
    let fingerprint = fingerprint(&table, path, &rows.train)?;
    let loader = Loader::new(rows.train.clone(), loader_options(&plan, &adapter));
    let eval = scoring::eval_batches(&rows.val);
    let mut trainer = Trainer::new(bench.model.as_ref(), &adapter, &plan, loader, eval, &out, fingerprint)?;
    trainer = trainer.guarded_by(guard);
    if resume {
        go_on(&mut trainer, note)?;
    }
    let startup_seconds = since_start().as_secs_f64();
    let mut watcher = Watcher::new(&trainer, note);
    let outcome = trainer.run(&mut watcher)?;
    drop((watcher, trainer));
    let summary = Summary::new(outcome, startup_seconds, &adapter, out)?;
    Ok(Trained { summary, table, shown: rows.shown })
}

/// The prompts of rows, and what shall follow them.
pub fn prompts(given: &Given, bench: &Bench, files: &[PathBuf]) -> Result<Vec<Prompt>> {
    let encoder = encoder(given, given.plan()?.schedule.max_seq_len, bench)?;
    let mut prompts = Vec::new();
    for row in engobe_data::reader::read(files)?.iter().flat_map(|f| &f.rows) {
        prompts.extend(encoder.prompt(row)?);
    }
    Ok(prompts)
}

/// What reads rows as the settings say.
fn encoder<'b>(given: &'b Given, max_seq_len: usize, bench: &'b Bench) -> Result<Encoder<'b>> {
    let settings = RowSettings {
        train_on: given.text("train_on").unwrap_or("completions"),
        template: given.text("template").unwrap_or("auto"),
        max_seq_len,
    };
    settings.encoder(bench.tokenizer.as_ref(), bench.model.info().vocab_size)
}

/// What runs of every task have in common.
pub struct Run<'a> {
    /// the model as it was typed
    pub name: &'a str,
    /// its directory or file
    pub path: &'a Path,
    /// where everything is written
    pub out: PathBuf,
    /// how the base is held
    pub options: LoadOptions,
    /// a run that goes on
    pub resume: bool,
}

/// Goes on from the newest checkpoint, and says where that is.
pub fn go_on(trainer: &mut Trainer<'_>, note: &mut Note) -> Result<()> {
    match trainer.resume()? {
        true => note.line(&format!("going on after step {} of {}", trainer.step(), trainer.total_steps())),
        false => note.line("no checkpoint yet: starting from the beginning"),
    }
    Ok(())
}

/// Makes the output directory; another run's results are never overwritten.
pub fn prepare_out(out: &Path, resume: bool) -> Result<()> {
    let taken = ["adapter_config.json", "metrics.jsonl", "checkpoints"].iter().any(|f| out.join(f).exists());
    if taken && !resume {
        return Err(engobe_train::Error::OutExists { path: out.to_path_buf() }.into());
    }
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())
}

/// How the rows of a run are grouped and ordered.
pub fn loader_options(plan: &Plan, adapter: &Adapter) -> LoaderOptions {
    let s = &plan.schedule;
    LoaderOptions {
        batch_size: s.batch_size,
        max_seq_len: s.max_seq_len,
        packing: s.packing,
        shuffle: s.shuffle,
        seed: s.seed,
        lead: adapter.lead(),
    }
}

/// Reads, encodes, splits and checks the rows.
fn read_rows(given: &Given, plan: &Plan, bench: &Bench, date: &str, note: &mut Note) -> Result<Rows> {
    let tokenizer = bench.tokenizer.as_ref();
    let max_seq_len = plan.schedule.max_seq_len;
    let mut encoder = encoder(given, max_seq_len, bench)?;
    encoder.fix_date(date)?;
    let allow = dataset::allowed(&given.names("allow"))?;
    let mut train = dataset::load(&given.paths("data"), &encoder, note)?;
    let val_paths = given.paths("val_data");
    let share = given.number("val_split").unwrap_or(0.0);
    let mut val = dataset::Dataset::default();
    if !val_paths.is_empty() {
        val = dataset::load(&val_paths, &encoder, note)?;
    } else if share != 0.0 {
        val = split_rows(&mut train, share, plan.schedule.seed)?;
    }
    let report = dataset::check(&train, &val.samples, &encoder, tokenizer, max_seq_len);
    dataset::enforce(&report, &allow, note)?;
    let from = if val.samples.is_empty() { &train } else { &val };
    let shown = shown_prompts(from, &encoder)?;
    let uses_date = encoder.template().is_some_and(ChatTemplate::uses_date);
    Ok(Rows { train: Arc::new(train.samples), val: val.samples, shown, uses_date })
}

/// Loss of the model as it stands on the validation rows; `None` without any.
pub fn validation_loss(given: &Given, bench: &Bench) -> Result<Option<f64>> {
    let mut silent = Note::new(&Common { quiet: true, ..Common::default() });
    let date = template_date(given, Path::new(""), false)?;
    let rows = read_rows(given, &given.plan()?, bench, &date, &mut silent)?;
    let batches = scoring::eval_batches(&rows.val);
    if batches.is_empty() {
        return Ok(None);
    }
    Ok(Some(engobe_train::evaluate(bench.model.as_ref(), &batches, None, &mut |_| ())?.loss))
}

/// Takes a share of the rows, chosen by the seed, out of the training rows.
pub fn split_rows(train: &mut dataset::Dataset, share: f64, seed: u64) -> Result<dataset::Dataset> {
    if !(share > 0.0 && share < 1.0) {
        bail!("val_split = {share}: must lie between 0 and 1");
    }
    let n = train.samples.len();
    let count = ((n as f64 * share).round() as usize).clamp(1, n.max(2) - 1);
    if n < 2 {
        bail!("val_split = {share}: there is but one row");
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let mut chosen = vec![false; n];
    order[..count].iter().for_each(|i| chosen[*i] = true);
    Ok(train.take(&chosen))
}

/// Prompts of the first two rows that have one.
fn shown_prompts(rows: &dataset::Dataset, encoder: &Encoder<'_>) -> Result<Vec<Prompt>> {
    const SHOWN: usize = 2;
    let mut prompts = Vec::new();
    for row in rows.files.iter().flat_map(|f| &f.rows).take(20) {
        if prompts.len() < SHOWN {
            prompts.extend(encoder.prompt(row)?);
        }
    }
    Ok(prompts)
}

/// What must not change between the parts of a resumed run, a line each. How long the run is, and how often
/// it is looked at, may change.
pub fn fingerprint(table: &toml::Table, model: &Path, samples: &[Sample]) -> Result<String> {
    const FREE: [&str; 21] = [
        "model",
        "data",
        "val_data",
        "device",
        "allow",
        "train_on",
        "template",
        "chat_template",
        "epochs",
        "max_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "early_stopping_patience",
        "early_stopping_threshold",
        "load_best",
        "metric_for_best_model",
        "init_adapter",
        "activation_checkpointing",
        "memory_limit",
        "state_file",
    ];
    let line = |(k, v): (&String, &toml::Value)| match (k.as_str(), v.as_str()) {
        // where the moments lie makes no difference
        ("optimizer", Some(name)) => format!("{k} = {:?}", name.trim_start_matches("paged_")),
        _ => format!("{k} = {v}"),
    };
    // runs that began before there was this setting go on
    let unsaid = |k: &str, v: &toml::Value| k == "compute_dtype" && v.as_str() == Some("f32");
    let mut lines: Vec<String> =
        table.iter().filter(|(k, v)| !FREE.contains(&k.as_str()) && !unsaid(k, v)).map(line).collect();
    lines.sort();
    let mut rows = Sha256::new();
    for sample in samples {
        for id in &sample.ids {
            rows.update(id.to_le_bytes());
        }
        for label in &sample.labels {
            rows.update(label.map_or(-1i64, i64::from).to_le_bytes());
        }
        rows.update((sample.ids.len() as u64).to_le_bytes());
        if sample.goal != Goal::NextTokens {
            rows.update(format!("{:?}{:?}", sample.goal, sample.second_type_from));
        }
    }
    let mut weights = Sha256::new();
    for tensor in engobe_formats::checkpoint::Checkpoint::open(model)?.tensors() {
        weights.update(format!("{} {:?} {}\n", tensor.name, tensor.shape, tensor.dtype));
        // the ends of each tensor tell models of one shape apart without reading them whole
        let bytes = tensor.bytes();
        weights.update(&bytes[..bytes.len().min(64)]);
        weights.update(&bytes[bytes.len().saturating_sub(64)..]);
    }
    let hex = |h: Sha256| h.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect::<String>();
    lines.push(format!("rows = {}", hex(rows)));
    lines.push(format!("weights = {}", hex(weights)));
    Ok(lines.join("\n"))
}

/// The last lines that a run prints.
pub fn tell(summary: &Summary, note: &mut Note) {
    let o = &summary.outcome;
    let losses: Vec<f64> = summary.history.iter().map(|m| m.loss).collect();
    if losses.len() > 1 {
        note.line(&format!("loss {}", crate::terminal::sparkline(&losses, 60)));
    }
    let first = losses.first().copied().unwrap_or(f64::NAN);
    let mut line = format!("{} steps in {}", o.steps, seconds_text(o.seconds));
    if let Some(last) = o.final_loss {
        line += &format!(" · loss {first:.4} -> {last:.4}");
    }
    if let Some(best) = o.best_eval_loss {
        line += &format!(" · best validation loss {best:.4}");
    }
    line += &format!(" · {:.0} tokens/s", summary.tokens_per_second());
    if let Some(bytes) = summary.peak_rss_bytes {
        line += &format!(" · peak {}", memory::bytes_text(bytes));
    }
    note.line(&line);
    if let Some(last) = summary.history.iter().rev().find(|m| !m.eval_scores.is_empty()) {
        let shown = |(name, value): (&String, &f64)| format!("{name} {value:.4}");
        let scores: Vec<String> = last.eval_scores.iter().map(shown).collect();
        note.line(&format!("validation after step {}: {}", last.step, scores.join(" · ")));
    }
    if o.stopped_early {
        note.line("stopped early: evaluations no longer get better");
    }
    if o.interrupted {
        note.line(&format!("stopped by you after step {} of {}: --resume goes on", o.steps, o.total_steps));
    }
    note.line(&format!("adapter, report.html, loss.svg, metrics.jsonl, run.toml: {}", summary.out.display()));
}

/// What the model says to the first prompts without what was learned, and with it.
fn show(
    bench: Bench,
    path: &Path,
    init: Option<&Path>,
    options: &LoadOptions,
    prompts: Vec<Prompt>,
) -> Result<Vec<Shown>> {
    const TOKENS: usize = 64;
    if bench.tokenizer.is_none() || prompts.is_empty() {
        return Ok(Vec::new());
    }
    let after = scoring::complete(&bench, &prompts, TOKENS, &mut |_| ())?;
    // two models at once may be more than there is room for
    drop(bench);
    // weights stay as stored, or are quantized again: mapping them once more costs next to nothing
    let base = Bench::load(path, init, &LoadOptions { dtype: WeightDtype::Stored, ..options.clone() })?;
    let before = scoring::complete(&base, &prompts, TOKENS, &mut |_| ())?;
    let shown = prompts.into_iter().zip(before).zip(after).map(|((prompt, before), after)| {
        let tokenizer = base.need_tokenizer()?;
        Ok(Shown { prompt: tokenizer.decode(&prompt.ids, true)?, expected: prompt.completion, before, after })
    });
    shown.collect()
}
