//! Linear layers that share their input, each with a frozen or trained weight and low-rank deltas.
//!
//! For input x `[n, in]` and layer i with weight Wᵢ `[outᵢ, in]` and delta (A `[r, in]`, B `[outᵢ, r]`, s):
//!
//! ```text
//! u  = drop(x)·Aᵀ            yᵢ = x·Wᵢᵀ + bᵢ + s·u·Bᵀ
//! du = s·dyᵢ·B               dB = s·dyᵢᵀ·u     dA = duᵀ·drop(x)
//! dx = Σᵢ dyᵢ·Wᵢ + mask(du·A)
//! dWᵢ = dyᵢᵀ·x  (only if Wᵢ is trained)        dbᵢ = column sums of dyᵢ
//! ```
//!
//! A spec may put factors on the columns of its input and of its output (IA3, DoRA):
//!
//! ```text
//! y = g ⊙ (l⊙x)·Wᵀ + s·g ⊙ u·Bᵀ + b        or, where the factors cover the bias, g ⊙ (… + b)
//! ```
//!
//! These are ops of their own around the product (`scaled`); layers without factors take the path that they took before.
//!
//! B·A is never formed. On the CPU (`fast.rs`) the whole forward is two parallel jobs (all u; then all y, the deltas
//! riding along as one more term of their layer's sum), the backward as well (all du; then dx, dA and dB together).
//! On a tape that keeps 16 bits, A and B enter these products rounded to them (and du, dx come from the rounded ones, as
//! autocast has it); their gradients go to the f32 parameters unrounded.
//!
//! Saved: x (once, and only if some A or W wants a gradient; not even then if it is cheap to make again) and u.
//! Source: Hu et al. 2021 (LoRA).

mod composed;
mod fast;

use crate::host::{narrowed, widened};
use crate::ops::{self, dims2, dropout, generation};
use crate::tape::Slot;
use crate::var::Kept;
use crate::{Error, FrozenWeight, GradSink, Host, Result, Tape, Var, host};
use candle_core::{DType, Device, Tensor};
use engobe_kernels::narrow::Half;
use engobe_kernels::storage::WeightView;

/// A matrix `[out, in]` that is frozen or trained.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// never gets a gradient
    Frozen(FrozenWeight),
    /// a parameter on the tape
    Trained(Var),
}

impl Matrix {
    /// Rows and columns.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Frozen(w) => Ok((w.rows(), w.cols())),
            Self::Trained(v) => dims2("weight", v.tensor()),
        }
    }

    /// Where its gradient goes.
    pub fn slot(&self) -> Slot {
        match self {
            Self::Frozen(_) => Slot::default(),
            Self::Trained(v) => v.slot(),
        }
    }

    /// The whole matrix as f32 on the device of `like`.
    pub(crate) fn to_tensor(&self, like: &Tensor) -> Result<Tensor> {
        match self {
            Self::Frozen(w) => w.to_tensor(like.device()),
            Self::Trained(v) => Ok(v.tensor().to_dtype(DType::F32)?),
        }
    }
}

/// A matrix borrowed for one call, as the kernels take it.
pub(crate) enum Borrowed<'a> {
    /// in the storage that it has
    Frozen(WeightView<'a>),
    /// floats, rows, columns
    Trained(Host<'a>, usize, usize),
}

impl<'a> Borrowed<'a> {
    /// A weight.
    pub(crate) fn of(matrix: &'a Matrix) -> Result<Self> {
        match matrix {
            Matrix::Frozen(w) => Ok(Self::Frozen(w.view()?)),
            Matrix::Trained(v) => Self::var(v),
        }
    }

    /// A matrix on the tape.
    pub(crate) fn var(v: &'a Var) -> Result<Self> {
        let (rows, cols) = dims2("weight", v.tensor())?;
        Ok(Self::Trained(host(v.tensor())?, rows, cols))
    }

    /// `[rows, cols]`
    pub(crate) fn view(&self) -> WeightView<'_> {
        match self {
            Self::Frozen(view) => *view,
            Self::Trained(data, rows, cols) => WeightView::f32(data, *rows, *cols),
        }
    }
}

/// A low-rank delta `scale · B·A` beside a weight.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[r, in]`
    pub a: Var,
    /// `[out, r]`
    pub b: Var,
    /// bias added after B, `[out]`, also scaled
    pub b_bias: Option<Var>,
    /// factor on the delta
    pub scale: f32,
    /// probability that an element of the delta's input is dropped in training
    pub dropout: f32,
}

/// One linear layer.
#[derive(Clone, Debug)]
pub struct LinearSpec {
    /// `[out, in]`
    pub weight: Matrix,
    /// `[out]`
    pub bias: Option<Var>,
    /// deltas, all added
    pub low_rank: Vec<LowRank>,
    /// factors `[in]` on the columns of x
    pub input_scale: Option<Var>,
    /// factors on the columns of the output
    pub output_scale: Option<OutputScale>,
}

/// Factors on a layer's output.
#[derive(Clone, Debug)]
pub struct OutputScale {
    /// `[out]`
    pub gain: Var,
    /// the bias gets them as well; without, it is added afterwards
    pub covers_bias: bool,
}

impl LinearSpec {
    /// A layer without bias, deltas and factors.
    pub fn plain(weight: Matrix) -> Self {
        Self::new(weight, None, Vec::new())
    }

    /// A layer without factors.
    pub fn new(weight: Matrix, bias: Option<Var>, low_rank: Vec<LowRank>) -> Self {
        Self { weight, bias, low_rank, input_scale: None, output_scale: None }
    }

    /// Puts factors `[in]` on the input, on top of those that are there.
    pub fn scale_input(&mut self, tape: &mut Tape<'_>, factors: Var) -> Result<()> {
        self.input_scale = Some(match self.input_scale.take() {
            Some(old) => ops::scale_rows(tape, &old, &factors)?,
            None => factors,
        });
        Ok(())
    }

    fn is_unscaled(&self) -> bool {
        self.input_scale.is_none() && self.output_scale.is_none()
    }
}

/// One layer: `x` `[n, in]` to `[n, out]`.
pub fn linear<'m>(tape: &mut Tape<'m>, x: &Var, spec: LinearSpec) -> Result<Var> {
    one(forward(tape, x, vec![spec], None, false)?)
}

/// Several layers over one input.
pub fn linear_group<'m>(tape: &mut Tape<'m>, x: &Var, specs: Vec<LinearSpec>) -> Result<Vec<Var>> {
    forward(tape, x, specs, None, false)
}

/// `residual + layer(x)`: the end of a sub-layer.
pub fn linear_residual<'m>(tape: &mut Tape<'m>, x: &Var, spec: LinearSpec, residual: &Var) -> Result<Var> {
    one(forward(tape, x, vec![spec], Some(residual), false)?)
}

/// [`linear_residual`] whose result is the output of the [`Tape::block`] around it. When the block runs again in the
/// backward, the product with the weight is left out: the gradients need u and x, but not the output.
pub fn linear_residual_last<'m>(
    tape: &mut Tape<'m>,
    x: &Var,
    spec: LinearSpec,
    residual: &Var,
) -> Result<Var> {
    one(forward(tape, x, vec![spec], Some(residual), true)?)
}

fn one(mut outs: Vec<Var>) -> Result<Var> {
    outs.pop().ok_or_else(|| Error::shape("linear", "no output"))
}

/// A delta as the group sees it.
struct Delta {
    /// layer that it belongs to
    layer: usize,
    low_rank: LowRank,
    /// seed of its dropout mask; `None`: its input is x itself
    mask: Option<u64>,
}

impl Delta {
    fn rank(&self) -> usize {
        self.low_rank.a.tensor().dims()[0]
    }

    /// What goes through A.
    fn input(&self, x: &Tensor) -> Result<Tensor> {
        self.masked(x.clone())
    }

    /// `t` with the mask on it: x in the forward, the gradient of the masked x in the backward.
    fn masked(&self, t: Tensor) -> Result<Tensor> {
        match self.mask {
            Some(seed) => dropout::apply(seed, self.low_rank.dropout, &t),
            None => Ok(t),
        }
    }
}

/// The layers of one op.
struct Group {
    specs: Vec<LinearSpec>,
    deltas: Vec<Delta>,
    /// rows of x
    n: usize,
    /// columns of x
    width: usize,
    /// what the deltas' factors are rounded to
    half: Option<Half>,
}

/// What the backward needs beside the group.
struct Saved {
    x: Option<Kept>,
    /// u of every delta, unscaled: `[n, r]`
    us: Vec<Kept>,
}

fn forward<'m>(
    tape: &mut Tape<'m>,
    x: &Var,
    specs: Vec<LinearSpec>,
    residual: Option<&Var>,
    last: bool,
) -> Result<Vec<Var>> {
    let (n, width) = dims2("linear", x.tensor())?;
    check(&specs, n, width, residual)?;
    match specs.iter().all(LinearSpec::is_unscaled) {
        true => unscaled(tape, x, specs, residual, last),
        false => scaled(tape, x, specs, residual),
    }
}

/// Layers some of which have factors on their input or output. Those without an input's factors share one op.
fn scaled<'m>(
    tape: &mut Tape<'m>,
    x: &Var,
    specs: Vec<LinearSpec>,
    residual: Option<&Var>,
) -> Result<Vec<Var>> {
    let mut outs: Vec<Option<Var>> = specs.iter().map(|_| None).collect();
    let mut shared = Vec::new();
    let mut scales = Vec::new();
    for (i, mut spec) in specs.into_iter().enumerate() {
        let scale = spec.output_scale.take();
        let bias = scale.as_ref().filter(|s| !s.covers_bias).and_then(|_| spec.bias.take());
        let inside = residual.filter(|_| scale.is_none());
        scales.push(scale.map(|s| (s.gain, bias)));
        match spec.input_scale.take() {
            None => shared.push((i, spec)),
            Some(factors) => {
                let (kept, l) = (tape.keep(x)?, factors.tensor().clone());
                let input = ops::scale_columns(tape, x, &factors, None, None)?;
                let fast = tape.fast(x.tensor());
                let input =
                    input.made_by(move || ops::columns::forward(fast, &kept.value()?, &l, None, None));
                outs[i] = Some(one(unscaled(tape, &input, vec![spec], inside, false)?)?);
            }
        }
    }
    if !shared.is_empty() {
        let (places, specs): (Vec<usize>, Vec<LinearSpec>) = shared.into_iter().unzip();
        let inside = residual.filter(|_| scales.iter().all(Option::is_none));
        for (i, y) in places.into_iter().zip(unscaled(tape, x, specs, inside, false)?) {
            outs[i] = Some(y);
        }
    }
    let finish = |(y, scale): (Option<Var>, Option<(Var, Option<Var>)>)| {
        let y = y.ok_or_else(|| Error::shape("linear", "no output"))?;
        match scale {
            None => Ok(y),
            Some((gain, bias)) => ops::scale_columns(tape, &y, &gain, bias.as_ref(), residual),
        }
    };
    outs.into_iter().zip(scales).map(finish).collect()
}

fn unscaled<'m>(
    tape: &mut Tape<'m>,
    x: &Var,
    specs: Vec<LinearSpec>,
    residual: Option<&Var>,
    last: bool,
) -> Result<Vec<Var>> {
    let (n, width) = dims2("linear", x.tensor())?;
    let fast = tape.fast(x.tensor());
    if let (Some(activations), true) = (tape.generating(), fast) {
        return generation::linear_group(x.tensor(), &specs, residual.map(Var::tensor), activations);
    }
    let mut deltas = Vec::new();
    for (layer, spec) in specs.iter().enumerate() {
        for low_rank in &spec.low_rank {
            let mask = if low_rank.dropout > 0.0 { tape.next_dropout_seed() } else { None };
            deltas.push(Delta { layer, low_rank: low_rank.clone(), mask });
        }
    }
    let group = Group { specs, deltas, n, width, half: tape.half_type() };
    let residual_value = residual.map(Var::tensor);
    let (outs, us) = match fast {
        true if last && tape.is_second_run() => (group.no_outputs()?, group.project(x.tensor())?),
        true => group.fast_forward(x.tensor(), residual_value)?,
        false => group.composed_forward(x.tensor(), residual_value)?,
    };
    let residual_slot = residual.map(Var::slot).unwrap_or_default();
    let mut inputs = vec![x.slot(), residual_slot];
    for spec in &group.specs {
        inputs.push(spec.weight.slot());
        inputs.extend(spec.bias.iter().map(Var::slot));
    }
    for d in &group.deltas {
        inputs.extend([d.low_rank.a.slot(), d.low_rank.b.slot()]);
        inputs.extend(d.low_rank.b_bias.iter().map(Var::slot));
    }
    let keeps_x = group.specs.iter().any(|s| s.weight.slot().is_tracked())
        || group.deltas.iter().any(|d| d.low_rank.a.is_tracked());
    let us = us.into_iter().map(|u| tape.keep(&Var::constant(u))).collect::<Result<_>>()?;
    let saved = Saved { x: keeps_x.then(|| tape.keep(x)).transpose()?, us };
    let x_slot = x.slot();
    Ok(tape.record(&inputs, outs, move |mut grads, sink| {
        let dys: Vec<Option<Tensor>> = (0..group.specs.len()).map(|i| grads.take(i)).collect();
        if residual_slot.is_tracked()
            && let Some(Some(dy)) = dys.first()
        {
            sink.add_shared(residual_slot, dy.clone())?;
        }
        group.bias_grads(&dys, sink)?;
        match fast {
            true => group.fast_backward(saved, &dys, x_slot, sink),
            false => group.composed_backward(saved, &dys, x_slot, sink),
        }
    }))
}

impl Group {
    /// A factor of every delta as it goes into products: on a tape of 16 bits rounded to them, for this op alone.
    fn factors(&self, of: fn(&LowRank) -> &Var) -> Result<Vec<Tensor>> {
        let factor = |d: &Delta| match (of(&d.low_rank).tensor(), self.half) {
            (factor, None) => Ok(factor.clone()),
            (factor, Some(half)) => widened(&narrowed(factor, half)?),
        };
        self.deltas.iter().map(factor).collect()
    }

    /// Tensors with the outputs' shapes that hold nothing.
    fn no_outputs(&self) -> Result<Vec<Tensor>> {
        let nothing = Tensor::zeros((1, 1), DType::F32, &Device::Cpu)?;
        let of = |spec: &LinearSpec| Ok(nothing.broadcast_as((self.n, spec.weight.dims()?.0))?);
        self.specs.iter().map(of).collect()
    }

    /// Gradients of the layers' biases and of the deltas'.
    fn bias_grads(&self, dys: &[Option<Tensor>], sink: &mut GradSink<'_>) -> Result<()> {
        for (spec, dy) in self.specs.iter().zip(dys) {
            if let (Some(bias), Some(dy)) = (spec.bias.as_ref().filter(|b| b.is_tracked()), dy) {
                sink.add(bias.slot(), dy.sum(0)?)?;
            }
        }
        for d in &self.deltas {
            let bias = d.low_rank.b_bias.as_ref().filter(|b| b.is_tracked());
            if let (Some(bias), Some(dy)) = (bias, &dys[d.layer]) {
                sink.add(bias.slot(), (dy.sum(0)? * f64::from(d.low_rank.scale))?)?;
            }
        }
        Ok(())
    }
}

/// Fills `y` `[n, out]` with what the layer's sum starts from: the residual, the bias, and those of its deltas; false if
/// there is nothing and y is untouched.
pub(super) fn preset(spec: &LinearSpec, residual: Option<&Tensor>, y: &mut [f32]) -> Result<bool> {
    let (out, _) = spec.weight.dims()?;
    let mut bias = match &spec.bias {
        Some(bias) => Some(host(bias.tensor())?.to_vec()),
        None => None,
    };
    for delta in &spec.low_rank {
        let Some(b_bias) = &delta.b_bias else { continue };
        let sum = bias.get_or_insert_with(|| vec![0.0; out]);
        let b_bias = host(b_bias.tensor())?;
        sum.iter_mut().zip(b_bias.iter()).for_each(|(s, b)| *s += delta.scale * b);
    }
    match (residual, &bias) {
        (None, None) => return Ok(false),
        (Some(residual), None) => y.copy_from_slice(&host(residual)?),
        (None, Some(bias)) => y.chunks_exact_mut(out).for_each(|row| row.copy_from_slice(bias)),
        (Some(residual), Some(bias)) => {
            let residual = host(residual)?;
            for (row, residual) in y.chunks_exact_mut(out).zip(residual.chunks_exact(out)) {
                for ((y, r), b) in row.iter_mut().zip(residual).zip(bias) {
                    *y = r + b;
                }
            }
        }
    }
    Ok(true)
}

fn check(specs: &[LinearSpec], n: usize, width: usize, residual: Option<&Var>) -> Result<()> {
    if let (Some(residual), Some(spec)) = (residual, specs.first()) {
        let expected = [n, spec.weight.dims()?.0];
        if residual.tensor().dims() != expected {
            let what = format!("residual {:?} beside an output {expected:?}", residual.tensor().dims());
            return Err(Error::shape("linear", what));
        }
    }
    for spec in specs {
        let (out, cols) = spec.weight.dims()?;
        if cols != width {
            return Err(Error::shape(
                "linear",
                format!("weight [{out}, {cols}] for an input of width {width}"),
            ));
        }
        let factors = [
            (spec.input_scale.as_ref(), "input", width),
            (spec.output_scale.as_ref().map(|s| &s.gain), "output", out),
        ];
        for (factors, side, expected) in factors {
            if let Some(found) = factors.map(|f| f.tensor().dims()).filter(|f| *f != [expected]) {
                let what = format!("{found:?} factors on the {side} of a weight [{out}, {cols}]");
                return Err(Error::shape("linear", what));
            }
        }
        for lr in &spec.low_rank {
            let (r, a_in) = dims2("linear", lr.a.tensor())?;
            if a_in != width || lr.b.tensor().dims() != [out, r] {
                return Err(Error::shape(
                    "linear",
                    format!(
                        "delta A [{r}, {a_in}], B {:?} beside weight [{out}, {cols}]",
                        lr.b.tensor().dims()
                    ),
                ));
            }
        }
    }
    Ok(())
}
