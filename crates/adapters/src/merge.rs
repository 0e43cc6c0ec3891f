//! An adapter baked into its model: every tensor of the sum, one at a time.
//!
//! The sum `W + s·B·A` is taken in f32 from the base as it is stored, and rounded once, to the type that is asked
//! for. No more than one tensor is held beside the base, which stays mapped.

use crate::{Adapter, Error, Result};
use candle_core::{Device, Tensor};
use engobe_autograd::host;
use engobe_formats::sharded::ShardedWriter;
use engobe_kernels::codec;
use engobe_kernels::storage::StorageType;
use engobe_nn::{ModuleMut, ModuleTree, SiteMut, Weight};
use std::path::Path;

/// What [`merge`] writes.
pub struct MergeOptions<'a> {
    /// type of the tensor of that name
    pub storage: &'a dyn Fn(&str) -> StorageType,
    /// most bytes in one file
    pub max_shard_bytes: usize,
    /// the output head is the embedding's matrix
    pub tied_head: bool,
}

/// What [`merge`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// tensors written
    pub tensors: usize,
    /// tensors that the adapter changed
    pub changed: usize,
    /// the head is still the embedding's matrix
    pub tied_head: bool,
}

/// A tensor of the merged model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Hugging Face's name
    pub name: String,
    /// shape
    pub shape: Vec<usize>,
    /// the adapter changes it
    pub changed: bool,
}

/// What a merged model consists of.
#[derive(Clone, Debug)]
pub struct MergePlan {
    /// its tensors, in the order in which [`each_tensor`] yields them
    pub tensors: Vec<Planned>,
    /// the head's matrix is the embedding's, and not among the tensors
    pub tied_head: bool,
}

/// What merging the adapters that are attached to `model` will give; `tied_head` tells whether the base's head is
/// its embedding. A head that no longer is the embedding's matrix becomes a tensor of its own.
pub fn plan(model: &mut dyn ModuleTree, tied_head: bool) -> MergePlan {
    let heads = model.output_heads();
    let tied_head = tied_head && !unties(model, &heads);
    let mut tensors = Vec::new();
    model.visit_modules(&mut |module| {
        let is_embedding = tied_head && heads.iter().any(|h| h == module.path());
        // (a tied head may have a bias, which is its own)
        let own = |tensor: &Planned| !(is_embedding && tensor.name.ends_with(".weight"));
        tensors.extend(planned(&module).into_iter().filter(own));
    });
    MergePlan { tensors, tied_head }
}

/// A tensor's value, taken when it is asked for.
pub type Value<'a> = &'a dyn Fn() -> Result<Tensor>;

/// Calls `f` with every tensor of `plan` and its merged value in f32 on the CPU: `W + s·B·A` is summed only if the
/// value is asked for. `adapter` is the one that is attached to `model`, if there is one.
pub fn each_tensor<E: From<Error>>(
    model: &mut dyn ModuleTree,
    adapter: Option<&Adapter>,
    plan: &MergePlan,
    f: &mut dyn FnMut(&Planned, Value<'_>) -> Result<(), E>,
) -> Result<(), E> {
    if let Some(adapter) = adapter {
        adapter.check_mergeable()?;
    }
    let mut waiting = plan.tensors.iter().peekable();
    let mut result = Ok(());
    model.visit_modules(&mut |module| {
        let of_this = |p: &&Planned| p.name.rsplit_once('.').is_some_and(|(path, _)| path == module.path());
        while result.is_ok()
            && let Some(tensor) = waiting.next_if(|p| of_this(p))
        {
            result = f(tensor, &|| value(&module, tensor, adapter));
        }
    });
    result
}

/// Writes the model with `adapter`, which is attached to it, into `dir`. `progress` sees how many tensors of
/// how many are written.
pub fn merge(
    model: &mut dyn ModuleTree,
    adapter: &Adapter,
    dir: &Path,
    options: &MergeOptions<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Merged> {
    adapter.check_mergeable()?;
    let plan = plan(model, options.tied_head);
    let constants = model.constants()?;
    let announce =
        |name: &str, shape: &[usize]| (name.to_string(), (options.storage)(name).into(), shape.to_vec());
    let of_modules = plan.tensors.iter().map(|p| announce(&p.name, &p.shape));
    let announced = of_modules.chain(constants.iter().map(|(name, t)| announce(name, t.dims()))).collect();
    let mut writer = ShardedWriter::create(dir, announced, options.max_shard_bytes)?;
    let (mut done, all) = (0, plan.tensors.len() + constants.len());
    let mut write = |name: &str, value: &Tensor| -> Result<()> {
        writer.write(name, &encode(name, value, (options.storage)(name), dir)?)?;
        done += 1;
        progress(done, all);
        Ok(())
    };
    each_tensor(model, Some(adapter), &plan, &mut |tensor, value| write(&tensor.name, &value()?))?;
    for (name, value) in &constants {
        write(name, &value.to_device(&Device::Cpu)?)?;
    }
    writer.finish()?;
    Ok(Merged {
        tensors: all,
        changed: plan.tensors.iter().filter(|p| p.changed).count(),
        tied_head: plan.tied_head,
    })
}

/// True if a tied head and the token embedding are no longer the same.
fn unties(model: &mut dyn ModuleTree, heads: &[String]) -> bool {
    // there are other embeddings: of positions, of T5's distances
    let mut tokens = Vec::new();
    model.visit_sites(&mut |site| {
        if let SiteMut::Entry(entry) = site {
            tokens.push(entry.path().to_string());
        }
    });
    let mut changes = Vec::new();
    model.visit_modules(&mut |module| match &module {
        ModuleMut::Linear(m) if heads.iter().any(|h| h == m.path()) => changes.push(m.changes()),
        ModuleMut::Embedding(m) if tokens.iter().any(|path| path == m.path()) => changes.push(m.changes()),
        _ => {}
    });
    // rows of some tokens are trained in both at once; whatever else there is, is in one of them
    changes.iter().any(|all| all.is_none() || *all != changes[0])
}

/// Names and shapes of a module's tensors.
fn planned(module: &ModuleMut<'_>) -> Vec<Planned> {
    let path = module.path();
    let of =
        |kind: &str, shape: Vec<usize>, changed| Planned { name: format!("{path}.{kind}"), shape, changed };
    match module {
        ModuleMut::Linear(m) => {
            let shape = match m.is_transposed_in_files() {
                true => vec![m.in_features(), m.out_features()],
                false => vec![m.out_features(), m.in_features()],
            };
            let mut all = vec![of("weight", shape, !m.weight_is_plain())];
            all.extend(m.bias().map(|b| of("bias", b.dims().to_vec(), !m.bias_is_plain())));
            all
        }
        ModuleMut::Embedding(m) => {
            let (rows, cols) = m.weight().dims();
            vec![of("weight", vec![rows, cols], !m.is_plain())]
        }
        ModuleMut::RmsNorm(m) => vec![of("weight", m.weight().dims().to_vec(), m.is_trained())],
        ModuleMut::LayerNorm(m) => {
            let mut all = vec![of("weight", m.weight().dims().to_vec(), m.weight_is_trained())];
            all.extend(m.bias().map(|b| of("bias", b.dims().to_vec(), m.bias_is_trained())));
            all
        }
    }
}

/// A tensor of a module, with the adapter's part in it.
fn value(module: &ModuleMut<'_>, tensor: &Planned, adapter: Option<&Adapter>) -> Result<Tensor> {
    let value = match module {
        ModuleMut::Linear(m) if tensor.name.ends_with(".bias") => {
            let bias = vector(m.bias(), tensor)?.to_device(&Device::Cpu)?;
            match adapter {
                Some(adapter) => adapter.merged_bias(m.path(), bias)?,
                None => bias,
            }
        }
        ModuleMut::LayerNorm(m) if tensor.name.ends_with(".bias") => vector(m.bias(), tensor)?,
        ModuleMut::Linear(m) => {
            let weight = merged(m.weight(), m.path(), adapter)?;
            if m.is_transposed_in_files() { weight.t()? } else { weight }
        }
        ModuleMut::Embedding(m) => merged(m.weight(), m.path(), adapter)?,
        ModuleMut::RmsNorm(m) => m.weight().clone(),
        ModuleMut::LayerNorm(m) => m.weight().clone(),
    };
    Ok(value.to_device(&Device::Cpu)?.contiguous()?)
}

/// A matrix with the adapter's part in it.
fn merged(weight: &Weight, path: &str, adapter: Option<&Adapter>) -> Result<Tensor> {
    let weight = weight.to_tensor()?;
    match adapter {
        Some(adapter) => adapter.merged_weight(path, weight),
        None => Ok(weight),
    }
}

/// A bias; one that is not there adds nothing.
fn vector(bias: Option<&Tensor>, planned: &Planned) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(bias.clone()),
        None => Ok(Tensor::zeros(planned.shape.as_slice(), candle_core::DType::F32, &Device::Cpu)?),
    }
}

/// A value rounded to what is written; `path` is for the error that names a number beyond the storage's range.
pub fn encode(name: &str, value: &Tensor, storage: StorageType, path: &Path) -> Result<Vec<u8>> {
    let floats = host(value)?;
    let most = if storage == StorageType::F16 { 65504.0 } else { f32::MAX };
    // (a NaN compares as false)
    if !floats.iter().all(|v| v.abs() <= most) {
        return Err(Error::NotFinite { path: path.to_path_buf(), tensor: format!("{name} (as {storage})") });
    }
    Ok(codec::encode_parallel(storage, &floats)?)
}
