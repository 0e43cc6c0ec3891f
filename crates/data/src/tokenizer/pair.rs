//! Texts, pairs of texts and lists of words as encoders read them: with the special tokens around them, cut to a length.

use super::TextTokenizer;
use crate::{Error, Result};
use tokenizers::Tokenizer;

/// The ids that stand around a pair of texts.
#[derive(Clone, Debug, Default)]
pub(super) struct PairLayout {
    before: Vec<u32>,
    between: Vec<u32>,
    after: Vec<u32>,
    /// what the second text counts as (BERT's `token_type_ids`)
    second_type: u32,
}

/// Ids with special tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// the ids
    pub ids: Vec<u32>,
    /// tokens cut off
    pub truncated: usize,
    /// the first token that is of the second type, in pairs of tokenizers that tell them apart
    pub second_type_from: Option<usize>,
    /// [`TextTokenizer::encode_words`]: the first token of each word, `None` where it was cut or has none
    pub first_tokens: Vec<Option<usize>>,
}

impl PairLayout {
    /// What the post-processor of `inner` puts around a pair; `None` if it has no post-processor.
    pub(super) fn of(inner: &Tokenizer) -> tokenizers::Result<Option<Self>> {
        if inner.get_post_processor().is_none() {
            return Ok(None);
        }
        let plain = inner.encode("a", false)?;
        let full = inner.encode(("a", "a"), true)?;
        let (plain, ids) = (plain.get_ids(), full.get_ids());
        let n = plain.len();
        let mut found = (0..=ids.len().saturating_sub(n)).filter(|at| ids[*at..].starts_with(plain));
        let (Some(first), Some(second)) = (found.next(), found.next_back()) else { return Ok(None) };
        if n == 0 || second < first + n {
            return Ok(None);
        }
        Ok(Some(Self {
            before: ids[..first].to_vec(),
            between: ids[first + n..second].to_vec(),
            after: ids[second + n..].to_vec(),
            second_type: full.get_type_ids().get(second).copied().unwrap_or(0),
        }))
    }
}

impl TextTokenizer {
    /// A text, or two, with the special tokens that the model puts around them, in at most `max` tokens: what is too
    /// much is cut from the end of the longer text, as transformers' `longest_first` does.
    pub fn encode_pair(&self, text: &str, pair: Option<&str>, max: usize) -> Result<Encoded> {
        let first = self.encode(text, false)?;
        let Some(pair) = pair else {
            let room = self.room(max, self.prefix.len() + self.suffix.len())?;
            let kept = first.len().min(room);
            let ids = [&self.prefix, &first[..kept], &self.suffix].concat();
            return Ok(Encoded { ids, truncated: first.len() - kept, ..Encoded::default() });
        };
        let second = self.encode(pair, false)?;
        let made_up = || PairLayout {
            before: self.prefix.clone(),
            between: self.suffix.clone(),
            after: self.suffix.clone(),
            second_type: 0,
        };
        let layout = self.pair.clone().unwrap_or_else(made_up);
        let PairLayout { before, between, after, second_type } = &layout;
        let room = self.room(max, before.len() + between.len() + after.len())?;
        let (n1, n2) = longest_first(first.len(), second.len(), room);
        let ids = [before, &first[..n1], between, &second[..n2], after].concat();
        let from = before.len() + n1 + between.len();
        Ok(Encoded {
            truncated: first.len() + second.len() - n1 - n2,
            second_type_from: (*second_type == 1 && from < ids.len()).then_some(from),
            ids,
            first_tokens: Vec::new(),
        })
    }

    /// Words that are given apart, with the special tokens around them, in at most `max` tokens.
    pub fn encode_words(&self, words: &[String], max: usize) -> Result<Encoded> {
        let room = self.room(max, self.prefix.len() + self.suffix.len())?;
        // a byte-level alphabet writes the space before a word with it
        let words: Vec<String> = match self.byte_level {
            true => {
                words.iter().map(|w| if w.starts_with(' ') { w.clone() } else { format!(" {w}") }).collect()
            }
            false => words.to_vec(),
        };
        let count = words.len();
        let encoding = self.inner.encode(words, false).map_err(|e| Error::tokenizer(&self.origin, e))?;
        let kept = encoding.len().min(room);
        let mut first_tokens = vec![None; count];
        for (at, word) in encoding.get_word_ids()[..kept].iter().enumerate() {
            if let Some(slot) = word.and_then(|w| first_tokens.get_mut(w as usize)) {
                slot.get_or_insert(self.prefix.len() + at);
            }
        }
        let ids = [&self.prefix, &encoding.get_ids()[..kept], &self.suffix].concat();
        Ok(Encoded { ids, truncated: encoding.len() - kept, second_type_from: None, first_tokens })
    }

    fn room(&self, max: usize, special: usize) -> Result<usize> {
        max.checked_sub(special).filter(|room| *room > 0).ok_or_else(|| {
            Error::Options(format!(
                "max_seq_len {max} is too short: {special} special tokens stand around a text"
            ))
        })
    }
}

/// How many tokens of both texts stay, as the tokenizers library decides it.
fn longest_first(a: usize, b: usize, room: usize) -> (usize, usize) {
    if a + b <= room {
        return (a, b);
    }
    let (short, long) = (a.min(b), a.max(b));
    let mut kept = (short, if short > room { short } else { short.max(room - short) });
    if kept.0 + kept.1 > room {
        kept = (room / 2, room / 2 + room % 2);
    }
    debug_assert!(kept.1 <= long);
    if a > b { (kept.1, kept.0) } else { kept }
}
