//! Tokenizers of GGUF files, from `tokenizer.ggml.*`.
//!
//! Two families: byte-level BPE (`gpt2`), whose splitting before BPE depends on `tokenizer.ggml.pre`, and
//! SentencePiece BPE (`llama`), whose merges are implied by the scores. The ids are those of llama.cpp
//! (`src/llama-vocab.cpp`), which are those of the Hugging Face tokenizer that the file was made from.

mod export;
mod pre;
mod spm;

pub(super) use export::to_gguf;

use super::{Specials, TextTokenizer};
use crate::{Error, Result};
use engobe_formats::gguf::Gguf;
use std::collections::HashMap;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, Tokenizer};

/// The `tokenizer.ggml.*` keys of a GGUF file, and `tokenizer.chat_template`.
#[derive(Clone, Debug, Default)]
pub struct GgufTokenizer {
    /// `model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE)
    pub model: String,
    /// `pre`: how text is split before BPE
    pub pre: Option<String>,
    /// `tokens`
    pub tokens: Vec<String>,
    /// `token_type`: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte; empty means all normal
    pub token_types: Vec<i32>,
    /// `scores`; SentencePiece merges the pair of the highest first
    pub scores: Option<Vec<f32>>,
    /// `merges`: `left right`, the first is done first
    pub merges: Vec<String>,
    /// `bos_token_id`
    pub bos: Option<u32>,
    /// `eos_token_id`
    pub eos: Option<u32>,
    /// `eot_token_id`, end of a chat turn
    pub eot: Option<u32>,
    /// `unknown_token_id`
    pub unk: Option<u32>,
    /// `padding_token_id`
    pub pad: Option<u32>,
    /// `add_bos_token`; without it, as llama.cpp does for the model and `pre`
    pub add_bos: Option<bool>,
    /// `add_eos_token`
    pub add_eos: Option<bool>,
    /// `add_space_prefix`; SentencePiece alone uses it, default true
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.tool_use`, for dialogues with tools
    pub tool_template: Option<String>,
}

impl GgufTokenizer {
    /// Reads the keys of an open GGUF file. Those that are missing stay empty; a wrong type is an error.
    pub fn read(file: &Gguf) -> Result<Self> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        Ok(Self {
            model: file.str(&key("model"))?.to_owned(),
            pre: file.opt_str(&key("pre"))?.map(str::to_owned),
            tokens: file.opt_str_array(&key("tokens"))?.unwrap_or_default(),
            token_types: file.opt_i32_array(&key("token_type"))?.unwrap_or_default(),
            scores: file.opt_f32_array(&key("scores"))?,
            merges: file.opt_str_array(&key("merges"))?.unwrap_or_default(),
            bos: file.opt_u32(&key("bos_token_id"))?,
            eos: file.opt_u32(&key("eos_token_id"))?,
            eot: file.opt_u32(&key("eot_token_id"))?,
            unk: file.opt_u32(&key("unknown_token_id"))?,
            pad: file.opt_u32(&key("padding_token_id"))?,
            add_bos: file.opt_bool(&key("add_bos_token"))?,
            add_eos: file.opt_bool(&key("add_eos_token"))?,
            add_space_prefix: file.opt_bool(&key("add_space_prefix"))?,
            chat_template: file.opt_str("tokenizer.chat_template")?.map(str::to_owned),
            tool_template: file.opt_str("tokenizer.chat_template.tool_use")?.map(str::to_owned),
        })
    }
}

const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

pub(super) fn build(meta: GgufTokenizer, origin: &str) -> Result<TextTokenizer> {
    let error = |what: String| Error::tokenizer(origin, what);
    check(&meta).map_err(error)?;
    let vocab = vocabulary(&meta).map_err(error)?;
    let (mut inner, add_bos) = match meta.model.as_str() {
        "gpt2" => byte_level(&meta, vocab).map_err(error)?,
        "llama" => (spm::tokenizer(&meta, vocab).map_err(error)?, true),
        other => {
            return Err(error(format!(
                "tokenizer.ggml.model {other:?} is not supported; supported are \"gpt2\" and \"llama\""
            )));
        }
    };
    add_tokens(&mut inner, &meta);
    let specials = Specials {
        bos: meta.bos,
        eos: meta.eos,
        pad: meta.pad,
        unk: meta.unk,
        end_ids: meta.eot.into_iter().collect(),
    };
    let prefix = meta.bos.filter(|_| meta.add_bos.unwrap_or(add_bos)).into_iter().collect();
    let suffix = meta.eos.filter(|_| meta.add_eos.unwrap_or(false)).into_iter().collect();
    let mut tokenizer = TextTokenizer::assemble(inner, origin.to_owned(), prefix, suffix, specials);
    tokenizer.chat_template = meta.chat_template;
    tokenizer.tool_template = meta.tool_template;
    Ok(tokenizer)
}

/// Lengths and ids that later code relies on.
fn check(meta: &GgufTokenizer) -> Result<(), String> {
    let n = meta.tokens.len();
    if n == 0 {
        return Err("tokenizer.ggml.tokens is empty or missing".into());
    }
    if u32::try_from(n).is_err() {
        return Err(format!("tokenizer.ggml.tokens has {n} entries; ids are 32-bit"));
    }
    if !meta.token_types.is_empty() && meta.token_types.len() != n {
        let types = meta.token_types.len();
        return Err(format!("tokenizer.ggml.token_type has {types} entries for {n} tokens"));
    }
    if let Some(scores) = &meta.scores
        && scores.len() != n
    {
        return Err(format!("tokenizer.ggml.scores has {} entries for {n} tokens", scores.len()));
    }
    for (key, id) in [
        ("bos_token_id", meta.bos),
        ("eos_token_id", meta.eos),
        ("eot_token_id", meta.eot),
        ("unknown_token_id", meta.unk),
        ("padding_token_id", meta.pad),
    ] {
        if let Some(id) = id.filter(|&id| id as usize >= n) {
            return Err(format!("tokenizer.ggml.{key} is {id}, beyond the {n} tokens"));
        }
    }
    Ok(())
}

type Vocabulary = HashMap<String, u32>;

fn vocabulary(meta: &GgufTokenizer) -> Result<Vocabulary, String> {
    let mut vocab = HashMap::with_capacity(meta.tokens.len());
    for (id, token) in meta.tokens.iter().enumerate() {
        // llama.cpp's name for tokens without text
        let token = if token.is_empty() { format!("[EMPTY_{id}]") } else { token.clone() };
        if let Some(first) = vocab.insert(token, id as u32) {
            return Err(format!("token {:?} stands at id {first} and at id {id}", meta.tokens[id]));
        }
    }
    Ok(vocab)
}

fn byte_level(meta: &GgufTokenizer, vocab: Vocabulary) -> Result<(Tokenizer, bool), String> {
    let pre = pre::lookup(meta.pre.as_deref())?;
    let mut merges = Vec::with_capacity(meta.merges.len());
    for (i, merge) in meta.merges.iter().enumerate() {
        // a token never holds a space here, but may be one in old files: split at the first after a character
        let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let (left, right) = at.map(|at| (&merge[..at], &merge[at + 1..])).unwrap_or((merge, ""));
        let joined = format!("{left}{right}");
        if right.is_empty() || [left, right, &joined].iter().any(|t| !vocab.contains_key(*t)) {
            return Err(format!(
                "tokenizer.ggml.merges[{i}] is {merge:?}; both halves and their sum must be tokens"
            ));
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    let model = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|e| e.to_string())?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(pre.pre_tokenizer()?));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok((tokenizer, pre.add_bos))
}

/// Control, unknown and user-defined tokens are found in the text before it is split.
fn add_tokens(tokenizer: &mut Tokenizer, meta: &GgufTokenizer) {
    for (kinds, special) in [(&[CONTROL, UNKNOWN][..], true), (&[USER_DEFINED][..], false)] {
        let tokens: Vec<AddedToken> = meta
            .tokens
            .iter()
            .zip(&meta.token_types)
            .filter(|(token, kind)| kinds.contains(kind) && !token.is_empty())
            .map(|(token, _)| AddedToken::from(token.clone(), special).normalized(false))
            .collect();
        if special {
            tokenizer.add_special_tokens(&tokens);
        } else {
            tokenizer.add_tokens(&tokens);
        }
    }
}
