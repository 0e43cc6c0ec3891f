//! The tiny models of `golden/llama` as llama.cpp's converter writes them: the same logits from a GGUF file.

use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::gguf::{GgufValue, write_gguf};
use engobe_formats::hf_config::HfConfig;
use engobe_models::gguf_names;
use engobe_testkit::models::{load, logits};
use engobe_testkit::{assert_close, golden, golden_json};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Deserialize)]
struct Expected {
    ids: Vec<u32>,
    logits: BTreeMap<usize, [Vec<f64>; 3]>,
}

/// `LlamaModel.permute` of `convert_hf_to_gguf.py`, which it applies to weights and biases of q and k.
fn permute(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (width, head) = (bytes.len() / rows, rows / heads);
    let mut out = Vec::with_capacity(bytes.len());
    for h in 0..heads {
        for i in 0..head / 2 {
            for s in 0..2 {
                let row = h * head + s * head / 2 + i;
                out.extend_from_slice(&bytes[row * width..][..width]);
            }
        }
    }
    out
}

/// Writes a model directory as a GGUF file, by the converter's rules.
fn convert(dir: &Path, to: &Path) {
    let config = HfConfig::open(dir).unwrap();
    let size = |key: &str| config.opt_usize(key).unwrap();
    let heads = size("num_attention_heads").unwrap();
    let kv_heads = size("num_key_value_heads").unwrap_or(heads);
    let hidden = size("hidden_size").unwrap();
    let head_dim = size("head_dim").unwrap_or(hidden / heads);
    let theta = config.get("rope_parameters").and_then(|p| p["rope_theta"].as_f64()).unwrap_or(10_000.0);
    let count = |key: &str, n: usize| (format!("llama.{key}"), GgufValue::Unsigned(n as u64));
    let metadata = [
        ("general.architecture".to_string(), GgufValue::String("llama".to_string())),
        count("block_count", size("num_hidden_layers").unwrap()),
        count("embedding_length", hidden),
        count("feed_forward_length", size("intermediate_size").unwrap()),
        count("attention.head_count", heads),
        count("attention.head_count_kv", kv_heads),
        count("attention.key_length", head_dim),
        count("attention.value_length", head_dim),
        ("llama.rope.freq_base".to_string(), GgufValue::Float(theta)),
        (
            "llama.attention.layer_norm_rms_epsilon".to_string(),
            GgufValue::Float(config.opt_f64("rms_norm_eps").unwrap().unwrap()),
        ),
    ];
    let mut tensors = Vec::new();
    for view in Checkpoint::open(dir).unwrap().tensors() {
        let heads = match &view.name {
            name if name.contains("q_proj") => Some(heads),
            name if name.contains("k_proj") => Some(kv_heads),
            _ => None,
        };
        let bytes = match heads {
            Some(heads) => permute(view.bytes(), view.shape[0], heads),
            None => view.bytes().to_vec(),
        };
        let name = gguf_names::LLAMA.from_hf(&view.name).unwrap();
        tensors.push((name, view.storage().unwrap(), view.shape.clone(), bytes));
    }
    write_gguf(to, &metadata, &tensors).unwrap();
}

#[test]
fn a_converted_model_gives_the_logits_of_transformers() {
    let scratch = tempfile::tempdir().unwrap();
    // with and without grouped queries, a tied head, biases, heads of their own size
    for name in ["plain", "gqa_tied", "mqa_theta", "head_dim_bias"] {
        let path = scratch.path().join(format!("{name}.gguf"));
        convert(&golden(format!("llama/{name}")), &path);
        let model = load(&path);
        let expected: Expected = golden_json(format!("llama/{name}/expected.json"));
        for (n, rows) in &expected.logits {
            let found = logits(model.as_ref(), &expected.ids[..*n]);
            for (at, expected) in [0, n / 2, n - 1].into_iter().zip(rows) {
                // f32 sums in another order, as in transformers_parity.rs
                assert_close(&found[at], expected, 1e-5, &format!("{name}, {n} tokens"));
            }
        }
    }
}
