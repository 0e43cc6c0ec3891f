//! The cache, the batch and the sampler at work on a tiny model.

use engobe_infer::{Activations, Generator, Sampler, Sampling, StopReason, complete_all};
use engobe_models::{LoadOptions, load_causal_lm};
use engobe_nn::CausalLm;
use engobe_testkit::{golden, golden_json};
use serde::Deserialize;
use std::ops::ControlFlow;

#[derive(Deserialize)]
struct Expected {
    ids: Vec<u32>,
    greedy: Vec<u32>,
}

fn model(name: &str) -> Box<dyn CausalLm> {
    load_causal_lm(&golden(format!("llama/{name}")), &LoadOptions::default()).unwrap()
}

fn greedy(model: &dyn CausalLm, prompt: &[u32], n: usize, end: &[u32]) -> (Vec<u32>, StopReason) {
    let mut sampler = Sampler::new(Sampling::default()).unwrap();
    let mut generator = Generator::new(model, prompt.len() + n, Activations::Rounded).unwrap();
    let found = generator.generate(prompt, n, end, &mut sampler, &mut |_| ControlFlow::Continue(())).unwrap();
    (found.token_ids, found.reason)
}

#[test]
fn the_cache_gives_what_transformers_generates() {
    for name in ["plain", "gqa_tied", "llama3", "yarn", "linear", "mqa_theta"] {
        let expected: Expected = golden_json(format!("llama/{name}/expected.json"));
        let model = model(name);
        let found = greedy(model.as_ref(), &expected.ids[..6], expected.greedy.len(), &[]);
        assert_eq!(found, (expected.greedy, StopReason::Length), "{name}");
    }
}

#[test]
fn many_at_once_are_what_each_is_alone() {
    let model = model("gqa_tied");
    // more prompts than slots, of uneven length, some of which end
    let prompts: Vec<Vec<u32>> =
        (0..70u32).map(|i| (0..1 + i % 13).map(|j| (i * 7 + j * 11) % 40).collect()).collect();
    let most: Vec<usize> = (0..70).map(|i| i % 9).collect();
    let end = [3, 17];
    let mut finished = 0;
    let found =
        complete_all(model.as_ref(), &prompts, &most, &end, Activations::Rounded, &mut |n| finished = n)
            .unwrap();
    assert_eq!(finished, 70);
    for ((prompt, n), found) in prompts.iter().zip(most).zip(found) {
        assert_eq!(found, greedy(model.as_ref(), prompt, n, &end).0, "{prompt:?}");
    }
}

#[test]
fn an_end_token_ends_and_is_left_out() {
    let expected: Expected = golden_json("llama/plain/expected.json");
    let model = model("plain");
    let end = expected.greedy[4];
    let first = expected.greedy.iter().position(|t| *t == end).unwrap();
    let found = greedy(model.as_ref(), &expected.ids[..6], 10, &[end]);
    assert_eq!(found, (expected.greedy[..first].to_vec(), StopReason::EndToken));
}

#[test]
fn a_dialogue_reuses_its_cache_and_says_the_same() {
    let expected: Expected = golden_json("llama/plain/expected.json");
    let model = model("plain");
    let mut sampler = Sampler::new(Sampling::default()).unwrap();
    let mut generator = Generator::new(model.as_ref(), 4, Activations::Rounded).unwrap();
    for n in [6, 20, 12, 30] {
        let prompt = &expected.ids[..n];
        let mut go = |_| ControlFlow::Continue(());
        let found = generator.generate(prompt, 5, &[], &mut sampler, &mut go).unwrap();
        assert_eq!(found.token_ids, greedy(model.as_ref(), prompt, 5, &[]).0, "{n} tokens");
    }
}

#[test]
fn a_seed_repeats_itself() {
    let model = model("plain");
    let draw = |seed| {
        let settings = Sampling { temperature: 1.0, seed, ..Default::default() };
        let mut sampler = Sampler::new(settings).unwrap();
        let mut generator = Generator::new(model.as_ref(), 64, Activations::Rounded).unwrap();
        let mut go = |_| ControlFlow::Continue(());
        generator.generate(&[1, 2, 3], 24, &[], &mut sampler, &mut go).unwrap().token_ids
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}
