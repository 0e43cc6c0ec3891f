//! Models written tensor by tensor, in shards, without ever being held whole.

use crate::atomic::{AtomicFile, write_atomic};
use crate::safetensors_file::header;
use crate::tensor::Dtype;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Name, type and shape of a tensor to come.
pub type Announced = (String, Dtype, Vec<usize>);

/// Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` and their index.
#[derive(Debug)]
pub struct ShardedWriter {
    dir: PathBuf,
    /// shards still to come, the next one last
    waiting: Vec<(PathBuf, Vec<Announced>)>,
    current: Option<(AtomicFile, std::vec::IntoIter<Announced>)>,
    index: Option<Value>,
}

impl ShardedWriter {
    /// Announces all tensors, in the order in which they will be written. A shard holds at most
    /// `max_shard_bytes`, or a single tensor that is larger.
    pub fn create(dir: &Path, tensors: Vec<Announced>, max_shard_bytes: usize) -> Result<Self> {
        let mut shards: Vec<Vec<Announced>> = vec![Vec::new()];
        let (mut filled, mut total) = (0usize, 0usize);
        for tensor in tensors {
            let size = tensor.1.bytes_of(&tensor.2).ok_or_else(|| {
                Error::corrupt(dir, format!("{}: shape {:?} overflows", tensor.0, tensor.2))
            })?;
            if filled > 0 && filled + size > max_shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += size;
            total += size;
            if let Some(shard) = shards.last_mut() {
                shard.push(tensor);
            }
        }
        let count = shards.len();
        let name = |i: usize| match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let mut map = Map::new();
        for (i, shard) in shards.iter().enumerate() {
            map.extend(shard.iter().map(|t| (t.0.clone(), Value::String(name(i)))));
        }
        let index = (count > 1).then(|| json!({"metadata": {"total_size": total}, "weight_map": map}));
        let waiting = shards.into_iter().enumerate().map(|(i, s)| (dir.join(name(i)), s)).rev().collect();
        Ok(Self { dir: dir.to_path_buf(), waiting, current: None, index })
    }

    /// Writes the next tensor's bytes.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let next = self.current.as_mut().and_then(|(_, tensors)| tensors.next());
        let announced = match next {
            Some(announced) => announced,
            None => self.next_shard()?,
        };
        let expected = announced.1.bytes_of(&announced.2);
        if announced.0 != name || expected != Some(bytes.len()) {
            let what =
                format!("{name} ({} bytes) where {} ({expected:?}) was announced", bytes.len(), announced.0);
            return Err(Error::corrupt(&self.dir, what));
        }
        match &mut self.current {
            Some((file, _)) => file.write(bytes),
            None => Ok(()),
        }
    }

    /// Closes a shard, opens the next one, and takes its first tensor.
    fn next_shard(&mut self) -> Result<Announced> {
        if let Some((file, _)) = self.current.take() {
            file.commit()?;
        }
        let none = || Error::corrupt(&self.dir, "more tensors than announced");
        let (path, tensors) = self.waiting.pop().ok_or_else(none)?;
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let mut file = AtomicFile::create(&path)?;
        file.write(&header(&tensors, &metadata).map_err(|what| Error::corrupt(&path, what))?)?;
        let mut tensors = tensors.into_iter();
        let first = tensors.next().ok_or_else(|| Error::corrupt(&path, "a shard without tensors"))?;
        self.current = Some((file, tensors));
        Ok(first)
    }

    /// Closes the last shard and writes the index.
    pub fn finish(mut self) -> Result<()> {
        let left = self.current.as_ref().map_or(0, |(_, t)| t.len()) + self.waiting.len();
        if left > 0 {
            return Err(Error::corrupt(&self.dir, "fewer tensors than announced"));
        }
        if let Some((file, _)) = self.current.take() {
            file.commit()?;
        }
        match &self.index {
            Some(index) => {
                let json = serde_json::to_vec_pretty(index).unwrap_or_default();
                write_atomic(&self.dir.join("model.safetensors.index.json"), &json)
            }
            None => Ok(()),
        }
    }
}
