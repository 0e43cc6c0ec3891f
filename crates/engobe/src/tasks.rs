//! Tasks beside next tokens: texts out of texts, classes and numbers for texts, classes for words.

pub mod eval;
pub mod seq2seq;
pub mod train;

use crate::Usage;
use crate::dataset::Dataset;
use crate::forecast::Head;
use crate::settings::Given;
use crate::terminal::Note;
use crate::workbench;
use anyhow::{Context, Result, bail};
use engobe_adapters::Adapter;
use engobe_adapters::method::{NeedsText, StartText};
use engobe_data::task::lint_task;
use engobe_data::{
    DataFile, LabelSet, LintReport, Problem, Sample, Task, TaskEncoder, TaskOptions, TextTokenizer,
};
use engobe_formats::adapter_hub;
use engobe_formats::hf_config::HfConfig;
use engobe_formats::peft::{PeftAdapter, PeftConfig};
use engobe_models::{
    HeadKind, LoadOptions, TaskOutline, config_of, encoder_architecture, load_seq2seq, load_task_model,
    seq2seq_architecture,
};
use engobe_nn::{ModelInfo, ModuleTree, Seq2Seq, TaskModel};
use engobe_train::Model;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A model for a task, and what belongs to it.
pub struct TaskBench {
    task: Task,
    /// the model
    pub kind: Kind,
    /// its tokenizer; token ids need none
    pub tokenizer: Option<TextTokenizer>,
    /// the adapter, if one was asked for
    pub adapter: Option<Adapter>,
    /// rows that it puts before each text
    lead: usize,
}

/// The model of a task.
pub enum Kind {
    /// an encoder with a head, and what the head's classes are called
    Labels(TaskModel, LabelSet),
    /// an encoder-decoder
    Texts(Box<dyn Seq2Seq>),
}

impl Kind {
    /// The model as adapters see it.
    pub fn tree(&mut self) -> &mut dyn ModuleTree {
        match self {
            Self::Labels(model, _) => model,
            Self::Texts(model) => model.as_mut(),
        }
    }
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
    if let Some(dir) = hints.adapter
        && let Some(task) = task_of_peft(hints.model, dir)?
    {
        // PEFT has one name for classes and numbers
        let numbers = task == Task::SeqCls
            && Task::of_rows(&engobe_data::reader::read(hints.data)?) == Some(Task::Regression);
        let task = if numbers { Task::Regression } else { task };
        if task.is_labelled() {
            note.line(&format!("task: {task} (from the adapter's task_type; --task says another)"));
        }
        return Ok(task);
    }
    // GGUF files and whatever is no directory: the loader will say what is wrong with it
    let Ok(config) = HfConfig::open(hints.model) else { return Ok(Task::CausalLm) };
    if seq2seq_architecture(&config)?.is_some() {
        return Ok(Task::Seq2SeqLm);
    }
    let of_config = task_of_architectures(&config);
    if of_config.is_none() && encoder_architecture(&config).is_err() {
        return Ok(Task::CausalLm);
    }
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

/// The task that the adapter in `dir` was trained for, over the model at `path`: what is written beside it, PEFT's
/// `task_type`, or what the model is for.
pub fn of_adapter(path: &Path, dir: &Path) -> Result<Task> {
    if let Some(labels) = LabelSet::load(dir)? {
        return Ok(labels.task);
    }
    if let Some(task) = task_of_peft(path, dir)? {
        return Ok(task);
    }
    let config = HfConfig::open(path).ok().filter(|config| encoder_architecture(config).is_ok());
    Ok(config.map_or(Task::CausalLm, |config| task_of_architectures(&config).unwrap_or(Task::SeqCls)))
}

/// The task that PEFT wrote into an adapter's configuration, if it is one of ours; over an encoder-decoder there is one.
fn task_of_peft(path: &Path, dir: &Path) -> Result<Option<Task>> {
    if is_seq2seq(path) {
        return Ok(Some(Task::Seq2SeqLm));
    }
    let config = PeftConfig::in_dir(dir)?;
    let tasks = [Task::SeqCls, Task::TokenCls, Task::Seq2SeqLm, Task::CausalLm];
    Ok(tasks
        .into_iter()
        .find(|task| config.get("task_type").and_then(Value::as_str) == Some(task.peft_name())))
}

/// True if the model is an encoder-decoder.
pub fn is_seq2seq(path: &Path) -> bool {
    let config = HfConfig::open(path);
    config.is_ok_and(|config| matches!(seq2seq_architecture(&config), Ok(Some(_))))
}

/// The head that a task's labels need; none where texts are made.
///
/// # Errors
/// Nothing here trains or scores the task.
fn head_kind(task: Task) -> Result<Option<HeadKind>> {
    match task {
        Task::SeqCls | Task::Regression => Ok(Some(HeadKind::Sequence)),
        Task::TokenCls => Ok(Some(HeadKind::Token)),
        Task::Seq2SeqLm => Ok(None),
        Task::Embedding => {
            bail!(Usage("--task embedding: vectors are made by engobe embed, and not trained".into()))
        }
        Task::CausalLm => bail!(Usage("--task causal-lm: needs a decoder, and this is an encoder".into())),
    }
}

/// Names of the classes that the model's configuration knows.
fn known_names(path: &Path) -> Result<Vec<String>> {
    let config = config_of(path)?;
    Ok(LabelSet::known(&Value::Object(config.raw().clone())))
}

/// The classes of an adapter: from the file beside it; for adapters that PEFT or AdapterHub wrote from the head's or the base's
/// configuration, or numbered, as many as the saved head has.
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
    let mut known = adapter_hub::heads::labels(dir)?;
    if known.len() != rows {
        known = known_names(path)?;
    }
    let names = match known.len() == rows {
        true => known,
        false => (0..rows).map(|i| format!("LABEL_{i}")).collect(),
    };
    let problem = match (task, LabelSet::of_rows(task, files, &names)) {
        (Task::Regression, _) => Problem::Regression,
        (_, Ok(found)) => found.problem,
        (Task::TokenCls, _) => Problem::SingleLabel,
        // no rows: what the base says, or what transformers takes a head of so many for
        _ => match config_of(path)?.opt_str("problem_type")?.and_then(Problem::of_name) {
            Some(problem) if (problem == Problem::Regression) == (rows == 1) => problem,
            _ if rows == 1 => Problem::Regression,
            _ => Problem::SingleLabel,
        },
    };
    let task = if problem == Problem::Regression { Task::Regression } else { task };
    Ok(LabelSet::new(task, problem, names))
}

impl TaskBench {
    /// Loads the model in `path` for `task`, with a head where it has labels. `seed` decides how a head begins that the
    /// model lacks.
    pub fn load(
        path: &Path,
        task: Task,
        labels: Option<LabelSet>,
        options: &LoadOptions,
        seed: u64,
    ) -> Result<Self> {
        let kind = match (head_kind(task)?, labels) {
            (Some(head), Some(labels)) => {
                Kind::Labels(load_task_model(path, options, head, labels.len(), seed)?, labels)
            }
            _ => Kind::Texts(load_seq2seq(path, options)?),
        };
        let tokenizer = workbench::tokenizer(path)?;
        Ok(Self { task, kind, tokenizer, adapter: None, lead: 0 })
    }

    /// Loads the model in `path` with the adapter in `dir`, whose head is taken from there. `files` tell what its logits
    /// mean where nothing beside it does.
    pub fn with_adapter(
        path: &Path,
        task: Task,
        dir: &Path,
        files: &[DataFile],
        options: &LoadOptions,
    ) -> Result<Self> {
        let labels = match task.is_labelled() {
            true => Some(labels_of_adapter(task, path, dir, files)?),
            false => None,
        };
        let task = labels.as_ref().map_or(task, |labels| labels.task);
        let mut bench = Self::load(path, task, labels, options, 0)?;
        let adapter = Adapter::load(bench.kind.tree(), dir, &options.device)?;
        bench.lead = adapter.lead();
        bench.adapter = Some(adapter);
        Ok(bench)
    }

    /// True if an encoder-decoder's head is the embedding's matrix.
    pub fn tied_head(&self) -> bool {
        matches!(&self.kind, Kind::Texts(model) if model.info().tied_head)
    }

    /// The model with what its outputs mean.
    pub fn model(&self) -> Model<'_> {
        match &self.kind {
            Kind::Labels(model, labels) => Model::Task(model, labels),
            Kind::Texts(model) => Model::Seq2Seq(model.as_ref()),
        }
    }

    /// Names of its classes, if it has any.
    pub fn labels(&self) -> Option<&LabelSet> {
        match &self.kind {
            Kind::Labels(_, labels) => Some(labels),
            Kind::Texts(_) => None,
        }
    }

    fn info(&self) -> &ModelInfo {
        match &self.kind {
            Kind::Labels(model, _) => model.info(),
            Kind::Texts(model) => model.info(),
        }
    }

    /// What turns rows into samples; rows are cut where the model's positions end. T5's do not end: `n_positions` is only
    /// how long its training rows were.
    pub fn encoder(&self, max_seq_len: usize) -> TaskEncoder<'_> {
        let info = self.info();
        let most = match &self.kind {
            Kind::Labels(..) => info.max_positions.saturating_sub(self.lead),
            Kind::Texts(_) => usize::MAX,
        };
        let options = TaskOptions { task: self.task, max_seq_len: max_seq_len.min(most) };
        TaskEncoder::new(self.tokenizer.as_ref(), self.labels(), info.vocab_size, options)
    }

    /// What the text that a new adapter starts from is to the model.
    fn start_text(&self, needs: Option<NeedsText>) -> Result<StartText> {
        let Some(needs) = needs else { return Ok(StartText::default()) };
        if needs.key_values {
            bail!(
                "prefix_init_text: {}; leave it out",
                match &self.kind {
                    Kind::Labels(..) => "a model with a task's head keeps no keys and values",
                    Kind::Texts(_) =>
                        "keys and values of an encoder-decoder's decoder are of a source and a target",
                }
            );
        }
        let missing = "prompt_tuning_init_text: the model has no tokenizer.json, and a text needs one";
        let ids = self.tokenizer.as_ref().context(missing)?.encode(&needs.text, false)?;
        Ok(StartText { ids, key_values: Vec::new() })
    }

    /// What is trained and what is there, as PEFT prints it.
    fn trainable_line(&mut self, adapter: &Adapter) -> String {
        let tied = self.tied_head();
        let all = workbench::base_parameters(self.kind.tree(), tied);
        workbench::trainable_text(adapter.num_parameters(), adapter.num_added() + all)
    }
}

/// Says which layers begin at random.
fn tell_fresh(bench: &TaskBench, note: &mut Note) {
    let Kind::Labels(model, _) = &bench.kind else { return };
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

/// PEFT's settings for a task: its name, and the head, if there is one, among the modules that are trained in full.
///
/// # Errors
/// The method trains no modules beside its own parameters, and a head is needed.
fn for_task(given: &Given, name: &str, bench: &TaskBench) -> Result<PeftConfig> {
    let mut config = match &bench.kind {
        Kind::Labels(model, _) => with_head(given, name, &model.head().saved)?,
        Kind::Texts(_) => given.adapter(name)?,
    };
    config.set("task_type", bench.task.peft_name());
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

/// The task of the run that `engobe plan` is asked about, and the head of one that has labels. Classes are counted in the
/// rows, or in the model's configuration.
pub fn of_plan(given: &Given, path: &Path, note: &mut Note) -> Result<(Task, Option<Head>)> {
    let data = given.paths("data");
    let encoder = config_of(path).ok().filter(|config| encoder_architecture(config).is_ok());
    let task = match (given.text("task"), encoder) {
        (None, Some(config)) if data.is_empty() => task_of_architectures(&config).unwrap_or(Task::SeqCls),
        _ => of_training(given, path, note)?,
    };
    if !task.is_labelled() {
        return Ok((task, None));
    }
    let known = known_names(path)?;
    let labels = match data.is_empty() {
        true if task == Task::Regression => 1,
        true => known.len().max(2),
        false => LabelSet::of_rows(task, &engobe_data::reader::read(&data)?, &known)?.len(),
    };
    note.line(&format!("task: {task}, a head of {labels}"));
    Ok((task, head_of(task, labels)?))
}

/// Rows of a task as training would take them, and what is to be said of them: those of the first files to be trained on,
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
    let labels = match task.is_labelled() {
        true => Some(LabelSet::of_rows(task, &files, &known_names(path)?)?),
        false => None,
    };
    let (vocab_size, most) = match head_of(task, labels.as_ref().map_or(0, LabelSet::len))? {
        Some(Head { kind, labels }) => {
            let outline = TaskOutline::read(path, &LoadOptions::default(), kind, labels)?;
            let info = outline.model.info();
            (info.vocab_size, info.max_positions)
        }
        None => (HfConfig::open(path)?.usize("vocab_size")?, usize::MAX),
    };
    let options = TaskOptions { task, max_seq_len: max_seq_len.min(most) };
    let encoder = TaskEncoder::new(tokenizer, labels.as_ref(), vocab_size, options);
    let train = Dataset { samples: encoder.encode(&files)?, files };
    tell_files(&train.files, &train.samples, note);
    let val = match val {
        [] => Vec::new(),
        paths => encoder.encode(&engobe_data::reader::read(paths)?)?,
    };
    let special = tokenizer.map_or(0, TextTokenizer::special_around);
    let report = lint_task(&train.samples, &val, labels.as_ref(), special, max_seq_len);
    Ok((train, report))
}

/// The head of a task with so many labels; `None` where texts are made.
fn head_of(task: Task, labels: usize) -> Result<Option<Head>> {
    Ok(head_kind(task)?.map(|kind| Head { kind, labels }))
}

/// The task of a training run.
pub fn of_training(given: &Given, path: &Path, note: &mut Note) -> Result<Task> {
    let (adapter, data) = (given.path("init_adapter"), given.paths("data"));
    choose(&Hints { asked: given.text("task"), model: path, adapter: adapter.as_deref(), data: &data }, note)
}
