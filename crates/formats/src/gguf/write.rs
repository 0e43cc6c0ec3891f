//! Writing GGUF files.

use super::GgufValue;
use crate::atomic::AtomicFile;
use crate::tensor::bytes_of;
use crate::{Error, Result};
use engobe_kernels::storage::StorageType;
use std::path::{Path, PathBuf};

const ALIGNMENT_KEY: &str = "general.alignment";

/// Name, storage and shape (outermost first) of a tensor to come.
pub type Announced = (String, StorageType, Vec<usize>);

/// A metadata value to be written.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaValue {
    /// whole numbers and floats in 32 bits where they fit
    Value(GgufValue),
    /// as it lay in another file
    Copied {
        /// GGUF's number of the type
        kind: u32,
        /// the value's bytes
        bytes: Vec<u8>,
    },
}

impl From<GgufValue> for MetaValue {
    fn from(value: GgufValue) -> Self {
        Self::Value(value)
    }
}

/// A version 3 file written tensor by tensor beside its place. [`GgufWriter::finish`] puts it there; dropped
/// before that, it leaves nothing behind.
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    file: AtomicFile,
    waiting: std::vec::IntoIter<Announced>,
    /// the tensor being written, and its bytes still to come
    current: Option<(String, usize)>,
    /// bytes after it up to the next boundary
    padding: usize,
    alignment: usize,
}

impl GgufWriter {
    /// Announces metadata and all tensors, in the order in which they will be written.
    pub fn create(path: &Path, metadata: &[(String, MetaValue)], tensors: Vec<Announced>) -> Result<Self> {
        let corrupt = |what: String| Error::corrupt(path, what);
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend((metadata.len() as u64).to_le_bytes());
        let mut alignment = 32usize;
        for (key, value) in metadata {
            text(&mut out, key);
            match value {
                MetaValue::Value(value) => {
                    out.extend(kind(value).to_le_bytes());
                    put(&mut out, value).map_err(|what| corrupt(format!("{key}: {what}")))?;
                }
                MetaValue::Copied { kind, bytes } => {
                    out.extend(kind.to_le_bytes());
                    out.extend(bytes);
                }
            }
            if key == ALIGNMENT_KEY {
                alignment = alignment_of(value)
                    .ok_or_else(|| corrupt(format!("{key} is {value:?}; expected a power of two")))?;
            }
        }
        let mut offset = 0usize;
        for (name, storage, shape) in &tensors {
            let size = bytes_of(*storage, shape)
                .ok_or_else(|| corrupt(format!("{name}: {shape:?} is not whole blocks of {storage}")))?;
            text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            for size in shape.iter().rev() {
                out.extend((*size as u64).to_le_bytes());
            }
            out.extend(number(*storage).to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += size.next_multiple_of(alignment);
        }
        out.resize(out.len().next_multiple_of(alignment), 0);
        let mut file = AtomicFile::create(path)?;
        file.write(&out)?;
        let waiting = tensors.into_iter();
        Ok(Self { path: path.to_path_buf(), file, waiting, current: None, padding: 0, alignment })
    }

    /// Writes the next tensor's bytes.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.begin(name)?;
        self.append(bytes)
    }

    /// Begins the next tensor, whose bytes follow in parts.
    pub fn begin(&mut self, name: &str) -> Result<()> {
        self.end_tensor()?;
        let Some((announced, storage, shape)) = self.waiting.next() else {
            return Err(Error::corrupt(&self.path, format!("{name}: more tensors than announced")));
        };
        if announced != name {
            let what = format!("{name} where {announced} was announced");
            return Err(Error::corrupt(&self.path, what));
        }
        let size = bytes_of(storage, &shape).unwrap_or(0);
        self.padding = size.next_multiple_of(self.alignment) - size;
        self.current = Some((announced, size));
        Ok(())
    }

    /// Writes a part of the tensor that was begun.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.current {
            Some((_, left)) if *left >= bytes.len() => {
                *left -= bytes.len();
                self.file.write(bytes)
            }
            Some((name, left)) => {
                let what = format!("{name}: {} bytes where {left} are left", bytes.len());
                Err(Error::corrupt(&self.path, what))
            }
            None => Err(Error::corrupt(&self.path, "no tensor was begun")),
        }
    }

    fn end_tensor(&mut self) -> Result<()> {
        match self.current.take() {
            Some((name, left)) if left > 0 => {
                Err(Error::corrupt(&self.path, format!("{name}: {left} bytes are missing")))
            }
            Some(_) => {
                let zeros = vec![0; self.padding];
                self.file.write(&zeros)
            }
            None => Ok(()),
        }
    }

    /// Flushes the file and puts it into its place.
    pub fn finish(mut self) -> Result<()> {
        self.end_tensor()?;
        if let Some((name, _, _)) = self.waiting.next() {
            return Err(Error::corrupt(&self.path, format!("{name} was announced and not written")));
        }
        self.file.commit()
    }
}

/// Writes a version 3 file atomically: metadata, and tensors as (name, storage, shape outermost first, bytes).
pub fn write_gguf(
    path: &Path,
    metadata: &[(String, GgufValue)],
    tensors: &[(String, StorageType, Vec<usize>, Vec<u8>)],
) -> Result<()> {
    let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
    let announced = tensors.iter().map(|(name, storage, shape, _)| (name.clone(), *storage, shape.clone()));
    let mut writer = GgufWriter::create(path, &metadata, announced.collect())?;
    for (name, _, _, bytes) in tensors {
        writer.write(name, bytes)?;
    }
    writer.finish()
}

/// `general.alignment` that the tensors' data must keep.
fn alignment_of(value: &MetaValue) -> Option<usize> {
    let alignment = match value {
        MetaValue::Value(value) => value.as_u32()?,
        MetaValue::Copied { kind: 4, bytes } => u32::from_le_bytes(bytes.as_slice().try_into().ok()?),
        MetaValue::Copied { .. } => return None,
    };
    (alignment.is_power_of_two() && alignment <= 1 << 20).then_some(alignment as usize)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The type that a value is written as: 32 bits where it fits, as llama.cpp expects of counts.
fn kind(value: &GgufValue) -> u32 {
    match value {
        GgufValue::Unsigned(v) if *v <= u64::from(u32::MAX) => 4,
        GgufValue::Unsigned(_) => 10,
        GgufValue::Signed(v) if i32::try_from(*v).is_ok() => 5,
        GgufValue::Signed(_) => 11,
        GgufValue::Float(_) => 6,
        GgufValue::Bool(_) => 7,
        GgufValue::String(_) => 8,
        GgufValue::Array(_) => 9,
    }
}

fn put(out: &mut Vec<u8>, value: &GgufValue) -> std::result::Result<(), String> {
    match value {
        GgufValue::Unsigned(v) if kind(value) == 4 => out.extend((*v as u32).to_le_bytes()),
        GgufValue::Unsigned(v) => out.extend(v.to_le_bytes()),
        GgufValue::Signed(v) if kind(value) == 5 => out.extend((*v as i32).to_le_bytes()),
        GgufValue::Signed(v) => out.extend(v.to_le_bytes()),
        GgufValue::Float(v) => out.extend((*v as f32).to_le_bytes()),
        GgufValue::Bool(v) => out.push(u8::from(*v)),
        GgufValue::String(v) => text(out, v),
        GgufValue::Array(values) => {
            let element = values.first().map_or(4, kind);
            if values.iter().any(|v| kind(v) != element) {
                return Err("a list of values of different types".to_string());
            }
            out.extend(element.to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            values.iter().try_for_each(|v| put(out, v))?;
        }
    }
    Ok(())
}

fn number(storage: StorageType) -> u32 {
    match storage {
        StorageType::F32 => 0,
        StorageType::F16 => 1,
        StorageType::Q4_0 => 2,
        StorageType::Q4_1 => 3,
        StorageType::Q5_0 => 6,
        StorageType::Q5_1 => 7,
        StorageType::Q8_0 => 8,
        StorageType::Q2_K => 10,
        StorageType::Q3_K => 11,
        StorageType::Q4_K => 12,
        StorageType::Q5_K => 13,
        StorageType::Q6_K => 14,
        StorageType::BF16 => 30,
    }
}
