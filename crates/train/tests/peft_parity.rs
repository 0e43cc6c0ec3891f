//! Training beside PEFT's, from the adapters of `golden/peft` and, over a model that bitsandbytes quantized, those of
//! `golden/qlora`: losses and gradient norms of every step.

mod support;

use engobe_adapters::Adapter;
use engobe_models::{LoadOptions, load_causal_lm};
use engobe_testkit::{assert_relative, cases, golden, golden_json};
use engobe_train::metrics;
use engobe_train::plan::{Compute, ComputeDtype, Plan};
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    base: String,
    accumulation: usize,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    trainable_parameters: usize,
    /// LoRA+: ratio, learning rate beside embeddings
    loraplus: Option<(f64, f64)>,
}

/// The issue asks for 1e-3 and 1e-2. Twenty steps let rounding grow: 6e-7 and 2e-6 were seen, and a wrong rule
/// (epsilon, clipping, a mean of means) shows above 1e-4.
const LOSS: f64 = 1e-5;
const NORM: f64 = 5e-5;

fn curve(name: &str, expected: &Expected, checkpointing: bool) -> Vec<metrics::StepMetrics> {
    let compute = Compute { activation_checkpointing: checkpointing, ..Compute::default() };
    computed(name, expected, compute)
}

fn computed(name: &str, expected: &Expected, compute: Compute) -> Vec<metrics::StepMetrics> {
    let (base, start) = (format!("llama/{}", expected.base), format!("peft/{name}"));
    let change = |plan: &mut Plan| {
        plan.schedule.gradient_accumulation = expected.accumulation;
        plan.compute = compute;
        if let Some((ratio, embedding)) = expected.loraplus {
            plan.optimization.loraplus_lr_ratio = Some(ratio);
            plan.optimization.loraplus_lr_embedding = embedding;
        }
    };
    train(&base, &start, 20, change, Some(expected.trainable_parameters))
}

/// Steps over the model at `base` from the adapter at `start`, in `golden/`.
fn train(
    base: &str,
    start: &str,
    steps: usize,
    change: impl FnOnce(&mut Plan),
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
    plan.optimization.learning_rate = 1e-3;
    change(&mut plan);
    let out = tempfile::tempdir().unwrap();
    support::train(model.as_ref(), &adapter, &plan, out.path())
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
            if *norm == 0.0 {
                // no row of this step has a trained token
                assert_eq!(line.grad_norm, 0.0, "{name}: norm of step {}", line.step);
                continue;
            }
            // with AdaLoRA a sum of two gradients, the rows' and the penalty's, whose rounding counts where they cancel:
            // 9e-5 was seen
            let tolerance = if name.ends_with("adalora") { 10.0 * NORM } else { NORM };
            assert_relative(line.grad_norm, *norm, tolerance, &format!("{name}: norm of step {}", line.step));
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
        let found = train("bitsandbytes/nf4_dq", &format!("qlora/{name}"), 20, |_| (), None);
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
            let recompute = |plan: &mut Plan| plan.compute.activation_checkpointing = checkpointing;
            let found = train(&base, &start, 10, recompute, None);
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
    for name in ["all_linear", "bias_all", "bias_dora", "bias_ia3", "olora", "tied_tokens", "vera"] {
        let expected: Expected = golden_json(format!("peft/{name}/expected.json"));
        let numbers = |checkpointing| -> Vec<(f64, f64)> {
            curve(name, &expected, checkpointing).iter().map(|m| (m.loss, m.grad_norm)).collect()
        };
        assert_eq!(numbers(false), numbers(true), "{name}");
    }
}

/// Kept values and the adapter's factors are off by 2^-9 (bf16) or 2^-12 (f16) of themselves. A loss is a mean over many
/// of them, a norm a root of squares, so both are off by less than one such unit, and twenty steps at a high learning
/// rate let it grow a few times.
#[test]
fn curves_in_16_bits_stay_near_those_of_f32() {
    for (dtype, loss, norm) in
        [(ComputeDtype::BF16, 2.0 / 512.0, 8.0 / 512.0), (ComputeDtype::F16, 2.0 / 4096.0, 8.0 / 4096.0)]
    {
        for name in ["all_linear", "bias_all"] {
            let expected: Expected = golden_json(format!("peft/{name}/expected.json"));
            let exact = curve(name, &expected, false);
            for activation_checkpointing in [false, true] {
                let compute =
                    Compute { activation_checkpointing, compute_dtype: dtype, ..Compute::default() };
                let found = computed(name, &expected, compute);
                let mut moved = false;
                for (line, exact) in found.iter().zip(&exact) {
                    let what = format!("{name} in {} at step {}", dtype.name(), line.step);
                    println!(
                        "{what}: {:.2e} {:.2e}",
                        line.loss / exact.loss - 1.0,
                        line.grad_norm / exact.grad_norm - 1.0
                    );
                    assert_relative(line.loss, exact.loss, loss, &format!("loss of {what}"));
                    assert_relative(line.grad_norm, exact.grad_norm, norm, &format!("norm of {what}"));
                    moved |= line.grad_norm != exact.grad_norm;
                }
                assert!(moved, "{name}: {} changed nothing", dtype.name());
            }
        }
    }
}
