//! The distance of two models on the tiny ones of `golden/llama`.

use engobe_data::{EncodeOptions, Encoder, MicroBatch, PromptStyle, TrainOn, reader};
use engobe_models::{LoadOptions, WeightDtype, load_causal_lm};
use engobe_nn::CausalLm;
use engobe_testkit::{assert_relative, golden};
use engobe_train::{compare, evaluate};

fn model(name: &str, dtype: WeightDtype) -> Box<dyn CausalLm> {
    load_causal_lm(&golden(format!("llama/{name}")), &LoadOptions { dtype, ..Default::default() }).unwrap()
}

/// Rows of token ids, some of whose labels are masked.
fn batches() -> Vec<MicroBatch> {
    let files = reader::read(&[golden("peft/rows.jsonl")]).unwrap();
    let encode = EncodeOptions { train_on: TrainOn::All, style: PromptStyle::Auto, max_seq_len: 48 };
    let samples = Encoder::new(None, 40, encode).unwrap().encode(&files).unwrap();
    vec![MicroBatch::of(&samples, &[0, 1, 2]), MicroBatch::of(&samples, &[3])]
}

#[test]
fn a_model_is_no_distance_from_itself_and_some_from_others() {
    let (batches, mut seen) = (batches(), Vec::new());
    let plain = model("plain", WeightDtype::Stored);
    let same = compare(plain.as_ref(), plain.as_ref(), &batches, &mut |done| seen.push(done)).unwrap();
    assert_eq!(seen, [1, 2]);
    assert!(same.mean_kl < 1e-12 && same.top1_agreement == 1.0, "{same:?}");
    assert_eq!(same.tokens, batches.iter().map(|b| b.label_tokens).sum::<usize>());
    // the perplexities are those of evaluation
    let alone = evaluate(plain.as_ref(), &batches, None, &mut |_| ()).unwrap();
    assert_relative(same.reference_perplexity, alone.perplexity, 1e-5, "perplexity");
    // rounding to 16 bits is a small distance, another model a large one
    let rounded = model("plain", WeightDtype::Bf16);
    let small = compare(plain.as_ref(), rounded.as_ref(), &batches, &mut |_| ()).unwrap();
    let other = model("linear", WeightDtype::Stored);
    let large = compare(plain.as_ref(), other.as_ref(), &batches, &mut |_| ()).unwrap();
    assert!(
        same.mean_kl < small.mean_kl && small.mean_kl < 0.05 && large.mean_kl > 0.5,
        "{small:?} {large:?}"
    );
    assert!(small.max_kl >= small.mean_kl && large.top1_agreement < 0.5);
}

#[test]
fn without_labels_there_is_nothing_to_compare() {
    let plain = model("plain", WeightDtype::Stored);
    assert!(
        compare(plain.as_ref(), plain.as_ref(), &[], &mut |_| ()).unwrap_err().to_string().contains("label")
    );
}
