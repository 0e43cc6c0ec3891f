//! Stop strings in streamed text.

/// What may be shown of the text so far.
#[derive(Debug, PartialEq, Eq)]
pub struct Emit {
    /// new text that can no longer turn out to be part of a stop string
    pub text: String,
    /// a stop string has appeared; it and what follows are cut
    pub stopped: bool,
}

/// Holds back text that may be the start of a stop string.
#[derive(Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Empty strings are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Takes new text.
    pub fn push(&mut self, text: &str) -> Emit {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return Emit { text: std::mem::take(&mut self.held), stopped: true };
        }
        let tail = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - tail);
        Emit { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The text still held back when generation ends.
    pub fn finish(self) -> String {
        self.held
    }
}

/// Length of the longest end of `text` that starts `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = text.char_indices().map(|(at, _)| &text[at..]);
    ends.filter(|end| stop.starts_with(end)).map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_string_split_over_pieces_is_found_and_never_shown() {
        let mut s = StopStrings::new(["###".to_string(), "\nUser:".to_string()]);
        assert_eq!(s.push("Hi#"), Emit { text: "Hi".into(), stopped: false });
        assert_eq!(s.push("1 ##"), Emit { text: "#1 ".into(), stopped: false });
        assert_eq!(s.push("\nUs"), Emit { text: "##".into(), stopped: false });
        assert_eq!(s.push("er: x"), Emit { text: "".into(), stopped: true });
    }

    #[test]
    fn held_text_comes_out_at_the_end() {
        let mut s = StopStrings::new(["été!".to_string(), String::new()]);
        assert_eq!(s.push("l'ét").text, "l'");
        assert_eq!(s.finish(), "ét");
    }
}
