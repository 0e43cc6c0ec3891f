//! How `tokenizer.ggml.pre` splits text before BPE.
//!
//! The expressions are those of the models' tokenizer.json, as llama.cpp's `llm_tokenizer_bpe` names and groups
//! them. Each expression of a list splits the pieces that the one before it left.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

/// A pre-tokenizer and what llama.cpp sets along with it.
pub(super) struct Pre {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// a piece that is a token as it stands is not merged up from its bytes
    pub(super) ignore_merges: bool,
    /// BOS is added if `add_bos_token` is not in the file
    pub(super) add_bos: bool,
}

/// The expression of the `tokenizers` library's own byte-level splitting.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A list of the known kinds; a name that is not in it is an error, never a guess.
const KNOWN: &[Pre] = &[
    Pre {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        patterns: &[r"\p{N}", GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        patterns: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    Pre {
        names: &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"],
        patterns: &[LLAMA3],
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan"],
        patterns: &[QWEN2],
        ignore_merges: false,
        add_bos: false,
    },
    Pre { names: &["qwen35"], patterns: &[QWEN35], ignore_merges: false, add_bos: false },
    Pre {
        names: &[
            "gpt-2",
            "gpt2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "mpt",
            "olmo",
            "jais",
            "exaone4",
            "trillion",
            "granite-docling",
        ],
        patterns: &[GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    Pre { names: &["tekken"], patterns: &[TEKKEN], ignore_merges: true, add_bos: true },
    Pre { names: &["gpt-4o", "llama4"], patterns: &[GPT4O], ignore_merges: false, add_bos: false },
    Pre {
        names: &["falcon"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
    },
    // llama.cpp's fallback for files that name no pre-tokenizer
    Pre {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
    },
];

pub(super) fn lookup(name: Option<&str>) -> Result<&'static Pre, String> {
    let name = name.unwrap_or("default");
    KNOWN.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
        let names: Vec<&str> = KNOWN.iter().flat_map(|pre| pre.names.iter().copied()).collect();
        format!("tokenizer.ggml.pre {name:?} is not known; known are {}", names.join(", "))
    })
}

/// The name of the splitting by these expressions, if it is a known one.
pub(super) fn recognise(patterns: &[&str], ignore_merges: bool) -> Option<&'static str> {
    let known = KNOWN.iter().find(|pre| pre.patterns == patterns && pre.ignore_merges == ignore_merges);
    known.map(|pre| pre.names[0])
}

/// One name of each kind.
pub(super) fn canonical_names() -> Vec<&'static str> {
    KNOWN.iter().map(|pre| pre.names[0]).collect()
}

impl Pre {
    pub(super) fn pre_tokenizer(&self) -> Result<Sequence, String> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for pattern in self.patterns {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            let split =
                Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(|e| e.to_string())?;
            steps.push(split.into());
        }
        // the bytes of each piece in the printable alphabet; the splitting is done
        steps.push(ByteLevel::new(false, false, false).into());
        Ok(Sequence::new(steps))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_compiles_and_no_name_stands_twice() {
        let mut names = std::collections::HashSet::new();
        for pre in KNOWN {
            pre.pre_tokenizer().unwrap();
            for name in pre.names {
                assert!(names.insert(name), "{name} twice");
            }
        }
        assert!(lookup(Some("smolm")).err().unwrap().contains("smollm"));
    }
}
