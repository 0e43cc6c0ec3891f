//! Every method over every family of decoders beside PEFT, from adapters that `golden/matrix.py` and this test make of
//! names alone: losses and gradient norms of ten steps.

#[path = "support/filled.rs"]
mod filled;
mod support;

use engobe_formats::peft::PeftConfig;
use engobe_testkit::models::load;
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

fn beside_peft(family: &str) {
    let expected: Family = golden_json(format!("matrix/{family}.json"));
    assert!(expected.methods.len() >= 9, "{family}");
    for (name, case) in &expected.methods {
        let what = format!("{family}, {name}");
        let config = PeftConfig::parse(Path::new("matrix"), case.config.to_string().as_bytes()).unwrap();
        let base = golden(&expected.base);
        let (mut named, mut model) = (load(&base), load(&base));
        let adapter = filled::adapter(named.as_mut(), model.as_mut(), &config);
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
