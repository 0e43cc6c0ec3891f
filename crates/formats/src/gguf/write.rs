//! Writing GGUF files.

use super::GgufValue;
use crate::atomic::AtomicFile;
use crate::tensor::bytes_of;
use crate::{Error, Result};
use engobe_kernels::storage::StorageType;
use std::path::Path;

const ALIGNMENT: usize = 32;

/// Writes a version 3 file atomically: metadata, and tensors as (name, storage, shape outermost first, bytes).
pub fn write_gguf(
    path: &Path,
    metadata: &[(String, GgufValue)],
    tensors: &[(String, StorageType, Vec<usize>, Vec<u8>)],
) -> Result<()> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        out.extend(kind(value).to_le_bytes());
        put(&mut out, value).map_err(|what| Error::corrupt(path, format!("{key}: {what}")))?;
    }
    let mut offset = 0usize;
    for (name, storage, shape, bytes) in tensors {
        if bytes_of(*storage, shape) != Some(bytes.len()) {
            return Err(Error::corrupt(
                path,
                format!("{name}: {} bytes for {storage} {shape:?}", bytes.len()),
            ));
        }
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        for size in shape.iter().rev() {
            out.extend((*size as u64).to_le_bytes());
        }
        out.extend(number(*storage).to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += bytes.len().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    let mut file = AtomicFile::create(path)?;
    file.write(&out)?;
    for (_, _, _, bytes) in tensors {
        file.write(bytes)?;
        file.write(&[0; ALIGNMENT][..bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()])?;
    }
    file.commit()
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
