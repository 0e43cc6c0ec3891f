//! Parameters from the tensors of a file.

use crate::{Error, Result};
use candle_core::Tensor;
use engobe_autograd::{Param, tensor_of};
use engobe_formats::tensor::TensorView;
use engobe_kernels::codec;
use std::collections::BTreeMap;
use std::path::Path;

/// Sets each parameter from the tensor of its name; nothing is set unless every tensor finds its parameter and every
/// parameter its tensor.
pub(crate) fn by_name(params: &[&Param], path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
    let params: BTreeMap<&str, &Param> = params.iter().map(|p| (p.name(), *p)).collect();
    let mut problems = Vec::new();
    let mut values = Vec::new();
    for (name, view) in tensors {
        match params.get(name.as_str()) {
            None => problems.push(format!("{name} matches no module")),
            Some(p) if p.tensor().dims() != view.shape => {
                problems.push(format!("{name} is {:?}, the model needs {:?}", view.shape, p.tensor().dims()));
            }
            Some(p) => values.push((*p, view)),
        }
    }
    let missing = params.keys().filter(|n| !tensors.contains_key(**n));
    problems.extend(missing.map(|n| format!("{n} is missing from the file")));
    if !problems.is_empty() {
        return Err(Error::DoesNotFit {
            path: path.to_path_buf(),
            problems: engobe_formats::shorten(problems),
        });
    }
    for (param, view) in values {
        param.set(&value(view, path)?.to_device(param.tensor().device())?)?;
    }
    Ok(())
}

/// A file's tensor in f32 on the CPU.
///
/// # Errors
/// It holds an infinity or a NaN.
pub(crate) fn value(view: &TensorView, path: &Path) -> Result<Tensor> {
    let mut data = vec![0f32; view.elements()];
    codec::decode(view.storage()?, view.bytes(), &mut data);
    if data.iter().any(|v| !v.is_finite()) {
        return Err(Error::NotFinite { path: path.to_path_buf(), tensor: view.name.clone() });
    }
    Ok(tensor_of(data, view.shape.as_slice())?)
}
