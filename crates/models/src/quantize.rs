//! A model quantized into a new directory, as bitsandbytes and transformers store it.
//!
//! One tensor at a time is read, quantized and written, so that no more than that is held.

use crate::llama_config::LlamaConfig;
use crate::weights::Weights;
use crate::{Error, LoadOptions, Result, gguf_names};
use engobe_formats::bitsandbytes::{self, announce};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::hf_config::HfConfig;
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
    /// rows and columns of a linear layer's matrix
    linear: Option<(usize, usize)>,
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
    let options = LoadOptions::default();
    let (config, weights) = match checkpoint.gguf() {
        Some(gguf) => {
            let config = LlamaConfig::from_gguf(gguf)?;
            let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
            (config, Weights::gguf_llama(&checkpoint, &options, heads, kv_heads)?)
        }
        None => {
            let config = LlamaConfig::from_hf(&HfConfig::open(path)?)?;
            (config, Weights::hugging_face(&checkpoint, &options)?)
        }
    };
    let plan = plan(&checkpoint, &config, scheme)?;
    let announced = plan.iter().map(|p| p.announced(scheme)).collect::<Result<Vec<_>>>()?;
    let bytes_after = announced.iter().flatten().filter_map(|(_, dtype, shape)| dtype.bytes_of(shape));
    let mut originals = plan.iter().filter(|p| p.linear.is_some()).map(|p| p.view.storage());
    let report = QuantizedModel {
        quantized: plan.iter().filter(|p| p.linear.is_some()).count(),
        kept: plan.iter().filter(|p| p.linear.is_none()).count(),
        bytes_before: plan.iter().map(|p| p.view.bytes().len() as u64).sum(),
        bytes_after: bytes_after.map(|n| n as u64).sum(),
        skipped: vec!["lm_head".to_string()],
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
fn plan<'a>(checkpoint: &'a Checkpoint, config: &LlamaConfig, scheme: Scheme) -> Result<Vec<Planned<'a>>> {
    let mut linears: BTreeMap<String, (usize, usize)> =
        config.linears().into_iter().map(|(path, dims)| (format!("{path}.weight"), dims)).collect();
    let mut plan = Vec::new();
    for view in checkpoint.tensors() {
        let name = match checkpoint.gguf() {
            // what has no name there stands for settings, which are in the configuration
            Some(_) => gguf_names::to_hf(&view.name),
            None => Some(view.name.clone()),
        };
        let Some(name) = name else { continue };
        if let Some(found) = bitsandbytes::find(checkpoint, &name)? {
            return Err(Error::AlreadyQuantized {
                path: checkpoint.path().to_path_buf(),
                tensor: name,
                storage: found.scheme().to_string(),
            });
        }
        let linear = linears.remove(&name);
        plan.push(Planned { name, view, linear });
    }
    if let Some((missing, _)) = linears.pop_first() {
        let name = if checkpoint.gguf().is_some() { gguf_names::from_hf(&missing) } else { None };
        // the error names those that are near
        checkpoint.get(&name.unwrap_or(missing))?;
    }
    if let Some(none) = plan.iter().find(|p| p.linear.is_none() && matches!(p.view.dtype, Dtype::Other(_))) {
        none.view.storage()?;
    }
    debug_assert!(plan.iter().any(|p| p.linear.is_some()), "{scheme}: a decoder has linear layers");
    Ok(plan)
}

impl Planned<'_> {
    fn announced(&self, scheme: Scheme) -> Result<Vec<Announced>> {
        if let Some(dims) = self.linear {
            return Ok(announce(&self.name, scheme, dims, self.view.storage()?));
        }
        Ok(vec![(self.name.clone(), self.kept_dtype(), self.view.shape.clone())])
    }

    /// Type of a tensor that is not quantized: its own, but for GGUF blocks, which safetensors does not know.
    fn kept_dtype(&self) -> Dtype {
        match &self.view.dtype {
            Dtype::Storage(storage) if storage.is_quantized() => Dtype::Storage(StorageType::F32),
            other => other.clone(),
        }
    }

    /// What is written, in the order in which it was announced.
    fn tensors(
        &self,
        checkpoint: &Checkpoint,
        weights: &Weights<'_>,
        scheme: Scheme,
    ) -> Result<Vec<(String, Vec<u8>)>> {
        if let Some((rows, cols)) = self.linear {
            let quantized = weights.quantized(checkpoint, &self.name, (rows, cols), scheme)?;
            return Ok(bitsandbytes::tensors(&self.name, quantized, self.view.storage()?));
        }
        let bytes = match &self.view.dtype {
            Dtype::Storage(storage) if storage.is_quantized() => {
                let mut floats = vec![0f32; self.view.elements()];
                codec::decode_parallel(*storage, self.view.bytes(), &mut floats);
                floats.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
            _ => self.view.bytes().to_vec(),
        };
        Ok(vec![(self.name.clone(), bytes)])
    }
}
