//! Configurations that cannot be meant: the error names the file, the key and the value.

use engobe_formats::gguf::{GgufValue, write_gguf};
use engobe_kernels::storage::StorageType;
use engobe_models::{LoadOptions, load_causal_lm, load_seq2seq};
use engobe_testkit::golden;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The error of loading a golden model whose `config.json` was changed.
fn error(case: &str, change: impl Fn(&mut Value)) -> String {
    error_of(&format!("llama/{case}"), change)
}

fn error_of(case: &str, change: impl Fn(&mut Value)) -> String {
    let dir = changed(case, change);
    load_causal_lm(dir.path(), &LoadOptions::default()).err().map(|e| e.to_string()).unwrap_or_default()
}

/// A golden model whose `config.json` was changed.
fn changed(case: &str, change: impl Fn(&mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(case)).unwrap().flatten().filter(|e| e.path().is_file()) {
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    dir
}

#[test]
fn numbers_of_rope_must_be_above_0() {
    for (case, key, value) in [
        ("linear", "factor", json!(-2.0)),
        ("dynamic", "factor", json!(0)),
        ("llama3", "low_freq_factor", json!(0)),
        ("yarn", "factor", json!(-4)),
        ("yarn", "beta_fast", json!(-1)),
        ("yarn", "attention_factor", json!(0)),
        ("longrope", "attention_factor", json!(-1)),
    ] {
        let error = error(case, |config| config["rope_parameters"][key] = value.clone());
        assert!(
            error.contains("config.json") && error.contains(&format!(".{key} is")),
            "{case} {key}: {error}"
        );
    }
    let error = error("longrope", |config| config["rope_parameters"]["long_factor"][1] = json!(0.0));
    assert!(error.contains("long_factor is 0"), "{error}");
}

#[test]
fn sizes_must_fit_together() {
    for (key, value) in [
        ("num_key_value_heads", json!(3)),
        ("num_hidden_layers", json!(0)),
        ("head_dim", json!(7)),
        ("vocab_size", json!(-1)),
        ("hidden_act", json!("gelu")),
        ("rms_norm_eps", json!(-1.0)),
    ] {
        let error = error("plain", |config| config[key] = value.clone());
        assert!(error.contains("config.json") && error.contains(key), "{key}: {error}");
    }
}

#[test]
fn an_encoder_decoder_s_settings_must_fit_together() {
    for (key, value) in [
        ("decoder_start_token_id", json!(40)),
        ("num_heads", json!(0)),
        ("d_kv", json!(1u64 << 40)),
        ("relative_attention_num_buckets", json!(3)),
        ("relative_attention_max_distance", json!(16)),
        ("feed_forward_proj", json!("gelu-gated")),
        ("feed_forward_proj", json!("gated-softmax")),
        ("scale_decoder_outputs", json!("no")),
        ("num_decoder_layers", json!(0)),
    ] {
        let dir = changed("t5/v11", |config| config[key] = value.clone());
        let error = load_seq2seq(dir.path(), &LoadOptions::default()).err().map(|e| e.to_string());
        let error = error.unwrap_or_default();
        assert!(error.contains("config.json") && error.contains(key), "{key} {value}: {error}");
    }
}

/// What a family's configuration may say and its decoder cannot do, or what nobody can mean.
#[test]
fn families_refuse_what_they_cannot_be() {
    for (case, key, value) in [
        ("gemma", "use_bidirectional_attention", json!(true)),
        ("gemma", "hidden_act", json!("silu")),
        ("olmo2", "hidden_act", json!("gelu")),
        ("granite", "residual_multiplier", json!(0.0)),
        ("granite", "logits_scaling", json!(-1.0)),
        ("smollm3", "no_rope_layers", json!([1, 2, 1, 0])),
        ("smollm3", "no_rope_layers", json!([1, 0])),
        ("starcoder2", "sliding_window", json!(0)),
        ("phi", "qk_layernorm", json!(true)),
        ("phi", "hidden_act", json!("softplus")),
        ("stablelm", "qk_layernorm", json!(true)),
        ("stablelm", "num_attention_heads", json!(5)),
    ] {
        let error = error_of(&format!("decoders/{case}"), |config| config[key] = value.clone());
        assert!(error.contains("config.json") && error.contains(key), "{case} {key}: {error}");
    }
    let error = error_of("decoders/smollm3", |config| {
        config["no_rope_layers"] = Value::Null;
        config["no_rope_layer_interval"] = json!(0);
    });
    assert!(error.contains("no_rope_layer_interval is 0"), "{error}");
}

/// GGUF files that say they are of a family, and hold what its decoder here does not have.
#[test]
fn gguf_files_of_later_models_by_the_same_name_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let window = ("olmo2.attention.sliding_window".to_string(), GgufValue::Unsigned(4096));
    let tensor = |name: &str| (name.to_string(), StorageType::F32, vec![1], vec![0; 4]);
    for (name, settings, tensors, expected) in [
        (
            "olmo2",
            vec![window],
            vec![tensor("output_norm.weight")],
            "sliding_window is 4096; expected none: this is OLMo 3",
        ),
        (
            "stablelm",
            vec![],
            vec![tensor("blk.0.attn_q_norm.weight")],
            "attn_q_norm.weight is there; expected no such tensor",
        ),
    ] {
        let path = dir.path().join(format!("{name}.gguf"));
        let architecture = ("general.architecture".to_string(), GgufValue::String(name.to_string()));
        let metadata: Vec<_> = std::iter::once(architecture).chain(settings).collect();
        write_gguf(&path, &metadata, &tensors).unwrap();
        let error = load_causal_lm(&path, &LoadOptions::default()).err().map(|e| e.to_string());
        assert!(error.as_ref().is_some_and(|e| e.contains(expected)), "{name}: {error:?}");
    }
}
