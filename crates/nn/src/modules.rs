//! Embedding, norm, and how a model shows its modules.

use crate::linear::Linear;
use candle_core::{Device, Tensor};
use engobe_autograd::ops::{self, Matrix};
use engobe_autograd::{FrozenWeight, Param, Result, Tape, Var};
use std::sync::Arc;

/// A matrix `[rows, cols]` that is frozen, or trained in full (`modules_to_save`).
#[derive(Clone, Debug)]
pub enum Weight {
    /// as it came with the base model
    Frozen(FrozenWeight),
    /// a copy that is trained
    Trained(Param),
}

impl Weight {
    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Self::Frozen(w) => (w.rows(), w.cols()),
            Self::Trained(p) => match p.tensor().dims() {
                [rows, cols] => (*rows, *cols),
                other => (other.iter().product(), 1),
            },
        }
    }

    /// True if it is of quantized blocks beside which activations may be rounded.
    pub fn is_of_blocks(&self) -> bool {
        matches!(self, Self::Frozen(w) if w.is_of_blocks())
    }

    /// The matrix on a tape.
    pub fn on<'m>(&self, tape: &mut Tape<'m>) -> Matrix {
        match self {
            Self::Frozen(w) => Matrix::Frozen(w.clone()),
            Self::Trained(p) => Matrix::Trained(tape.param(p)),
        }
    }

    /// The whole matrix in f32 on the CPU.
    pub fn to_tensor(&self) -> Result<Tensor> {
        match self {
            Self::Frozen(w) => w.to_tensor(&Device::Cpu),
            Self::Trained(p) => Ok(p.tensor().to_device(&Device::Cpu)?),
        }
    }
}

/// A vector that is frozen or trained: a norm's weight, a bias.
#[derive(Clone, Debug)]
pub enum Vector {
    /// as it came with the base model
    Frozen(Tensor),
    /// trained
    Trained(Param),
}

impl Vector {
    /// The value.
    pub fn tensor(&self) -> &Tensor {
        match self {
            Self::Frozen(t) => t,
            Self::Trained(p) => p.tensor(),
        }
    }

    /// The vector on a tape.
    pub fn on<'m>(&self, tape: &mut Tape<'m>) -> Var {
        match self {
            Self::Frozen(t) => Var::constant(t.clone()),
            Self::Trained(p) => tape.param(p),
        }
    }
}

/// Token embedding `[vocab, d]`.
#[derive(Debug)]
pub struct Embedding {
    path: String,
    weight: Weight,
}

impl Embedding {
    /// An embedding at a module path.
    pub fn new(path: impl Into<String>, weight: FrozenWeight) -> Self {
        Self { path: path.into(), weight: Weight::Frozen(weight) }
    }

    /// Module path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Trains the whole matrix: `param` has its shape.
    pub fn train_weight(&mut self, param: Param) {
        self.weight = Weight::Trained(param);
    }

    /// Rows `ids`: `[n, d]`.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m>, ids: Arc<[u32]>, device: &Device) -> Result<Var> {
        let weight = self.weight.on(tape);
        ops::embedding(tape, &weight, ids, device)
    }
}

/// Root-mean-square norm with a weight `[d]`.
#[derive(Debug)]
pub struct RmsNorm {
    path: String,
    weight: Vector,
    /// 1 + the frozen weight, and ones, where the factor is 1 + weight
    plus_one: Option<[Tensor; 2]>,
    eps: f32,
}

impl RmsNorm {
    /// A norm at a module path.
    pub fn new(path: impl Into<String>, weight: Tensor, eps: f32) -> Self {
        Self { path: path.into(), weight: Vector::Frozen(weight), plus_one: None, eps }
    }

    /// A norm whose factor is 1 + weight (Gemma).
    pub fn plus_one(path: impl Into<String>, weight: Tensor, eps: f32) -> Result<Self> {
        let both = [(&weight + 1.0)?, weight.ones_like()?];
        Ok(Self { plus_one: Some(both), ..Self::new(path, weight, eps) })
    }

    /// Module path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The weight's value.
    pub fn weight(&self) -> &Tensor {
        self.weight.tensor()
    }

    /// Trains the weight: `param` has its shape.
    pub fn train_weight(&mut self, param: Param) {
        self.weight = Vector::Trained(param);
    }

    /// True if the weight is trained, and so no longer the base's own.
    pub fn is_trained(&self) -> bool {
        matches!(self.weight, Vector::Trained(_))
    }

    /// Normed rows of `x` `[n, d]`.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m>, x: &Var) -> Result<Var> {
        let weight = match (&self.plus_one, &self.weight) {
            (None, weight) => weight.on(tape),
            (Some([sum, _]), Vector::Frozen(_)) => Var::constant(sum.clone()),
            (Some([_, ones]), Vector::Trained(weight)) => {
                let weight = tape.param(weight);
                ops::add(tape, &weight, &Var::constant(ones.clone()))?
            }
        };
        ops::rms_norm(tape, x, &weight, self.eps)
    }
}

/// Layer norm with a weight and perhaps a bias, `[d]` each.
#[derive(Debug)]
pub struct LayerNorm {
    path: String,
    weight: Vector,
    bias: Option<Vector>,
    eps: f32,
}

impl LayerNorm {
    /// A norm at a module path.
    pub fn new(path: impl Into<String>, weight: Tensor, bias: Option<Tensor>, eps: f32) -> Self {
        let (weight, bias) = (Vector::Frozen(weight), bias.map(Vector::Frozen));
        Self { path: path.into(), weight, bias, eps }
    }

    /// Module path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The weight's value.
    pub fn weight(&self) -> &Tensor {
        self.weight.tensor()
    }

    /// The bias' value.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref().map(Vector::tensor)
    }

    /// Trains the weight: `param` has its shape.
    pub fn train_weight(&mut self, param: Param) {
        self.weight = Vector::Trained(param);
    }

    /// Trains the bias: `param` has its shape.
    pub fn train_bias(&mut self, param: Param) {
        self.bias = Some(Vector::Trained(param));
    }

    /// True if the weight is trained, and so no longer the base's own.
    pub fn weight_is_trained(&self) -> bool {
        matches!(self.weight, Vector::Trained(_))
    }

    /// True if the bias is.
    pub fn bias_is_trained(&self) -> bool {
        matches!(self.bias, Some(Vector::Trained(_)))
    }

    /// Normed rows of `x` `[n, d]`.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m>, x: &Var) -> Result<Var> {
        let weight = self.weight.on(tape);
        let bias = self.bias.as_ref().map(|b| b.on(tape));
        ops::layer_norm(tape, x, &weight, bias.as_ref(), self.eps)
    }
}

/// A norm of either kind.
#[derive(Debug)]
pub enum Norm {
    /// by root mean square
    Rms(RmsNorm),
    /// by mean and variance
    Layer(LayerNorm),
}

impl Norm {
    /// Normed rows of `x` `[n, d]`.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m>, x: &Var) -> Result<Var> {
        match self {
            Self::Rms(norm) => norm.forward(tape, x),
            Self::Layer(norm) => norm.forward(tape, x),
        }
    }

    /// The norm as a module of its model.
    pub fn module(&mut self) -> ModuleMut<'_> {
        match self {
            Self::Rms(norm) => ModuleMut::RmsNorm(norm),
            Self::Layer(norm) => ModuleMut::LayerNorm(norm),
        }
    }
}

/// A module of a model, by kind.
pub enum ModuleMut<'a> {
    /// a linear layer
    Linear(&'a mut Linear),
    /// a token embedding
    Embedding(&'a mut Embedding),
    /// a norm by root mean square
    RmsNorm(&'a mut RmsNorm),
    /// a norm by mean and variance
    LayerNorm(&'a mut LayerNorm),
}

impl ModuleMut<'_> {
    /// Module path.
    pub fn path(&self) -> &str {
        match self {
            Self::Linear(m) => m.path(),
            Self::Embedding(m) => m.path(),
            Self::RmsNorm(m) => m.path(),
            Self::LayerNorm(m) => m.path(),
        }
    }
}

/// A model as adapters see it.
pub trait ModuleTree {
    /// Calls `f` on every module that holds weights, in the order of Hugging Face's `named_modules`.
    fn visit_modules(&mut self, f: &mut dyn FnMut(ModuleMut<'_>));

    /// Paths of the output heads, which `all-linear` leaves out.
    fn output_heads(&self) -> Vec<String>;
}
