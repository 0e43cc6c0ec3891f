//! SmolLM2's own GGUF beside llama.cpp, where there is one:
//! `ENGOBE_SMOLLM2_GGUF=path cargo test -p engobe-infer --test smollm2`.

use engobe_infer::{Activations, Generator, Sampler, Sampling};
use engobe_models::{LoadOptions, load_causal_lm};
use engobe_testkit::golden_json;
use serde::Deserialize;
use std::ops::ControlFlow;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Case {
    prompt: String,
    ids: Vec<u32>,
    tokens: Vec<u32>,
    margins: Vec<f64>,
}

/// llama.cpp's own log-probabilities move by up to half a nat with its rounding of activations to 8 bits (seen
/// beside f32 arithmetic on the dequantized weights); a choice clearer than twice that must be ours too.
const CLEAR: f64 = 1.0;

#[test]
fn clear_choices_are_those_of_llama_cpp() {
    let Some(path) = std::env::var_os("ENGOBE_SMOLLM2_GGUF").map(PathBuf::from) else {
        eprintln!("skipped: ENGOBE_SMOLLM2_GGUF does not name SmolLM2-135M-Instruct.Q4_1.gguf");
        return;
    };
    let model = load_causal_lm(&path, &LoadOptions::default()).unwrap();
    let cases: Vec<Case> = golden_json("smollm2_greedy.json");
    let (mut clear, mut same, mut all) = (0, 0, 0);
    for case in cases {
        let mut generator = Generator::new(model.as_ref(), 256, Activations::Rounded).unwrap();
        let mut sampler = Sampler::new(Sampling::default()).unwrap();
        let mut context = case.ids.clone();
        for (token, margin) in case.tokens.iter().zip(&case.margins) {
            let mut go = |_| ControlFlow::Continue(());
            let found = generator.generate(&context, 1, &[], &mut sampler, &mut go).unwrap().token_ids[0];
            if *margin > CLEAR {
                clear += 1;
                assert_eq!(
                    found,
                    *token,
                    "{:?} after {} tokens, margin {margin}",
                    case.prompt,
                    context.len()
                );
            }
            all += 1;
            same += usize::from(found == *token);
            context.push(*token);
        }
    }
    assert!(clear > 100, "{clear} clear choices are too few to mean anything");
    // the close ones mostly agree too
    assert!(same * 100 >= all * 93, "{same} of {all}");
}
