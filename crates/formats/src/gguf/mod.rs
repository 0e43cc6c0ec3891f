//! GGUF files (versions 2 and 3, little-endian), as ggml's `gguf.md` specifies them.

pub mod lora;
mod reader;
mod value;
mod write;

pub use reader::{Header, TensorInfo, parse};
pub use value::GgufValue;
pub use write::{Announced, GgufWriter, MetaValue, write_gguf};

use crate::mmap::MappedFile;
use crate::tensor::TensorView;
use crate::{Error, Result, nearest};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A GGUF file, mapped.
#[derive(Debug)]
pub struct Gguf {
    file: Arc<MappedFile>,
    metadata: BTreeMap<String, GgufValue>,
    raw_metadata: Vec<(String, u32, Range<usize>)>,
    tensors: BTreeMap<String, TensorView>,
}

impl Gguf {
    /// Maps and checks a file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let header = parse((*file).as_ref()).map_err(|what| Error::corrupt(path, what))?;
        let view = |t: TensorInfo| {
            let view = TensorView {
                name: t.name.clone(),
                shape: t.shape,
                dtype: t.dtype,
                file: file.clone(),
                range: t.range,
            };
            (t.name, view)
        };
        let tensors = header.tensors.into_iter().map(view).collect();
        Ok(Self { tensors, metadata: header.metadata, raw_metadata: header.raw_metadata, file })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// All metadata by key.
    pub fn metadata(&self) -> &BTreeMap<String, GgufValue> {
        &self.metadata
    }

    /// All metadata in the file's order, to be written again as it is.
    pub fn copied_metadata(&self) -> Vec<(String, MetaValue)> {
        let bytes = (*self.file).as_ref();
        let copy = |(key, kind, range): &(String, u32, Range<usize>)| {
            (key.clone(), MetaValue::Copied { kind: *kind, bytes: bytes[range.clone()].to_vec() })
        };
        self.raw_metadata.iter().map(copy).collect()
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorView> {
        &self.tensors
    }

    /// True if there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Result<&TensorView> {
        self.tensors.get(name).ok_or_else(|| Error::NoTensor {
            path: self.path().to_path_buf(),
            name: name.to_string(),
            near: nearest(name, self.tensors.keys().map(String::as_str)),
        })
    }

    fn read<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        as_type: impl FnOnce(&'a GgufValue) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        as_type(value).map(Some).ok_or_else(|| Error::BadValue {
            path: self.path().to_path_buf(),
            key: key.to_string(),
            found: value.describe(),
            expected: expected.to_string(),
        })
    }

    fn needed<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::NoKey {
            path: self.path().to_path_buf(),
            key: key.to_string(),
            near: nearest(key, self.metadata.keys().map(String::as_str)),
        })
    }

    /// A whole number of any width, if the key is there.
    pub fn opt_u32(&self, key: &str) -> Result<Option<u32>> {
        self.read(key, "a whole number below 2^32", GgufValue::as_u32)
    }

    /// A whole number of any width.
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.needed(key, self.opt_u32(key)?)
    }

    /// A float, if the key is there.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>> {
        self.read(key, "a finite number", GgufValue::as_f32)
    }

    /// A float.
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.needed(key, self.opt_f32(key)?)
    }

    /// A boolean, if the key is there.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "a boolean", GgufValue::as_bool)
    }

    /// A string, if the key is there.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.read(key, "a string", GgufValue::as_str)
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.needed(key, self.opt_str(key)?)
    }

    /// A list of strings, if the key is there.
    pub fn opt_str_array(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.read(key, "a list of strings", |v| {
            v.as_array()?.iter().map(|v| v.as_str().map(str::to_string)).collect()
        })
    }

    /// A list of floats, if the key is there.
    pub fn opt_f32_array(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.read(key, "a list of numbers", |v| v.as_array()?.iter().map(GgufValue::as_f32).collect())
    }

    /// A list of whole numbers, if the key is there.
    pub fn opt_i32_array(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.read(key, "a list of whole numbers", |v| v.as_array()?.iter().map(GgufValue::as_i32).collect())
    }
}
