//! Logits beside transformers', on the tiny models of `golden/llama`.

use engobe_models::{LoadOptions, WeightDtype, load_causal_lm};
use engobe_testkit::models::{logits, tiny};
use engobe_testkit::{assert_close, cases, golden, golden_json};
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Expected {
    ids: Vec<u32>,
    /// number of tokens -> logits of the first, middle and last of them
    logits: BTreeMap<usize, [Vec<f64>; 3]>,
    greedy: Vec<u32>,
}

/// f32 sums in another order over two layers of width 32 differ by some 1e-6; the issue asks for 1e-4.
const TOLERANCE: f64 = 1e-5;

#[test]
fn logits_are_those_of_transformers() {
    let names = cases("llama");
    assert!(names.len() >= 10, "{names:?}");
    for name in names {
        let expected: Expected = golden_json(format!("llama/{name}/expected.json"));
        for dtype in [WeightDtype::Stored, WeightDtype::F32] {
            let options = LoadOptions { dtype, ..Default::default() };
            let model = load_causal_lm(&golden(format!("llama/{name}")), &options).unwrap();
            for (n, rows) in &expected.logits {
                let found = logits(model.as_ref(), &expected.ids[..*n]);
                for (at, expected) in [0, n / 2, n - 1].into_iter().zip(rows) {
                    assert_close(&found[at], expected, TOLERANCE, &format!("{name}, {n} tokens, {dtype:?}"));
                }
            }
        }
    }
}

#[test]
fn the_likeliest_tokens_are_those_of_transformers() {
    for name in cases("llama") {
        // rope that depends on the length is not what generate's cache holds
        if name == "dynamic" || name == "longrope" {
            continue;
        }
        let expected: Expected = golden_json(format!("llama/{name}/expected.json"));
        let model = tiny(&name);
        let mut ids = expected.ids[..6].to_vec();
        for token in &expected.greedy {
            let last = logits(model.as_ref(), &ids).pop().unwrap();
            let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
            assert_eq!(best as u32, *token, "{name} after {ids:?}");
            ids.push(*token);
        }
    }
}
