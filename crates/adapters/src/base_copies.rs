//! Copies of the base's own weights in adapter files.
//!
//! PEFT (`save_embedding_layers="auto"`) stores the embedding and the head beside an adapter that targets them, or
//! whose vocabulary was changed. Copies that equal the base are passed over; others mean another base.

use crate::{Error, Result};
use engobe_autograd::host;
use engobe_formats::tensor::TensorView;
use engobe_kernels::codec;
use engobe_nn::{ModuleMut, ModuleTree};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Takes the copies of the embedding's and the heads' weights out of an adapter's tensors. `trained` are names
/// that the adapter itself claims.
///
/// # Errors
/// A copy of another shape, or of other values, than the base's.
pub(crate) fn take(
    model: &mut dyn ModuleTree,
    tensors: &mut BTreeMap<String, TensorView>,
    trained: &BTreeSet<&str>,
    file: &Path,
) -> Result<()> {
    let heads = model.output_heads();
    let mut result = Ok(());
    model.visit_modules(&mut |module| {
        let path = module.path();
        let weight = match &module {
            ModuleMut::Embedding(m) => m.weight(),
            ModuleMut::Linear(m) if heads.iter().any(|h| h == path) => m.weight(),
            _ => return,
        };
        for level in ["", ".base_layer"] {
            let name = format!("base_model.model.{path}{level}.weight");
            if trained.contains(name.as_str()) {
                continue;
            }
            if let Some(view) = tensors.remove(&name)
                && result.is_ok()
            {
                let base = weight.to_tensor().map_err(Error::from);
                result = base.and_then(|base| compare(&view, &base, file));
            }
        }
    });
    result
}

/// Equal up to the rounding of the coarser of both storages.
fn compare(view: &TensorView, base: &candle_core::Tensor, file: &Path) -> Result<()> {
    let misfit = |problem: String| Error::DoesNotFit { path: file.to_path_buf(), problems: vec![problem] };
    if view.shape != base.dims() {
        let (found, needed) = (&view.shape, base.dims());
        return Err(misfit(format!("{} is {found:?}, the base model has {needed:?}", view.name)));
    }
    let mut copy = vec![0f32; view.elements()];
    codec::decode(view.storage()?, view.bytes(), &mut copy);
    let base = host(base)?;
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let size = square(&mut base.iter().copied());
    let error = square(&mut base.iter().zip(&copy).map(|(a, b)| a - b));
    // 4-bit storage errs by up to a tenth of a weight's size; another model's weights by more than all of it
    if error <= size * 0.2 * 0.2 {
        return Ok(());
    }
    Err(misfit(format!("{} differs from the base model's: it was trained over another base", view.name)))
}
