//! A row's columns, read as a form has them.

use super::{Content, Form};
use crate::Result;
use crate::reader::label::Label;
use crate::reader::raw::{Place, kind};
use serde_json::{Map, Value};

/// A row's columns, with errors that name row, form and key.
pub(super) struct Fields<'a> {
    pub fields: &'a Map<String, Value>,
    pub place: &'a Place,
    pub form: &'a Form,
}

impl Fields<'_> {
    fn get(&self, key: &str) -> Result<&Value> {
        self.fields.get(key).filter(|v| !v.is_null()).ok_or_else(|| {
            let found: Vec<&str> = self.fields.keys().map(String::as_str).collect();
            let what = format!(
                "{key:?} is missing; the file was read as {}; this row has {}",
                self.form.describe(),
                found.join(", ")
            );
            self.place.error(what)
        })
    }

    fn wrong<T>(&self, key: &str, want: &str, got: &Value) -> Result<T> {
        Err(self.place.error(format!("{key:?} must be {want}, this is {}", kind(got))))
    }

    pub fn text(&self, key: &str) -> Result<String> {
        match self.get(key)? {
            Value::String(text) => Ok(text.clone()),
            // answers are often numbers
            Value::Number(number) => Ok(number.to_string()),
            other => self.wrong(key, "a string", other),
        }
    }

    pub fn optional_text(&self, key: &str) -> Result<Option<String>> {
        match self.fields.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.text(key).map(Some),
        }
    }

    fn list(&self, key: &str) -> Result<&Vec<Value>> {
        match self.get(key)? {
            Value::Array(list) => Ok(list),
            other => self.wrong(key, "a list", other),
        }
    }

    pub fn messages(&self, key: &str) -> Result<Vec<Value>> {
        let list = self.list(key)?;
        if list.is_empty() {
            return Err(self
                .place
                .error(format!("{key:?} is an empty list; a conversation has at least one message")));
        }
        for (i, message) in list.iter().enumerate() {
            let at = format!("message {} of {key:?}", i + 1);
            let Value::Object(fields) = message else {
                return Err(self.place.error(format!(
                    "{at} must be an object with role and content, this is {}",
                    kind(message)
                )));
            };
            match fields.get("role") {
                Some(Value::String(_)) => {}
                Some(other) => {
                    return Err(self
                        .place
                        .error(format!("role of {at} must be a string, this is {}", kind(other))));
                }
                None => return Err(self.place.error(format!("{at} has no \"role\""))),
            }
            let speaks =
                ["content", "tool_calls"].iter().any(|key| fields.get(*key).is_some_and(|v| !v.is_null()));
            if !speaks {
                return Err(self.place.error(format!("{at} has no \"content\"")));
            }
        }
        Ok(list.clone())
    }

    pub fn tools(&self) -> Result<Option<Value>> {
        match self.fields.get("tools") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(tools)) if tools.is_empty() => Ok(None),
            Some(tools @ Value::Array(_)) => Ok(Some(tools.clone())),
            // data sets keep them as JSON text, because columns have one type
            Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(tools @ Value::Array(_)) => Ok(Some(tools)),
                _ => Err(self.place.error("\"tools\" is a string that is not a JSON list")),
            },
            Some(other) => self.wrong("tools", "a list", other),
        }
    }

    pub fn share_gpt(&self, key: &str) -> Result<Content> {
        let mut messages = Vec::new();
        if let Some(system) = self.optional_text("system")?.filter(|s| !s.is_empty()) {
            messages.push(crate::template::message("system", &system));
        }
        for (i, turn) in self.list(key)?.iter().enumerate() {
            let part = |name: &str| {
                turn.get(name).and_then(Value::as_str).ok_or_else(|| {
                    self.place.error(format!(
                        "turn {} of {key:?} has no {name:?}; turns are {{from, value}}",
                        i + 1
                    ))
                })
            };
            let from = part("from")?;
            let role = match from.to_ascii_lowercase().as_str() {
                "human" | "user" => "user",
                "gpt" | "assistant" | "chatgpt" | "bing" | "bard" | "model" => "assistant",
                "system" => "system",
                "tool" | "observation" | "function_response" => "tool",
                _ => {
                    let what = format!(
                        "turn {} of {key:?} is from {from:?}; known are human, gpt, system, tool",
                        i + 1
                    );
                    return Err(self.place.error(what));
                }
            };
            messages.push(crate::template::message(role, part("value")?));
        }
        if messages.is_empty() {
            return Err(self
                .place
                .error(format!("{key:?} is an empty list; a conversation has at least one turn")));
        }
        Ok(Content::Chat { messages, tools: self.tools()?, prompt_messages: 0 })
    }

    pub fn pair(&self, prompt: &str, completion: &str) -> Result<Content> {
        if self.get(prompt)?.is_array() {
            let mut messages = self.messages(prompt)?;
            let prompt_messages = messages.len();
            messages.extend(self.messages(completion)?);
            return Ok(Content::Chat { messages, tools: self.tools()?, prompt_messages });
        }
        Ok(Content::Pair { prompt: self.text(prompt)?, completion: self.text(completion)? })
    }

    /// What a row is labelled with; nothing where the cell is empty.
    pub fn label(&self, key: &str) -> Result<Option<Label>> {
        let Some(value) = self.fields.get(key).filter(|v| !v.is_null() && v.as_str() != Some("")) else {
            return Ok(None);
        };
        match Label::of(value) {
            Some(label) => Ok(Some(label)),
            None => self.wrong(key, "a name, a number, or a list of either", value),
        }
    }

    /// Words and their tags; a string is split at its whitespace.
    pub fn tagged(&self, tokens: &str, tags: Option<&str>) -> Result<Content> {
        let list = |key: &str| -> Result<Vec<Label>> {
            match self.get(key)? {
                Value::String(text) => Ok(text.split_whitespace().map(Label::from_text).collect()),
                Value::Array(list) => {
                    let one = |v: &Value| Label::of(v).filter(|l| !matches!(l, Label::Many(_)));
                    list.iter()
                        .map(|v| one(v).map_or_else(|| self.wrong(key, "a list of texts", v), Ok))
                        .collect()
                }
                other => self.wrong(key, "a list", other),
            }
        };
        let words: Vec<String> = match self.get(tokens)? {
            // a number among the words is a word
            Value::Array(list) if list.iter().all(Value::is_string) => {
                list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
            }
            Value::String(text) => text.split_whitespace().map(str::to_owned).collect(),
            _ => list(tokens)?.iter().map(Label::to_string).collect(),
        };
        let tags = tags.map(list).transpose()?;
        if let Some(tags) = &tags
            && tags.len() != words.len()
        {
            let what = format!("{} tags for {} {tokens}; one tag a word", tags.len(), words.len());
            return Err(self.place.error(what));
        }
        Ok(Content::Tagged { tokens: words, tags })
    }

    /// Ids with their labels. How many labels there must be depends on the task.
    pub fn tokens(&self) -> Result<Content> {
        let number = |key: &str, i: usize, v: &Value| {
            v.as_i64()
                .ok_or_else(|| self.place.error(format!("{key}[{i}] must be a whole number, this is {v}")))
        };
        let mut ids = Vec::new();
        for (i, v) in self.list("input_ids")?.iter().enumerate() {
            let id = number("input_ids", i, v)?;
            let id = u32::try_from(id)
                .map_err(|_| self.place.error(format!("input_ids[{i}] is {id}; ids begin at 0")))?;
            ids.push(id);
        }
        if self.fields.get("labels").is_none_or(Value::is_null) {
            return Ok(Content::Tokens { ids, labels: None });
        }
        let list = self.list("labels")?;
        let mut labels = Vec::with_capacity(ids.len());
        for (i, v) in list.iter().enumerate() {
            labels.push(match number("labels", i, v)? {
                -100 => None,
                id => Some(u32::try_from(id).map_err(|_| {
                    self.place
                        .error(format!("labels[{i}] is {id}; a label is a token id, or -100 where masked"))
                })?),
            });
        }
        Ok(Content::Tokens { ids, labels: Some(labels) })
    }
}
