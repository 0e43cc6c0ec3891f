//! Every method over every family of encoders beside PEFT, from adapters and heads that `golden/encoder_matrix.py` and this
//! test make of names alone: logits, losses and gradient norms of ten steps, and what was saved.

#[path = "support/filled.rs"]
mod filled;
#[path = "support/tasks.rs"]
mod tasks;

use engobe_formats::peft::PeftConfig;
use engobe_testkit::golden_json;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tasks::{Curve, Rows, Tolerances, beside};

#[derive(Deserialize)]
struct Family {
    #[serde(flatten)]
    rows: Rows,
    learning_rate: f64,
    methods: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
struct Case {
    config: Value,
    #[serde(flatten)]
    curve: Curve,
}

/// As in `families_parity.rs`: the order of sums in f32, which ten steps let grow.
const WITHIN: Tolerances = Tolerances { logits: 1e-5, losses: 2e-5, norms: 3e-4 };

fn beside_peft(family: &str) {
    let expected: Family = golden_json(format!("encoder_matrix/{family}.json"));
    assert!(expected.methods.len() >= 9, "{family}");
    let rows = &expected.rows;
    for (name, case) in &expected.methods {
        let config = PeftConfig::parse(Path::new("matrix"), case.config.to_string().as_bytes()).unwrap();
        let what = format!("{family}, {name}");
        beside(&what, rows, &case.curve, expected.learning_rate, &WITHIN, |model| {
            filled::adapter(&mut rows.model(&rows.labels()), model, &config)
        });
    }
}

macro_rules! families {
    ($($name:ident)*) => { $(#[test] fn $name() { beside_peft(stringify!($name)); })* };
}

families!(bert roberta distilbert electra deberta_v2 modernbert);
