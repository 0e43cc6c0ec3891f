//! Attaching, saving, loading and merging on tiny models.

use candle_core::Device;
use engobe_adapters::merge::{MergeOptions, merge};
use engobe_adapters::{Adapter, Start};
use engobe_autograd::host;
use engobe_formats::peft::{LoraConfig, PeftAdapter, TargetModules};
use engobe_formats::safetensors_file::write_safetensors;
use engobe_kernels::storage::StorageType;
use engobe_nn::CausalLm;
use engobe_testkit::models::{self, load, tiny};
use engobe_testkit::{assert_close, base_of, cases, doubles, golden};
use std::collections::BTreeMap;

/// Logits of twenty tokens.
fn logits(model: &dyn CausalLm) -> Vec<f32> {
    let ids = engobe_testkit::models::some_ids();
    models::logits(model, &ids).concat()
}

fn config(targets: TargetModules) -> LoraConfig {
    LoraConfig { r: 3, target_modules: Some(targets), ..Default::default() }
}

fn attach(model: &mut dyn CausalLm, config: &LoraConfig) -> engobe_adapters::Result<Adapter> {
    Adapter::attach(model, config, Start { seed: 4 }, &Device::Cpu)
}

#[test]
fn a_new_adapter_changes_no_bit() {
    let plain = logits(tiny("plain").as_ref());
    let mut model = tiny("plain");
    attach(model.as_mut(), &config(TargetModules::AllLinear)).unwrap();
    assert_eq!(logits(model.as_ref()), plain);
}

#[test]
fn the_seed_fixes_the_start_whatever_else_is_adapted() {
    let (mut a, mut b) = (tiny("plain"), tiny("plain"));
    let all = attach(a.as_mut(), &config(TargetModules::AllLinear)).unwrap().state().unwrap();
    let some = attach(b.as_mut(), &config(TargetModules::List(vec!["up_proj".into()]))).unwrap();
    for (name, value) in some.state().unwrap() {
        assert_eq!(*host(&all[&name]).unwrap(), *host(&value).unwrap(), "{name}");
    }
}

#[test]
fn all_linear_is_written_as_names() {
    let mut model = tiny("plain");
    let adapter = attach(model.as_mut(), &config(TargetModules::AllLinear)).unwrap();
    let Some(TargetModules::List(names)) = adapter.config().modules("target_modules").unwrap() else {
        panic!("no list")
    };
    assert_eq!(names.join(" "), "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj");
    assert_eq!(adapter.params().len(), 2 * 14);
}

#[test]
fn adapters_of_peft_come_back_as_they_were() {
    for name in cases("peft") {
        let (mut first, mut second) = (load(&base_of(&name)), load(&base_of(&name)));
        let adapter = Adapter::load(first.as_mut(), &golden(format!("peft/{name}")), &Device::Cpu).unwrap();
        let dir = tempfile::tempdir().unwrap();
        adapter.save(dir.path()).unwrap();
        let again = Adapter::load(second.as_mut(), dir.path(), &Device::Cpu).unwrap();
        if adapter.file_is_whole() {
            assert_eq!(adapter.config().to_json(), again.config().to_json(), "{name}"); // (lists are written in order)
            assert_eq!(logits(first.as_ref()), logits(second.as_ref()), "{name}");
        } else {
            // PiSSA and OLoRA are written as plain LoRA of twice the rank: the same sum in another order
            assert_eq!(again.config().get("init_lora_weights"), Some(&serde_json::json!(true)), "{name}");
            assert_close(&logits(second.as_ref()), &doubles(&logits(first.as_ref())), 2e-6, &name);
        }
    }
}

#[test]
fn merged_models_say_what_adapters_say() {
    let unties = ["saved_embed", "tied_embed", "tied_tokens", "tied_only_tokens"];
    for name in cases("peft") {
        let mut model = load(&base_of(&name));
        let adapter = Adapter::load(model.as_mut(), &golden(format!("peft/{name}")), &Device::Cpu).unwrap();
        let with = logits(model.as_ref());
        let dir = tempfile::tempdir().unwrap();
        let tied_head = model.info().tied_head;
        let options = MergeOptions { storage: &|_| StorageType::F32, max_shard_bytes: 20_000, tied_head };
        let merged = merge(model.as_mut(), &adapter, dir.path(), &options, &mut |_, _| ()).unwrap();
        let source = std::fs::read_to_string(base_of(&name).join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&source).unwrap();
        config["tie_word_embeddings"] = merged.tied_head.into();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        // the sum W + sBA is rounded to f32 once: some 1e-7 of the largest logit a layer
        assert_close(&logits(load(dir.path()).as_ref()), &doubles(&with), 5e-6, &name);
        assert!(
            merged.changed > 0 && (merged.tied_head || !tied_head || unties.contains(&name.as_str())),
            "{merged:?}"
        );
    }
}

#[test]
fn what_does_not_fit_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = tiny("plain");
    let targets = TargetModules::List(vec!["q_proj".into()]);
    attach(model.as_mut(), &config(targets)).unwrap().save(dir.path()).unwrap();
    let file = PeftAdapter::load(dir.path()).unwrap();
    let mut tensors: Vec<_> =
        file.tensors.values().map(|t| (t.name.clone(), t.shape.clone(), t.bytes().to_vec())).collect();
    drop(file);
    let lost = tensors.remove(0).0;
    tensors[0].1.reverse();
    let misshapen = tensors[0].0.clone();
    tensors.push(("base_model.model.model.layers.9.q_proj.lora_A.weight".into(), vec![1], vec![0; 4]));
    write_safetensors(&dir.path().join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let error = Adapter::load(tiny("plain").as_mut(), dir.path(), &Device::Cpu).unwrap_err().to_string();
    for part in
        [&format!("{lost} is missing"), &format!("{misshapen} is ["), "layers.9.q_proj.lora_A.weight matches"]
    {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn a_copy_of_another_base_is_refused() {
    // `head` carries the head's own weight beside its adapter
    let path = golden("peft/head");
    assert!(Adapter::load(tiny("plain").as_mut(), &path, &Device::Cpu).is_ok());
    let error = Adapter::load(tiny("linear").as_mut(), &path, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("lm_head.base_layer.weight differs"), "{error}");
}

#[test]
fn targets_that_match_nothing_are_named() {
    let refused = |config: &LoraConfig| attach(tiny("plain").as_mut(), config).unwrap_err().to_string();
    let error = refused(&config(TargetModules::List(vec!["query".into()])));
    assert!(error.contains("query") && error.contains("q_proj"), "{error}");
    let error = refused(&config(TargetModules::List(vec!["input_layernorm".into()])));
    assert!(error.contains("input_layernorm is a norm"), "{error}");
    let dora = LoraConfig { use_dora: true, ..config(TargetModules::List(vec!["embed_tokens".into()])) };
    assert!(refused(&dora).contains("model.embed_tokens, an embedding"), "{}", refused(&dora));
    let saved = LoraConfig {
        modules_to_save: vec!["classifier".into()],
        ..config(TargetModules::List(vec!["q_proj".into()]))
    };
    assert!(refused(&saved).contains("classifier"));
}
