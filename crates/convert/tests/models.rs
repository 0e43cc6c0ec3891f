//! Models as GGUF files: read again, they say what they said before.

mod support;

use candle_core::Device;
use engobe_adapters::Adapter;
use engobe_convert::GgufType;
use engobe_convert::model::{ModelSource, WrittenModel, write_model};
use engobe_data::TextTokenizer;
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_kernels::storage::StorageType;
use engobe_testkit::models::load;
use engobe_testkit::{assert_close, base_of, cases, doubles, golden};
use std::path::{Path, PathBuf};
use support::{logits, logits_of};

fn write(
    base: &Path,
    adapter: Option<&Path>,
    wanted: &str,
    out: &Path,
) -> Result<WrittenModel, engobe_convert::Error> {
    let mut model = load(base);
    let adapter = adapter.map(|dir| Adapter::load(model.as_mut(), dir, &Device::Cpu).unwrap());
    let tokenizer = None::<TextTokenizer>;
    let source =
        ModelSource { path: base, tokenizer: tokenizer.as_ref(), adapter: adapter.as_ref(), name: "tiny" };
    write_model(model.as_mut(), &source, wanted.parse::<GgufType>().unwrap(), out, &mut |_, _| ())
}

fn temporary() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    (dir, path)
}

#[test]
fn every_configuration_says_the_same_from_a_gguf_file() {
    let mut refused = Vec::new();
    for name in cases("llama") {
        let (_dir, path) = temporary();
        let base = golden(format!("llama/{name}"));
        let written = match write(&base, None, "keep", &path) {
            Ok(written) => written,
            Err(error) => {
                assert!(error.to_string().contains("rope_scaling is"), "{error}");
                refused.push(name);
                continue;
            }
        };
        assert!(written.otherwise.is_empty() && written.changed == 0);
        // rope_freqs are divided once more; all else is the same numbers in another order
        assert_close(&logits(&path, None), &doubles(&logits(&base, None)), 1e-6, &name);
        let file = Gguf::open(&path).unwrap();
        assert_eq!(written.mapped.len(), file.tensors().len(), "{name}: every tensor is reported");
        assert!(file.tensor("output_norm.weight").unwrap().storage().unwrap() == StorageType::F32);
        assert_eq!(file.contains("rope_freqs.weight"), name.starts_with("llama3"), "{name}");
    }
    assert_eq!(refused, ["dynamic", "longrope"]);
}

#[test]
fn every_family_says_the_same_from_a_gguf_file() {
    let mut refused = Vec::new();
    for name in cases("decoders") {
        let (dir, path) = temporary();
        let base = golden(format!("decoders/{name}"));
        if let Err(error) = write(&base, None, "f32", &path) {
            refused.push((name, error.to_string()));
            continue;
        }
        // the same numbers in another order; 1 + w is rounded once more
        assert_close(&logits(&path, None), &doubles(&logits(&base, None)), 5e-6, &name);
        let adapter = base.join("lora");
        if adapter.exists() {
            let merged = dir.path().join("merged.gguf");
            let expected = doubles(&logits(&base, Some(&adapter)));
            assert!(write(&base, Some(&adapter), "f32", &merged).unwrap().changed > 0);
            // W + sBA is rounded to f32 once, as above
            assert_close(&logits(&merged, None), &expected, 5e-6, &format!("{name}, merged"));
            assert_close(&logits(&path, Some(&adapter)), &expected, 5e-6, &format!("{name}, adapted"));
        }
    }
    let names: Vec<&str> = refused.iter().map(|(name, _)| name.as_str()).collect();
    let expected = [
        ("gemma2_uncapped", "attn_logit_softcapping is null"),
        ("gemma3_scaled", "query_pre_attn_scalar is 20"),
        ("gemma_bias", "attention_bias is true"),
        ("gpt2_short_names", "activation_function is gelu"),
        ("gpt_neox_serial", "hidden_act is gelu_new"),
        ("mistral", "sliding_window is 6"),
        ("olmo2_bias", "attention_bias is true"),
        ("opt", "llama.cpp has no architecture for opt"),
        ("opt_plain", "llama.cpp has no architecture for opt"),
        ("opt_post_norm", "llama.cpp has no architecture for opt"),
        ("phi_share", "hidden_act is gelu"),
        ("qwen2_window", "sliding_window is 7"),
        ("qwen3_bias", "sliding_window is 9"),
        ("smollm3_window", "no_rope_layers is another pattern"),
        ("starcoder2_window", "hidden_act is gelu"),
    ];
    assert_eq!(names, expected.map(|(name, _)| name));
    for ((name, error), (_, part)) in refused.iter().zip(expected) {
        assert!(error.contains(part), "{name}: {error}");
    }
}

/// The `config.json` that a GGUF file's settings come to describes the weights of the directory that it was made of.
#[test]
fn every_family_says_the_same_by_the_settings_of_its_gguf_file() {
    let mut read = 0;
    for name in cases("decoders") {
        let (dir, path) = temporary();
        let base = golden(format!("decoders/{name}"));
        if write(&base, None, "f32", &path).is_err() {
            continue;
        }
        let config = engobe_models::hf_config_of(&Gguf::open(&path).unwrap()).unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(base.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        // settings are f32 in one and f64 in the other
        assert_close(&logits(dir.path(), None), &doubles(&logits(&base, None)), 1e-6, &name);
        read += 1;
    }
    assert!(read >= 18, "{read}");
}

#[test]
fn merged_files_say_what_the_adapter_says() {
    for name in cases("peft") {
        let (dir, path) = temporary();
        let (base, adapter) = (base_of(&name), golden(format!("peft/{name}")));
        let expected = doubles(&logits(&base, Some(&adapter)));
        let written = write(&base, Some(&adapter), "f32", &path).unwrap();
        assert!(written.changed > 0, "{name}");
        // W + sBA is rounded to f32 once: some 1e-7 of the largest logit a layer
        assert_close(&logits(&path, None), &expected, 5e-6, &name);
        // the same over a GGUF base, which keeps its metadata and what the adapter does not touch
        let (plain, merged) = (dir.path().join("plain.gguf"), dir.path().join("merged.gguf"));
        write(&base, None, "f32", &plain).unwrap();
        let second = write(&plain, Some(&adapter), "keep", &merged).unwrap();
        assert_close(&logits(&merged, None), &expected, 5e-6, &format!("{name} over GGUF"));
        let (before, after) = (Gguf::open(&plain).unwrap(), Gguf::open(&merged).unwrap());
        assert_eq!(before.copied_metadata(), after.copied_metadata(), "{name}");
        let differ =
            before.tensors().values().filter(|t| after.tensor(&t.name).unwrap().bytes() != t.bytes());
        let added = after.tensors().len() - before.tensors().len();
        // a head that is added was the embedding before; it counts as changed if it differs from that
        let head = after.tensors().get("output.weight").filter(|_| added == 1);
        let embedding = before.tensor("token_embd.weight").unwrap();
        let changed_head = head.is_some_and(|head| head.bytes() != embedding.bytes());
        assert_eq!(differ.count() + usize::from(changed_head), second.changed, "{name}");
        // an embedding that is trained, or a head that is adapted, is no longer the other; some tokens are trained in both
        let unties = ["saved_embed", "tied_embed"].contains(&name.as_str());
        assert_eq!(added, usize::from(unties), "{name}");
    }
}

/// Numbers as coarse as the type, no coarser: the same as encoding the merged weights would give.
#[test]
fn types_are_what_was_asked_for_where_rows_allow_it() {
    let (base, adapter) = (base_of("all_linear"), golden("peft/all_linear"));
    for (wanted, attention, down, head) in [
        ("f16", "F16", "F16", "F16"),
        ("bf16", "BF16", "BF16", "BF16"),
        // rows of 32 are whole blocks of 32, rows of 48 are not; heads are written with more bits
        ("q8_0", "Q8_0", "F16", "Q8_0"),
        ("q4_0", "Q4_0", "F16", "Q8_0"),
        ("q4_k", "Q5_0", "F16", "Q8_0"),
    ] {
        let (_dir, path) = temporary();
        let written = write(&base, Some(&adapter), wanted, &path).unwrap();
        let file = Gguf::open(&path).unwrap();
        let kind = |name: &str| file.tensor(name).unwrap().storage().unwrap().name();
        assert_eq!(kind("blk.0.attn_q.weight"), attention, "{wanted}");
        assert_eq!(kind("blk.0.ffn_down.weight"), down, "{wanted}");
        assert_eq!(kind("output.weight"), head, "{wanted}");
        assert_eq!(kind("blk.1.ffn_norm.weight"), "F32", "{wanted}");
        let others = written
            .otherwise
            .iter()
            .any(|(name, kind)| name == "blk.0.ffn_down.weight" && kind.name() == down);
        assert_eq!(others, wanted.starts_with('q'), "{wanted}: what got another type is told");
        assert!(!logits(&path, None).iter().any(|v| v.is_nan()));
        let size: f64 = doubles(&logits(&base, Some(&adapter))).iter().map(|v| v * v).sum();
        let error: f64 = logits(&path, None)
            .iter()
            .zip(logits(&base, Some(&adapter)))
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum();
        // relative steps: 2^-11, 2^-9, 1/254, 1/14 (Q4_0 and Q5_0 rows), through two layers
        let most = match wanted {
            "f16" => 2e-3,
            "bf16" => 1e-2,
            "q8_0" => 3e-2,
            _ => 0.5,
        };
        assert!((error / size).sqrt() < most, "{wanted}: {}", (error / size).sqrt());
    }
}

#[test]
fn a_changed_type_changes_the_label_and_nothing_else() {
    let (dir, path) = temporary();
    write(&golden("llama/plain"), None, "f32", &path).unwrap();
    let second = dir.path().join("f16.gguf");
    write(&path, None, "f16", &second).unwrap();
    let (before, after) = (Gguf::open(&path).unwrap(), Gguf::open(&second).unwrap());
    assert_eq!(before.metadata()["general.file_type"], GgufValue::Unsigned(0));
    assert_eq!(after.metadata()["general.file_type"], GgufValue::Unsigned(1));
    for (key, value) in before.metadata().iter().filter(|(key, _)| *key != "general.file_type") {
        assert_eq!(&after.metadata()[key], value);
    }
    for (name, tensor) in before.tensors().iter().filter(|(_, t)| t.shape.len() == 1) {
        assert_eq!(after.tensor(name).unwrap().bytes(), tensor.bytes());
    }
}

#[test]
fn tensors_that_have_no_place_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let base = golden("llama/gqa_tied");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(base.join(name), dir.path().join(name)).unwrap();
    }
    let file =
        engobe_formats::safetensors_file::SafetensorsFile::open(&base.join("model.safetensors")).unwrap();
    let mut tensors: Vec<_> = file
        .tensors()
        .map(|t| {
            let mut floats = vec![0f32; t.elements()];
            engobe_kernels::codec::decode(t.storage().unwrap(), t.bytes(), &mut floats);
            (
                t.name.clone(),
                t.shape.clone(),
                floats.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>(),
            )
        })
        .collect();
    let add = |tensors: &mut Vec<(String, Vec<usize>, Vec<u8>)>, name: &str| {
        tensors.push((name.to_string(), vec![1], vec![0; 4]));
        let path = dir.path().join("model.safetensors");
        engobe_formats::safetensors_file::write_safetensors(&path, tensors, &Default::default()).unwrap();
        write(dir.path(), None, "f32", &dir.path().join("x.gguf")).map(|_| ())
    };
    // what old transformers stored beside the weights, and a head that is not used
    add(&mut tensors, "model.layers.0.self_attn.rotary_emb.inv_freq").unwrap();
    add(&mut tensors, "lm_head.weight").unwrap();
    let error = add(&mut tensors, "model.layers.0.self_attn.q_norm.weight").unwrap_err().to_string();
    assert!(error.contains("q_norm.weight cannot be converted"), "{error}");
}

/// Logits of a GGUF file with its own tokenizer: the model can be merged again and again.
#[test]
fn a_merged_file_is_a_base_like_any_other() {
    let (dir, path) = temporary();
    let (base, adapter) = (base_of("default"), golden("peft/default"));
    write(&base, Some(&adapter), "f32", &path).unwrap();
    let twice = dir.path().join("twice.gguf");
    write(&path, Some(&adapter), "keep", &twice).unwrap();
    let mut model = load(&path);
    Adapter::load(model.as_mut(), &adapter, &Device::Cpu).unwrap();
    assert_close(&logits(&twice, None), &doubles(&logits_of(model.as_ref())), 5e-6, "twice");
}
