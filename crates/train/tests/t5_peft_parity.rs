//! Methods on T5 beside PEFT's: losses and gradient norms of ten steps, from the adapters of `golden/peft_t5`.

use candle_core::{Device, Tensor};
use engobe_adapters::Adapter;
use engobe_autograd::{Gradients, Tape, host};
use engobe_models::{LoadOptions, load_seq2seq};
use engobe_nn::{Seq2Seq, TokenBatch};
use engobe_testkit::{assert_relative, cases, golden, golden_json};
use engobe_train::Optimizer;
use engobe_train::plan::Optimization;
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    base: String,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    trainable_parameters: usize,
}

#[derive(Deserialize)]
struct Rows {
    sources: Vec<Vec<u32>>,
    labels: Vec<Vec<u32>>,
}

/// The issue asks for 1e-3; a wrong rule shows above 1e-4. What is expected was computed in f64, so what differs is our
/// rounding in f32. It grows where AdamW's first step takes the sign of a gradient that is rounding alone: torch's own f32
/// is off by up to 4e-5 in the norm of the second step of `saved`.
const LOSS: f64 = 1e-5;
const NORM: f64 = 5e-5;

fn packed(rows: &[Vec<u32>]) -> TokenBatch {
    let mut start = 0;
    let ranges: Vec<_> = rows.iter().map(|r| (start, start += r.len()).0..start).collect();
    TokenBatch::packed(&rows.concat(), &ranges)
}

/// Mean loss of the labels; its gradients are added to `grads`.
fn differentiate(model: &dyn Seq2Seq, rows: &Rows, checkpointing: bool, grads: &mut Gradients) -> f64 {
    let shifted = |l: &Vec<u32>| {
        [model.start_token()].into_iter().chain(l[..l.len() - 1].iter().copied()).collect::<Vec<u32>>()
    };
    let targets: Vec<Vec<u32>> = rows.labels.iter().map(shifted).collect();
    let mut tape = Tape::new().checkpointing(checkpointing);
    let states = model.encode(&mut tape, &packed(&rows.sources)).unwrap();
    let hidden = model.decoder_states(&mut tape, &packed(&targets), &states).unwrap();
    let labels = rows.labels.concat();
    let n = labels.len() as f64;
    let loss = model.head_loss(&mut tape, &hidden, labels.into()).unwrap().loss;
    let value = f64::from(host(loss.tensor()).unwrap()[0]) / n;
    tape.backward(&loss, Tensor::full((1.0 / n) as f32, 1, &Device::Cpu).unwrap(), grads).unwrap();
    value
}

/// Loss and gradient norm of each step.
fn curve(name: &str, expected: &Expected, checkpointing: bool) -> Vec<(f64, f64)> {
    let rows: Rows = golden_json(format!("t5/{}/expected.json", expected.base));
    let mut model = load_seq2seq(&golden(format!("t5/{}", expected.base)), &LoadOptions::default()).unwrap();
    let adapter = Adapter::load(model.as_mut(), &golden(format!("peft_t5/{name}")), &Device::Cpu).unwrap();
    assert_eq!(adapter.num_parameters(), expected.trainable_parameters, "{name}");
    let dir = tempfile::tempdir().unwrap();
    let settings = Optimization { learning_rate: 1e-3, ..Default::default() };
    let params = adapter.params();
    let mut optimizer = Optimizer::new(&settings, &params, &dir.path().join("state")).unwrap();
    let step = |_| {
        let mut grads = Gradients::new();
        let loss = differentiate(model.as_ref(), &rows, checkpointing, &mut grads);
        let norm = grads.sum_squares().unwrap().sqrt();
        optimizer.step(&params, &grads, 1e-3, (1.0 / (norm + 1e-6)).min(1.0)).unwrap();
        (loss, norm)
    };
    (0..expected.losses.len()).map(step).collect()
}

#[test]
fn curves_are_those_of_peft() {
    let names = cases("peft_t5");
    assert_eq!(names, ["default", "feed_forward", "ia3", "prefix", "prompt", "prompt_source", "saved"]);
    for name in names {
        let expected: Expected = golden_json(format!("peft_t5/{name}/expected.json"));
        assert_eq!(expected.losses.len(), 10);
        let found = curve(&name, &expected, false);
        for (i, (loss, norm)) in found.iter().enumerate() {
            assert_relative(*loss, expected.losses[i], LOSS, &format!("{name}: loss of step {i}"));
            assert_relative(*norm, expected.grad_norms[i], NORM, &format!("{name}: norm of step {i}"));
        }
        assert_eq!(curve(&name, &expected, true), found, "{name}: recomputing blocks changes a bit");
    }
}
