//! Heads beside transformers' and training beside PEFT's, from the adapters of `golden/peft_tasks`: logits, losses and
//! gradient norms of every step; what was trained is saved, and says the same when it is loaded again.

mod support;

use candle_core::Device;
use engobe_adapters::Adapter;
use engobe_data::{Goal, LabelSet, Loader, LoaderOptions, MicroBatch, Place, Problem, Sample, Task};
use engobe_models::{HeadKind, LoadOptions, load_task_model};
use engobe_nn::TaskModel;
use engobe_testkit::{assert_close, assert_relative, cases, doubles, golden, golden_json};
use engobe_train::plan::Plan;
use engobe_train::{Model, Silent, Trainer, metrics, predict};
use serde::Deserialize;
use serde_json::Value;
use std::sync::Arc;

#[derive(Deserialize)]
struct Expected {
    base: String,
    problem: String,
    classes: usize,
    /// settings of dropout, which is off
    off: Vec<String>,
    rows: Vec<Vec<u32>>,
    labels: Vec<Value>,
    types: Option<Vec<Vec<u32>>>,
    /// of the row, or of its first token
    logits: Vec<Vec<f64>>,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    trainable_parameters: usize,
}

/// The issue asks for 1e-3. As in `peft_parity.rs` what differs is the order of sums in f32.
const LOSS: f64 = 1e-5;
const NORM: f64 = 5e-5;
const LOGITS: f64 = 1e-5;

impl Expected {
    fn labels(&self) -> LabelSet {
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
    fn model(&self, labels: &LabelSet) -> TaskModel {
        let (from, dir) = (golden(&self.base), tempfile::tempdir().unwrap());
        let mut config: Value = engobe_testkit::json(&from.join("config.json"));
        self.off.iter().for_each(|key| config[key.as_str()] = 0.0.into());
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        for entry in std::fs::read_dir(&from).unwrap().flatten() {
            if entry.path().is_file() && entry.file_name() != "config.json" {
                std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
            }
        }
        let kind = if labels.task == Task::TokenCls { HeadKind::Token } else { HeadKind::Sequence };
        load_task_model(dir.path(), &LoadOptions::default(), kind, self.classes, 1).unwrap()
    }
}

#[test]
fn logits_and_curves_are_those_of_transformers_and_peft() {
    let names = cases("peft_tasks");
    assert!(names.len() >= 52, "{names:?}");
    let fails = |name: &String| std::panic::catch_unwind(|| one(name)).is_err();
    let failed: Vec<String> = names.into_iter().filter(fails).collect();
    assert!(failed.is_empty(), "{failed:?}: see above");
}

/// Logits before training, ten steps, and logits of what was saved.
fn one(name: &str) {
    let expected: Expected = golden_json(format!("peft_tasks/{name}/expected.json"));
    let labels = expected.labels();
    let mut model = expected.model(&labels);
    let adapter = support::to_train(&mut model, &format!("peft_tasks/{name}"));
    assert_eq!(adapter.num_parameters(), expected.trainable_parameters, "{name}");
    let samples: Vec<Sample> = (0..expected.rows.len()).map(|i| expected.sample(i, &labels)).collect();

    // without labels a head of tokens gives every token's logits, the first one's first
    let unlabelled: Vec<Sample> = samples
        .iter()
        .map(|s| Sample { goal: Goal::Nothing, labels: vec![None; s.ids.len()], ..s.clone() })
        .collect();
    let all: Vec<usize> = (0..samples.len()).collect();
    let batch = MicroBatch::of(&unlabelled, &all);
    let probe = [batch];
    for found in predict(Model::Task(&model, &labels), &probe, &mut |_| ()).unwrap() {
        let what = format!("{name}: logits of row {}", found.row);
        // the file has seven digits behind the point
        let size = expected.logits[found.row].iter().fold(0f64, |m, z| m.max(z.abs()));
        let tolerance = LOGITS.max(1e-7 / size);
        assert_close(&found.logits[0], &expected.logits[found.row], tolerance, &what);
    }

    let mut plan = Plan::default();
    plan.schedule.max_steps = Some(expected.losses.len());
    plan.schedule.batch_size = 4;
    plan.optimization.learning_rate = 1e-3;
    let order =
        LoaderOptions { batch_size: 4, max_seq_len: 64, packing: false, shuffle: false, seed: 0, lead: 0 };
    let out = tempfile::tempdir().unwrap();
    let loader = Loader::new(Arc::new(samples), order);
    let task = Model::Task(&model, &labels);
    let mut trainer = Trainer::new(task, &adapter, &plan, loader, vec![], out.path(), String::new()).unwrap();
    trainer.run(&mut Silent).unwrap();
    let found = metrics::read(&out.path().join("metrics.jsonl")).unwrap();
    assert_eq!(found.len(), expected.losses.len());
    // AdaLoRA's gradient is a sum of the rows' and the penalty's, whose rounding counts where they cancel
    let norms = if name.ends_with("adalora") { 10.0 * NORM } else { NORM };
    for (line, (loss, norm)) in found.iter().zip(expected.losses.iter().zip(&expected.grad_norms)) {
        assert_relative(line.loss, *loss, LOSS, &format!("{name}: loss of step {}", line.step));
        assert_relative(line.grad_norm, *norm, norms, &format!("{name}: norm of step {}", line.step));
    }
    let mut again = expected.model(&labels);
    Adapter::load(&mut again, out.path(), &Device::Cpu).unwrap();
    let said = |model: &TaskModel| predict(Model::Task(model, &labels), &probe, &mut |_| ()).unwrap();
    for (loaded, trained) in said(&again).iter().zip(said(&model)) {
        // AdaLoRA's file leaves out directions of nothing, and a prompt's its encoder: sums in another order
        let what = format!("{name}: row {} after loading", trained.row);
        assert_close(&loaded.logits.concat(), &doubles(&trained.logits.concat()), 1e-5, &what);
    }
}
