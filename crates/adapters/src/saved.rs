//! Modules trained in full beside an adapter (`modules_to_save`) and biases (`bias`): seam 5.

use candle_core::Tensor;
use engobe_autograd::{Param, Result};
use engobe_nn::{LayerNorm, Linear, ModuleMut};

/// Makes the module's tensors parameters, starting from the base's values.
pub(crate) fn train_module(module: &mut ModuleMut<'_>) -> Result<Vec<Param>> {
    train_module_as(module, "")
}

/// [`train_module`] with `level` between the module's path and the tensor in names.
pub(crate) fn train_module_as(module: &mut ModuleMut<'_>, level: &str) -> Result<Vec<Param>> {
    let path = module.path().to_string();
    let param =
        |kind: &str, value: &Tensor| Param::new(format!("base_model.model.{path}{level}.{kind}"), value);
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
    let param = Param::new(format!("base_model.model.{}{level}.bias", linear.path()), bias)?;
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
