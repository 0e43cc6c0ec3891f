//! Heads beside transformers' and training beside PEFT's, from the adapters of `golden/peft_tasks`: logits, losses and
//! gradient norms of every step.

use engobe_adapters::Adapter;
use engobe_data::{Goal, LabelSet, Loader, LoaderOptions, MicroBatch, Place, Problem, Sample, Task};
use engobe_models::{HeadKind, LoadOptions, load_task_model};
use engobe_nn::TaskModel;
use engobe_testkit::{assert_close, assert_relative, cases, golden, golden_json};
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
        let (from, dir) = (golden(format!("encoders/{}", self.base)), tempfile::tempdir().unwrap());
        let mut config: Value = engobe_testkit::json(&from.join("config.json"));
        self.off.iter().for_each(|key| config[key.as_str()] = 0.0.into());
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let kind = if labels.task == Task::TokenCls { HeadKind::Token } else { HeadKind::Sequence };
        load_task_model(dir.path(), &LoadOptions::default(), kind, self.classes, 1).unwrap()
    }
}

#[test]
fn logits_and_curves_are_those_of_transformers_and_peft() {
    let names = cases("peft_tasks");
    assert!(names.len() >= 9, "{names:?}");
    for name in names {
        let expected: Expected = golden_json(format!("peft_tasks/{name}/expected.json"));
        let labels = expected.labels();
        let mut model = expected.model(&labels);
        let dir = golden(format!("peft_tasks/{name}"));
        let adapter = Adapter::load(&mut model, &dir, &candle_core::Device::Cpu).unwrap();
        assert_eq!(adapter.num_parameters(), expected.trainable_parameters, "{name}");
        let samples: Vec<Sample> = (0..expected.rows.len()).map(|i| expected.sample(i, &labels)).collect();

        // without labels a head of tokens gives every token's logits, the first one's first
        let unlabelled: Vec<Sample> = samples
            .iter()
            .map(|s| Sample { goal: Goal::Nothing, labels: vec![None; s.ids.len()], ..s.clone() })
            .collect();
        let all: Vec<usize> = (0..samples.len()).collect();
        let batch = MicroBatch::of(&unlabelled, &all);
        for found in predict(Model::Task(&model, &labels), &[batch], &mut |_| ()).unwrap() {
            let what = format!("{name}: logits of row {}", found.row);
            assert_close(&found.logits[0], &expected.logits[found.row], LOGITS, &what);
        }

        let mut plan = Plan::default();
        plan.schedule.max_steps = Some(expected.losses.len());
        plan.schedule.batch_size = 4;
        plan.optimization.learning_rate = 1e-3;
        let order = LoaderOptions {
            batch_size: 4,
            max_seq_len: 64,
            packing: false,
            shuffle: false,
            seed: 0,
            lead: 0,
        };
        let out = tempfile::tempdir().unwrap();
        let loader = Loader::new(Arc::new(samples), order);
        let task = Model::Task(&model, &labels);
        let mut trainer =
            Trainer::new(task, &adapter, &plan, loader, vec![], out.path(), String::new()).unwrap();
        trainer.run(&mut Silent).unwrap();
        let found = metrics::read(&out.path().join("metrics.jsonl")).unwrap();
        assert_eq!(found.len(), expected.losses.len());
        for (line, (loss, norm)) in found.iter().zip(expected.losses.iter().zip(&expected.grad_norms)) {
            assert_relative(line.loss, *loss, LOSS, &format!("{name}: loss of step {}", line.step));
            assert_relative(line.grad_norm, *norm, NORM, &format!("{name}: norm of step {}", line.step));
        }
    }
}
