//! safetensors files.

use crate::atomic::AtomicFile;
use crate::mmap::MappedFile;
use crate::tensor::{Dtype, TensorView, bytes_of};
use crate::{Error, Result, nearest};
use engobe_kernels::storage::StorageType;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// A tensor of a parsed header: name, type, shape, bytes within the file.
pub type Entry = (String, Dtype, Vec<usize>, Range<usize>);

/// A safetensors file, mapped.
#[derive(Debug)]
pub struct SafetensorsFile {
    tensors: Vec<TensorView>,
    metadata: BTreeMap<String, String>,
}

/// Checks a whole file and lists its tensors, by name. The reason is without the file's name.
pub fn parse(bytes: &[u8]) -> std::result::Result<(Vec<Entry>, BTreeMap<String, String>), String> {
    let parsed = SafeTensors::deserialize(bytes).map_err(|e| format!("not a valid safetensors file: {e}"))?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let mut entries = Vec::new();
    for (name, view) in parsed.tensors() {
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let dtype = match view.dtype() {
            safetensors::Dtype::F32 => Dtype::Storage(StorageType::F32),
            safetensors::Dtype::F16 => Dtype::Storage(StorageType::F16),
            safetensors::Dtype::BF16 => Dtype::Storage(StorageType::BF16),
            safetensors::Dtype::U8 => Dtype::U8,
            safetensors::Dtype::I8 => Dtype::I8,
            other => Dtype::Other(format!("{other:?}")),
        };
        if let Dtype::Storage(storage) = dtype
            && bytes_of(storage, view.shape()) != Some(view.data().len())
        {
            return Err(format!("{name}: {:?} does not fit its {} bytes", view.shape(), view.data().len()));
        }
        entries.push((name, dtype, view.shape().to_vec(), start..start + view.data().len()));
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    Ok((entries, metadata))
}

impl SafetensorsFile {
    /// Maps and checks a file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let (entries, metadata) = parse((*file).as_ref()).map_err(|what| Error::corrupt(path, what))?;
        let view =
            |(name, dtype, shape, range): Entry| TensorView { name, shape, dtype, file: file.clone(), range };
        Ok(Self { tensors: entries.into_iter().map(view).collect(), metadata })
    }

    /// Tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorView> {
        self.tensors.iter()
    }

    /// The tensor called `name`.
    pub fn get(&self, path: &Path, name: &str) -> Result<&TensorView> {
        match self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)) {
            Ok(at) => Ok(&self.tensors[at]),
            Err(_) => Err(Error::NoTensor {
                path: path.to_path_buf(),
                name: name.to_string(),
                near: nearest(name, self.tensors.iter().map(|t| t.name.as_str())),
            }),
        }
    }

    /// `__metadata__` of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// The header of a file with these tensors, in this order, 8-byte aligned, length included.
pub(crate) fn header(
    tensors: &[(String, Dtype, Vec<usize>)],
    metadata: &BTreeMap<String, String>,
) -> std::result::Result<Vec<u8>, String> {
    let mut map = Map::new();
    if !metadata.is_empty() {
        map.insert("__metadata__".to_string(), json!(metadata));
    }
    let mut at = 0usize;
    for (name, dtype, shape) in tensors {
        let written = match dtype {
            Dtype::Storage(StorageType::F32) => "F32",
            Dtype::Storage(StorageType::F16) => "F16",
            Dtype::Storage(StorageType::BF16) => "BF16",
            Dtype::U8 => "U8",
            Dtype::I8 => "I8",
            other => return Err(format!("{name}: safetensors has no type for {other}")),
        };
        let size = dtype.bytes_of(shape).ok_or_else(|| format!("{name}: shape {shape:?} overflows"))?;
        let entry = json!({"dtype": written, "shape": shape, "data_offsets": [at, at + size]});
        if map.insert(name.clone(), entry).is_some() {
            return Err(format!("{name}: listed twice"));
        }
        at += size;
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend(json);
    Ok(out)
}

/// Writes f32 tensors (name, shape, little-endian bytes) atomically.
pub fn write_safetensors<B: AsRef<[u8]>>(
    path: &Path,
    tensors: &[(String, Vec<usize>, B)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let listed: Vec<_> =
        tensors.iter().map(|(n, shape, _)| (n.clone(), StorageType::F32.into(), shape.clone())).collect();
    let mut file = AtomicFile::create(path)?;
    file.write(&header(&listed, metadata).map_err(|what| Error::corrupt(path, what))?)?;
    for (name, shape, bytes) in tensors {
        let bytes = bytes.as_ref();
        if bytes_of(StorageType::F32, shape) != Some(bytes.len()) {
            return Err(Error::corrupt(path, format!("{name}: {} bytes for shape {shape:?}", bytes.len())));
        }
        file.write(bytes)?;
    }
    file.commit()
}
