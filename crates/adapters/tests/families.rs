//! LoRA on every family's decoder: merged into its model, it says what it says beside it.

use candle_core::Device;
use engobe_adapters::merge::{MergeOptions, Planned, merge, plan};
use engobe_adapters::{Adapter, Start};
use engobe_autograd::{Activations, Tape, host};
use engobe_formats::peft::{BiasMode, LoraConfig, PeftConfig, TargetModules};
use engobe_kernels::storage::StorageType;
use engobe_models::{LoadOptions, load_seq2seq};
use engobe_nn::{CausalLm, ModuleMut};
use engobe_testkit::models::{self, load, some_ids};
use engobe_testkit::{assert_close, cases, golden};
use serde_json::{Value, json};
use std::path::Path;

fn logits(model: &dyn CausalLm) -> Vec<f32> {
    models::logits(model, &some_ids()).concat()
}

#[test]
fn a_merged_model_says_what_its_adapter_said() {
    let mut transposed = Vec::new();
    for name in cases("decoders") {
        let base = golden(format!("decoders/{name}"));
        if !base.join("lora").exists() {
            continue;
        }
        let mut model = load(&base);
        let plain = logits(model.as_ref());
        let adapter = Adapter::load(model.as_mut(), &base.join("lora"), &Device::Cpu).unwrap();
        let adapted = logits(model.as_ref());
        assert_ne!(plain, adapted, "{name}");
        if adapter.config().flag("fan_in_fan_out").unwrap() {
            transposed.push(name.clone());
        }
        let dir = tempfile::tempdir().unwrap();
        let options = MergeOptions {
            storage: &|_| StorageType::F32,
            max_shard_bytes: 1 << 30,
            tied_head: model.info().tied_head,
        };
        let merged = merge(model.as_mut(), &adapter, dir.path(), &options, &mut |_, _| ()).unwrap();
        assert!(merged.changed >= 8, "{name}");
        std::fs::copy(base.join("config.json"), dir.path().join("config.json")).unwrap();
        let expected: Vec<f64> = adapted.iter().map(|x| f64::from(*x)).collect();
        // W + sBA is rounded to f32 once: some 1e-7 of the largest logit a layer
        assert_close(&logits(load(dir.path()).as_ref()), &expected, 5e-6, &name);
    }
    assert_eq!(transposed, ["gpt2"], "PEFT is told of Conv1D");
}

/// Merges, and finds the head tied and the model saying the same.
fn stays_tied(base: &Path, model: &mut dyn CausalLm, adapter: &Adapter) {
    let expected: Vec<f64> = logits(model).iter().map(|x| f64::from(*x)).collect();
    let dir = tempfile::tempdir().unwrap();
    let options = MergeOptions { storage: &|_| StorageType::F32, max_shard_bytes: 1 << 30, tied_head: true };
    let merged = merge(model, adapter, dir.path(), &options, &mut |_, _| ()).unwrap();
    assert!(merged.tied_head);
    std::fs::copy(base.join("config.json"), dir.path().join("config.json")).unwrap();
    // the same numbers, widened
    assert_close(&logits(load(dir.path()).as_ref()), &expected, 1e-6, "merged");
}

/// Phi's head has a bias, which is no part of the embedding that its matrix may be.
#[test]
fn a_tied_head_keeps_its_bias_in_a_merged_model() {
    let base = golden("decoders/phi_share");
    let mut model = load(&base);
    assert!(model.info().tied_head);
    let config = LoraConfig {
        bias: BiasMode::All,
        target_modules: Some(TargetModules::AllLinear),
        ..Default::default()
    };
    let adapter = Adapter::attach(model.as_mut(), &config, Start { seed: 1 }, &Device::Cpu).unwrap();
    let params = adapter.params();
    let bias = params.iter().find(|p| p.name().ends_with("lm_head.bias")).unwrap();
    bias.update_host(|v| v.iter_mut().enumerate().for_each(|(i, v)| *v += 0.1 * i as f32)).unwrap();
    stays_tied(&base, model.as_mut(), &adapter);
}

/// A table of positions that was trained is not the matrix that the head is tied to.
#[test]
fn trained_positions_do_not_untie_the_head() {
    let base = golden("decoders/gpt2");
    let mut model = load(&base);
    assert!(model.info().tied_head);
    let config = LoraConfig {
        target_modules: Some(TargetModules::List(vec!["c_fc".to_string()])),
        modules_to_save: vec!["wpe".to_string()],
        ..Default::default()
    };
    let adapter = Adapter::attach(model.as_mut(), &config, Start { seed: 1 }, &Device::Cpu).unwrap();
    let params = adapter.params();
    let positions = params.iter().find(|p| p.name().contains("wpe")).unwrap();
    positions
        .update_host(|v| v.iter_mut().enumerate().for_each(|(i, v)| *v += 0.01 * (i % 7) as f32))
        .unwrap();
    stays_tied(&base, model.as_mut(), &adapter);
}

#[test]
fn a_conv1d_is_not_trained_in_full() {
    let mut model = load(&golden("decoders/gpt2"));
    let config = LoraConfig {
        target_modules: Some(TargetModules::List(vec!["c_fc".to_string()])),
        modules_to_save: vec!["c_attn".to_string()],
        ..Default::default()
    };
    let start = Start { seed: 1 };
    let error = Adapter::attach(model.as_mut(), &config, start, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("transformer.h.0.attn.c_attn is a Conv1D"), "{error}");
}

/// Norms and embeddings are trained in full by the names that PEFT gives them, Gemma's 1 + w and LayerNorm's bias too.
#[test]
fn norms_and_embeddings_are_trained_in_full() {
    for (name, module, expected) in [
        ("gemma3", "model.norm", vec!["model.norm.weight"]),
        ("gpt2", "ln_f", vec!["transformer.ln_f.weight", "transformer.ln_f.bias"]),
        ("gpt2", "wpe", vec!["transformer.wpe.weight"]),
        ("gpt_neox", "embed_out", vec!["embed_out.weight"]),
    ] {
        let mut model = load(&golden(format!("decoders/{name}")));
        let plain = logits(model.as_ref());
        let config = LoraConfig {
            target_modules: Some(engobe_formats::peft::TargetModules::AllLinear),
            modules_to_save: vec![module.to_string()],
            ..Default::default()
        };
        let start = Start { seed: 1 };
        let adapter = Adapter::attach(model.as_mut(), &config, start, &Device::Cpu).unwrap();
        let params = adapter.params();
        let names: Vec<&str> = params.iter().map(|p| p.name()).filter(|n| !n.contains(".lora_")).collect();
        let expected: Vec<String> = expected.iter().map(|n| format!("base_model.model.{n}")).collect();
        assert_eq!(names, expected, "{name}");
        // B is zero and the copies are the base's own values
        let plain: Vec<f64> = plain.iter().map(|x| f64::from(*x)).collect();
        assert_close(&logits(model.as_ref()), &plain, 1e-6, name);
    }
}

/// Prompts and prefixes before every family's tokens: one row at once, and the same tokens over a cache.
#[test]
fn prompts_and_prefixes_are_the_same_over_a_cache() {
    for name in cases("decoders") {
        let path = golden(format!("decoders/{name}"));
        // OPT-350m's embedding is narrower than its blocks, and rope that depends on the length is not cached
        if name == "opt_post_norm" || name == "phi3_longrope" {
            continue;
        }
        for method in ["PROMPT_TUNING", "PREFIX_TUNING"] {
            let mut model = load(&path);
            let plain = logits(model.as_ref());
            let mut config = PeftConfig::new(method);
            config.set("num_virtual_tokens", 3);
            Adapter::attach(model.as_mut(), config, Start { seed: 4 }, &Device::Cpu).unwrap();
            let whole = logits(model.as_ref());
            assert_ne!(whole, plain, "{name} {method}");
            let ids = some_ids();
            let mut cache = model.new_cache(1, 8, Activations::Exact).unwrap();
            let mut stepped = Vec::new();
            for range in [0..11, 11..12, 12..20] {
                let batch = cache.batch(&[(0, &ids[range])]).unwrap();
                let mut tape = Tape::generation(Activations::Exact);
                let hidden = model.hidden_states(&mut tape, &batch, Some(&mut cache)).unwrap();
                stepped.extend(host(&model.logits(&mut tape, &hidden).unwrap()).unwrap().to_vec());
            }
            let expected: Vec<f64> = whole.iter().map(|x| f64::from(*x)).collect();
            // sums in another order over a few layers: some 1e-6 of the largest
            assert_close(&stepped, &expected, 1e-5, &format!("{name} {method}"));
            model.detach_all();
            assert_eq!(logits(model.as_ref()), plain, "{name} {method}: detached");
        }
    }
}

/// `bias = "all"` trains every bias, those of layer norms too, as PEFT does; a file holds them.
#[test]
fn all_biases_are_all() {
    for name in ["gpt2", "opt", "gpt_neox", "phi", "stablelm_parallel"] {
        let path = golden(format!("decoders/{name}"));
        let (mut model, mut expected) = (load(&path), 0);
        model.visit_modules(&mut |module| {
            expected += usize::from(match module {
                ModuleMut::Linear(m) => m.bias().is_some(),
                ModuleMut::LayerNorm(m) => m.bias().is_some(),
                _ => false,
            });
        });
        let config = LoraConfig { bias: BiasMode::All, ..Default::default() };
        let config = LoraConfig { target_modules: Some(TargetModules::AllLinear), ..config };
        let adapter = Adapter::attach(model.as_mut(), &config, Start { seed: 1 }, &Device::Cpu).unwrap();
        let biases: Vec<_> = adapter.params().into_iter().filter(|p| p.name().ends_with(".bias")).collect();
        assert_eq!(biases.len(), expected, "{name}");
        let plain = logits(model.as_ref());
        biases.iter().for_each(|p| p.update_host(|v| v.iter_mut().for_each(|v| *v += 0.05)).unwrap());
        let trained = logits(model.as_ref());
        assert_ne!(trained, plain, "{name}");
        let dir = tempfile::tempdir().unwrap();
        adapter.save(dir.path()).unwrap();
        let mut again = load(&path);
        Adapter::load(again.as_mut(), dir.path(), &Device::Cpu).unwrap();
        assert_eq!(logits(again.as_ref()), trained, "{name}");
    }
}

/// What is trained of another embedding than that of tokens (T5's biases by distance) leaves a tied head tied, and so do
/// tokens that are trained in both.
#[test]
fn a_head_that_is_changed_as_the_embedding_of_tokens_stays_tied() {
    let head_stays = |kind: &str, key: &str, value: Value, changed: &str| {
        let mut model = load_seq2seq(&golden("t5/uneven"), &LoadOptions::default()).unwrap();
        assert!(model.info().tied_head);
        let mut config = PeftConfig::new(kind);
        config.set(key, value);
        if kind == "LORA" {
            config.set("target_modules", vec!["q".to_string()]);
        }
        Adapter::attach(model.as_mut(), config, Start { seed: 1 }, &Device::Cpu).unwrap();
        let plan = plan(model.as_mut(), true);
        let is_changed = |t: &Planned| t.changed && t.name.contains(changed);
        assert!(plan.tensors.iter().any(is_changed), "{changed} is not among what is merged");
        plan.tied_head
    };
    let saved = |name: &str| head_stays("LORA", "modules_to_save", json!([name]), name);
    assert!(saved("relative_attention_bias"));
    assert!(!saved("shared"));
    assert!(!saved("lm_head"));
    assert!(head_stays("TRAINABLE_TOKENS", "token_indices", json!([3, 5]), "shared"));
    assert!(head_stays("LORA", "trainable_token_indices", json!([3, 5]), "shared"));
}
