//! Decoding ids as they are generated.

use super::TextTokenizer;
use crate::Result;

/// Turns ids into text piece by piece; yields only whole characters.
///
/// A character can be spread over several tokens (byte-level BPE, byte fallback), and a decoder may treat the
/// first token of a text in its own way (the space that SentencePiece adds). So a window of the last ids is
/// decoded with and without the new one, and the difference is held back while it ends in half a character.
#[derive(Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t TextTokenizer,
    skip_special: bool,
    window: Vec<u32>,
    /// ids at the start of `window` whose text was given out; the rest is held back
    given: usize,
}

impl<'t> DecodeStream<'t> {
    pub(super) fn new(tokenizer: &'t TextTokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, window: Vec::new(), given: 0 }
    }

    /// Takes one id; returns the text that is now complete, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.window.push(id);
        let text = self.new_text()?;
        if text.is_empty() || text.ends_with('\u{fffd}') {
            return Ok(None);
        }
        self.shift();
        Ok(Some(text))
    }

    /// Text still held back (half a character, as U+FFFD), at the end of the ids.
    pub fn finish(&mut self) -> Result<Option<String>> {
        let text = self.new_text()?;
        self.window.clear();
        self.given = 0;
        Ok((!text.is_empty()).then_some(text))
    }

    fn new_text(&self) -> Result<String> {
        let all = self.tokenizer.decode(&self.window, self.skip_special)?;
        let before = self.tokenizer.decode(&self.window[..self.given], self.skip_special)?;
        Ok(match all.strip_prefix(before.as_str()) {
            Some(new) => new.to_owned(),
            // the old text itself changed: only decoders with a clean-up step do that; count characters
            None => all.chars().skip(before.chars().count()).collect(),
        })
    }

    /// Keeps the ids of the last piece as context of the next.
    fn shift(&mut self) {
        self.window.drain(..self.given);
        self.given = self.window.len();
    }
}
