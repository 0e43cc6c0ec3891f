//! Every method over every family of decoders beside PEFT, from adapters that `golden/matrix.py` and this test make of
//! names alone: losses and gradient norms of ten steps.

mod support;

use candle_core::Device;
use engobe_adapters::{Adapter, Start};
use engobe_autograd::host;
use engobe_formats::peft::{PeftAdapter, PeftConfig};
use engobe_nn::CausalLm;
use engobe_testkit::models::{filled, load};
use engobe_testkit::{assert_relative, golden, golden_json};
use engobe_train::plan::Plan;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Deserialize)]
struct Family {
    base: String,
    learning_rate: f64,
    methods: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
struct Case {
    config: Value,
    trainable_parameters: usize,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
}

/// The issue asks for 1e-3. As in `peft_parity.rs`, what differs is the order of sums in f32, which ten steps let grow.
const LOSS: f64 = 2e-5;
const NORM: f64 = 3e-4;

/// Gives the model an adapter of this configuration whose values are made of names.
fn made(base: &Path, config: &PeftConfig) -> (Box<dyn CausalLm>, Adapter) {
    let mut model = load(base);
    let adapter = Adapter::attach(model.as_mut(), config.clone(), Start { seed: 0 }, &Device::Cpu).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let values = |tensors: BTreeMap<String, candle_core::Tensor>| {
        let value = |(name, t): (String, candle_core::Tensor)| {
            let values = bytemuck::cast_slice(&filled(&name, t.elem_count())).to_vec();
            (name, t.dims().to_vec(), values)
        };
        tensors.into_iter().map(value).collect::<Vec<(String, Vec<usize>, Vec<u8>)>>()
    };
    if !adapter.file_is_whole() {
        // an encoder that PEFT's files leave out
        PeftAdapter::save(dir.path(), adapter.config(), &values(adapter.state().unwrap())).unwrap();
        let file = PeftAdapter::load(dir.path()).unwrap();
        adapter.restore(dir.path(), &file.tensors).unwrap();
        return (model, adapter);
    }
    PeftAdapter::save(dir.path(), adapter.config(), &values(adapter.export().unwrap())).unwrap();
    let mut model = load(base);
    let adapter = Adapter::load(model.as_mut(), dir.path(), &Device::Cpu).unwrap();
    for (name, tensor) in adapter.export().unwrap() {
        if name.contains("lm_head.trainable_tokens") || name.contains("embed_out.trainable_tokens") {
            continue; // the same parameter as the tied embedding's, of whose name its values are made
        }
        assert_eq!(host(&tensor).unwrap()[..], filled(&name, tensor.elem_count())[..], "{name}");
    }
    (model, adapter)
}

fn beside_peft(family: &str) {
    let expected: Family = golden_json(format!("matrix/{family}.json"));
    assert!(expected.methods.len() >= 9, "{family}");
    for (name, case) in &expected.methods {
        let what = format!("{family}, {name}");
        let config = PeftConfig::parse(Path::new("matrix"), case.config.to_string().as_bytes()).unwrap();
        let (model, adapter) = made(&golden(&expected.base), &config);
        assert_eq!(adapter.num_parameters(), case.trainable_parameters, "{what}");
        let mut plan = Plan::default();
        plan.schedule.max_steps = Some(case.losses.len());
        plan.schedule.batch_size = 2;
        plan.optimization.learning_rate = expected.learning_rate;
        let out = tempfile::tempdir().unwrap();
        let found = support::train(model.as_ref(), &adapter, &plan, out.path());
        assert_eq!(found.len(), case.losses.len(), "{what}");
        for (line, (loss, norm)) in found.iter().zip(case.losses.iter().zip(&case.grad_norms)) {
            assert_relative(line.loss, *loss, LOSS, &format!("{what}: loss of step {}", line.step));
            if *norm == 0.0 {
                // no row of this step has a trained token
                assert_eq!(line.grad_norm, 0.0, "{what}: norm of step {}", line.step);
                continue;
            }
            assert_relative(line.grad_norm, *norm, NORM, &format!("{what}: norm of step {}", line.step));
        }
    }
}

macro_rules! families {
    ($($name:ident)*) => { $(#[test] fn $name() { beside_peft(stringify!($name)); })* };
}

families!(llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 gpt2 opt gpt_neox);
