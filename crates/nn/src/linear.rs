//! Linear layers: seam 1.

use crate::modules::{Vector, Weight};
use candle_core::Tensor;
use engobe_autograd::ops::{self, Head, LinearSpec, Matrix, OutputScale};
use engobe_autograd::{FrozenWeight, Param, Result, Tape, Var};
use std::fmt::Debug;
use std::sync::Arc;

/// Something attached to a linear layer. It describes what it adds in the terms of [`LinearSpec`], so that
/// layers that share an input still run as one op.
pub trait LinearAdapter: Debug + Send + Sync {
    /// Adds this adapter's part to the layer's description for one forward pass.
    fn extend(&self, tape: &mut Tape<'_>, spec: &mut LinearSpec) -> Result<()>;

    /// True if it changes the layer's bias, and not only its matrix.
    fn changes_bias(&self) -> bool {
        false
    }
}

/// `y = x·Wᵀ + bias`, plus what adapters add.
#[derive(Debug)]
pub struct Linear {
    path: String,
    weight: Weight,
    bias: Option<Vector>,
    adapters: Vec<Arc<dyn LinearAdapter>>,
    /// the base's own matrix and bias, while others are trained in their place
    base_weight: Option<Weight>,
    base_bias: Option<Vector>,
    file_transposed: bool,
}

impl Linear {
    /// A layer at a module path; `bias` is `[out]`.
    pub fn new(path: impl Into<String>, weight: FrozenWeight, bias: Option<Tensor>) -> Self {
        Self {
            path: path.into(),
            weight: Weight::Frozen(weight),
            bias: bias.map(Vector::Frozen),
            adapters: Vec::new(),
            base_weight: None,
            base_bias: None,
            file_transposed: false,
        }
    }

    /// Says that the model's files hold the matrix as `[in, out]` (transformers' `Conv1D`).
    pub fn transposed_in_files(mut self) -> Self {
        self.file_transposed = true;
        self
    }

    /// True if the model's files hold the matrix as `[in, out]`.
    pub fn is_transposed_in_files(&self) -> bool {
        self.file_transposed
    }

    /// Module path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The matrix `[out, in]`.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The bias' value.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref().map(Vector::tensor)
    }

    /// Input features.
    pub fn in_features(&self) -> usize {
        self.weight.dims().1
    }

    /// Output features.
    pub fn out_features(&self) -> usize {
        self.weight.dims().0
    }

    /// Puts another frozen matrix of this shape in the place of the base's.
    pub fn set_weight(&mut self, weight: FrozenWeight) {
        let base = std::mem::replace(&mut self.weight, Weight::Frozen(weight));
        self.base_weight.get_or_insert(base);
    }

    /// Trains the whole matrix: `param` has its shape.
    pub fn train_weight(&mut self, param: Param) {
        let base = std::mem::replace(&mut self.weight, Weight::Trained(param));
        self.base_weight.get_or_insert(base);
    }

    /// Trains the bias: `param` has its shape.
    pub fn train_bias(&mut self, param: Param) {
        let base = self.bias.replace(Vector::Trained(param));
        self.base_bias = self.base_bias.take().or(base);
    }

    /// Takes away what was attached, and what was trained in the base's place.
    pub fn detach(&mut self) {
        self.adapters.clear();
        if let Some(base) = self.base_weight.take() {
            self.weight = base;
        }
        if let Some(base) = self.base_bias.take() {
            self.bias = Some(base);
        }
    }

    /// Attaches an adapter; several add up.
    pub fn attach(&mut self, adapter: Arc<dyn LinearAdapter>) {
        self.adapters.push(adapter);
    }

    /// What is attached, as [`Embedding::changes`](crate::Embedding::changes) has it.
    pub fn changes(&self) -> Option<Vec<*const ()>> {
        let is_frozen = matches!(self.weight, Weight::Frozen(_));
        is_frozen.then(|| self.adapters.iter().map(|adapter| Arc::as_ptr(adapter).cast()).collect())
    }

    /// True if nothing is attached and nothing is trained.
    pub fn is_plain(&self) -> bool {
        self.weight_is_plain() && self.bias_is_plain()
    }

    /// True if the matrix is the base's own and nothing is added to it.
    pub fn weight_is_plain(&self) -> bool {
        self.adapters.is_empty() && matches!(self.weight, Weight::Frozen(_))
    }

    /// True if the bias is the base's own.
    pub fn bias_is_plain(&self) -> bool {
        !matches!(self.bias, Some(Vector::Trained(_))) && !self.adapters.iter().any(|a| a.changes_bias())
    }

    /// The layer with its adapters for one forward pass.
    pub fn spec(&self, tape: &mut Tape<'_>) -> Result<LinearSpec> {
        let bias = self.bias.as_ref().map(|b| b.on(tape));
        let mut spec = LinearSpec::new(self.weight.on(tape), bias, Vec::new());
        for adapter in &self.adapters {
            adapter.extend(tape, &mut spec)?;
        }
        Ok(spec)
    }

    /// The layer as an output head, and its input with what the adapters do to it: [`ops::head_loss`] reads a matrix,
    /// a bias and one low-rank delta, so factors are multiplied in and deltas laid side by side.
    pub fn head(&self, tape: &mut Tape<'_>, x: &Var) -> Result<(Var, Head)> {
        let spec = self.spec(tape)?;
        let x = match &spec.input_scale {
            Some(factors) => ops::scale_columns(tape, x, factors, None, None)?,
            None => x.clone(),
        };
        let (mut us, mut bs, mut bias) = (Vec::new(), Vec::new(), None);
        for delta in spec.low_rank {
            let input = ops::drop_out(tape, &x, delta.dropout)?;
            let u = ops::linear(tape, &input, LinearSpec::plain(Matrix::Trained(delta.a)))?;
            us.push(ops::scale(tape, &u, delta.scale)?);
            bs.push(delta.b);
            if let Some(b) = delta.b_bias {
                let b = ops::scale(tape, &b, delta.scale)?;
                bias = Some(plus(tape, bias, b)?);
            }
        }
        let mut low_rank = match us.len() {
            0 => None,
            1 => us.pop().zip(bs.pop()),
            _ => Some((ops::concat_columns(tape, &us)?, ops::concat_columns(tape, &bs)?)),
        };
        let mut weight = spec.weight;
        let mut late = spec.bias;
        if let Some(OutputScale { gain, covers_bias }) = spec.output_scale {
            let matrix = match weight {
                Matrix::Frozen(w) => Var::constant(w.to_tensor(x.tensor().device())?),
                Matrix::Trained(w) => w,
            };
            weight = Matrix::Trained(ops::scale_rows(tape, &matrix, &gain)?);
            low_rank = match low_rank {
                Some((u, b)) => Some((u, ops::scale_rows(tape, &b, &gain)?)),
                None => None,
            };
            if let Some(b) = late.take_if(|_| covers_bias) {
                bias = Some(plus(tape, bias, b)?);
            }
            bias = match bias {
                Some(b) => Some(ops::scale_rows(tape, &b, &gain)?),
                None => None,
            };
        }
        if let Some(b) = late {
            bias = Some(plus(tape, bias, b)?);
        }
        Ok((x, Head { weight, bias, low_rank, soft_cap: None }))
    }

    /// `x` `[n, in]` to `[n, out]`.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m>, x: &Var) -> Result<Var> {
        let spec = self.spec(tape)?;
        ops::linear(tape, x, spec)
    }

    /// `residual + layer(x)`, as one op.
    pub fn forward_residual<'m>(&'m self, tape: &mut Tape<'m>, x: &Var, residual: &Var) -> Result<Var> {
        let spec = self.spec(tape)?;
        ops::linear_residual(tape, x, spec, residual)
    }

    /// [`Linear::forward_residual`] whose result is the output of the block around it: when the block runs again in
    /// the backward, nobody reads it and it is not computed.
    pub fn forward_residual_last<'m>(&'m self, tape: &mut Tape<'m>, x: &Var, residual: &Var) -> Result<Var> {
        let spec = self.spec(tape)?;
        ops::linear_residual_last(tape, x, spec, residual)
    }
}

/// Layers that share their input, as one op.
pub fn linear_group<'m, const N: usize>(
    tape: &mut Tape<'m>,
    x: &Var,
    layers: [&'m Linear; N],
) -> Result<[Var; N]> {
    let specs = layers.iter().map(|l| l.spec(tape)).collect::<Result<_>>()?;
    let outs = ops::linear_group(tape, x, specs)?;
    outs.try_into().map_err(|_| engobe_autograd::Error::shape("linear_group", "one output a layer"))
}

/// `a + b`, where there is an a.
fn plus(tape: &mut Tape<'_>, a: Option<Var>, b: Var) -> Result<Var> {
    match a {
        Some(a) => ops::add(tape, &a, &b),
        None => Ok(b),
    }
}
