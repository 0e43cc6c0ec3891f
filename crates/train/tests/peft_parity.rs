//! Training beside PEFT's, from the adapters of `golden/peft` and, over a model that bitsandbytes quantized, those of
//! `golden/qlora`: losses and gradient norms of every step.

use engobe_adapters::Adapter;
use engobe_data::{EncodeOptions, Encoder, Loader, LoaderOptions, PromptStyle, TrainOn, reader};
use engobe_models::{LoadOptions, load_causal_lm};
use engobe_testkit::{assert_relative, cases, golden, golden_json};
use engobe_train::plan::Plan;
use engobe_train::{Silent, Trainer, metrics};
use serde::Deserialize;
use std::sync::Arc;

#[derive(Deserialize)]
struct Expected {
    base: String,
    accumulation: usize,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    trainable_parameters: usize,
}

/// The issue asks for 1e-3 and 1e-2. Twenty steps let rounding grow: 6e-7 and 2e-6 were seen, and a wrong rule
/// (epsilon, clipping, a mean of means) shows above 1e-4.
const LOSS: f64 = 1e-5;
const NORM: f64 = 5e-5;

fn options() -> EncodeOptions {
    EncodeOptions { train_on: TrainOn::Completions, style: PromptStyle::Auto, max_seq_len: 64 }
}

fn curve(name: &str, expected: &Expected, checkpointing: bool) -> Vec<metrics::StepMetrics> {
    let (base, start) = (format!("llama/{}", expected.base), format!("peft/{name}"));
    train(&base, &start, 20, expected.accumulation, checkpointing, Some(expected.trainable_parameters))
}

/// Steps over the model at `base` from the adapter at `start`, in `golden/`.
fn train(
    base: &str,
    start: &str,
    steps: usize,
    accumulation: usize,
    checkpointing: bool,
    parameters: Option<usize>,
) -> Vec<metrics::StepMetrics> {
    let device = candle_core::Device::Cpu;
    let mut model = load_causal_lm(&golden(base), &LoadOptions::default()).unwrap();
    let adapter = Adapter::load(model.as_mut(), &golden(start), &device).unwrap();
    if let Some(parameters) = parameters {
        assert_eq!(adapter.num_parameters(), parameters, "{start}");
    }
    let mut plan = Plan::default();
    plan.schedule.max_steps = Some(steps);
    plan.schedule.batch_size = 2;
    plan.schedule.gradient_accumulation = accumulation;
    plan.optimization.learning_rate = 1e-3;
    plan.compute.activation_checkpointing = checkpointing;
    let files = reader::read(&[golden("peft/rows.jsonl")]).unwrap();
    let encoder = Encoder::new(None, model.info().vocab_size, options()).unwrap();
    let samples = Arc::new(encoder.encode(&files).unwrap());
    let order = LoaderOptions { batch_size: 2, max_seq_len: 64, packing: false, shuffle: false, seed: 0 };
    let out = tempfile::tempdir().unwrap();
    let loader = Loader::new(samples, order);
    let mut trainer =
        Trainer::new(model.as_ref(), &adapter, &plan, loader, vec![], out.path(), String::new()).unwrap();
    trainer.run(&mut Silent).unwrap();
    metrics::read(&out.path().join("metrics.jsonl")).unwrap()
}

#[test]
fn curves_are_those_of_peft() {
    let names = cases("peft");
    assert!(names.len() >= 10, "{names:?}");
    for name in names {
        let expected: Expected = golden_json(format!("peft/{name}/expected.json"));
        let found = curve(&name, &expected, false);
        assert_eq!(found.len(), expected.losses.len());
        for (line, (loss, norm)) in found.iter().zip(expected.losses.iter().zip(&expected.grad_norms)) {
            assert_relative(line.loss, *loss, LOSS, &format!("{name}: loss of step {}", line.step));
            assert_relative(line.grad_norm, *norm, NORM, &format!("{name}: norm of step {}", line.step));
        }
    }
}

#[derive(Deserialize)]
struct Curve {
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
}

/// The issue asks for 2e-3. The codes and factors are the same numbers on both sides, so what differs is the order of
/// sums alone, as over unquantized models.
#[test]
fn curves_over_nf4_are_those_of_peft_and_bitsandbytes() {
    let names = cases("qlora");
    assert_eq!(names, ["all_linear", "default"]);
    for name in names {
        let expected: Curve = golden_json(format!("qlora/{name}/expected.json"));
        let found = train("bitsandbytes/nf4_dq", &format!("qlora/{name}"), 20, 1, false, None);
        assert_eq!(found.len(), expected.losses.len());
        for (line, (loss, norm)) in found.iter().zip(expected.losses.iter().zip(&expected.grad_norms)) {
            assert_relative(line.loss, *loss, LOSS, &format!("{name}: loss of step {}", line.step));
            assert_relative(line.grad_norm, *norm, NORM, &format!("{name}: norm of step {}", line.step));
        }
    }
}

/// Every family's decoder, LoRA on all of its linear layers.
#[test]
fn curves_over_every_family_are_those_of_peft() {
    let trained = |name: &String| golden(format!("decoders/{name}/lora")).exists();
    let names: Vec<String> = cases("decoders").into_iter().filter(trained).collect();
    assert!(names.len() >= 9, "{names:?}");
    for name in names {
        let (base, start) = (format!("decoders/{name}"), format!("decoders/{name}/lora"));
        let expected: Curve = golden_json(format!("{start}/expected.json"));
        for checkpointing in [false, true] {
            let found = train(&base, &start, 10, 1, checkpointing, None);
            assert_eq!(found.len(), expected.losses.len());
            for (line, (loss, norm)) in found.iter().zip(expected.losses.iter().zip(&expected.grad_norms)) {
                assert_relative(line.loss, *loss, LOSS, &format!("{name}: loss of step {}", line.step));
                assert_relative(line.grad_norm, *norm, NORM, &format!("{name}: norm of step {}", line.step));
            }
        }
    }
}

#[test]
fn recomputing_blocks_changes_no_bit() {
    for name in ["all_linear", "bias_all"] {
        let expected: Expected = golden_json(format!("peft/{name}/expected.json"));
        let numbers = |checkpointing| -> Vec<(f64, f64)> {
            curve(name, &expected, checkpointing).iter().map(|m| (m.loss, m.grad_norm)).collect()
        };
        assert_eq!(numbers(false), numbers(true), "{name}");
    }
}
