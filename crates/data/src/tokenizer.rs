//! Text to token ids and back.
//!
//! [`TextTokenizer`] wraps the `tokenizers` crate, so a `tokenizer.json` gives the ids that transformers gives;
//! [`gguf`] builds the same thing from GGUF metadata. The post-processor of a tokenizer is reduced to what it
//! is used for in causal models, ids put before and after the text: byte-level post-processors also trim
//! whitespace from token offsets, which would make a loss mask by character spans lose tokens.

pub mod gguf;
mod hf;
mod pair;
mod save;
mod stream;

pub use pair::Encoded;
pub use stream::DecodeStream;

use crate::{Error, Result};
use std::ops::Range;
use tokenizers::Tokenizer;

/// A tokenizer with its special tokens and chat template.
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    inner: Tokenizer,
    origin: String,
    /// ids put before a text when special tokens are asked for (BOS, as the model says)
    prefix: Vec<u32>,
    /// ids put after it
    suffix: Vec<u32>,
    /// ids put around a pair of texts, where the model says
    pair: Option<pair::PairLayout>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    unk: Option<u32>,
    /// ids at which generation ends, EOS first
    end_ids: Vec<u32>,
    vocab_size: usize,
    chat_template: Option<String>,
    tool_template: Option<String>,
    byte_level: bool,
}

/// Special tokens of a tokenizer, by id.
#[derive(Clone, Debug, Default)]
struct Specials {
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    unk: Option<u32>,
    end_ids: Vec<u32>,
}

/// Names under which chat models end a turn; generation stops at those that the vocabulary has as special tokens.
const TURN_ENDS: [&str; 8] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
];

impl TextTokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` / `chat_template.json`,
    /// `special_tokens_map.json` and the end tokens of `generation_config.json` from a Hugging Face directory.
    pub fn from_hf_dir(dir: &std::path::Path) -> Result<Self> {
        hf::load(dir)
    }

    /// The tokenizer and chat template of a GGUF file.
    pub fn from_gguf_file(file: &engobe_formats::gguf::Gguf) -> Result<Self> {
        gguf::build(gguf::GgufTokenizer::read(file)?, &file.path().display().to_string())
    }

    /// Builds a tokenizer from GGUF metadata.
    pub fn from_gguf(metadata: gguf::GgufTokenizer, origin: &str) -> Result<Self> {
        gguf::build(metadata, origin)
    }

    /// `inner` must be without post-processor, truncation and padding.
    fn assemble(
        inner: Tokenizer,
        origin: String,
        prefix: Vec<u32>,
        suffix: Vec<u32>,
        specials: Specials,
    ) -> Self {
        let vocab = inner.get_vocab(true);
        let vocab_size = vocab.values().map(|&id| id as usize + 1).max().unwrap_or(0);
        // byte-level alphabets write a space as U+0120; SentencePiece as U+2581
        let byte_level = vocab.contains_key("\u{120}") && !vocab.contains_key("<0x20>");
        let added = inner.get_added_tokens_decoder();
        let mut end_ids: Vec<u32> = specials.eos.into_iter().chain(specials.end_ids).collect();
        for name in TURN_ENDS {
            if let Some(&id) = vocab.get(name)
                && added.get(&id).is_some_and(|token| token.special)
            {
                end_ids.push(id);
            }
        }
        let mut seen = std::collections::HashSet::new();
        end_ids.retain(|id| seen.insert(*id));
        Self {
            inner,
            origin,
            prefix,
            suffix,
            pair: None,
            bos: specials.bos,
            eos: specials.eos,
            pad: specials.pad,
            unk: specials.unk,
            end_ids,
            vocab_size,
            chat_template: None,
            tool_template: None,
            byte_level,
        }
    }

    /// Ids of `text`. With `add_special`, BOS and EOS where the model adds them; a BOS that the text already
    /// starts with is not doubled.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| Error::tokenizer(&self.origin, e))?;
        let ids = encoding.get_ids();
        if !add_special {
            return Ok(ids.to_vec());
        }
        let mut out = Vec::with_capacity(ids.len() + self.prefix.len() + self.suffix.len());
        if self.prefix.is_empty() || !ids.starts_with(&self.prefix) {
            out.extend(&self.prefix);
        }
        out.extend(ids);
        if self.suffix.is_empty() || !ids.ends_with(&self.suffix) {
            out.extend(&self.suffix);
        }
        Ok(out)
    }

    /// Ids of a text that goes on: BOS where the model adds it, no EOS.
    pub fn encode_start(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode(text, false)?;
        if ids.starts_with(&self.prefix) {
            return Ok(ids);
        }
        Ok(self.prefix.iter().copied().chain(ids).collect())
    }

    /// Ids of `text` without added ones, and the bytes of `text` that each covers. Tokens that share a
    /// character (bytes of one emoji) each cover the whole character.
    pub fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding = self.inner.encode(text, false).map_err(|e| Error::tokenizer(&self.origin, e))?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), offsets))
    }

    /// Text of `ids`; ids beyond the vocabulary are left out, broken UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| Error::tokenizer(&self.origin, e))
    }

    /// A decoder for ids that arrive one by one.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The vocabulary's spelling of `id`.
    pub fn token_str(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The bytes that `id` stands for in a text.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        if self.is_added(id) {
            return Some(token.into_bytes());
        }
        if self.byte_level {
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            return Some(bytes.unwrap_or_else(|| token.into_bytes()));
        }
        if let Some(hex) = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'))
            && let Ok(byte) = u8::from_str_radix(hex, 16)
        {
            return Some(vec![byte]);
        }
        Some(token.replace('\u{2581}', " ").into_bytes())
    }

    /// Id of a token by its spelling.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// True for tokens matched as a whole in the text, before the model's own splitting.
    pub fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// True for control tokens (`skip_special` leaves them out of texts).
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
    }

    /// Beginning of sequence.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Padding.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Ids at which generation ends: EOS, those of `generation_config.json` or GGUF, and the known end-of-turn tokens.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// Ids that the model puts before a text.
    pub(crate) fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Number of ids that the model puts around a text.
    pub fn special_around(&self) -> usize {
        self.prefix.len() + self.suffix.len()
    }

    /// True if the model puts BOS before a text.
    pub fn adds_bos(&self) -> bool {
        self.bos.is_some_and(|bos| self.prefix.first() == Some(&bos))
    }

    /// One more than the largest id. The model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// File it was read from.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and, if there is a template, `chat_template.jinja` into
    /// `dir`, as transformers reads them.
    pub fn save(&self, dir: &std::path::Path) -> Result<()> {
        save::write(self, dir)
    }

    /// The metadata of a GGUF file that gives the same ids, for a model whose embedding has `vocab_size` rows.
    ///
    /// # Errors
    /// A tokenizer that GGUF (and so llama.cpp) cannot express; what it can is listed.
    pub fn to_gguf(&self, vocab_size: usize) -> Result<gguf::GgufTokenizer> {
        gguf::to_gguf(self, vocab_size)
    }

    /// Source of the model's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Takes another chat template, as `--chat-template FILE` asks for.
    pub fn set_chat_template(&mut self, source: String) {
        self.chat_template = Some(source);
        self.tool_template = None;
    }

    /// The chat template compiled, with the special tokens that templates name (`bos_token`, ...).
    pub fn compile_chat_template(&self) -> Result<Option<crate::ChatTemplate>> {
        let Some(source) = &self.chat_template else { return Ok(None) };
        let token = |id: Option<u32>| id.and_then(|id| self.token_str(id));
        let mut template =
            crate::ChatTemplate::new(source, token(self.bos).as_deref(), token(self.eos).as_deref())?;
        for (name, id) in [("pad_token", self.pad), ("unk_token", self.unk)] {
            if let Some(token) = token(id) {
                template.set_variable(name, token);
            }
        }
        if let Some(tools) = &self.tool_template {
            template.set_tool_template(tools)?;
        }
        Ok(Some(template))
    }
}

/// The byte that a character of GPT-2's byte-level alphabet stands for (`bytes_to_unicode` of the GPT-2 code).
fn byte_of(c: char) -> Option<u8> {
    let c = u32::from(c);
    match c {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(c).ok(),
        // the other 68 bytes, in order, stand at 256 and after
        0x100..=0x143 => {
            let nth = (c - 0x100) as u8;
            Some(match nth {
                0..=0x20 => nth,
                0x21..=0x42 => nth - 0x21 + 0x7f,
                _ => 0xad,
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_alphabet_covers_every_byte_once() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('\u{120}'), Some(b' '));
        assert_eq!(byte_of('\u{10a}'), Some(b'\n'));
        assert_eq!(byte_of('\u{2581}'), None);
    }
}
