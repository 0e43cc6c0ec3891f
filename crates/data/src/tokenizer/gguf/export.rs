//! A tokenizer as GGUF metadata: the way back.
//!
//! Byte-level BPE is written under the name of its splitting (`tokenizer.ggml.pre`), which is recognised by its
//! expressions, never guessed. SentencePiece BPE needs scores, of which a tokenizer.json keeps the order alone: a
//! token that is merged earlier gets the higher one. Whatever is written is read back and must give the same ids on
//! texts that exercise the splitting: a tokenizer that GGUF cannot express is an error, not a model that reads
//! other words than it was trained on.

use super::super::TextTokenizer;
use super::{CONTROL, GgufTokenizer, UNKNOWN, USER_DEFINED, pre};
use crate::{Error, Result};
use engobe_formats::gguf::GgufValue;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};

const NORMAL: i32 = 1;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Texts on which both must agree: contractions, digits, spaces, line ends, scripts, emoji, code.
const PROBES: [&str; 16] = [
    "Hello world",
    " leading and  double   spaces ",
    "I'll we'RE THEY'VE don't 'Sup 's it's",
    "1 22 333 4444 55555 3.14159 1,000,000",
    "def f(x):\n    return x  # twice\n\t\tif a:\r\n\r\n",
    "\n\n\n \n\n\t\t \t end",
    "!!!??? ...--- ==> $x^2$ `code` ~|~ <b>\"q\"</b>",
    "CamelCaseWORDS andMore HTMLParser",
    "http://a.b/c?d=e&f#g/",
    "{\"key\": [1, 2, 3], \"other\": null}",
    "na\u{ef}ve caf\u{e9} d\u{e9}j\u{e0} vu, \u{c7}a va",
    "\u{440}\u{443}\u{441}\u{441}\u{43a}\u{438}\u{439} \u{395}\u{3bb}\u{3bb}\u{3b7}\u{3bd}\u{3b9}\u{3ba}\u{3ac}",
    "\u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c}\u{ff01} \u{65e5}\u{672c}\u{8a9e}",
    "\u{1f999} hi \u{1f999}\u{1f999} \u{1f469}\u{200d}\u{1f680}",
    "a\u{a0}b\u{3000}c\u{200b}d \u{bd} \u{b2}",
    "zqxjk vwvw qqq\u{11f}",
];

/// Added tokens that are tried out in a text; there can be thousands.
const PROBED_TOKENS: usize = 64;

pub(in super::super) fn to_gguf(tokenizer: &TextTokenizer, vocab_size: usize) -> Result<GgufTokenizer> {
    let error = |what: String| Error::tokenizer(&tokenizer.origin, what);
    let text = tokenizer.inner.to_string(false).map_err(|e| error(e.to_string()))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| error(e.to_string()))?;
    let parts = Parts::of(&json).map_err(error)?;
    let mut meta = match parts.kind {
        Family::ByteLevel => GgufTokenizer {
            model: "gpt2".to_string(),
            pre: Some(byte_level_pre(&json, parts.ignore_merges).map_err(error)?.to_string()),
            ..Default::default()
        },
        Family::SentencePiece { add_space, .. } => GgufTokenizer {
            model: "llama".to_string(),
            pre: Some("default".to_string()),
            add_space_prefix: Some(add_space),
            ..Default::default()
        },
    };
    (meta.bos, meta.eos, meta.unk, meta.pad) =
        (tokenizer.bos, tokenizer.eos, tokenizer.unk.or(parts.unk), tokenizer.pad);
    (meta.add_bos, meta.add_eos) = around(tokenizer).map_err(error)?;
    (meta.tokens, meta.token_types) = parts.tokens(meta.unk, vocab_size).map_err(error)?;
    match parts.kind {
        Family::ByteLevel => meta.merges = parts.merges.iter().map(|(l, r)| format!("{l} {r}")).collect(),
        Family::SentencePiece { .. } => meta.scores = Some(parts.scores(&meta.tokens, &meta.token_types)),
    }
    (meta.chat_template, meta.tool_template) =
        (tokenizer.chat_template.clone(), tokenizer.tool_template.clone());
    try_out(tokenizer, &meta, &parts)?;
    Ok(meta)
}

/// Whether BOS and EOS are added to a text.
fn around(tokenizer: &TextTokenizer) -> Result<(Option<bool>, Option<bool>), String> {
    let is = |ids: &[u32], special: Option<u32>, what: &str| match ids {
        [] => Ok(Some(false)),
        [one] if Some(*one) == special => Ok(Some(true)),
        _ => {
            Err(format!("puts tokens {ids:?} {what} a text; GGUF can only say whether BOS and EOS are added"))
        }
    };
    Ok((is(&tokenizer.prefix, tokenizer.bos, "before")?, is(&tokenizer.suffix, tokenizer.eos, "after")?))
}

/// An error unless the metadata gives the tokenizer's own ids.
fn try_out(tokenizer: &TextTokenizer, meta: &GgufTokenizer, parts: &Parts<'_>) -> Result<()> {
    let back = super::build(meta.clone(), &tokenizer.origin)?;
    let added: Vec<String> = match parts.kind {
        // llama.cpp puts a space before every stretch of text, these tokenizers before the first alone
        Family::SentencePiece { first_only: true, .. } => Vec::new(),
        _ => parts.added.values().take(PROBED_TOKENS).map(|a| format!("a{}b", a.content)).collect(),
    };
    for text in PROBES.into_iter().chain(added.iter().map(String::as_str)) {
        let (mine, written) = (tokenizer.encode(text, false)?, back.encode(text, false)?);
        if mine != written {
            let what = format!(
                "gives {mine:?} for {text:?}, but written as a GGUF tokenizer ({:?}, pre {:?}) it gives {written:?}: GGUF cannot express it",
                meta.model,
                meta.pre.as_deref().unwrap_or("default")
            );
            return Err(Error::tokenizer(&tokenizer.origin, what));
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Family {
    ByteLevel,
    SentencePiece { add_space: bool, first_only: bool },
}

/// A token that is matched as a whole.
struct Added<'a> {
    content: &'a str,
    special: bool,
    normalized: bool,
}

/// What tokenizer.json says.
struct Parts<'a> {
    kind: Family,
    vocab: BTreeMap<u32, &'a str>,
    added: BTreeMap<u32, Added<'a>>,
    merges: Vec<(&'a str, &'a str)>,
    unk: Option<u32>,
    ignore_merges: bool,
}

impl<'a> Parts<'a> {
    fn of(json: &'a Value) -> Result<Self, String> {
        let model = &json["model"];
        let kind = model["type"].as_str().unwrap_or("BPE");
        if kind != "BPE" {
            return Err(format!(
                "is of type {kind}; GGUF files are written with byte-level BPE and SentencePiece BPE alone"
            ));
        }
        for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if model[key].as_str().is_some_and(|s| !s.is_empty()) {
                return Err(format!("has {key} {}; GGUF has no such thing", model[key]));
            }
        }
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let vocab = model["vocab"].as_object().ok_or("has no vocabulary")?;
        let vocab: BTreeMap<u32, &str> =
            vocab.iter().filter_map(|(token, v)| Some((id(v)?, token.as_str()))).collect();
        let added = json["added_tokens"].as_array().into_iter().flatten().filter_map(|a| {
            let flag = |key: &str| a[key].as_bool().unwrap_or(false);
            let content = a["content"].as_str()?;
            Some((id(&a["id"])?, Added { content, special: flag("special"), normalized: flag("normalized") }))
        });
        let merges = model["merges"].as_array().into_iter().flatten().map(|m| match m {
            Value::String(pair) => pair.split_once(' '),
            pair => Some((pair[0].as_str()?, pair[1].as_str()?)),
        });
        let unk = model["unk_token"].as_str();
        Ok(Self {
            kind: family(json)?,
            unk: unk.and_then(|unk| vocab.iter().find(|(_, token)| **token == unk)).map(|(id, _)| *id),
            vocab,
            added: added.collect(),
            merges: merges.collect::<Option<_>>().ok_or("has merges that are no pairs")?,
            ignore_merges: model["ignore_merges"].as_bool().unwrap_or(false),
        })
    }

    /// Tokens and their types; ids that nothing has are filled up.
    fn tokens(&self, unk: Option<u32>, vocab_size: usize) -> Result<(Vec<String>, Vec<i32>), String> {
        let last = self.vocab.keys().chain(self.added.keys()).max().map_or(0, |id| *id as usize);
        if last >= vocab_size {
            return Err(format!(
                "has a token of id {last}, but the model's embedding only {vocab_size} rows"
            ));
        }
        let sentence_piece = matches!(self.kind, Family::SentencePiece { .. });
        let token = |id: u32| -> (String, i32) {
            if let Some(added) = self.added.get(&id) {
                let kind = match added.special {
                    _ if Some(id) == unk && sentence_piece => UNKNOWN,
                    true => CONTROL,
                    false => USER_DEFINED,
                };
                // a normalized token is looked for where spaces are U+2581 already
                let spaced = sentence_piece && added.normalized && kind == USER_DEFINED;
                let text = added.content.to_string();
                return (if spaced { text.replace('\u{2581}', " ") } else { text }, kind);
            }
            match self.vocab.get(&id) {
                None => (format!("[PAD{id}]"), UNUSED),
                Some(token) if Some(id) == unk && sentence_piece => ((*token).to_string(), UNKNOWN),
                Some(token) if sentence_piece && is_byte(token) => ((*token).to_string(), BYTE),
                Some(token) => ((*token).to_string(), NORMAL),
            }
        };
        Ok((0..vocab_size as u32).map(token).unzip())
    }

    /// Scores that put merges into their order: the earlier a token is merged, the higher it is.
    fn scores(&self, tokens: &[String], types: &[i32]) -> Vec<f32> {
        let mut ranks: HashMap<String, usize> = HashMap::new();
        for (left, right) in &self.merges {
            let next = ranks.len();
            ranks.entry(format!("{left}{right}")).or_insert(next);
        }
        let score = |(token, kind): (&String, &i32)| match *kind {
            NORMAL => -(*ranks.get(token).unwrap_or(&ranks.len()) as f32),
            _ => 0.0,
        };
        tokens.iter().zip(types).map(score).collect()
    }
}

fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The steps of a normalizer or pre-tokenizer that may be a sequence.
fn steps<'a>(value: &'a Value, list: &str) -> Vec<&'a Value> {
    match value {
        Value::Null => Vec::new(),
        v if v["type"] == "Sequence" => v[list].as_array().map_or(Vec::new(), |a| a.iter().collect()),
        v => vec![v],
    }
}

/// Which of GGUF's two families a tokenizer belongs to.
fn family(json: &Value) -> Result<Family, String> {
    let normalizers = steps(&json["normalizer"], "normalizers");
    let splits = steps(&json["pre_tokenizer"], "pretokenizers");
    if splits.iter().any(|s| s["type"] == "ByteLevel") {
        // llama.cpp does not compose characters either; most text is composed already
        return match normalizers.iter().find(|n| n["type"] != "NFC") {
            None => Ok(Family::ByteLevel),
            Some(other) => {
                Err(format!("has the normalizer {}; GGUF has none for byte-level BPE", other["type"]))
            }
        };
    }
    let (mut add_space, mut replaces) = (false, false);
    let mut first_only = false;
    for n in normalizers {
        match n["type"].as_str() {
            Some("Prepend") if n["prepend"] == "\u{2581}" => add_space = true,
            Some("Replace") if n["pattern"]["String"] == " " && n["content"] == "\u{2581}" => replaces = true,
            _ => return Err(format!("has the normalizer {n}; GGUF can only put U+2581 for spaces")),
        }
    }
    for s in splits {
        match s["type"].as_str() {
            Some("Metaspace") if s["replacement"] == "\u{2581}" && s["split"] != true => {
                replaces = true;
                let scheme = s["prepend_scheme"].as_str().unwrap_or("always");
                add_space = scheme != "never";
                first_only = scheme == "first";
            }
            _ => return Err(format!("splits text by {s}; {}", known())),
        }
    }
    match replaces && json["model"]["byte_fallback"] == true {
        true => Ok(Family::SentencePiece { add_space, first_only }),
        false => {
            Err(format!("is neither byte-level BPE nor SentencePiece BPE with byte fallback; {}", known()))
        }
    }
}

fn known() -> String {
    format!("known are SentencePiece BPE and the splittings {}", pre::canonical_names().join(", "))
}

/// The name of a byte-level tokenizer's splitting.
fn byte_level_pre(json: &Value, ignore_merges: bool) -> Result<&'static str, String> {
    let mut patterns: Vec<&str> = Vec::new();
    for s in steps(&json["pre_tokenizer"], "pretokenizers") {
        let unknown = || format!("splits text by {s}; {}", known());
        match s["type"].as_str() {
            Some("ByteLevel") if s["add_prefix_space"] == true => {
                return Err(
                    "adds a space before a text (add_prefix_space), which llama.cpp does not".to_string()
                );
            }
            Some("ByteLevel") if s["use_regex"] != false => patterns.push(pre::GPT2),
            Some("ByteLevel") => {}
            Some("Digits") if s["individual_digits"] == true => patterns.push(r"\p{N}"),
            Some("Digits") => patterns.push(r"\p{N}+"),
            Some("Split") => {
                // for an expression that leaves nothing out, both ways cut alike
                let cuts = match (s["behavior"].as_str(), s["invert"] == true) {
                    (Some("Isolated"), false) | (Some("Removed"), true) => s["pattern"]["Regex"].as_str(),
                    _ => None,
                };
                patterns.push(cuts.ok_or_else(unknown)?);
            }
            _ => return Err(unknown()),
        }
    }
    pre::recognise(&patterns, ignore_merges).ok_or_else(|| {
        let merges = if ignore_merges { " with ignore_merges" } else { "" };
        format!("splits text by {patterns:?}{merges}; {}", known())
    })
}

impl GgufTokenizer {
    /// The keys of a GGUF file that say all this.
    pub fn entries(&self) -> Vec<(String, GgufValue)> {
        let text = |v: &str| GgufValue::String(v.to_string());
        let strings = |v: &[String]| GgufValue::Array(v.iter().map(|s| text(s)).collect());
        let mut entries = vec![("model", text(&self.model))];
        entries.extend(self.pre.as_deref().map(|pre| ("pre", text(pre))));
        entries.push(("tokens", strings(&self.tokens)));
        if let Some(scores) = &self.scores {
            let scores = scores.iter().map(|s| GgufValue::Float(f64::from(*s)));
            entries.push(("scores", GgufValue::Array(scores.collect())));
        }
        let types = self.token_types.iter().map(|t| GgufValue::Signed(i64::from(*t)));
        entries.push(("token_type", GgufValue::Array(types.collect())));
        if !self.merges.is_empty() {
            entries.push(("merges", strings(&self.merges)));
        }
        for (key, id) in [
            ("bos_token_id", self.bos),
            ("eos_token_id", self.eos),
            ("eot_token_id", self.eot),
            ("unknown_token_id", self.unk),
            ("padding_token_id", self.pad),
        ] {
            entries.extend(id.map(|id| (key, GgufValue::Unsigned(u64::from(id)))));
        }
        for (key, flag) in [
            ("add_bos_token", self.add_bos),
            ("add_eos_token", self.add_eos),
            ("add_space_prefix", self.add_space_prefix),
        ] {
            entries.extend(flag.map(|flag| (key, GgufValue::Bool(flag))));
        }
        let mut named: Vec<(String, GgufValue)> =
            entries.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
        if let Some(template) = &self.chat_template {
            named.push(("tokenizer.chat_template".to_string(), text(template)));
        }
        if let Some(template) = &self.tool_template {
            named.push(("tokenizer.chat_templates".to_string(), GgufValue::Array(vec![text("tool_use")])));
            named.push(("tokenizer.chat_template.tool_use".to_string(), text(template)));
        }
        named
    }
}
