//! Greedy answers of T5 beside transformers', token by token, on the tiny models of `golden/t5`.

use engobe_infer::{Activations, Error, Sampler, Sampling, StopReason, answer_all, generate_from};
use engobe_models::{LoadOptions, load_seq2seq};
use engobe_testkit::{cases, golden, golden_json};
use serde::Deserialize;
use std::ops::ControlFlow;

#[derive(Deserialize)]
struct Expected {
    sources: Vec<Vec<u32>>,
    greedy: Vec<Vec<u32>>,
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    for name in cases("t5") {
        let expected: Expected = golden_json(format!("t5/{name}/expected.json"));
        let model = load_seq2seq(&golden(format!("t5/{name}")), &LoadOptions::default()).unwrap();
        let n = expected.greedy[0].len();
        assert!(n >= 16);
        let mut finished = 0;
        let all = answer_all(model.as_ref(), &expected.sources, n, &[], Activations::Exact, &mut |done| {
            finished = done
        });
        assert_eq!(all.unwrap(), expected.greedy, "{name}");
        assert_eq!(finished, expected.sources.len());
        for (source, wanted) in expected.sources.iter().zip(&expected.greedy) {
            let mut greedy = Sampler::new(Sampling::default()).unwrap();
            let mut seen = Vec::new();
            let mut on_token = |t| {
                seen.push(t);
                ControlFlow::Continue(())
            };
            let one =
                generate_from(model.as_ref(), source, n, &[], Activations::Exact, &mut greedy, &mut on_token)
                    .unwrap();
            assert_eq!((&one.token_ids, one.reason), (wanted, StopReason::Length), "{name}");
            assert_eq!(&seen, wanted);
        }
    }
}

#[test]
fn answers_end_at_an_end_token_or_when_the_caller_says_so() {
    let expected: Expected = golden_json("t5/v10/expected.json");
    let model = load_seq2seq(&golden("t5/v10"), &LoadOptions::default()).unwrap();
    let wanted = &expected.greedy[0];
    let end = [wanted[3]];
    let cut = wanted.iter().position(|t| *t == end[0]).unwrap();
    let all =
        answer_all(model.as_ref(), &expected.sources, 16, &end, Activations::Exact, &mut |_| ()).unwrap();
    assert_eq!(all[0], wanted[..cut]);
    let run = |source: &[u32], max, stop_after: usize| {
        let mut greedy = Sampler::new(Sampling::default()).unwrap();
        let mut n = 0;
        let mut on_token = |_| {
            n += 1;
            if n == stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        generate_from(model.as_ref(), source, max, &end, Activations::Exact, &mut greedy, &mut on_token)
    };
    assert_eq!(run(&expected.sources[0], 16, 0).unwrap().reason, StopReason::EndToken);
    assert_eq!(run(&expected.sources[0], 16, 1).unwrap().token_ids.len(), 1.min(cut));
    assert!(run(&expected.sources[0], 0, 0).unwrap().token_ids.is_empty());
    assert!(matches!(run(&[], 4, 0), Err(Error::EmptyPrompt)));
}
