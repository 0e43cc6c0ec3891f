//! Embedding, norm, and how a model shows its modules.

use crate::entry::Entry;
use crate::linear::Linear;
use crate::prefix::KvPrefix;
use crate::sub_layer::SubLayer;
use candle_core::{Device, Tensor};
use engobe_autograd::ops::{self, Matrix};
use engobe_autograd::{FrozenWeight, Param, Result, Tape, Var};
use std::fmt::Debug;
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

    /// True if both are the same matrix of the base: one place in memory.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Frozen(a), Self::Frozen(b)) => a.is_same(b),
            _ => false,
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

/// Something attached to an embedding.
pub trait EmbeddingAdapter: Debug + Send + Sync {
    /// The rows `[n, d]` of tokens `ids` with this adapter's part in them.
    fn apply(&self, tape: &mut Tape<'_>, ids: &Arc<[u32]>, rows: Var) -> Result<Var>;
}

/// Token embedding `[vocab, d]`.
#[derive(Debug)]
pub struct Embedding {
    path: String,
    /// other paths of the same module
    copies: Vec<String>,
    weight: Weight,
    /// the base's own matrix, while another is trained in its place
    base: Option<Weight>,
    adapters: Vec<Arc<dyn EmbeddingAdapter>>,
}

impl Embedding {
    /// An embedding at a module path.
    pub fn new(path: impl Into<String>, weight: FrozenWeight) -> Self {
        let (copies, adapters) = (Vec::new(), Vec::new());
        Self { path: path.into(), copies, weight: Weight::Frozen(weight), base: None, adapters }
    }

    /// The same, with the other paths at which Hugging Face's model holds this module: files of adapters may repeat
    /// there what they hold for the first.
    pub fn also_at(self, copies: impl IntoIterator<Item = String>) -> Self {
        Self { copies: copies.into_iter().collect(), ..self }
    }

    /// Its other paths.
    pub fn copies(&self) -> &[String] {
        &self.copies
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
        let base = std::mem::replace(&mut self.weight, Weight::Trained(param));
        self.base.get_or_insert(base);
    }

    /// Attaches an adapter; each sees the rows as the one before left them.
    pub fn attach(&mut self, adapter: Arc<dyn EmbeddingAdapter>) {
        self.adapters.push(adapter);
    }

    /// True if the matrix is the base's own and nothing is attached.
    pub fn is_plain(&self) -> bool {
        self.adapters.is_empty() && matches!(self.weight, Weight::Frozen(_))
    }

    /// Takes away what was attached, and what was trained in the base's place.
    pub fn detach(&mut self) {
        self.adapters.clear();
        if let Some(base) = self.base.take() {
            self.weight = base;
        }
    }

    /// What is attached, each by its place in memory: where a head is the embedding's matrix and both have the same, they
    /// are still one. `None` if the matrix is trained in full.
    pub fn changes(&self) -> Option<Vec<*const ()>> {
        let is_frozen = matches!(self.weight, Weight::Frozen(_));
        is_frozen.then(|| self.adapters.iter().map(|adapter| Arc::as_ptr(adapter).cast()).collect())
    }

    /// Rows `ids`: `[n, d]`.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m>, ids: Arc<[u32]>, device: &Device) -> Result<Var> {
        let weight = self.weight.on(tape);
        let mut rows = ops::embedding(tape, &weight, ids.clone(), device)?;
        for adapter in &self.adapters {
            rows = adapter.apply(tape, &ids, rows)?;
        }
        Ok(rows)
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
    /// the base's own weight, while another is trained in its place
    base: Option<Vector>,
}

impl RmsNorm {
    /// A norm at a module path.
    pub fn new(path: impl Into<String>, weight: Tensor, eps: f32) -> Self {
        Self { path: path.into(), weight: Vector::Frozen(weight), plus_one: None, eps, base: None }
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
        let base = std::mem::replace(&mut self.weight, Vector::Trained(param));
        self.base.get_or_insert(base);
    }

    /// Takes away what was trained in the base's place.
    pub fn detach(&mut self) {
        if let Some(base) = self.base.take() {
            self.weight = base;
        }
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
    /// the base's own weight and bias, while others are trained in their place
    base_weight: Option<Vector>,
    base_bias: Option<Vector>,
}

impl LayerNorm {
    /// A norm at a module path.
    pub fn new(path: impl Into<String>, weight: Tensor, bias: Option<Tensor>, eps: f32) -> Self {
        let (weight, bias) = (Vector::Frozen(weight), bias.map(Vector::Frozen));
        Self { path: path.into(), weight, bias, eps, base_weight: None, base_bias: None }
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
        let base = std::mem::replace(&mut self.weight, Vector::Trained(param));
        self.base_weight.get_or_insert(base);
    }

    /// Trains the bias: `param` has its shape.
    pub fn train_bias(&mut self, param: Param) {
        let base = self.bias.replace(Vector::Trained(param));
        self.base_bias = self.base_bias.take().or(base);
    }

    /// Takes away what was trained in the base's place.
    pub fn detach(&mut self) {
        if let Some(base) = self.base_weight.take() {
            self.weight = base;
        }
        if let Some(base) = self.base_bias.take() {
            self.bias = Some(base);
        }
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
    /// Takes away what was attached to the module or trained in its place.
    pub fn detach(&mut self) {
        match self {
            Self::Linear(m) => m.detach(),
            Self::Embedding(m) => m.detach(),
            Self::RmsNorm(m) => m.detach(),
            Self::LayerNorm(m) => m.detach(),
        }
    }

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

/// A place of a model that holds no weights of its own, at which adapters attach.
pub enum SiteMut<'a> {
    /// where embedded tokens enter the blocks: seam 2
    Entry(&'a mut Entry),
    /// before the keys and values of an attention module: seam 3
    KvPrefix(&'a mut KvPrefix),
    /// the end of a sub-layer: seam 4
    SubLayer(&'a mut SubLayer),
}

impl SiteMut<'_> {
    /// Takes away what was attached to the site.
    pub fn detach(&mut self) {
        match self {
            Self::Entry(m) => m.detach(),
            Self::KvPrefix(m) => m.detach(),
            Self::SubLayer(m) => m.detach(),
        }
    }
}

/// A model as adapters see it.
pub trait ModuleTree {
    /// Calls `f` on every module that holds weights, in the order of Hugging Face's `named_modules`.
    fn visit_modules(&mut self, f: &mut dyn FnMut(ModuleMut<'_>));

    /// Calls `f` on every site, block by block from the first to the last.
    fn visit_sites(&mut self, _f: &mut dyn FnMut(SiteMut<'_>)) {}

    /// Takes away all that adapters attached or trained: the model is its base again, to the bit.
    fn detach_all(&mut self) {
        self.visit_modules(&mut |mut module| module.detach());
        self.visit_sites(&mut |mut site| site.detach());
    }

    /// Paths of the output heads, which `all-linear` leaves out.
    fn output_heads(&self) -> Vec<String>;

    /// Tensors of its files, by their names there, that no module holds and nothing adapts: convolutions.
    ///
    /// # Errors
    /// A tensor can't be made.
    fn constants(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }
}
