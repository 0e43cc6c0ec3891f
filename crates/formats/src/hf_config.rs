//! `config.json` and `generation_config.json` of Hugging Face directories.

use crate::{Error, Result, nearest};
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// A configuration as it lies in the file, with accessors whose errors name file and key.
#[derive(Clone, Debug)]
pub struct HfConfig {
    path: PathBuf,
    raw: Map<String, Value>,
}

impl HfConfig {
    /// Reads `config.json` of a directory.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::read(&dir.join("config.json"))
    }

    /// Reads a JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io(path))?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(raw)) => Ok(Self { path: path.to_path_buf(), raw }),
            Ok(_) => Err(Error::corrupt(path, "is not a JSON object")),
            Err(e) => Err(Error::corrupt(path, format!("is not valid JSON: {e}"))),
        }
    }

    /// A configuration that was made of another file's, at `path`.
    pub fn made(path: &Path, raw: Map<String, Value>) -> Self {
        Self { path: path.to_path_buf(), raw }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything in it.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// A value that is there and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.raw.get(key).filter(|v| !v.is_null())
    }

    /// `model_type`.
    pub fn model_type(&self) -> Result<&str> {
        self.needed("model_type", self.opt_str("model_type")?)
    }

    fn opt<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        as_type: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        as_type(value).map(Some).ok_or_else(|| Error::BadValue {
            path: self.path.clone(),
            key: key.to_string(),
            found: value.to_string(),
            expected: expected.to_string(),
        })
    }

    fn needed<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::NoKey {
            path: self.path.clone(),
            key: key.to_string(),
            near: nearest(key, self.raw.keys().map(String::as_str)),
        })
    }

    /// A whole number, if there.
    pub fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        self.opt(key, "a whole number, 0 or above", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// A whole number.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.needed(key, self.opt_usize(key)?)
    }

    /// A number, if there.
    pub fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        self.opt(key, "a number", Value::as_f64)
    }

    /// A string, if there.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.opt(key, "a string", Value::as_str)
    }

    /// A boolean, or `default`.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.opt(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// `eos_token_id`: one number or a list; empty if there is none.
    pub fn eos_token_ids(&self) -> Result<Vec<u32>> {
        let ids = self.opt("eos_token_id", "a token id or a list of them", |v| {
            let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
            match v {
                Value::Array(list) => list.iter().map(id).collect(),
                one => id(one).map(|id| vec![id]),
            }
        })?;
        Ok(ids.unwrap_or_default())
    }
}

/// End-of-sequence tokens of a directory: those of `generation_config.json`, else of `config.json`.
pub fn eos_token_ids(dir: &Path) -> Result<Vec<u32>> {
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        if path.exists() {
            let ids = HfConfig::read(&path)?.eos_token_ids()?;
            if !ids.is_empty() {
                return Ok(ids);
            }
        }
    }
    Ok(Vec::new())
}
