//! Tasks beside next tokens: classes and numbers for texts, classes for words.

pub mod eval;
pub mod train;

use crate::Usage;
use crate::dataset::Dataset;
use crate::forecast::Head;
use crate::settings::Given;
use crate::terminal::Note;
use crate::workbench;
use anyhow::{Context, Result, bail};
use engobe_adapters::Adapter;
use engobe_data::task::lint_task;
use engobe_data::{
    DataFile, LabelSet, LintReport, Problem, Sample, Task, TaskEncoder, TaskOptions, TextTokenizer,
};
use engobe_formats::hf_config::HfConfig;
use engobe_formats::peft::{PeftAdapter, PeftConfig};
use engobe_models::{HeadKind, LoadOptions, TaskOutline, encoder_architecture, load_task_model};
use engobe_nn::{ModelInfo, ModuleTree, TaskModel};
use engobe_train::Model;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A model with a head, and what belongs to it.
pub struct TaskBench {
    /// encoder and head
    pub model: TaskModel,
    /// its tokenizer
    pub tokenizer: TextTokenizer,
    /// its classes
    pub labels: LabelSet,
    /// the adapter, if one was asked for
    pub adapter: Option<Adapter>,
}

/// What decides on the task when nothing says it.
pub struct Hints<'a> {
    /// `--task`
    pub asked: Option<&'a str>,
    /// the model's directory or file
    pub model: &'a Path,
    /// the adapter's directory
    pub adapter: Option<&'a Path>,
    /// where rows are read from
    pub data: &'a [PathBuf],
}

/// The task of a run: the one that was asked for, the adapter's, the one that the configuration's `architectures`
/// names, or the one that the rows are made for.
pub fn choose(hints: &Hints<'_>, note: &mut Note) -> Result<Task> {
    if let Some(name) = hints.asked {
        return Ok(name.parse().map_err(|e: engobe_data::Error| Usage(e.to_string()))?);
    }
    if let Some(dir) = hints.adapter
        && let Some(labels) = LabelSet::load(dir)?
    {
        note.line(&format!("task: {} (from the adapter's labels.json)", labels.task));
        return Ok(labels.task);
    }
    // decoders, GGUF files and whatever is no directory: the loader will say what is wrong with it
    let Ok(config) = HfConfig::open(hints.model) else { return Ok(Task::CausalLm) };
    if encoder_architecture(&config).is_err() {
        return Ok(Task::CausalLm);
    }
    let of_config = task_of_architectures(&config);
    let files = engobe_data::reader::read(hints.data)?;
    let of_rows = Task::of_rows(&files);
    let (task, why) = match (of_config, of_rows) {
        // the head of a classifier makes numbers as well
        (Some(Task::SeqCls), Some(Task::Regression)) => (Task::Regression, "by the rows"),
        (Some(task), _) => (task, "by the model's config.json"),
        (None, Some(task)) => (task, "by the rows"),
        (None, None) => bail!(
            "{} is an encoder, and the rows do not tell for what: give --task, or rows with text and label, or tokens and tags",
            hints.model.display()
        ),
    };
    note.line(&format!("task: {task} ({why}; --task says another)"));
    Ok(task)
}

fn task_of_architectures(config: &HfConfig) -> Option<Task> {
    let names = config.get("architectures").and_then(Value::as_array)?;
    names.iter().filter_map(Value::as_str).find_map(|name| match name {
        n if n.ends_with("ForSequenceClassification") => Some(Task::SeqCls),
        n if n.ends_with("ForTokenClassification") => Some(Task::TokenCls),
        _ => None,
    })
}

/// Refuses tasks that nothing here trains or scores.
fn head_kind(task: Task) -> Result<HeadKind> {
    match task {
        Task::SeqCls | Task::Regression => Ok(HeadKind::Sequence),
        Task::TokenCls => Ok(HeadKind::Token),
        Task::Embedding => {
            bail!(Usage("--task embedding: vectors are made by engobe embed, and not trained".into()))
        }
        Task::Seq2SeqLm => {
            bail!(Usage("--task seq2seq-lm: needs an encoder-decoder, and this is none".into()))
        }
        Task::CausalLm => bail!(Usage("--task causal-lm: needs a decoder, and this is an encoder".into())),
    }
}

/// Names of the classes that the model's configuration knows.
fn known_names(path: &Path) -> Result<Vec<String>> {
    let config = HfConfig::open(path)?;
    Ok(LabelSet::known(&Value::Object(config.raw().clone())))
}

/// The classes of an adapter: from the file beside it; for adapters that PEFT wrote from the base's configuration, or
/// numbered, as many as the saved head has.
fn labels_of_adapter(task: Task, path: &Path, dir: &Path, files: &[DataFile]) -> Result<LabelSet> {
    if let Some(labels) = LabelSet::load(dir)? {
        return Ok(labels);
    }
    let file = PeftAdapter::load(dir)?;
    let is_head = |name: &str| {
        ["classifier.weight", "classifier.out_proj.weight", "score.weight"].iter().any(|n| name.ends_with(n))
    };
    let rows =
        file.tensors.iter().find(|(name, _)| is_head(name)).and_then(|(_, view)| view.shape.first().copied());
    let Some(rows) = rows else {
        bail!(
            "{}: has neither labels.json nor a saved classifier: it is no adapter for the task {task}",
            dir.display()
        )
    };
    let known = known_names(path)?;
    let names = match known.len() == rows {
        true => known,
        false => (0..rows).map(|i| format!("LABEL_{i}")).collect(),
    };
    let problem = match task {
        Task::Regression => Problem::Regression,
        _ => LabelSet::of_rows(task, files, &names).map_or(Problem::SingleLabel, |found| found.problem),
    };
    Ok(LabelSet::new(task, problem, names))
}

impl TaskBench {
    /// Loads the model in `path` with a head for `labels`. `seed` decides how a head begins that the model lacks.
    pub fn load(path: &Path, labels: LabelSet, options: &LoadOptions, seed: u64) -> Result<Self> {
        let kind = head_kind(labels.task)?;
        let model = load_task_model(path, options, kind, labels.len(), seed)?;
        let tokenizer = needed(workbench::tokenizer(path)?, path)?;
        Ok(Self { model, tokenizer, labels, adapter: None })
    }

    /// The model with what its logits mean.
    pub fn model(&self) -> Model<'_> {
        Model::Task(&self.model, &self.labels)
    }

    /// What turns rows into samples.
    pub fn encoder(&self, max_seq_len: usize) -> TaskEncoder<'_> {
        encoder(&self.tokenizer, &self.labels, self.model.info(), max_seq_len)
    }

    /// What is trained and what is there, as PEFT prints it.
    fn trainable_line(&mut self, adapter: &Adapter) -> String {
        let all = workbench::elements(&mut self.model);
        workbench::trainable_text(adapter.num_parameters(), adapter.num_added() + all)
    }
}

/// Says which layers begin at random.
fn tell_fresh(model: &TaskModel, note: &mut Note) {
    let fresh = &model.head().fresh;
    if !fresh.is_empty() {
        note.line(&format!("new, and trained from random values: {}", fresh.join(", ")));
    }
}

/// Says what was read.
fn tell_files(files: &[DataFile], samples: &[Sample], note: &mut Note) {
    for file in files {
        note.line(&file.describe());
    }
    let cut = samples.iter().filter(|s| s.truncated > 0).count();
    if cut > 0 {
        note.line(&format!("{cut} of {} rows are cut at max_seq_len", samples.len()));
    }
}

/// PEFT's settings for a task: its name, and the head among the modules that are trained in full.
///
/// # Errors
/// The method trains no modules beside its own parameters.
fn for_task(given: &Given, name: &str, bench: &TaskBench) -> Result<PeftConfig> {
    let mut config = with_head(given, name, &bench.model.head().saved)?;
    config.set("task_type", bench.labels.task.peft_name());
    Ok(config)
}

/// The settings of an adapter that trains the modules `head` beside it.
///
/// # Errors
/// The method trains no modules beside its own parameters.
pub fn with_head(given: &Given, name: &str, head: &[String]) -> Result<PeftConfig> {
    let (method, mut config) = (given.method()?, given.adapter(name)?);
    if !method.settings().iter().any(|s| s.name == "modules_to_save") {
        bail!("method = {:?} trains no head beside it, and this task needs one", method.name());
    }
    let mut saved = config.names("modules_to_save")?;
    saved.extend(head.iter().filter(|n| !saved.contains(n)).cloned().collect::<Vec<_>>());
    config.set("modules_to_save", saved);
    Ok(config)
}

/// The head of the run that `engobe plan` is asked about; `None` for next tokens. Classes are counted in the rows, or in
/// the model's configuration.
pub fn head_of_plan(given: &Given, path: &Path, note: &mut Note) -> Result<Option<Head>> {
    let data = given.paths("data");
    let config = match path.is_dir() {
        true => HfConfig::open(path),
        false => HfConfig::read(path),
    };
    let Some(config) = config.ok().filter(|config| encoder_architecture(config).is_ok()) else {
        return Ok(None);
    };
    let task = match (given.text("task"), data.is_empty()) {
        (None, true) => task_of_architectures(&config).unwrap_or(Task::SeqCls),
        _ => of_training(given, path, note)?,
    };
    let kind = head_kind(task)?;
    let known = LabelSet::known(&Value::Object(config.raw().clone()));
    let labels = match data.is_empty() {
        true if task == Task::Regression => 1,
        true => known.len().max(2),
        false => LabelSet::of_rows(task, &engobe_data::reader::read(&data)?, &known)?.len(),
    };
    note.line(&format!("task: {task}, a head of {labels}"));
    Ok(Some(Head { kind, labels }))
}

/// Labelled rows as training would take them, and what is to be said of them: those of the first files to be trained on,
/// those of the others to be validated on.
pub fn checked(
    task: Task,
    path: &Path,
    tokenizer: Option<&TextTokenizer>,
    (data, val): (&[PathBuf], &[PathBuf]),
    max_seq_len: usize,
    note: &mut Note,
) -> Result<(Dataset, LintReport)> {
    let files = engobe_data::reader::read(data)?;
    let labels = LabelSet::of_rows(task, &files, &known_names(path)?)?;
    let Head { kind, labels: count } = head_for(&labels)?;
    let outline = TaskOutline::read(path, &LoadOptions::default(), kind, count)?;
    let tokenizer = needed(tokenizer, path)?;
    let encoder = encoder(tokenizer, &labels, outline.model.info(), max_seq_len);
    let train = Dataset { samples: encoder.encode(&files)?, files };
    tell_files(&train.files, &train.samples, note);
    let val = match val {
        [] => Vec::new(),
        paths => encoder.encode(&engobe_data::reader::read(paths)?)?,
    };
    let special = tokenizer.special_around();
    let report = lint_task(&train.samples, &val, Some(&labels), special, max_seq_len);
    Ok((train, report))
}

/// What turns rows into samples; rows are cut where the model's positions end.
fn encoder<'t>(
    tokenizer: &'t TextTokenizer,
    labels: &'t LabelSet,
    info: &ModelInfo,
    max_seq_len: usize,
) -> TaskEncoder<'t> {
    let options = TaskOptions { task: labels.task, max_seq_len: max_seq_len.min(info.max_positions) };
    TaskEncoder::new(tokenizer, Some(labels), info.vocab_size, options)
}

/// The tokenizer of the model in `path`, which texts need.
fn needed<T>(tokenizer: Option<T>, path: &Path) -> Result<T> {
    tokenizer.with_context(|| format!("{}: has no tokenizer.json: texts need one", path.display()))
}

/// The head for `labels`.
fn head_for(labels: &LabelSet) -> Result<Head> {
    Ok(Head { kind: head_kind(labels.task)?, labels: labels.len() })
}

/// The task of a training run.
pub fn of_training(given: &Given, path: &Path, note: &mut Note) -> Result<Task> {
    let (adapter, data) = (given.path("init_adapter"), given.paths("data"));
    choose(&Hints { asked: given.text("task"), model: path, adapter: adapter.as_deref(), data: &data }, note)
}

/// The model as adapters see it.
fn tree(bench: &mut TaskBench) -> &mut dyn ModuleTree {
    &mut bench.model
}
