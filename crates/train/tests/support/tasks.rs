//! What tests of task models beside transformers and PEFT share: rows of a golden file, the head they are for, and a
//! run over them.

use candle_core::Device;
use engobe_adapters::Adapter;
use engobe_adapters::merge::{MergeOptions, merge};
use engobe_data::{Goal, LabelSet, Loader, LoaderOptions, MicroBatch, Place, Problem, Sample, Task};
use engobe_kernels::storage::StorageType;
use engobe_models::{HeadKind, LoadOptions, load_task_model};
use engobe_nn::TaskModel;
use engobe_testkit::{assert_close, assert_relative, doubles, golden};
use engobe_train::plan::Plan;
use engobe_train::{Model, Silent, Trainer, metrics, predict};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// Rows with their labels, and the model that they are for.
#[derive(Deserialize)]
pub struct Rows {
    base: String,
    problem: String,
    classes: usize,
    /// settings of dropout, which is off
    off: Vec<String>,
    rows: Vec<Vec<u32>>,
    labels: Vec<Value>,
    types: Option<Vec<Vec<u32>>>,
}

/// What transformers and PEFT say of them.
#[derive(Deserialize)]
pub struct Curve {
    /// of the row, or of its first token
    logits: Vec<Vec<f64>>,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    trainable_parameters: usize,
}

/// How far ours may lie from it.
pub struct Tolerances {
    pub logits: f64,
    pub losses: f64,
    pub norms: f64,
}

impl Rows {
    pub fn labels(&self) -> LabelSet {
        let names = (0..self.classes).map(|i| format!("LABEL_{i}")).collect();
        match self.problem.as_str() {
            "regression" => LabelSet::new(Task::Regression, Problem::Regression, names),
            "multi_label_classification" => LabelSet::new(Task::SeqCls, Problem::MultiLabel, names),
            "tokens" => LabelSet::new(Task::TokenCls, Problem::SingleLabel, names),
            _ => LabelSet::new(Task::SeqCls, Problem::SingleLabel, names),
        }
    }

    fn sample(&self, i: usize, labels: &LabelSet) -> Sample {
        let (ids, label) = (self.rows[i].clone(), &self.labels[i]);
        let list = || label.as_array().unwrap().iter().map(|v| v.as_i64().unwrap());
        let goal = match (labels.task, labels.problem) {
            (Task::TokenCls, _) => Goal::Tags,
            (_, Problem::Regression) => Goal::Value(label.as_f64().unwrap() as f32),
            (_, Problem::MultiLabel) => Goal::Classes(list().map(|v| v == 1).collect()),
            (_, Problem::SingleLabel) => Goal::Class(label.as_u64().unwrap() as u32),
        };
        let tags = match goal {
            Goal::Tags => list().map(|v| u32::try_from(v).ok()).collect(),
            _ => vec![None; ids.len()],
        };
        let second_type_from =
            self.types.as_ref().map(|types| types[i].iter().position(|t| *t == 1).unwrap());
        let place = Place { file: "rows".into(), number: i + 1, unit: "row" };
        Sample { ids, labels: tags, place, truncated: 0, goal, second_type_from }
    }

    /// The base with its dropout off, and the head that it has or lacks.
    pub fn model(&self, labels: &LabelSet) -> TaskModel {
        let (from, dir) = (golden(&self.base), self.configured());
        for entry in std::fs::read_dir(&from).unwrap().flatten() {
            if entry.path().is_file() && entry.file_name() != "config.json" {
                std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
            }
        }
        self.load(dir.path(), labels, 1)
    }

    /// A directory with the base's configuration, its dropout off.
    fn configured(&self) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut config: Value = engobe_testkit::json(&golden(&self.base).join("config.json"));
        self.off.iter().for_each(|key| config[key.as_str()] = 0.0.into());
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        dir
    }

    fn load(&self, dir: &Path, labels: &LabelSet, seed: u64) -> TaskModel {
        let kind = if labels.task == Task::TokenCls { HeadKind::Token } else { HeadKind::Sequence };
        load_task_model(dir, &LoadOptions::default(), kind, self.classes, seed).unwrap()
    }

    /// The model with `adapter` baked in, written and read again; nothing of it begins at random.
    fn merged(&self, model: &mut TaskModel, adapter: &Adapter, labels: &LabelSet) -> TaskModel {
        let dir = self.configured();
        let options =
            MergeOptions { storage: &|_| StorageType::F32, max_shard_bytes: 1 << 30, tied_head: false };
        merge(model, adapter, dir.path(), &options, &mut |_, _| ()).unwrap();
        let read = self.load(dir.path(), labels, 2);
        assert!(read.head().fresh.is_empty(), "{}: {:?} is missing", self.base, read.head().fresh);
        read
    }
}

/// Logits before training, the steps of `curve`, and logits of what was saved. `adapt` gives the model its adapter.
pub fn beside(
    name: &str,
    rows: &Rows,
    curve: &Curve,
    rate: f64,
    within: &Tolerances,
    adapt: impl Fn(&mut TaskModel) -> Adapter,
) {
    let labels = rows.labels();
    let mut model = rows.model(&labels);
    let adapter = adapt(&mut model);
    assert_eq!(adapter.num_parameters(), curve.trainable_parameters, "{name}");
    let samples: Vec<Sample> = (0..rows.rows.len()).map(|i| rows.sample(i, &labels)).collect();

    // without labels a head of tokens gives every token's logits, the first one's first
    let unlabelled: Vec<Sample> = samples
        .iter()
        .map(|s| Sample { goal: Goal::Nothing, labels: vec![None; s.ids.len()], ..s.clone() })
        .collect();
    let all: Vec<usize> = (0..samples.len()).collect();
    let batch = MicroBatch::of(&unlabelled, &all);
    let probe = [batch];
    let mut found = predict(Model::Task(&model, &labels), &probe, &mut |_| ()).unwrap();
    found.sort_by_key(|p| p.row);
    let found: Vec<f32> = found.iter().flat_map(|p| p.logits[0].clone()).collect();
    assert_close(&found, &curve.logits.concat(), within.logits, &format!("{name}: logits"));

    let mut plan = Plan::default();
    plan.schedule.max_steps = Some(curve.losses.len());
    plan.schedule.batch_size = 4;
    plan.optimization.learning_rate = rate;
    let order =
        LoaderOptions { batch_size: 4, max_seq_len: 64, packing: false, shuffle: false, seed: 0, lead: 0 };
    let out = tempfile::tempdir().unwrap();
    let loader = Loader::new(Arc::new(samples), order);
    let task = Model::Task(&model, &labels);
    let mut trainer = Trainer::new(task, &adapter, &plan, loader, vec![], out.path(), String::new()).unwrap();
    trainer.run(&mut Silent).unwrap();
    let found = metrics::read(&out.path().join("metrics.jsonl")).unwrap();
    assert_eq!(found.len(), curve.losses.len());
    for (line, (loss, norm)) in found.iter().zip(curve.losses.iter().zip(&curve.grad_norms)) {
        assert_relative(line.loss, *loss, within.losses, &format!("{name}: loss of step {}", line.step));
        assert_relative(line.grad_norm, *norm, within.norms, &format!("{name}: norm of step {}", line.step));
    }
    let mut again = rows.model(&labels);
    let loaded = Adapter::load(&mut again, out.path(), &Device::Cpu).unwrap();
    let said = |model: &TaskModel| predict(Model::Task(model, &labels), &probe, &mut |_| ()).unwrap();
    for (loaded, trained) in said(&again).iter().zip(said(&model)) {
        // AdaLoRA's file leaves out directions of nothing, and a prompt's its encoder: sums in another order
        let what = format!("{name}: row {} after loading", trained.row);
        assert_close(&loaded.logits.concat(), &doubles(&trained.logits.concat()), 1e-5, &what);
    }
    if loaded.check_mergeable().is_ok() {
        let merged = rows.merged(&mut again, &loaded, &labels);
        for (merged, trained) in said(&merged).iter().zip(said(&model)) {
            let what = format!("{name}: row {} after merging", trained.row);
            assert_close(&merged.logits.concat(), &doubles(&trained.logits.concat()), 1e-5, &what);
        }
    }
}
