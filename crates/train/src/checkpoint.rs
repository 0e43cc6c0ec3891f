//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! A checkpoint is a directory `checkpoints/step-00000120` that holds the adapter (`adapter.safetensors`),
//! the optimizer's state (`optimizer.safetensors`) and the rest (`state.json`). It is written under another
//! name, every file is fsynced, and then it is renamed: what carries the final name is whole, whatever
//! moment the process was killed at.

use crate::metrics::StepMetrics;
use crate::optimizer::StateTensor;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use engobe_autograd::{host, tensor_of};
use engobe_data::Cursor;
use engobe_formats::safetensors_file::{SafetensorsFile, write_safetensors, write_typed};
use engobe_formats::tensor::TensorView;
use engobe_kernels::codec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const DIR: &str = "checkpoints";
const PREFIX: &str = "step-";
const PARTIAL: &str = "partial-";

/// The part of a run's state that is not tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// optimizer steps done
    pub step: usize,
    /// where the data goes on
    pub cursor: Cursor,
    /// what the run was: settings and data that must not change under it
    pub fingerprint: String,
    /// best evaluation loss so far
    pub best_eval_loss: Option<f64>,
    /// best value of what decides on the best step, the sign such that more is better
    #[serde(default)]
    pub best_value: Option<f64>,
    /// step of the best evaluation
    pub best_step: Option<usize>,
    /// evaluations since the best one
    pub evals_without_gain: usize,
    /// the run ended early because evaluations stopped getting better
    pub stopped_early: bool,
    /// loss of the last step
    pub last_loss: Option<f64>,
    /// tokens seen
    pub tokens: u64,
    /// labels learned from
    pub label_tokens: u64,
    /// seconds spent in steps
    pub seconds: f64,
    /// the last step's line, if its evaluation was due and could not be done: it is not in `metrics.jsonl` yet
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unevaluated: Option<StepMetrics>,
}

/// A checkpoint read back.
pub struct Checkpoint {
    /// everything that is not tensors
    pub state: RunState,
    /// adapter tensors by name
    pub adapter: BTreeMap<String, Tensor>,
    /// optimizer tensors by name, as they lie in the file
    pub optimizer: BTreeMap<String, TensorView>,
}

/// Writes a checkpoint and removes all but the newest `keep`.
pub fn save(
    out: &Path,
    state: &RunState,
    adapter: &BTreeMap<String, Tensor>,
    optimizer: Vec<StateTensor<'_>>,
    keep: usize,
) -> Result<PathBuf> {
    let dir = out.join(DIR);
    fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
    let partial = dir.join(format!("{PARTIAL}{:08}", state.step));
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(Error::io(&partial))?;
    }
    fs::create_dir(&partial).map_err(Error::io(&partial))?;
    if let Err(error) = write_files(&partial, state, adapter, optimizer) {
        // a full disk: what is half written only takes room
        let _ = fs::remove_dir_all(&partial);
        return Err(error);
    }
    let done = dir.join(format!("{PREFIX}{:08}", state.step));
    if done.exists() {
        // the same step of the same run, written before a kill: identical, and already whole
        fs::remove_dir_all(&partial).map_err(Error::io(&partial))?;
    } else {
        fs::rename(&partial, &done).map_err(Error::io(&done))?;
        sync_dir(&dir)?;
    }
    prune(&dir, keep)?;
    Ok(done)
}

fn write_files(
    dir: &Path,
    state: &RunState,
    adapter: &BTreeMap<String, Tensor>,
    optimizer: Vec<StateTensor<'_>>,
) -> Result<()> {
    write_tensors(&dir.join("adapter.safetensors"), adapter)?;
    // borrowed: a copy of the optimizer's state would be the run's peak of memory
    let tensors = optimizer.into_iter().map(|t| (t.name, t.dtype, t.shape, t.data)).collect();
    write_typed(&dir.join("optimizer.safetensors"), tensors, &BTreeMap::new())?;
    let path = dir.join("state.json");
    let json = serde_json::to_vec_pretty(state)
        .map_err(|e| Error::BadFile { path: path.clone(), what: e.to_string() })?;
    Ok(engobe_formats::atomic::write_atomic(&path, &json)?)
}

/// The newest checkpoint of the run in `out`, if there is one.
pub fn latest(out: &Path) -> Result<Option<PathBuf>> {
    Ok(complete(&out.join(DIR))?.pop())
}

/// Reads a checkpoint.
pub fn load(dir: &Path) -> Result<Checkpoint> {
    let path = dir.join("state.json");
    let json = fs::read(&path).map_err(Error::io(&path))?;
    let state = serde_json::from_slice(&json).map_err(|e| Error::BadFile { path, what: e.to_string() })?;
    let optimizer = SafetensorsFile::open(&dir.join("optimizer.safetensors"))?;
    let optimizer = optimizer.tensors().map(|t| (t.name.clone(), t.clone())).collect();
    Ok(Checkpoint { state, adapter: read_tensors(&dir.join("adapter.safetensors"))?, optimizer })
}

/// Whole checkpoints, oldest first.
fn complete(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        if path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(PREFIX)) {
            found.push(path);
        }
    }
    found.sort(); // names are zero-padded
    Ok(found)
}

/// Removes old checkpoints and what kills left half-written. A directory loses its final name before its
/// files go, so that a kill in between leaves nothing that looks whole.
fn prune(dir: &Path, keep: usize) -> Result<()> {
    let found = complete(dir)?;
    for old in found.iter().rev().skip(keep.max(1)) {
        let name = old.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let doomed = dir.join(format!("{PARTIAL}old-{name}"));
        fs::rename(old, &doomed).map_err(Error::io(old))?;
    }
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        if path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(PARTIAL)) {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

fn sync_dir(dir: &Path) -> Result<()> {
    fs::File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io(dir))
}

pub(crate) fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let on_host = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.contiguous();
    let tensors = tensors.iter().map(|(name, t)| Ok((name, on_host(t)?))).collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::with_capacity(tensors.len());
    for (name, tensor) in &tensors {
        rows.push(((*name).clone(), tensor.dims().to_vec(), host(tensor)?));
    }
    Ok(write_safetensors(path, &rows, &BTreeMap::new())?)
}

fn read_tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let file = SafetensorsFile::open(path)?;
    let mut tensors = BTreeMap::new();
    for view in file.tensors() {
        let mut data = vec![0f32; view.shape.iter().product()];
        codec::decode(view.storage()?, view.bytes(), &mut data);
        tensors.insert(view.name.clone(), tensor_of(data, view.shape.as_slice())?);
    }
    Ok(tensors)
}
