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
use engobe_nn::{Linear, ModuleMut, ModuleTree, Weight};
use std::collections::BTreeMap;
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

/// A tensor to be written.
struct Planned {
    name: String,
    shape: Vec<usize>,
    changed: bool,
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
    let heads = model.output_heads();
    let tied_head = options.tied_head && !unties(model, &heads);
    let is_shared = |path: &str| tied_head && heads.iter().any(|h| h == path);
    let mut plan: Vec<Planned> = Vec::new();
    model.visit_modules(&mut |module| {
        if !is_shared(module.path()) {
            plan.extend(planned(&module));
        }
    });
    let announced =
        plan.iter().map(|p| (p.name.clone(), (options.storage)(&p.name).into(), p.shape.clone())).collect();
    let mut writer = ShardedWriter::create(dir, announced, options.max_shard_bytes)?;
    let deltas: BTreeMap<&str, Vec<&crate::LoraLayer>> =
        adapter.layers().iter().fold(BTreeMap::new(), |mut map, layer| {
            map.entry(layer.path()).or_insert_with(Vec::new).push(&**layer);
            map
        });
    let (mut result, mut done) = (Ok(()), 0);
    model.visit_modules(&mut |module| {
        if result.is_err() || is_shared(module.path()) {
            return;
        }
        let layers = deltas.get(module.path()).map_or(&[][..], Vec::as_slice);
        result = values(&module, layers).and_then(|values| {
            for (name, value) in values {
                write(&mut writer, &name, &value, (options.storage)(&name), dir)?;
                done += 1;
                progress(done, plan.len());
            }
            Ok(())
        });
    });
    result?;
    writer.finish()?;
    Ok(Merged { tensors: plan.len(), changed: plan.iter().filter(|p| p.changed).count(), tied_head })
}

/// True if a tied head and the embedding are no longer the same.
fn unties(model: &mut dyn ModuleTree, heads: &[String]) -> bool {
    let mut changed = false;
    model.visit_modules(&mut |module| {
        changed |= match &module {
            ModuleMut::Linear(linear) => heads.iter().any(|h| h == linear.path()) && !linear.is_plain(),
            ModuleMut::Embedding(embedding) => matches!(embedding.weight(), Weight::Trained(_)),
            ModuleMut::RmsNorm(_) => false,
        }
    });
    changed
}

/// Names and shapes of a module's tensors.
fn planned(module: &ModuleMut<'_>) -> Vec<Planned> {
    let path = module.path();
    let of =
        |kind: &str, shape: Vec<usize>, changed| Planned { name: format!("{path}.{kind}"), shape, changed };
    match module {
        ModuleMut::Linear(m) => {
            let mut all = vec![of("weight", vec![m.out_features(), m.in_features()], !m.is_plain())];
            all.extend(m.bias().map(|b| of("bias", b.dims().to_vec(), !m.is_plain())));
            all
        }
        ModuleMut::Embedding(m) => {
            let (rows, cols) = m.weight().dims();
            vec![of("weight", vec![rows, cols], matches!(m.weight(), Weight::Trained(_)))]
        }
        ModuleMut::RmsNorm(m) => vec![of("weight", m.weight().dims().to_vec(), false)],
    }
}

/// A module's tensors with the adapter's part in them, in [`planned`]'s order.
fn values(module: &ModuleMut<'_>, layers: &[&crate::LoraLayer]) -> Result<Vec<(String, Tensor)>> {
    let path = module.path();
    let named = |kind: &str, value: Tensor| (format!("{path}.{kind}"), value);
    Ok(match module {
        ModuleMut::Linear(m) => {
            let mut all = vec![named("weight", linear_weight(m, layers)?)];
            all.extend(m.bias().map(|b| named("bias", b.clone())));
            all
        }
        ModuleMut::Embedding(m) => vec![named("weight", m.weight().to_tensor()?)],
        ModuleMut::RmsNorm(m) => vec![named("weight", m.weight().clone())],
    })
}

fn linear_weight(linear: &Linear, layers: &[&crate::LoraLayer]) -> Result<Tensor> {
    let mut weight = linear.weight().to_tensor()?;
    for layer in layers {
        weight = (weight + layer.delta()?.to_device(&Device::Cpu)?)?;
    }
    Ok(weight)
}

fn write(
    writer: &mut ShardedWriter,
    name: &str,
    value: &Tensor,
    storage: StorageType,
    dir: &Path,
) -> Result<()> {
    let value = value.to_device(&Device::Cpu)?.contiguous()?;
    let floats = host(&value)?;
    let most = if storage == StorageType::F16 { 65504.0 } else { f32::MAX };
    // (a NaN compares as false)
    if !floats.iter().all(|v| v.abs() <= most) {
        return Err(Error::NotFinite { path: dir.to_path_buf(), tensor: format!("{name} (as {storage})") });
    }
    let mut bytes = Vec::new();
    codec::encode(storage, &floats, &mut bytes)?;
    Ok(writer.write(name, &bytes)?)
}
