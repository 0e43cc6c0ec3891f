//! Prompts, their encoders, prefixes and bottlenecks in training: beside PEFT's and AdapterHub's, and against themselves.

mod support;

use candle_core::Device;
use engobe_adapters::{Adapter, Start};
use engobe_autograd::{Gradients, host};
use engobe_data::MicroBatch;
use engobe_formats::peft::{PeftAdapter, PeftConfig};
use engobe_formats::safetensors_file::SafetensorsFile;
use engobe_nn::CausalLm;
use engobe_testkit::models::{self, tiny};
use engobe_testkit::{assert_close, assert_relative, cases, doubles, golden, golden_json};
use engobe_train::plan::Plan;
use engobe_train::step::{Differentiate, differentiate};
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
struct Expected {
    base: String,
    accumulation: usize,
    learning_rate: f64,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    trainable_parameters: usize,
    probe: Vec<u32>,
    logits_before: Vec<f64>,
    logits_after: Vec<f64>,
}

/// The issue asks for 1e-4 and 1e-3; numbers in the files have six and seven digits, and twenty steps let rounding grow.
const LOGITS: f64 = 2e-5;
const LOSS: f64 = 2e-5;
const NORM: f64 = 2e-4;

/// Logits after the last of `ids`.
fn logits(model: &dyn CausalLm, ids: &[u32]) -> Vec<f32> {
    models::logits(model, ids).pop().unwrap()
}

/// The adapter of a case as it is trained: with the encoder that a file of PEFT's leaves out.
fn to_train(model: &mut dyn CausalLm, case: &str) -> Adapter {
    let dir = golden(case);
    let encoder = dir.join("encoder.safetensors");
    if !encoder.exists() {
        return Adapter::load(model, &dir, &Device::Cpu).unwrap();
    }
    let config = PeftAdapter::load(&dir).unwrap().config;
    let adapter = Adapter::attach(model, config, Start { seed: 0 }, &Device::Cpu).unwrap();
    let file = SafetensorsFile::open(&encoder).unwrap();
    adapter.restore(&encoder, &file.tensors().map(|t| (t.name.clone(), t.clone())).collect()).unwrap();
    adapter
}

#[test]
fn curves_and_logits_are_those_of_peft() {
    assert!(curves("virtual_tokens") >= 7);
}

#[test]
fn curves_and_logits_are_those_of_adapter_hub() {
    assert!(curves("bottleneck") >= 5);
}

/// Trains every case of a directory beside what is expected of it; says how many there are.
fn curves(dir: &str) -> usize {
    let names = cases(dir);
    for name in names.iter().map(|name| format!("{dir}/{name}")) {
        let expected: Expected = golden_json(format!("{name}/expected.json"));
        let mut model = tiny(&expected.base);
        let adapter = to_train(model.as_mut(), &name);
        assert_eq!(adapter.num_parameters(), expected.trainable_parameters, "{name}");
        let what = |when: &str| format!("{name}: logits {when}");
        assert_close(
            &logits(model.as_ref(), &expected.probe),
            &expected.logits_before,
            LOGITS,
            &what("before"),
        );
        let mut plan = Plan::default();
        plan.schedule.max_steps = Some(20);
        plan.schedule.batch_size = 2;
        plan.schedule.gradient_accumulation = expected.accumulation;
        plan.optimization.learning_rate = expected.learning_rate;
        let out = tempfile::tempdir().unwrap();
        let found = support::train(model.as_ref(), &adapter, &plan, out.path());
        assert_eq!(found.len(), expected.losses.len());
        for (line, (loss, norm)) in found.iter().zip(expected.losses.iter().zip(&expected.grad_norms)) {
            assert_relative(line.loss, *loss, LOSS, &format!("{name}: loss of step {}", line.step));
            assert_relative(line.grad_norm, *norm, NORM, &format!("{name}: norm of step {}", line.step));
        }
        assert_close(&logits(model.as_ref(), &expected.probe), &expected.logits_after, 1e-4, &what("after"));
        // what was written, without its encoder, says the same
        let mut again = tiny(&expected.base);
        Adapter::load(again.as_mut(), out.path(), &Device::Cpu).unwrap();
        assert_eq!(
            logits(again.as_ref(), &expected.probe),
            logits(model.as_ref(), &expected.probe),
            "{name}"
        );
    }
    names.len()
}

/// AdaLoRA may give up all directions of a layer; its tensors then have no elements, and load all the same.
#[test]
fn a_layer_that_was_given_up_is_saved_and_loaded() {
    let mut model = tiny("gqa_tied");
    let mut config = PeftConfig::new("ADALORA");
    for (key, value) in
        [("init_r", json!(2)), ("target_r", json!(1)), ("target_modules", json!("all-linear"))]
    {
        config.set(key, value);
    }
    let adapter = Adapter::attach(model.as_mut(), config, Start { seed: 1 }, &Device::Cpu).unwrap();
    let mut plan = Plan::default();
    plan.schedule.max_steps = Some(20);
    plan.schedule.batch_size = 2;
    plan.optimization.learning_rate = 1e-2;
    let out = tempfile::tempdir().unwrap();
    support::train(model.as_ref(), &adapter, &plan, out.path());
    let mut again = tiny("gqa_tied");
    let loaded = Adapter::load(again.as_mut(), out.path(), &Device::Cpu).unwrap();
    assert!(loaded.params().iter().any(|p| p.is_empty()), "no layer was given up: the test shows nothing");
    let ids: Vec<u32> = (1..20).collect();
    // directions of nothing are left out of the file: sums in another order
    assert_close(&logits(again.as_ref(), &ids), &doubles(&logits(model.as_ref(), &ids)), 1e-5, "loaded");
}

/// Rows of uneven lengths end to end, every third token a label.
fn micro_batch(lens: &[usize]) -> MicroBatch {
    let n: usize = lens.iter().sum();
    let mut segments = Vec::new();
    for len in lens {
        let start = segments.last().map_or(0, |s: &std::ops::Range<usize>| s.end);
        segments.push(start..start + len);
    }
    let tokens: Vec<u32> = (0..n as u32).map(|i| (i * 7 + 3) % 40).collect();
    let targets: Vec<Option<u32>> = (0..n as u32).map(|i| (i % 3 == 0).then_some((i * 5 + 1) % 40)).collect();
    let label_tokens = targets.iter().flatten().count();
    let rows = (0..lens.len()).collect();
    MicroBatch { tokens, targets, segments, label_tokens, rows, ..MicroBatch::default() }
}

/// The rows of a batch, each by itself.
fn apart(batch: &MicroBatch) -> Vec<MicroBatch> {
    let one = |(row, s): (usize, &std::ops::Range<usize>)| {
        let targets = batch.targets[s.clone()].to_vec();
        MicroBatch {
            tokens: batch.tokens[s.clone()].to_vec(),
            label_tokens: targets.iter().flatten().count(),
            targets,
            segments: std::iter::once(0..s.len()).collect(),
            rows: vec![row],
            ..MicroBatch::default()
        }
    };
    batch.segments.iter().enumerate().map(one).collect()
}

/// Packed and checkpointed rows give the gradients of rows one by one without checkpointing: the order of sums over
/// rows differs, and nothing else.
#[test]
fn packing_and_checkpointing_change_no_gradient() {
    for (peft_type, projection) in [
        ("PROMPT_TUNING", false),
        ("P_TUNING", false),
        ("PREFIX_TUNING", false),
        ("PREFIX_TUNING", true),
        ("BOTTLENECK", false),
    ] {
        let mut model = tiny("gqa_tied");
        let mut config = PeftConfig::new(peft_type);
        if peft_type != "BOTTLENECK" {
            config.set("num_virtual_tokens", 3);
        }
        if projection {
            config.set("prefix_projection", json!(true));
        }
        let adapter = Adapter::attach(model.as_mut(), config, Start { seed: 3 }, &Device::Cpu).unwrap();
        let gradients = |batches: &[MicroBatch], checkpointing: bool| -> (f64, Vec<Vec<f32>>) {
            let mut grads = Gradients::new();
            let mut loss = 0.0;
            for batch in batches {
                let how =
                    Differentiate { checkpointing, dropout_seed: 0, scale: 0.1, half: None, watch: None };
                loss += differentiate(model.as_ref(), batch, how, &mut grads).unwrap().loss;
            }
            let of = |p: &engobe_autograd::Param| host(grads.get(p).unwrap()).unwrap().to_vec();
            (loss, adapter.params().into_iter().map(of).collect())
        };
        let batch = micro_batch(&[9, 1, 5]);
        let plain = gradients(&apart(&batch), false);
        let packed = gradients(std::slice::from_ref(&batch), true);
        assert_relative(packed.0, plain.0, 1e-6, peft_type);
        for ((a, b), p) in packed.1.iter().zip(&plain.1).zip(adapter.params()) {
            let b: Vec<f64> = b.iter().map(|v| f64::from(*v)).collect();
            assert_close(a, &b, 1e-5, &format!("{peft_type} {}", p.name()));
        }
        // and accumulation over the two is accumulation over the rows
        let both = gradients(&[batch.clone(), batch.clone()], true);
        assert_relative(both.0, 2.0 * plain.0, 1e-6, peft_type);
    }
}
