//! What lies beside a model's weights: its tokenizer and its configuration.

use anyhow::{Context, Result};
use engobe_data::TextTokenizer;
use engobe_formats::atomic::write_atomic;
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Files that travel with a model.
const FILES: [&str; 13] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "merges.txt",
    "chat_template.jinja",
];

/// Writes what belongs to `model`, a directory or GGUF file with the tokenizer `tokenizer`, into the directory `out`,
/// except for `config.json`: that is given back, to be written last, for without it nothing takes a directory for a
/// model.
pub fn write(model: &Path, tokenizer: Option<&TextTokenizer>, out: &Path) -> Result<Value> {
    if model.is_dir() {
        for name in FILES {
            let from = model.join(name);
            if from.exists() {
                let bytes = fs::read(&from).with_context(|| from.display().to_string())?;
                write_atomic(&out.join(name), &bytes)?;
            }
        }
        return Ok(Value::Object(HfConfig::open(model)?.raw().clone()));
    }
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(out)?;
        write_json(&out.join("generation_config.json"), &json!({ "eos_token_id": tokenizer.end_ids() }))?;
    }
    Ok(engobe_models::hf_config_of(&Gguf::open(model)?)?)
}

/// Writes a configuration.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    Ok(write_atomic(path, &serde_json::to_vec_pretty(value)?)?)
}
