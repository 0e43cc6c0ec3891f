//! Every family's decoder: outlined from its configuration alone, quantized on the way and in a directory.

use engobe_kernels::codec::FourBit;
use engobe_kernels::quantize::Scheme;
use engobe_models::{LoadOptions, Outline, load_causal_lm, quantize, vocab_size};
use engobe_testkit::{cases, golden, models};
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
