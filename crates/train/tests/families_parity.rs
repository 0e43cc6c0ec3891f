//! Every method over every family of decoders and encoder-decoders beside PEFT (bottlenecks over T5 beside AdapterHub's),
//! from adapters that `golden/matrix.py` (`golden/bottleneck.py`) and this test make of names alone: losses and gradient
//! norms of ten steps. Recomputing blocks changes no bit of them, and over T5 a cache gives what whole rows give.

#[path = "support/base.rs"]
mod base;
#[path = "support/filled.rs"]
mod filled;
mod support;

use base::{Base, Kind};
use engobe_autograd::{Tape, Var, host};
use engobe_data::{Goal, Place, Sample};
use engobe_formats::peft::PeftConfig;
use engobe_nn::{Seq2Seq, TokenBatch};
use engobe_testkit::{assert_close, assert_relative, doubles, golden, golden_json};
use engobe_train::StepMetrics;
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
/// Of encoder-decoders PEFT's steps are in f64. The losses are as near as that (1.1e-6 was seen); norms of the gradients of
/// T5's tiny models go up to 86, as a prompt's small rows meet a norm by root mean square, and a value whose gradient is all
/// rounding is moved by AdamW all the same: of prompts 1.6e-3 was seen, of PEFT's own steps in f32 2e-4, of all else 1.5e-4.
const ENCODER_DECODER: [f64; 2] = [1e-5, 3e-3];

/// The rows that an encoder-decoder's golden file has: sources and labels.
fn rows_of(base: &str) -> Vec<Sample> {
    #[derive(Deserialize)]
    struct Rows {
        sources: Vec<Vec<u32>>,
        labels: Vec<Vec<u32>>,
    }
    let rows: Rows = golden_json(format!("{base}/expected.json"));
    let sample = |(i, (ids, target)): (usize, (Vec<u32>, Vec<u32>))| Sample {
        labels: vec![None; ids.len()],
        ids,
        place: Place { file: "rows".into(), number: i + 1, unit: "row" },
        truncated: 0,
        goal: Goal::Sequence(target),
        second_type_from: None,
    };
    rows.sources.into_iter().zip(rows.labels).enumerate().map(sample).collect()
}

fn beside_peft(family: &str) {
    let expected: Family = golden_json(format!("matrix/{family}.json"));
    assert!(expected.methods.len() >= 4, "{family}");
    let [most_of_loss, most_of_norm] = match expected.base.starts_with("t5/") {
        true => ENCODER_DECODER,
        false => [LOSS, NORM],
    };
    let kind = if expected.base.starts_with("t5/") { Kind::EncoderDecoder } else { Kind::Decoder };
    for (name, case) in &expected.methods {
        let what = format!("{family}, {name}");
        let config = PeftConfig::parse(Path::new("matrix"), case.config.to_string().as_bytes()).unwrap();
        let base = golden(&expected.base);
        let run = |recomputed: bool| {
            let (mut named, mut model) = (Base::load(&base, kind), Base::load(&base, kind));
            let adapter = filled::adapter(named.tree(), model.tree(), &config);
            assert_eq!(adapter.num_parameters(), case.trainable_parameters, "{what}");
            let mut plan = Plan::default();
            plan.schedule.max_steps = Some(case.losses.len());
            plan.schedule.batch_size = 2;
            plan.optimization.learning_rate = expected.learning_rate;
            plan.compute.activation_checkpointing = recomputed;
            let out = tempfile::tempdir().unwrap();
            let samples = match kind {
                Kind::EncoderDecoder => rows_of(&expected.base),
                _ => support::decoder_rows(model.model().info().vocab_size),
            };
            let lines = support::train_on(model.model(), samples, &adapter, &plan, out.path());
            (lines, model)
        };
        let (found, model) = run(false);
        if let Base::Answerer(model) = &model {
            a_cache_gives_what_whole_rows_give(model.as_ref(), &what);
        }
        let seen = |lines: &[StepMetrics]| lines.iter().map(|m| (m.loss, m.grad_norm)).collect::<Vec<_>>();
        assert_eq!(seen(&run(true).0), seen(&found), "{what}: recomputing blocks changes a bit");
        assert_eq!(found.len(), case.losses.len(), "{what}");
        for (line, (loss, norm)) in found.iter().zip(case.losses.iter().zip(&case.grad_norms)) {
            assert_relative(line.loss, *loss, most_of_loss, &format!("{what}: loss of step {}", line.step));
            if *norm == 0.0 {
                // no row of this step has a trained token
                assert_eq!(line.grad_norm, 0.0, "{what}: norm of step {}", line.step);
                continue;
            }
            assert_relative(
                line.grad_norm,
                *norm,
                most_of_norm,
                &format!("{what}: norm of step {}", line.step),
            );
        }
    }
}

/// Logits after each token of two targets, which grow unevenly in one cache, beside those of whole rows.
fn a_cache_gives_what_whole_rows_give(model: &dyn Seq2Seq, what: &str) {
    let (sources, targets): ([u32; 14], [u32; 10]) =
        (std::array::from_fn(|i| 3 + i as u32 * 5 % 37), std::array::from_fn(|i| 3 + i as u32 * 11 % 37));
    let mut tape = Tape::inference();
    let states = model.encode(&mut tape, &TokenBatch::packed(&sources, &[0..9, 9..14])).unwrap();
    let logits = |hidden: Var| {
        let hidden = Var::constant(hidden.into_tensor());
        host(&model.logits(&mut Tape::inference(), &hidden).unwrap()).unwrap().to_vec()
    };
    let whole =
        model.decoder_states(&mut tape, &TokenBatch::packed(&targets, &[0..4, 4..10]), &states).unwrap();
    let whole = logits(whole);
    let width = whole.len() / targets.len();
    let (mut cache, mut said) = (model.new_cache(&mut tape, &states, 6).unwrap(), [vec![], vec![]]);
    let [a, b] = [&targets[..4], &targets[4..]];
    let turns: [&[(usize, &[u32])]; 4] =
        [&[(0, &a[..1]), (1, &b[..2])], &[(1, &b[2..3])], &[(0, &a[1..]), (1, &b[3..4])], &[(1, &b[4..])]];
    for turn in turns {
        let batch = cache.own.batch(turn).unwrap();
        let found = logits(model.next_states(&mut Tape::inference(), &batch, &mut cache).unwrap());
        for (segment, slot) in batch.segments.iter().zip(&batch.slots) {
            said[*slot].extend(&found[segment.q.start * width..segment.q.end * width]);
        }
    }
    // products of few and of many rows sum in other orders
    assert_close(&said.concat(), &doubles(&whole), 1e-5, &format!("{what}: through a cache"));
}

macro_rules! families {
    ($($name:ident)*) => { $(#[test] fn $name() { beside_peft(stringify!($name)); })* };
}

families!(llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 gpt2 opt gpt_neox gemma olmo2 granite smollm3 starcoder2 phi stablelm mt5 t5_v10 t5_v11 t5_uneven
    t5_v10_bottleneck t5_v11_bottleneck t5_uneven_bottleneck);
