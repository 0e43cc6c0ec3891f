//! A model quantized into a new directory, as bitsandbytes and transformers store it.
//!
//! One tensor at a time is read, quantized and written, so that no more than that is held.

use crate::outline::{LinearOutline, Outline};
use crate::registry::Described;
use crate::stored::Stored;
use crate::weights::{Layout, Weights};
use crate::{Error, LoadOptions, Result};
use engobe_formats::bitsandbytes::{self, announce};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::sharded::{Announced, ShardedWriter};
use engobe_formats::tensor::{Dtype, TensorView};
use engobe_kernels::codec;
use engobe_kernels::quantize::Scheme;
use engobe_kernels::storage::StorageType;
use std::collections::BTreeMap;
use std::path::Path;

/// What [`quantize`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizedModel {
    /// matrices that were quantized
    pub quantized: usize,
    /// tensors that stayed as they were
    pub kept: usize,
    /// bytes of all tensors before
    pub bytes_before: u64,
    /// and after
    pub bytes_after: u64,
    /// modules that were left out: output heads
    pub skipped: Vec<String>,
    /// type of the quantized matrices before
    pub original: StorageType,
}

/// A tensor of the model and what becomes of it.
struct Planned<'a> {
    /// Hugging Face's name
    name: String,
    view: &'a TensorView,
    /// the linear layer whose matrix it is
    linear: Option<&'a LinearOutline>,
    /// how the file keeps it
    stored: Stored,
}

/// Quantizes the linear layers of the model at `path`, all but the output head, and writes its tensors into `dir`.
/// `progress` sees how many tensors of how many are written.
///
/// # Errors
/// A model that cannot be loaded, is quantized already, or lacks a tensor; a full disk.
pub fn quantize(
    path: &Path,
    scheme: Scheme,
    dir: &Path,
    max_shard_bytes: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<QuantizedModel> {
    let checkpoint = Checkpoint::open(path)?;
    let described = Described::of(&checkpoint, path)?;
    let weights = Weights::of(&described, &checkpoint, &LoadOptions::default())?;
    let outline = Outline::of(Described::of(&checkpoint, path)?, &checkpoint)?;
    let plan = plan(&checkpoint, &outline, scheme)?;
    let announced = plan.iter().map(|p| p.announced(scheme)).collect::<Result<Vec<_>>>()?;
    let bytes_after = announced.iter().flatten().filter_map(|(_, dtype, shape)| dtype.bytes_of(shape));
    let mut originals = plan.iter().filter(|p| p.linear.is_some()).map(|p| p.view.storage());
    let report = QuantizedModel {
        quantized: plan.iter().filter(|p| p.linear.is_some()).count(),
        kept: plan.iter().filter(|p| p.linear.is_none()).count(),
        bytes_before: plan.iter().map(|p| p.view.bytes().len() as u64).sum(),
        bytes_after: bytes_after.map(|n| n as u64).sum(),
        skipped: outline.linears.iter().filter(|l| l.head).map(|l| l.path.clone()).collect(),
        original: originals.next().transpose()?.unwrap_or(StorageType::F32),
    };
    let mut writer = ShardedWriter::create(dir, announced.into_iter().flatten().collect(), max_shard_bytes)?;
    for (done, planned) in plan.iter().enumerate() {
        for (name, bytes) in planned.tensors(&checkpoint, &weights, scheme)? {
            writer.write(&name, &bytes)?;
        }
        planned.view.release(0..planned.view.bytes().len());
        progress(done + 1, plan.len());
    }
    writer.finish()?;
    Ok(report)
}

/// All tensors under Hugging Face names; every linear layer has its matrix.
fn plan<'a>(checkpoint: &'a Checkpoint, outline: &'a Outline, scheme: Scheme) -> Result<Vec<Planned<'a>>> {
    let matrix =
        |linear: &'a LinearOutline| (outline.name_in(checkpoint, &format!("{}.weight", linear.path)), linear);
    let mut linears: BTreeMap<String, &LinearOutline> =
        outline.linears.iter().filter(|l| !l.head).map(matrix).collect();
    let is_gguf = checkpoint.gguf().is_some();
    let mut plan = Vec::new();
    for view in checkpoint.tensors() {
        let name = match is_gguf {
            // what has no name there stands for settings, which are in the configuration
            true => outline.hf_name(&view.name),
            false => Some(view.name.clone()),
        };
        let Some(name) = name else { continue };
        if let Some(found) = bitsandbytes::find(checkpoint, &name)? {
            return Err(Error::AlreadyQuantized {
                path: checkpoint.path().to_path_buf(),
                tensor: name,
                storage: found.scheme().to_string(),
            });
        }
        let linear = linears.remove(&view.name);
        let stored = if is_gguf { outline.stored(&name) } else { Stored::AsIs };
        plan.push(Planned { name, view, linear, stored });
    }
    if let Some((missing, _)) = linears.pop_first() {
        // the error names those that are near
        checkpoint.get(&missing)?;
    }
    if let Some(none) = plan.iter().find(|p| p.linear.is_none() && matches!(p.view.dtype, Dtype::Other(_))) {
        none.view.storage()?;
    }
    debug_assert!(plan.iter().any(|p| p.linear.is_some()), "{scheme}: a decoder has linear layers");
    Ok(plan)
}

impl Planned<'_> {
    fn announced(&self, scheme: Scheme) -> Result<Vec<Announced>> {
        if let Some(linear) = self.linear {
            return Ok(announce(&self.name, scheme, (linear.rows, linear.cols), self.view.storage()?));
        }
        Ok(vec![(self.name.clone(), self.kept_dtype(), self.view.shape.clone())])
    }

    /// True if its values are written in f32: GGUF blocks, which safetensors does not know, and what is kept in
    /// another form.
    fn is_widened(&self) -> bool {
        let blocks = matches!(&self.view.dtype, Dtype::Storage(storage) if storage.is_quantized());
        blocks || self.stored != Stored::AsIs
    }

    /// Type of a tensor that is not quantized.
    fn kept_dtype(&self) -> Dtype {
        if self.is_widened() { Dtype::Storage(StorageType::F32) } else { self.view.dtype.clone() }
    }

    /// What is written, in the order in which it was announced.
    fn tensors(
        &self,
        checkpoint: &Checkpoint,
        weights: &Weights<'_>,
        scheme: Scheme,
    ) -> Result<Vec<(String, Vec<u8>)>> {
        if let Some(linear) = self.linear {
            let layout = match linear.transposed && checkpoint.gguf().is_none() {
                true => Layout::Columns,
                false => Layout::Rows,
            };
            let dims = (linear.rows, linear.cols);
            let quantized = weights.quantized(checkpoint, &self.name, dims, scheme, layout)?;
            return Ok(bitsandbytes::tensors(&self.name, quantized, self.view.storage()?));
        }
        if !self.is_widened() {
            return Ok(vec![(self.name.clone(), self.view.bytes().to_vec())]);
        }
        let mut floats = vec![0f32; self.view.elements()];
        codec::decode_parallel(self.view.storage()?, self.view.bytes(), &mut floats);
        let rows = self.view.shape.first().copied().unwrap_or(1);
        let floats = self.stored.values_from_gguf(&floats, rows);
        Ok(vec![(self.name.clone(), floats.iter().flat_map(|x| x.to_le_bytes()).collect())])
    }
}
