//! A model's tensors, whatever files they lie in.

use crate::gguf::Gguf;
use crate::safetensors_file::SafetensorsFile;
use crate::tensor::TensorView;
use crate::{Error, Result, nearest};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// A Hugging Face directory or a GGUF file.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    gguf: Option<Gguf>,
    tensors: BTreeMap<String, TensorView>,
}

impl Checkpoint {
    /// Maps all files of a model and checks them.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = fs::metadata(path).map_err(Error::io(path))?;
        let (gguf, tensors) = if meta.is_dir() {
            (None, open_dir(path)?)
        } else {
            let gguf = Gguf::open(path)?;
            let tensors = gguf.tensors().clone();
            (Some(gguf), tensors)
        };
        if tensors.is_empty() {
            return Err(Error::corrupt(path, "holds no tensors"));
        }
        Ok(Self { path: path.to_path_buf(), gguf, tensors })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The GGUF file, if it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorView> {
        self.tensors.values()
    }

    /// True if there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Result<&TensorView> {
        self.tensors.get(name).ok_or_else(|| Error::NoTensor {
            path: self.path.clone(),
            name: name.to_string(),
            near: nearest(name, self.tensors.keys().map(String::as_str)),
        })
    }
}

fn open_dir(dir: &Path) -> Result<BTreeMap<String, TensorView>> {
    let index = dir.join("model.safetensors.index.json");
    let single = dir.join("model.safetensors");
    if index.exists() {
        return open_shards(dir, &index);
    }
    if single.exists() {
        let file = SafetensorsFile::open(&single)?;
        return Ok(file.tensors().map(|t| (t.name.clone(), t.clone())).collect());
    }
    let what = match dir.join("pytorch_model.bin").exists() {
        true => {
            "has weights in pytorch_model.bin only, which can run code when read; save it with save_pretrained(..., safe_serialization=True)"
        }
        false => "has no model.safetensors and no model.safetensors.index.json",
    };
    Err(Error::corrupt(dir, what))
}

fn open_shards(dir: &Path, index: &Path) -> Result<BTreeMap<String, TensorView>> {
    let bytes = fs::read(index).map_err(Error::io(index))?;
    let json: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Error::corrupt(index, format!("is not valid JSON: {e}")))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::corrupt(index, "has no object \"weight_map\""))?;
    let mut wanted: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (name, file) in map {
        let file = file.as_str().ok_or_else(|| Error::corrupt(index, format!("{name}: no file name")))?;
        // a shard lies beside its index: a path out of the directory is an attack or a mistake
        let inside = Path::new(file).components().all(|c| matches!(c, Component::Normal(_)));
        if !inside {
            return Err(Error::corrupt(
                index,
                format!("{name} is said to lie in {file:?}, outside the directory"),
            ));
        }
        wanted.entry(file).or_default().insert(name);
    }
    let mut tensors = BTreeMap::new();
    for (shard, names) in wanted {
        let path = dir.join(shard);
        let file = SafetensorsFile::open(&path)?;
        for name in names {
            tensors.insert(name.to_string(), file.get(&path, name)?.clone());
        }
    }
    Ok(tensors)
}
