//! Prompts and prefixes on tiny models: what they are to a model, packed, cached and saved.

use candle_core::{Device, Tensor};
use engobe_adapters::{Adapter, Start, StartText};
use engobe_autograd::{Activations, Tape, Var, host};
use engobe_formats::peft::{PeftAdapter, PeftConfig};
use engobe_models::{LoadOptions, load_seq2seq};
use engobe_nn::{CausalLm, TokenBatch};
use engobe_testkit::models::{self, tiny};
use engobe_testkit::{assert_close, doubles, golden};
use serde_json::{Value, json};
use std::ops::Range;

/// Products of few and of many rows sum in other orders: some 1e-7 of the largest logit a layer.
const TOLERANCE: f64 = 3e-6;
const METHODS: [&str; 2] = ["PROMPT_TUNING", "PREFIX_TUNING"];
const TEXT: [u32; 4] = [3, 17, 8, 29];
const IDS: [u32; 12] = [1, 5, 9, 2, 30, 7, 11, 4, 22, 13, 6, 38];

fn config(peft_type: &str, settings: &[(&str, Value)]) -> PeftConfig {
    let mut config = PeftConfig::new(peft_type);
    settings.iter().for_each(|(key, value)| config.set(key, value.clone()));
    config
}

fn attach(model: &mut dyn CausalLm, peft_type: &str, settings: &[(&str, Value)]) -> Adapter {
    Adapter::attach(model, config(peft_type, settings), Start { seed: 4 }, &Device::Cpu).unwrap()
}

fn numbers(t: &Tensor) -> Vec<f32> {
    host(t).unwrap().to_vec()
}

fn same(found: &[f32], expected: &[f32], what: &str) {
    assert_close(found, &doubles(expected), TOLERANCE, what);
}

fn logits_of(model: &dyn CausalLm, hidden: Var) -> Vec<f32> {
    numbers(&model.logits(&mut Tape::inference(), &Var::constant(hidden.into_tensor())).unwrap())
}

/// Logits of rows that lie end to end.
fn logits(model: &dyn CausalLm, ids: &[u32], ranges: &[Range<usize>]) -> Vec<f32> {
    let batch = TokenBatch::packed(ids, ranges);
    logits_of(model, model.hidden_states(&mut Tape::inference(), &batch, None).unwrap())
}

fn one(model: &dyn CausalLm, ids: &[u32]) -> Vec<f32> {
    models::logits(model, ids).concat()
}

/// What the ids of a text are to a model.
fn start_text(model: &dyn CausalLm, ids: &[u32]) -> StartText {
    let mut cache = model.new_cache(1, ids.len(), Activations::Exact).unwrap();
    let batch = cache.batch(&[(0, ids)]).unwrap();
    model.hidden_states(&mut Tape::inference(), &batch, Some(&mut cache)).unwrap();
    let layers = 0..model.info().num_layers;
    StartText { ids: ids.to_vec(), key_values: layers.map(|l| cache.rows(l, 0).unwrap()).collect() }
}

#[test]
fn of_no_length_they_change_no_bit() {
    for peft_type in METHODS {
        let mut model = tiny("gqa_tied");
        let plain = one(model.as_ref(), &IDS);
        let adapter = attach(model.as_mut(), peft_type, &[("num_virtual_tokens", json!(0))]);
        assert_eq!(adapter.num_parameters(), 0);
        assert_eq!(one(model.as_ref(), &IDS), plain, "{peft_type}");
    }
}

/// A prompt of embedded tokens, and a prefix of their keys and values, are those tokens: positions, masks and layouts
/// are then the model's own.
#[test]
fn of_a_text_they_are_its_tokens() {
    for name in ["gqa_tied", "plain", "head_dim_bias"] {
        let whole = [&TEXT[..], &IDS].concat();
        let expected = one(tiny(name).as_ref(), &whole);
        let expected = &expected[expected.len() / whole.len() * TEXT.len()..];
        let start = start_text(tiny(name).as_ref(), &TEXT);
        let count = ("num_virtual_tokens", json!(TEXT.len()));
        let prompt = [
            ("prompt_tuning_init", json!("TEXT")),
            ("prompt_tuning_init_text", json!("some text")),
            count.clone(),
        ];
        let prefix = [("prefix_init_text", json!("some text")), count];
        for (peft_type, settings) in METHODS.into_iter().zip([&prompt[..], &prefix]) {
            let mut model = tiny(name);
            let config = config(peft_type, settings);
            Adapter::attach_with(model.as_mut(), config, Start { seed: 1 }, &start, &Device::Cpu).unwrap();
            same(&one(model.as_ref(), &IDS), expected, &format!("{peft_type} on {name}"));
        }
    }
}

#[test]
fn packed_rows_are_what_they_are_alone() {
    for peft_type in METHODS {
        let mut model = tiny("gqa_tied");
        attach(model.as_mut(), peft_type, &[("num_virtual_tokens", json!(3))]);
        let ranges = [0..5, 5..6, 6..12];
        let alone: Vec<f32> = ranges.iter().flat_map(|r| one(model.as_ref(), &IDS[r.clone()])).collect();
        same(&logits(model.as_ref(), &IDS, &ranges), &alone, peft_type);
    }
}

/// Two sequences that grow unevenly in a cache that must widen, and one that starts again.
#[test]
fn a_cache_gives_what_a_whole_pass_gives() {
    for peft_type in METHODS {
        let mut model = tiny("gqa_tied");
        attach(model.as_mut(), peft_type, &[("num_virtual_tokens", json!(3))]);
        let model = model.as_ref();
        let mut cache = model.new_cache(2, 2, Activations::Exact).unwrap();
        let mut seen = [Vec::new(), Vec::new()];
        let mut step = |rows: &[(usize, &[u32])], seen: &mut [Vec<f32>; 2]| {
            let batch = cache.batch(rows).unwrap();
            let hidden = model.hidden_states(&mut Tape::inference(), &batch, Some(&mut cache)).unwrap();
            let all = logits_of(model, hidden);
            let width = all.len() / batch.len();
            for (segment, slot) in batch.segments.iter().zip(&batch.slots) {
                seen[*slot].extend(&all[segment.q.start * width..segment.q.end * width]);
            }
            if rows.len() == 1 && rows[0].1 == &IDS[9..10] {
                cache.truncate(1, 0);
            }
        };
        step(&[(0, &IDS[..4]), (1, &IDS[..1])], &mut seen);
        step(&[(1, &IDS[1..7])], &mut seen);
        step(&[(0, &IDS[4..5]), (1, &IDS[7..9])], &mut seen);
        step(&[(1, &IDS[9..10])], &mut seen);
        same(&seen[0], &one(model, &IDS[..5]), peft_type);
        same(&seen[1], &one(model, &IDS[..10]), peft_type);
        // the second sequence was taken away: another one starts in its slot
        seen[1].clear();
        step(&[(1, &IDS[6..9])], &mut seen);
        same(&seen[1], &one(model, &IDS[6..9]), peft_type);
    }
}

#[test]
fn what_is_saved_comes_back() {
    let projected = [("prefix_projection", json!(true)), ("encoder_hidden_size", json!(7))];
    for (peft_type, settings) in [(METHODS[0], &[][..]), (METHODS[1], &[]), (METHODS[1], &projected)] {
        let (mut first, mut second) = (tiny("gqa_tied"), tiny("gqa_tied"));
        let adapter = attach(first.as_mut(), peft_type, settings);
        let dir = tempfile::tempdir().unwrap();
        adapter.save(dir.path()).unwrap();
        let again = Adapter::load(second.as_mut(), dir.path(), &Device::Cpu).unwrap();
        assert_eq!(adapter.config().to_json(), again.config().to_json());
        assert_eq!(one(first.as_ref(), &IDS), one(second.as_ref(), &IDS), "{peft_type} {settings:?}");
    }
}

#[test]
fn mistakes_are_named() {
    for (peft_type, settings, part) in [
        ("PROMPT_TUNING", vec![("num_virtual_tokens", json!(-1))], "num_virtual_tokens is -1"),
        ("PROMPT_TUNING", vec![("prompt_tuning_init", json!("ZERO"))], "RANDOM, SAMPLE_VOCAB, TEXT"),
        ("PROMPT_TUNING", vec![("prompt_tuning_init", json!("TEXT"))], "prompt_tuning_init_text is missing"),
        ("PROMPT_TUNING", vec![("prefix_projection", json!(true))], "prefix_projection"),
        ("PREFIX_TUNING", vec![("encoder_hidden_size", json!(0))], "encoder_hidden_size is 0"),
        ("PREFIX_TUNING", vec![("init_weights", json!("one"))], "init_weights"),
        ("HYDRA", vec![], "\"HYDRA\"; expected one of LORA"),
    ] {
        let config = config(peft_type, &settings);
        let mut model = tiny("gqa_tied");
        let error = Adapter::attach(model.as_mut(), config, Start { seed: 1 }, &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains(part), "{part} in {error}");
    }
}

#[test]
fn they_are_not_merged() {
    for peft_type in METHODS {
        let adapter = attach(tiny("gqa_tied").as_mut(), peft_type, &[]);
        assert!(
            adapter.check_mergeable().unwrap_err().to_string().contains("can't be merged"),
            "{peft_type}"
        );
    }
}

#[test]
fn a_model_without_them_is_its_base_again() {
    let mut model = tiny("head_dim_bias");
    let plain = one(model.as_ref(), &IDS);
    let lora = [
        ("target_modules", json!("all-linear")),
        ("init_lora_weights", json!(false)),
        ("bias", json!("all")),
        ("modules_to_save", json!(["norm", "embed_tokens"])),
    ];
    for (peft_type, settings) in [("LORA", &lora[..]), (METHODS[0], &[]), (METHODS[1], &[])] {
        let adapter = attach(model.as_mut(), peft_type, settings);
        for p in adapter.params() {
            p.update_host(|v| v.iter_mut().for_each(|v| *v += 0.1)).unwrap();
        }
        assert_ne!(one(model.as_ref(), &IDS), plain, "{peft_type}");
        model.detach_all();
        assert_eq!(one(model.as_ref(), &IDS), plain, "{peft_type}");
    }
}

/// The up-projection starts at zero, so that nothing is added; the residual sum is no longer one op with the linear
/// layer before it, and rounds once more.
#[test]
fn a_new_bottleneck_changes_no_logit() {
    for architecture in ["pfeiffer", "houlsby", "parallel"] {
        let mut model = tiny("gqa_tied");
        let plain = one(model.as_ref(), &IDS);
        let settings = [("architecture", json!(architecture)), ("init_weights", json!("mam_adapter"))];
        attach(model.as_mut(), "BOTTLENECK", &settings);
        same(&one(model.as_ref(), &IDS), &plain, architecture);
    }
}

#[test]
fn widths_of_bottlenecks_are_the_package_s() {
    let count = |settings: &[(&str, Value)]| {
        attach(tiny("gqa_tied").as_mut(), "BOTTLENECK", settings).num_parameters()
    };
    // two layers of width 32: 32·m + m + m·32 + 32 each
    let of = |m: usize| 65 * m + 32;
    assert_eq!(count(&[]), 2 * of(2));
    assert_eq!(count(&[("mh_adapter", json!(true)), ("leave_out", json!([1]))]), 2 * of(2));
    assert_eq!(count(&[("reduction_factor", json!({ "0": 5, "default": 64 }))]), of(6) + of(1));
}

/// `plan` counts without attaching what is large; what it counts is what is trained.
#[test]
fn counts_are_those_of_what_is_attached() {
    let lstm = [("encoder_reparameterization_type", json!("LSTM")), ("encoder_hidden_size", json!(6))];
    let projected = [("prefix_projection", json!(true)), ("encoder_hidden_size", json!(7))];
    let houlsby = [("architecture", json!("houlsby")), ("leave_out", json!([1]))];
    let learned = [("scaling", json!("channel")), ("ln_after", json!(true))];
    for (peft_type, settings) in [
        ("PROMPT_TUNING", &[][..]),
        ("P_TUNING", &[]),
        ("P_TUNING", &lstm),
        ("PREFIX_TUNING", &[]),
        ("PREFIX_TUNING", &projected),
        ("BOTTLENECK", &[]),
        ("BOTTLENECK", &houlsby),
        ("BOTTLENECK", &learned),
    ] {
        let counted = Adapter::sizes(tiny("gqa_tied").as_mut(), config(peft_type, settings)).unwrap();
        let adapter = attach(tiny("gqa_tied").as_mut(), peft_type, settings);
        let lens: Vec<usize> = adapter.params().into_iter().map(|p| p.len()).collect();
        assert_eq!(counted.params().collect::<Vec<_>>(), lens, "{peft_type} {settings:?}");
    }
}

/// PEFT makes two prompts for an encoder-decoder, one below the other, and reads the first.
#[test]
fn of_two_prompts_in_a_file_the_first_is_taken() {
    let rows: Vec<f32> = models::filled("rows", 2 * 3 * 32);
    let mut found = Vec::new();
    for (peft_type, prompts) in [("PROMPT_TUNING", 1), ("PROMPT_TUNING", 2), ("P_TUNING", 1), ("P_TUNING", 2)]
    {
        let settings = [("num_virtual_tokens", json!(3)), ("num_transformer_submodules", json!(prompts))];
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = rows[..prompts * 3 * 32].iter().flat_map(|v| v.to_le_bytes()).collect();
        let tensors = [("prompt_embeddings".to_string(), vec![prompts * 3, 32], bytes)];
        PeftAdapter::save(dir.path(), config(peft_type, &settings), &tensors).unwrap();
        let mut model = load_seq2seq(&golden("t5/v10"), &LoadOptions::default()).unwrap();
        let adapter = Adapter::load(model.as_mut(), dir.path(), &Device::Cpu).unwrap();
        let exported = adapter.export().unwrap();
        assert_eq!(numbers(&exported["prompt_embeddings"]), rows[..3 * 32], "{peft_type} {prompts}");
        let batch = TokenBatch::packed(&IDS, &[0..4, 4..12]);
        found.push(numbers(&model.encode(&mut Tape::inference(), &batch).unwrap().hidden.into_tensor()));
    }
    assert!(found.iter().all(|states| *states == found[0]), "the prompts say different things");
}
