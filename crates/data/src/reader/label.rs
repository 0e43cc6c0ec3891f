//! What a row, or a word, is labelled with, as it stands in the file.

use serde_json::Value;

/// A label as it was written.
#[derive(Clone, Debug, PartialEq)]
pub enum Label {
    /// a whole number: a class by its id, or a value
    Whole(i64),
    /// a number
    Number(f64),
    /// a name
    Name(String),
    /// any number of labels at once
    Many(Vec<Label>),
}

impl Label {
    /// A JSON value as a label; `None` for null and objects, and for lists of lists.
    pub(super) fn of(value: &Value) -> Option<Self> {
        Some(match value {
            Value::Bool(b) => Self::Whole(i64::from(*b)),
            Value::Number(n) => match n.as_i64() {
                Some(i) => Self::Whole(i),
                None => Self::Number(n.as_f64()?),
            },
            Value::String(text) => Self::from_text(text),
            Value::Array(list) => {
                let one = |v: &Value| Self::of(v).filter(|l| !matches!(l, Self::Many(_)));
                Self::Many(list.iter().map(one).collect::<Option<_>>()?)
            }
            Value::Null | Value::Object(_) => return None,
        })
    }

    /// A cell of text as a label: a number if it reads as one.
    pub(super) fn from_text(text: &str) -> Self {
        let text = text.trim();
        if let Ok(whole) = text.parse() {
            return Self::Whole(whole);
        }
        match text.parse::<f64>() {
            // `nan` and `inf` are names
            Ok(number) if number.is_finite() => Self::Number(number),
            _ => Self::Name(text.to_owned()),
        }
    }

    /// The label as a number, if it is one.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Whole(i) => Some(*i as f64),
            Self::Number(x) => Some(*x),
            Self::Name(_) | Self::Many(_) => None,
        }
    }

    /// The labels in it: itself, or those of the list.
    pub fn parts(&self) -> &[Label] {
        match self {
            Self::Many(list) => list,
            one => std::slice::from_ref(one),
        }
    }
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Whole(i) => write!(f, "{i}"),
            Self::Number(x) => write!(f, "{x}"),
            Self::Name(name) => f.write_str(name),
            Self::Many(list) => {
                let list: Vec<String> = list.iter().map(Self::to_string).collect();
                write!(f, "[{}]", list.join(", "))
            }
        }
    }
}
