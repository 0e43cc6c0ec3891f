//! `adapter_config.json` of any method: a map of settings, read and checked by what the method knows.

use super::TargetModules;
use crate::{Error, Result, adapter_hub, nearest};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Version of PEFT whose format we write.
const PEFT_VERSION: &str = "0.21.2";

/// Keys of every method beside its settings.
const LABELS: [&str; 3] = ["base_model_name_or_path", "task_type", "peft_type"];

/// Keys that change nothing that we compute.
const NOTES: [&str; 5] = ["auto_mapping", "inference_mode", "peft_version", "revision", "peft_task_config"];

/// An adapter's configuration: PEFT's keys and values. Two are equal if they say the same.
#[derive(Clone, Debug)]
pub struct PeftConfig {
    path: PathBuf,
    map: Map<String, Value>,
}

impl From<&PeftConfig> for PeftConfig {
    fn from(config: &PeftConfig) -> Self {
        config.clone()
    }
}

impl PartialEq for PeftConfig {
    fn eq(&self, other: &Self) -> bool {
        self.map == other.map
    }
}

/// The keys that a method has, for [`PeftConfig::check_keys`].
#[derive(Clone, Copy, Debug)]
pub struct KnownKeys<'a> {
    /// settings, which the method reads
    pub settings: &'a [&'a str],
    /// keys that change nothing that is computed
    pub notes: &'a [&'a str],
    /// keys of features that engobe does not have: they may only be off
    pub not_yet: &'a [&'a str],
}

/// True for values that mean "not used".
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    }
}

impl PeftConfig {
    /// A configuration of the method that PEFT calls `peft_type`, without settings.
    pub fn new(peft_type: &str) -> Self {
        let map = match json!({
            "auto_mapping": null,
            "base_model_name_or_path": null,
            "inference_mode": true,
            "peft_type": peft_type,
            "peft_version": PEFT_VERSION,
            "revision": null,
            "task_type": "CAUSAL_LM",
        }) {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        Self { path: PathBuf::from("settings"), map }
    }

    /// Reads that of the adapter in `dir`.
    pub fn in_dir(dir: &Path) -> Result<Self> {
        Self::load(&dir.join(super::CONFIG))
    }

    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io(path))?;
        Self::parse(path, &bytes)
    }

    /// Reads JSON; `path` is for errors.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let map = match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => map,
            Ok(_) => return Err(Error::corrupt(path, "is not a JSON object")),
            Err(e) => return Err(Error::corrupt(path, format!("is not valid JSON: {e}"))),
        };
        let map = if adapter_hub::is_ours(&map) { adapter_hub::to_peft(map) } else { map };
        let this = Self { path: path.to_path_buf(), map };
        match this.get("peft_type") {
            Some(Value::String(_)) => Ok(this),
            other => {
                let found = other.map_or("missing".to_string(), Value::to_string);
                Err(this.bad("peft_type", &found, "the name of a method, such as \"LORA\""))
            }
        }
    }

    /// PEFT's name of the method.
    pub fn peft_type(&self) -> &str {
        self.text("peft_type").unwrap_or_default()
    }

    /// The file that it was read from, or `settings`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets a key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.map.insert(key.to_string(), value.into());
    }

    /// The file's text: keys sorted, two spaces of indent.
    pub fn to_json(&self) -> String {
        let sorted: BTreeMap<&String, &Value> = self.map.iter().collect();
        serde_json::to_string_pretty(&sorted).unwrap_or_default()
    }

    /// A value; a null counts as none.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// An error about a key's value.
    pub fn bad(&self, key: &str, found: &str, expected: &str) -> Error {
        Error::BadValue {
            path: self.path.clone(),
            key: key.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    /// Refuses features that we lack, and keys that we do not know and that are on: an adapter that is read as
    /// something else would silently compute something else.
    pub fn check_keys(&self, known: KnownKeys<'_>) -> Result<()> {
        for (key, value) in &self.map {
            let key = key.as_str();
            let fine = known.settings.contains(&key) || known.notes.contains(&key);
            if fine || LABELS.contains(&key) || NOTES.contains(&key) || is_off(value) {
                continue;
            }
            if known.not_yet.contains(&key) {
                let right = "this feature to be off: engobe does not have it yet";
                return Err(self.bad(key, &value.to_string(), right));
            }
            let near = nearest(key, known.settings.iter().copied().chain(LABELS));
            return Err(self.bad(key, &value.to_string(), &format!("only known keys to be set{near}")));
        }
        Ok(())
    }

    /// A text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// A text that is one of some.
    pub fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)], default: T) -> Result<T> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let found = value.as_str().and_then(|text| {
            choices.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)).map(|(_, choice)| *choice)
        });
        found.ok_or_else(|| {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            self.bad(key, &value.to_string(), &names.join(", "))
        })
    }

    /// A whole number.
    pub fn whole(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        number.map(Some).ok_or_else(|| self.bad(key, &value.to_string(), "a whole number above 0"))
    }

    /// A whole number of which there must be one at least.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        match self.whole(key)? {
            Some(0) => Err(self.bad(key, "0", "a whole number above 0")),
            count => Ok(count),
        }
    }

    /// A probability of being dropped; 0 if it is not there.
    pub fn dropout(&self, key: &str) -> Result<f64> {
        let dropout = self.number(key)?.unwrap_or(0.0);
        match (0.0..1.0).contains(&dropout) {
            true => Ok(dropout),
            false => Err(self.bad(key, &dropout.to_string(), "a probability in [0, 1)")),
        }
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.bad(key, &value.to_string(), "a number"))
    }

    /// True or false; false if it is not there.
    pub fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.bad(key, &value.to_string(), "true or false"))
    }

    /// Names, a regular expression, or `all-linear`.
    pub fn modules(&self, key: &str) -> Result<Option<TargetModules>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) if s.eq_ignore_ascii_case("all-linear") => {
                Ok(Some(TargetModules::AllLinear))
            }
            Some(Value::String(s)) => Ok(Some(TargetModules::Regex(s.clone()))),
            Some(_) => Ok(Some(TargetModules::List(self.names(key)?))),
        }
    }

    /// A string or a list of strings.
    pub fn names(&self, key: &str) -> Result<Vec<String>> {
        let names = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::String(s)) => Some(vec![s.clone()]),
            Some(Value::Array(a)) => a.iter().map(|v| v.as_str().map(str::to_string)).collect(),
            Some(_) => None,
        };
        let found = || self.get(key).map(Value::to_string).unwrap_or_default();
        names.ok_or_else(|| self.bad(key, &found(), "a string or a list of strings"))
    }

    /// Numbers of layers: one or a list.
    pub fn layers(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let index = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let found = match self.get(key) {
            None => return Ok(None),
            Some(Value::Array(a)) => a.iter().map(index).collect(),
            Some(one) => index(one).map(|i| vec![i]),
        };
        let shown = || self.get(key).map(Value::to_string).unwrap_or_default();
        found.map(Some).ok_or_else(|| self.bad(key, &shown(), "a layer's number or a list of them"))
    }

    /// Values by pattern; `right` says what a value must be.
    pub fn pattern<T>(
        &self,
        key: &str,
        right: &str,
        as_type: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(p, v)| {
                    let value = as_type(v);
                    value
                        .map(|v| (p.clone(), v))
                        .ok_or_else(|| self.bad(&format!("{key}[{p:?}]"), &v.to_string(), right))
                })
                .collect(),
            Some(other) => Err(self.bad(key, &other.to_string(), "an object of patterns and numbers")),
        }
    }
}

/// Modules as a file has them: lists sorted.
pub fn modules_json(modules: &Option<TargetModules>) -> Value {
    match modules {
        None => Value::Null,
        Some(TargetModules::AllLinear) => json!("all-linear"),
        Some(TargetModules::Regex(pattern)) => json!(pattern),
        Some(TargetModules::List(names)) => {
            let mut names = names.clone();
            names.sort();
            json!(names)
        }
    }
}

/// A list as a file has it: null if it is empty.
pub fn list_json(list: &[String]) -> Value {
    if list.is_empty() { Value::Null } else { json!(list) }
}

/// A number as Python writes it: whole ones without a point.
pub fn number_json(v: f64) -> Value {
    if v.fract() == 0.0 && v.abs() < 1e15 { json!(v as i64) } else { json!(v) }
}
