//! Every family's decoder: outlined from its configuration alone, quantized on the way and in a directory.

use engobe_kernels::codec::FourBit;
use engobe_kernels::quantize::Scheme;
use engobe_models::{LoadOptions, Outline, load_causal_lm, quantize, vocab_size};
use engobe_testkit::{cases, golden, models};
use serde_json::Value;
use std::path::Path;

fn logits(path: &Path, options: &LoadOptions) -> Vec<f32> {
    models::logits(load_causal_lm(path, options).unwrap().as_ref(), &models::some_ids()).concat()
}

#[test]
fn a_configuration_alone_gives_the_outline() {
    for name in cases("decoders") {
        let dir = golden(format!("decoders/{name}"));
        let options = LoadOptions::default();
        let whole = Outline::read(&dir, &options).unwrap();
        let alone = Outline::read(&dir.join("config.json"), &options).unwrap();
        assert!(whole.has_weights && !alone.has_weights);
        assert_eq!((whole.linears, whole.sizes), (alone.linears, alone.sizes), "{name}");
        // a layer of its own for each of q, k, v or one for all; an MLP of two or three; the head
        let per_layer = (alone.tensors.len() - 1) / alone.sizes.layers;
        assert!((4..=7).contains(&per_layer), "{name}: {per_layer} matrices a layer");
        assert_eq!(vocab_size(&dir).unwrap(), 40);
    }
}

/// transformers 4 wrote what stands in `rope_parameters` at the top, and only what differs from the plain form in
/// `rope_scaling`.
#[test]
fn settings_as_transformers_4_wrote_them_say_the_same() {
    let mut read = 0;
    for name in cases("decoders") {
        let from = golden(format!("decoders/{name}"));
        let text = std::fs::read_to_string(from.join("config.json")).unwrap();
        let mut config: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
        let Some(Value::Object(mut rope)) = config.remove("rope_parameters") else { continue };
        // GPT-NeoX had keys of its own for them, Gemma 3 two bases
        if name.starts_with("gpt_neox") || name.starts_with("gemma3") {
            continue;
        }
        for key in ["rope_theta", "partial_rotary_factor", "original_max_position_embeddings"] {
            config.extend(rope.remove(key).map(|value| (key.to_string(), value)));
        }
        let plain = rope["rope_type"] == "default";
        config.insert("rope_scaling".to_string(), if plain { Value::Null } else { rope.into() });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), Value::Object(config).to_string()).unwrap();
        std::fs::copy(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let options = LoadOptions::default();
        assert_eq!(logits(dir.path(), &options), logits(&from, &options), "{name}");
        read += 1;
    }
    assert!(read >= 20, "{read}");
}

#[test]
fn a_quantized_directory_is_what_quantizing_while_reading_gives() {
    let nf4 = Scheme::FourBit { kind: FourBit::Nf4, block: 64, double: false };
    for name in cases("decoders") {
        let from = golden(format!("decoders/{name}"));
        for (scheme, section) in [
            (Scheme::Int8, r#"{"quant_method": "bitsandbytes", "load_in_8bit": true}"#),
            (nf4, r#"{"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}"#),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let done = quantize(&from, scheme, dir.path(), 1 << 30, &mut |_, _| ()).unwrap();
            assert!(done.quantized >= 8 && done.bytes_after < done.bytes_before, "{name}");
            let text = std::fs::read_to_string(from.join("config.json")).unwrap();
            let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
            config["quantization_config"] = serde_json::from_str(section).unwrap();
            std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            let options = LoadOptions { quantize: Some(scheme), ..Default::default() };
            let (stored, read) = (logits(dir.path(), &LoadOptions::default()), logits(&from, &options));
            assert_eq!(stored, read, "{name} {scheme}");
            assert_ne!(stored, logits(&from, &LoadOptions::default()), "{name} {scheme}");
        }
    }
}
