//! Modules below a path, over tensors that a checkpoint may keep under another prefix: transformers writes the names of
//! a bare encoder without the prefix (`encoder.layer.0`) that they have in a task model (`bert.encoder.layer.0`).

use crate::{Result, Weights};
use candle_core::{Device, Tensor};
use engobe_nn::{Embedding, LayerNorm, Linear, RmsNorm};

/// How an encoder's modules are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// as in the bare model: `encoder.layer.0`
    Bare,
    /// as in a task model, under the base model's prefix: `bert.encoder.layer.0`
    UnderTask,
}

/// A place in the tree of modules.
#[derive(Clone)]
pub(crate) struct Scope<'a> {
    weights: &'a Weights<'a>,
    /// what stands before names in the checkpoint
    file: String,
    /// what stands before module paths
    path: String,
}

impl<'a> Scope<'a> {
    /// The base model, whose prefix in task models is `prefix`; `probe` is a tensor that it has.
    pub fn base(weights: &'a Weights<'a>, prefix: &str, naming: Naming, probe: &str) -> Self {
        let prefix = format!("{prefix}.");
        let file = if weights.contains(&format!("{prefix}{probe}")) { prefix.clone() } else { String::new() };
        let path = if naming == Naming::UnderTask { prefix } else { String::new() };
        Self { weights, file, path }
    }

    /// The whole model.
    pub fn root(weights: &'a Weights<'a>) -> Self {
        Self { weights, file: String::new(), path: String::new() }
    }

    /// The place below `name`.
    pub fn within(&self, name: &str) -> Self {
        let below = |prefix: &str| format!("{prefix}{name}.");
        Self { weights: self.weights, file: below(&self.file), path: below(&self.path) }
    }

    /// The path of the module `name`.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    fn file(&self, name: &str, tensor: &str) -> String {
        format!("{}{name}.{tensor}", self.file)
    }

    /// True if the checkpoint has a tensor of the module `name`.
    pub fn has(&self, name: &str, tensor: &str) -> bool {
        self.weights.contains(&self.file(name, tensor))
    }

    /// A linear layer.
    pub fn linear(&self, name: &str, out: usize, width: usize, bias: bool) -> Result<Linear> {
        let weight = self.weights.linear(&self.file(name, "weight"), out, width)?;
        let bias = bias.then(|| self.weights.vector(&self.file(name, "bias"), out)).transpose()?;
        Ok(Linear::new(self.path(name), weight, bias))
    }

    /// The kernel `[d, d, size]` of a convolution over `d` channels, and its bias.
    pub fn convolution(&self, name: &str, d: usize, size: usize) -> Result<(Vec<f32>, Tensor)> {
        let kernel = self.weights.numbers(&self.file(name, "weight"), &[d, d, size])?;
        Ok((kernel, self.weights.vector(&self.file(name, "bias"), d)?))
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        self.weights.device()
    }

    /// A token embedding.
    pub fn embedding(&self, name: &str, rows: usize, cols: usize) -> Result<Embedding> {
        Ok(Embedding::new(self.path(name), self.weights.matrix(&self.file(name, "weight"), rows, cols)?))
    }

    /// A norm by root mean square.
    pub fn rms_norm(&self, name: &str, width: usize, eps: f32) -> Result<RmsNorm> {
        Ok(RmsNorm::new(self.path(name), self.weights.vector(&self.file(name, "weight"), width)?, eps))
    }

    /// A layer norm. Checkpoints from the time of TensorFlow call its parts gamma and beta.
    pub fn layer_norm(&self, name: &str, width: usize, eps: f32, bias: bool) -> Result<LayerNorm> {
        let [weight, beta] = match self.has(name, "gamma") {
            true => ["gamma", "beta"],
            false => ["weight", "bias"],
        };
        let weight = self.weights.vector(&self.file(name, weight), width)?;
        let bias = bias.then(|| self.weights.vector(&self.file(name, beta), width)).transpose()?;
        Ok(LayerNorm::new(self.path(name), weight, bias, eps))
    }
}
