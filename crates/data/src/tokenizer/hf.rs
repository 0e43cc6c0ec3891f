//! Tokenizers of Hugging Face directories.

use super::pair::PairLayout;
use super::{Specials, TextTokenizer};
use crate::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

pub(super) fn load(dir: &Path) -> Result<TextTokenizer> {
    let path = dir.join("tokenizer.json");
    let origin = path.display().to_string();
    let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    let mut inner = Tokenizer::from_bytes(&bytes).map_err(|e| {
        Error::tokenizer(&origin, format!("is not a tokenizer of the tokenizers library: {e}"))
    })?;
    // a saved tokenizer may cut or pad; here the row is the user's, and batches are packed
    inner.with_truncation(None).map_err(|e| Error::tokenizer(&origin, e))?;
    inner.with_padding(None);

    let config = json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
    let map = json(&dir.join("special_tokens_map.json"))?.unwrap_or(Value::Null);
    let named = |key: &str| named_token(&config, key).or_else(|| named_token(&map, key));
    let mut specials = Specials::default();
    for (key, slot) in [
        ("bos_token", &mut specials.bos),
        ("eos_token", &mut specials.eos),
        ("pad_token", &mut specials.pad),
        ("unk_token", &mut specials.unk),
    ] {
        let Some(token) = named(key) else { continue };
        match inner.token_to_id(&token) {
            Some(id) => {
                // transformers makes every named token a special one
                inner.add_special_tokens(&[AddedToken::from(token, true)]);
                *slot = Some(id);
            }
            None if key == "eos_token" || key == "bos_token" => {
                let what = format!(
                    "{key} {token:?} of tokenizer_config.json is not in the vocabulary; name a token that is"
                );
                return Err(Error::tokenizer(origin, what));
            }
            // padding and unknown tokens are never needed here
            None => {}
        }
    }
    specials.end_ids = generation_ends(dir)?;

    let (prefix, suffix) = added_around(&inner).map_err(|e| Error::tokenizer(&origin, e))?;
    let pair = PairLayout::of(&inner).map_err(|e| Error::tokenizer(&origin, e))?;
    inner.with_post_processor(None::<PostProcessorWrapper>);
    let mut tokenizer = TextTokenizer::assemble(inner, origin, prefix, suffix, specials);
    tokenizer.pair = pair;
    (tokenizer.chat_template, tokenizer.tool_template) = templates(dir, &config)?;
    Ok(tokenizer)
}

/// The ids that the post-processor puts before and after a text.
fn added_around(inner: &Tokenizer) -> tokenizers::Result<(Vec<u32>, Vec<u32>)> {
    if inner.get_post_processor().is_none() {
        return Ok((Vec::new(), Vec::new()));
    }
    let plain = inner.encode("a", false)?;
    let full = inner.encode("a", true)?;
    let (plain, full) = (plain.get_ids(), full.get_ids());
    let at = (0..=full.len().saturating_sub(plain.len())).find(|&at| full[at..].starts_with(plain));
    Ok(match at {
        Some(at) => (full[..at].to_vec(), full[at + plain.len()..].to_vec()),
        None => (Vec::new(), Vec::new()),
    })
}

/// A token name in the two spellings of tokenizer_config.json: a string, or an object with `content`.
fn named_token(config: &Value, key: &str) -> Option<String> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// `eos_token_id` of generation_config.json: a number or a list.
fn generation_ends(dir: &Path) -> Result<Vec<u32>> {
    let Some(config) = json(&dir.join("generation_config.json"))? else { return Ok(Vec::new()) };
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    Ok(match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    })
}

/// The default template and the one for tools. A file beside the tokenizer goes before the configuration, as in
/// transformers.
fn templates(dir: &Path, config: &Value) -> Result<(Option<String>, Option<String>)> {
    let jinja = dir.join("chat_template.jinja");
    match std::fs::read_to_string(&jinja) {
        Ok(source) => return Ok((Some(source), None)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(Error::Io { path: jinja, source }),
    }
    let file = json(&dir.join("chat_template.json"))?;
    let value = file.as_ref().and_then(|f| f.get("chat_template")).or_else(|| config.get("chat_template"));
    Ok(match value {
        Some(Value::String(source)) => (Some(source.clone()), None),
        Some(Value::Array(named)) => {
            let find = |name: &str| {
                let entry = named.iter().find(|e| e.get("name").and_then(Value::as_str) == Some(name))?;
                entry.get("template")?.as_str().map(str::to_owned)
            };
            (find("default"), find("tool_use"))
        }
        Some(Value::Object(named)) => {
            let find = |name: &str| named.get(name)?.as_str().map(str::to_owned);
            (find("default"), find("tool_use"))
        }
        _ => (None, None),
    })
}

/// A JSON file, or nothing where there is none.
fn json(path: &Path) -> Result<Option<Value>> {
    let path: PathBuf = path.into();
    match std::fs::read(&path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some(value)),
            Err(e) => Err(Error::File { path, what: format!("invalid JSON: {e}") }),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io { path, source }),
    }
}
