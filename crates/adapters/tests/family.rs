//! LoRA's family: what an untrained adapter changes, generation, starts, and combining.

use candle_core::{Device, Tensor};
use engobe_adapters::combine::{Combination, CombineOptions, combine};
use engobe_adapters::{Adapter, Start};
use engobe_autograd::{Activations, Param, Tape, Var, host, tensor_of};
use engobe_formats::peft::{LoraConfig, PeftAdapter, PeftConfig};
use engobe_kernels::codec;
use engobe_models::{LoadOptions, load_causal_lm};
use engobe_nn::{CausalLm, TokenBatch};
use engobe_testkit::{assert_close, cases, golden};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

fn base(path: &str) -> Box<dyn CausalLm> {
    load_causal_lm(&golden(path), &LoadOptions::default()).unwrap()
}

fn logits_on<'m>(model: &'m dyn CausalLm, mut tape: Tape<'m>) -> Vec<f32> {
    let ids = engobe_testkit::models::some_ids();
    let batch = TokenBatch::packed(&ids, &[0..12, 12..20]);
    let hidden = model.hidden_states(&mut tape, &batch, None).unwrap().into_tensor();
    let mut tape = Tape::inference();
    host(&model.logits(&mut tape, &Var::constant(hidden)).unwrap()).unwrap().to_vec()
}

fn logits(model: &dyn CausalLm) -> Vec<f32> {
    logits_on(model, Tape::inference())
}

fn doubles(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

fn config(kind: &str, settings: Value) -> PeftConfig {
    let mut config = PeftConfig::new(kind);
    for (key, value) in settings.as_object().unwrap() {
        config.set(key, value.clone());
    }
    config
}

fn attach(model: &mut dyn CausalLm, config: &PeftConfig) -> Adapter {
    Adapter::attach(model, config, Start { seed: 4 }, &Device::Cpu).unwrap()
}

/// Every method whose start changes nothing, in settings that reach each kind of place.
fn starts() -> Vec<PeftConfig> {
    let all = "all-linear";
    vec![
        config("LORA", json!({ "r": 3, "target_modules": all, "use_dora": true })),
        config("LORA", json!({ "r": 3, "target_modules": ["lm_head", "o_proj"], "use_dora": true })),
        config("LORA", json!({ "r": 3, "target_modules": all, "init_lora_weights": "pissa" })),
        config("LORA", json!({ "r": 3, "target_modules": all, "init_lora_weights": "pissa_niter_4" })),
        config(
            "LORA",
            json!({ "r": 2, "target_modules": all, "init_lora_weights": "olora", "use_dora": true }),
        ),
        config("LORA", json!({ "r": 3, "target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 1 })),
        config(
            "LORA",
            json!({ "r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [0, 13, 39] }),
        ),
        config("IA3", json!({ "target_modules": ["k_proj", "v_proj", "down_proj", "lm_head"] })),
        config("VERA", json!({ "target_modules": all, "r": 8 })),
        config("MISS", json!({ "target_modules": all, "r": 5 })),
        config("ADALORA", json!({ "target_modules": all, "init_r": 4, "target_r": 2, "total_step": 5 })),
        config("LN_TUNING", json!({})),
        config("FULL", json!({ "target_modules": ["o_proj", "norm"] })),
        config("TRAINABLE_TOKENS", json!({ "token_indices": [3, 5] })),
    ]
}

/// Factors of one and norms by norms are exact; a change that is taken out and put back is rounded.
#[test]
fn an_untrained_adapter_changes_nothing_beyond_rounding() {
    for path in ["llama/plain", "llama/gqa_tied", "llama/head_dim_bias", "bitsandbytes/nf4_dq"] {
        let plain = doubles(&logits(base(path).as_ref()));
        for config in starts() {
            let mut model = base(path);
            attach(model.as_mut(), &config);
            assert_close(&logits(model.as_ref()), &plain, 5e-6, &format!("{path}: {}", config.to_json()));
        }
        if path == "llama/head_dim_bias" {
            let mut model = base(path);
            assert!(attach(model.as_mut(), &config("BITFIT", json!({}))).num_parameters() > 0);
            assert_close(&logits(model.as_ref()), &plain, 0.0, "bitfit");
        }
    }
}

fn shake(params: &[&Param]) {
    for (n, p) in params.iter().enumerate() {
        let step = |i: usize| ((i * 31 + n * 17) as f32).sin() * 0.05;
        p.update_host(|v| v.iter_mut().enumerate().for_each(|(i, v)| *v += step(i))).unwrap();
    }
}

/// Generation's path, and files, hold what evaluation computes.
#[test]
fn generation_and_files_say_the_same() {
    for config in starts() {
        let mut model = base("llama/gqa_tied");
        let plain = logits(model.as_ref());
        let adapter = attach(model.as_mut(), &config);
        shake(&adapter.params());
        let trained = logits(model.as_ref());
        let name = config.to_json();
        assert!(trained.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1e-3), "{name} does nothing");
        let generated = logits_on(model.as_ref(), Tape::generation(Activations::Exact));
        assert_close(&generated, &doubles(&trained), 5e-6, &name);
        let dir = tempfile::tempdir().unwrap();
        adapter.save(dir.path()).unwrap();
        let mut again = base("llama/gqa_tied");
        Adapter::load(again.as_mut(), dir.path(), &Device::Cpu).unwrap();
        assert_close(&logits(again.as_ref()), &doubles(&trained), 5e-6, &name);
    }
}

/// LoftQ's base and factors come nearer to the base than its quantized weights alone.
#[test]
fn loftq_starts_nearer_than_quantized_weights() {
    let plain = logits(base("llama/plain").as_ref());
    let off = |start: Value| {
        let mut model = base("llama/plain");
        let all = json!({ "r": 8, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": "loftq",
            "loftq_config": start });
        let adapter = attach(model.as_mut(), &config("LORA", all));
        let with = logits(model.as_ref());
        for p in adapter.params() {
            p.update_host(|v| v.fill(0.0)).unwrap();
        }
        let without = logits(model.as_ref());
        let distance = |x: &[f32]| x.iter().zip(&plain).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
        (distance(&with), distance(&without))
    };
    for (bits, iterations) in [(4, 1), (4, 5), (8, 1)] {
        let (with, without) = off(json!({ "loftq_bits": bits, "loftq_iter": iterations }));
        assert!(with < 0.8 * without, "{bits} bits, {iterations} rounds: {with} and {without}");
    }
    let mut model = base("bitsandbytes/nf4_dq");
    let start = config("LORA", json!({ "target_modules": "all-linear", "init_lora_weights": "loftq" }));
    let error = Adapter::attach(model.as_mut(), &start, Start { seed: 0 }, &Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("quantizes the base itself"), "{error}");
}

/// `scale · B · A` of each module of a file.
fn changes(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = PeftAdapter::load(dir).unwrap();
    let config = LoraConfig::read(&file.config).unwrap();
    let tensor = |name: &str| -> Tensor {
        let view = &file.tensors[name];
        let mut data = vec![0f32; view.elements()];
        codec::decode(view.storage().unwrap(), view.bytes(), &mut data);
        tensor_of(data, view.shape.as_slice()).unwrap()
    };
    let of = |name: &String| {
        let other = match name.strip_suffix(".lora_A.weight") {
            Some(path) => format!("{path}.lora_B.weight"),
            None => {
                format!("{}B", name.strip_suffix("lora_embedding_A").map(|p| format!("{p}lora_embedding_"))?)
            }
        };
        let product = tensor(&other).matmul(&tensor(name)).unwrap();
        let product = (product * (config.lora_alpha / config.r as f64)).unwrap();
        Some((name.clone(), host(&product).unwrap().to_vec()))
    };
    file.tensors.keys().filter_map(of).collect()
}

#[test]
fn combined_adapters_are_those_of_peft() {
    let names = cases("combined");
    assert_eq!(names, ["cat", "linear", "magnitude_prune", "svd", "ties", "ties_svd"]);
    let parts = [(golden("peft/default"), 0.7), (golden("peft/tied_embed"), -0.3)];
    for name in names {
        let out = tempfile::tempdir().unwrap();
        let how = Combination::find(&name).unwrap();
        let options = CombineOptions { how, density: 0.4, rank: None, seed: 1 };
        combine(&parts, &options, out.path()).unwrap();
        let (mine, theirs) = (changes(out.path()), changes(&golden(format!("combined/{name}"))));
        assert_eq!(mine.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{name}");
        for (module, change) in &mine {
            // sums and decompositions in f32 on both sides
            assert_close(change, &doubles(&theirs[module]), 1e-5, &format!("{name}: {module}"));
        }
        let mut model = base("llama/gqa_tied");
        Adapter::load(model.as_mut(), out.path(), &Device::Cpu).unwrap();
    }
}

/// Dropping at random keeps the mean; all of it is the sum.
#[test]
fn what_is_dropped_at_random_keeps_the_sum() {
    let parts = [(golden("peft/default"), 0.7), (golden("peft/tied_embed"), -0.3)];
    let of = |name: &str, density: f32, seed: u64| {
        let out = tempfile::tempdir().unwrap();
        let how = Combination::find(name).unwrap();
        combine(&parts, &CombineOptions { how, density, rank: Some(8), seed }, out.path()).unwrap();
        changes(out.path())
    };
    assert_eq!(of("dare", 1.0, 1), of("linear", 1.0, 1));
    let whole = of("svd", 1.0, 1);
    let name = whole.keys().find(|k| k.contains("v_proj")).unwrap();
    let mut mean = vec![0f64; whole[name].len()];
    for seed in 0..200 {
        // full rank, so that the decomposition loses nothing
        let how = Combination::find("dare_linear_svd").unwrap();
        let out = tempfile::tempdir().unwrap();
        combine(&parts, &CombineOptions { how, density: 0.5, rank: Some(32), seed }, out.path()).unwrap();
        changes(out.path())[name].iter().zip(&mut mean).for_each(|(v, m)| *m += f64::from(*v) / 200.0);
    }
    // each element is twice itself or nothing: the mean of 200 errs by its size over √200
    let size = whole[name].iter().fold(0f32, |m, v| m.max(v.abs()));
    for (mean, v) in mean.iter().zip(&whole[name]) {
        assert!((mean - f64::from(*v)).abs() < 5.0 * f64::from(size) / 200f64.sqrt(), "{mean} {v}");
    }
    assert!(Combination::find("linear_svd").is_none() && Combination::find("mean").is_none());
    let more = combine(
        &[(golden("peft/dora"), 1.0)],
        &CombineOptions { how: Combination::find("cat").unwrap(), density: 1.0, rank: None, seed: 0 },
        Path::new("/nonexistent"),
    );
    assert!(more.unwrap_err().to_string().contains("use_dora"));
}
