//! Prompts, their encoders, prefixes and bottlenecks in training: beside PEFT's and AdapterHub's, and against themselves.

mod support;

use candle_core::Device;
use engobe_adapters::{Adapter, Start};
use engobe_autograd::{Activations, Gradients, Tape, Var, host};
use engobe_data::MicroBatch;
use engobe_formats::peft::PeftConfig;
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
        let adapter = support::to_train(model.as_mut(), &name);
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

/// Methods with rows before sequences or layers behind sub-layers, in their kinds.
fn settings() -> Vec<PeftConfig> {
    let config = |kind: &str, settings: serde_json::Value| {
        let mut config = PeftConfig::new(kind);
        settings.as_object().unwrap().iter().for_each(|(key, value)| config.set(key, value.clone()));
        config
    };
    let lstm = json!({ "num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6 });
    vec![
        config("PROMPT_TUNING", json!({ "num_virtual_tokens": 3 })),
        config("P_TUNING", json!({ "num_virtual_tokens": 3 })),
        config("P_TUNING", lstm),
        config("PREFIX_TUNING", json!({ "num_virtual_tokens": 3 })),
        config("PREFIX_TUNING", json!({ "num_virtual_tokens": 3, "prefix_projection": true })),
        config("BOTTLENECK", json!({ "architecture": "pfeiffer" })),
        config("BOTTLENECK", json!({ "architecture": "houlsby" })),
        config("BOTTLENECK", json!({ "architecture": "parallel" })),
    ]
}

/// The gradients of some batches, and their loss.
fn gradients(
    model: &dyn CausalLm,
    adapter: &Adapter,
    batches: &[MicroBatch],
    checkpointing: bool,
) -> (f64, Vec<Vec<f32>>) {
    let (mut grads, mut loss) = (Gradients::new(), 0.0);
    for batch in batches {
        let how = Differentiate { checkpointing, dropout_seed: 0, scale: 0.1, half: None, watch: None };
        loss += differentiate(model, batch, how, &mut grads).unwrap().loss;
    }
    let of = |p: &engobe_autograd::Param| host(grads.get(p).unwrap()).unwrap().to_vec();
    (loss, adapter.params().into_iter().map(of).collect())
}

/// Packed and checkpointed rows give the gradients of rows one by one without checkpointing: the order of sums over
/// rows differs, and nothing else.
#[test]
fn packing_and_checkpointing_change_no_gradient() {
    for config in settings() {
        let what = config.to_json().to_string();
        let mut model = tiny("gqa_tied");
        let adapter = Adapter::attach(model.as_mut(), config, Start { seed: 3 }, &Device::Cpu).unwrap();
        let of = |batches: &[MicroBatch], on| gradients(model.as_ref(), &adapter, batches, on);
        let batch = micro_batch(&[9, 1, 5]);
        let plain = of(&apart(&batch), false);
        let packed = of(std::slice::from_ref(&batch), true);
        assert_relative(packed.0, plain.0, 1e-6, &what);
        for ((a, b), p) in packed.1.iter().zip(&plain.1).zip(adapter.params()) {
            assert_close(a, &doubles(b), 1e-5, &format!("{what} {}", p.name()));
        }
        // and accumulation over the two is accumulation over the rows
        let both = of(&[batch.clone(), batch.clone()], true);
        assert_relative(both.0, 2.0 * plain.0, 1e-6, &what);
    }
}

/// Three steps of plain descent.
fn descend(model: &dyn CausalLm, adapter: &Adapter, batches: &[MicroBatch], checkpointing: bool) {
    for _ in 0..3 {
        let (_, grads) = gradients(model, adapter, batches, checkpointing);
        for (p, grad) in adapter.params().into_iter().zip(grads) {
            p.update_host(|v| v.iter_mut().zip(&grad).for_each(|(v, g)| *v -= 0.2 * g)).unwrap();
        }
    }
}

/// Logits after every token of two rows that grow unevenly in one cache.
fn through_a_cache(model: &dyn CausalLm, rows: [&[u32]; 2]) -> [Vec<f32>; 2] {
    let mut cache = model.new_cache(2, 2, Activations::Exact).unwrap();
    let mut said = [Vec::new(), Vec::new()];
    let [a, b] = rows;
    let turns: [Vec<(usize, &[u32])>; 4] = [
        vec![(0, &a[..3]), (1, &b[..1])],
        vec![(1, &b[1..6])],
        vec![(0, &a[3..4]), (1, &b[6..])],
        vec![(0, &a[4..])],
    ];
    for turn in turns {
        let batch = cache.batch(&turn).unwrap();
        let hidden = model.hidden_states(&mut Tape::inference(), &batch, Some(&mut cache)).unwrap();
        let logits = model.logits(&mut Tape::inference(), &Var::constant(hidden.into_tensor())).unwrap();
        let (all, width) = (host(&logits).unwrap(), logits.dim(1).unwrap());
        for (segment, slot) in batch.segments.iter().zip(&batch.slots) {
            said[*slot].extend(&all[segment.q.start * width..segment.q.end * width]);
        }
    }
    said
}

/// Trained on packed rows with checkpointing and asked through a cache that two sequences share, a method says what it
/// says trained row by row without checkpointing and asked in whole passes. The bases' heads share keys (GQA); one is
/// f32, one quantized. Three steps let the rounding of sums in other orders grow.
#[test]
fn packing_checkpointing_and_a_cache_at_once_change_nothing() {
    for base in ["llama/gqa_tied", "bitsandbytes/nf4_dq"] {
        for config in settings() {
            let what = format!("{base} {}", config.to_json());
            let attached = || {
                let mut model = models::load(&golden(base));
                let start = Start { seed: 3 };
                let adapter = Adapter::attach(model.as_mut(), config.clone(), start, &Device::Cpu).unwrap();
                (model, adapter)
            };
            let batch = micro_batch(&[9, 1, 5]);
            let (plain, adapter) = attached();
            let (row, other): (Vec<u32>, Vec<u32>) = ((5..14).collect(), (20..29).rev().collect());
            let untrained = models::logits(plain.as_ref(), &row).concat();
            descend(plain.as_ref(), &adapter, &apart(&batch), false);
            let expected = [&row, &other].map(|row| models::logits(plain.as_ref(), row).concat());
            let moved = expected[0].iter().zip(&untrained).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(moved > 1e-2, "{what}: moved by {moved}");
            let (all, adapter) = attached();
            descend(all.as_ref(), &adapter, std::slice::from_ref(&batch), true);
            for (found, expected) in through_a_cache(all.as_ref(), [&row, &other]).iter().zip(&expected) {
                assert_close(found, &doubles(expected), 2e-5, &what);
            }
        }
    }
}
