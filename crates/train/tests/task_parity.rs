//! Heads beside transformers' and training beside PEFT's, from the adapters of `golden/peft_tasks`: logits, losses and
//! gradient norms of every step; what was trained is saved, and says the same when it is loaded again.

mod support;
#[path = "support/tasks.rs"]
mod tasks;

use engobe_testkit::{cases, golden_json};
use serde::Deserialize;
use tasks::{Curve, Rows, Tolerances, beside};

#[derive(Deserialize)]
struct Expected {
    #[serde(flatten)]
    rows: Rows,
    #[serde(flatten)]
    curve: Curve,
}

/// The issue asks for 1e-3. As in `peft_parity.rs` what differs is the order of sums in f32.
const WITHIN: Tolerances = Tolerances { logits: 1e-5, losses: 1e-5, norms: 5e-5 };

#[test]
fn logits_and_curves_are_those_of_transformers_and_peft() {
    let names = cases("peft_tasks");
    assert!(names.len() >= 52, "{names:?}");
    let fails = |name: &String| std::panic::catch_unwind(|| one(name)).is_err();
    let failed: Vec<String> = names.into_iter().filter(fails).collect();
    assert!(failed.is_empty(), "{failed:?}: see above");
}

fn one(name: &str) {
    let expected: Expected = golden_json(format!("peft_tasks/{name}/expected.json"));
    // AdaLoRA's gradient is a sum of the rows' and the penalty's, whose rounding counts where they cancel
    let norms = if name.ends_with("adalora") { 10.0 * WITHIN.norms } else { WITHIN.norms };
    let within = Tolerances { norms, ..WITHIN };
    beside(name, &expected.rows, &expected.curve, 1e-3, &within, |model| {
        support::to_train(model, &format!("peft_tasks/{name}"))
    });
}
