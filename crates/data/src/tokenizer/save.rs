//! Tokenizers written for transformers.

use super::TextTokenizer;
use crate::{Error, Result};
use engobe_formats::atomic::write_atomic;
use serde_json::json;
use std::path::Path;
use tokenizers::processors::template::TemplateProcessing;

pub(super) fn write(tokenizer: &TextTokenizer, dir: &Path) -> Result<()> {
    let error = |what: String| Error::tokenizer(&tokenizer.origin, what);
    let mut inner = tokenizer.inner.clone();
    if let Some(processor) = around(tokenizer).map_err(error)? {
        inner.with_post_processor(Some(processor));
    }
    let text = inner.to_string(false).map_err(|e| error(e.to_string()))?;
    write_atomic(&dir.join("tokenizer.json"), text.as_bytes())?;
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
    });
    for (key, id) in [
        ("bos_token", tokenizer.bos),
        ("eos_token", tokenizer.eos),
        ("pad_token", tokenizer.pad),
        ("unk_token", tokenizer.unk),
    ] {
        if let Some(token) = id.and_then(|id| tokenizer.token_str(id)) {
            config[key] = json!(token);
        }
    }
    let text = serde_json::to_vec_pretty(&config).map_err(|e| error(e.to_string()))?;
    write_atomic(&dir.join("tokenizer_config.json"), &text)?;
    if let Some(template) = &tokenizer.chat_template {
        write_atomic(&dir.join("chat_template.jinja"), template.as_bytes())?;
    }
    Ok(())
}

/// The post-processor that puts the model's own tokens before and after a text.
fn around(tokenizer: &TextTokenizer) -> Result<Option<TemplateProcessing>, String> {
    if tokenizer.prefix.is_empty() && tokenizer.suffix.is_empty() {
        return Ok(None);
    }
    let name = |id: &u32| tokenizer.inner.id_to_token(*id).ok_or_else(|| format!("no token {id}"));
    let before = tokenizer.prefix.iter().map(name).collect::<Result<Vec<_>, _>>()?;
    let after = tokenizer.suffix.iter().map(name).collect::<Result<Vec<_>, _>>()?;
    let pieces: Vec<String> =
        before.iter().cloned().chain(["$A".to_string()]).chain(after.iter().cloned()).collect();
    let ids = before.into_iter().zip(&tokenizer.prefix).chain(after.into_iter().zip(&tokenizer.suffix));
    let special: Vec<(String, u32)> = ids.map(|(token, id)| (token, *id)).collect();
    TemplateProcessing::builder()
        .try_single(pieces)
        .map_err(|e| e.to_string())?
        .special_tokens(special)
        .build()
        .map(Some)
        .map_err(|e| e.to_string())
}
