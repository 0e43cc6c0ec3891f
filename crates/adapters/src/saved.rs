//! Modules trained in full beside an adapter (`modules_to_save`) and biases (`bias`): seam 5.

use crate::modules::nothing;
use crate::target::Targets;
use candle_core::Tensor;
use engobe_autograd::{Param, Result};
use engobe_formats::peft::PeftConfig;
use engobe_nn::{LayerNorm, Linear, ModuleMut, ModuleTree};

/// What stands before a module's path in PEFT's files of methods that adapt modules.
pub(crate) const ROOT: &str = "base_model.model.";
/// The same of prompts and prefixes, which PEFT does not wrap the model for.
pub(crate) const PROMPT_ROOT: &str = "base_model.";

/// Trains the modules that `modules_to_save` names, for methods that do not walk over modules themselves; `root`
/// stands before their paths in files.
///
/// # Errors
/// A name that no module has.
pub(crate) fn train_named(
    model: &mut dyn ModuleTree,
    config: &PeftConfig,
    root: &str,
) -> crate::Result<Vec<Param>> {
    let mut params = Vec::new();
    each_named(model, config, &mut |module| {
        params.extend(train_module_as(module, root, "")?);
        Ok(())
    })?;
    Ok(params)
}

/// Sizes of what [`train_named`] would train.
pub(crate) fn count_named(model: &mut dyn ModuleTree, config: &PeftConfig) -> crate::Result<Vec<usize>> {
    let mut sizes = Vec::new();
    each_named(model, config, &mut |module| {
        sizes.extend(elements(module));
        Ok(())
    })?;
    Ok(sizes)
}

fn each_named(
    model: &mut dyn ModuleTree,
    config: &PeftConfig,
    f: &mut dyn FnMut(&mut ModuleMut<'_>) -> Result<()>,
) -> crate::Result<()> {
    let names = config.names("modules_to_save")?;
    if names.is_empty() {
        return Ok(());
    }
    let targets = Targets::saving(&names)?;
    let (mut paths, mut result) = (Vec::new(), Ok(()));
    model.visit_modules(&mut |mut module| {
        paths.push(module.path().to_string());
        if result.is_ok() && targets.saves(module.path()) {
            result = f(&mut module);
        }
    });
    result?;
    match targets.unmatched(&paths).1.first() {
        Some(name) => Err(nothing("modules_to_save", (*name).to_string(), &paths)),
        None => Ok(()),
    }
}

/// Sizes of a module's tensors.
pub(crate) fn elements(module: &ModuleMut<'_>) -> Vec<usize> {
    let of = |weight: usize, bias: Option<&Tensor>| {
        [weight].into_iter().chain(bias.map(Tensor::elem_count)).collect()
    };
    let matrix = |(rows, cols): (usize, usize)| rows * cols;
    match module {
        ModuleMut::Linear(m) => of(matrix(m.weight().dims()), m.bias()),
        ModuleMut::Embedding(m) => of(matrix(m.weight().dims()), None),
        ModuleMut::RmsNorm(m) => of(m.weight().elem_count(), None),
        ModuleMut::LayerNorm(m) => of(m.weight().elem_count(), m.bias()),
    }
}
/// Makes the module's tensors parameters, starting from the base's values.
pub(crate) fn train_module(module: &mut ModuleMut<'_>) -> Result<Vec<Param>> {
    train_module_as(module, ROOT, "")
}

/// [`train_module`] with another `root` of names, and `level` between the module's path and the tensor.
pub(crate) fn train_module_as(module: &mut ModuleMut<'_>, root: &str, level: &str) -> Result<Vec<Param>> {
    let path = module.path().to_string();
    let param = |kind: &str, value: &Tensor| Param::new(format!("{root}{path}{level}.{kind}"), value);
    Ok(match module {
        ModuleMut::Linear(linear) => {
            let weight = param("weight", &linear.weight().to_tensor()?)?;
            linear.train_weight(weight.clone());
            let mut params = vec![weight];
            if let Some(bias) = linear.bias() {
                let bias = param("bias", bias)?;
                linear.train_bias(bias.clone());
                params.push(bias);
            }
            params
        }
        ModuleMut::Embedding(embedding) => {
            let weight = param("weight", &embedding.weight().to_tensor()?)?;
            embedding.train_weight(weight.clone());
            vec![weight]
        }
        ModuleMut::RmsNorm(norm) => {
            let weight = param("weight", norm.weight())?;
            norm.train_weight(weight.clone());
            vec![weight]
        }
        ModuleMut::LayerNorm(norm) => {
            let weight = param("weight", norm.weight())?;
            norm.train_weight(weight.clone());
            let mut params = vec![weight];
            if let Some(bias) = norm.bias() {
                let bias = param("bias", bias)?;
                norm.train_bias(bias.clone());
                params.push(bias);
            }
            params
        }
    })
}

/// Trains a linear layer's bias alone. PEFT keeps the base layer one level down in an adapted module, and
/// the bias' name in files shows it.
pub(crate) fn train_bias(linear: &mut Linear, adapted: bool) -> Result<Option<Param>> {
    let Some(bias) = linear.bias() else { return Ok(None) };
    let level = if adapted { ".base_layer" } else { "" };
    let param = Param::new(format!("{ROOT}{}{level}.bias", linear.path()), bias)?;
    linear.train_bias(param.clone());
    Ok(Some(param))
}

/// Trains a layer norm's bias alone.
pub(crate) fn train_norm_bias(norm: &mut LayerNorm) -> Result<Option<Param>> {
    let Some(bias) = norm.bias() else { return Ok(None) };
    let param = Param::new(format!("base_model.model.{}.bias", norm.path()), bias)?;
    norm.train_bias(param.clone());
    Ok(Some(param))
}
