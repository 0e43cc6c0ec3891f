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
//! B·A is never formed. The deltas of all layers in the group that see the same x (no dropout) run as one
//! pass: their A are stacked, so that x is read once for all u, once for all dA, and dx gets one product.
//! Saved: x (once, and only if some A or W wants a gradient) and u. Source: Hu et al. 2021 (LoRA).

use crate::tape::{OutGrads, Slot};
use crate::{
    Error, FrozenWeight, GradSink, Result, Tape, Var, host, ops::dims2, ops::dropout, ops::generation, tensor_of, uninit,
};
use candle_core::{DType, Tensor};
use engobe_kernels::mat::{MatMut, MatRef};
use engobe_kernels::matmul;
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

    /// Runs `f` on the matrix as the kernels take it.
    pub(crate) fn with_view<R>(&self, f: impl FnOnce(WeightView<'_>) -> R) -> Result<R> {
        match self {
            Self::Frozen(w) => Ok(f(w.view()?)),
            Self::Trained(v) => {
                let (rows, cols) = self.dims()?;
                Ok(f(WeightView::f32(&host(v.tensor())?, rows, cols)))
            }
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
}

impl LinearSpec {
    /// A layer without bias and deltas.
    pub fn plain(weight: Matrix) -> Self {
        Self { weight, bias: None, low_rank: Vec::new() }
    }
}

/// One layer: `x` `[n, in]` to `[n, out]`.
pub fn linear<'m>(tape: &mut Tape<'m>, x: &Var, spec: LinearSpec) -> Result<Var> {
    let mut outs = linear_group(tape, x, vec![spec])?;
    outs.pop().ok_or_else(|| Error::shape("linear", "no output"))
}

/// A delta as the group sees it.
struct Delta {
    /// layer that it belongs to
    layer: usize,
    low_rank: LowRank,
    /// its input: x, or the dropped-out x
    input: Tensor,
    /// seed of its dropout mask; `None`: the input is x itself, and the delta runs in the stacked pass
    mask: Option<u64>,
    /// `[n, r]`, unscaled
    u: Tensor,
}

/// Several layers over one input.
pub fn linear_group<'m>(tape: &mut Tape<'m>, x: &Var, specs: Vec<LinearSpec>) -> Result<Vec<Var>> {
    let (n, width) = dims2("linear", x.tensor())?;
    check(&specs, width)?;
    let fast = tape.fast(x.tensor());
    if let (Some(activations), true) = (tape.generating(), fast) {
        return generation::linear_group(x.tensor(), &specs, activations);
    }
    let mut outs = specs
        .iter()
        .map(|spec| if fast { base_fast(x.tensor(), spec, n) } else { base_composed(x.tensor(), spec) })
        .collect::<Result<Vec<_>>>()?;
    let deltas = project(tape, fast, x, &specs)?;
    for delta in &deltas {
        let y = &mut outs[delta.layer];
        *y = add_up(fast, y, delta)?;
    }
    let mut inputs = vec![x.slot()];
    for spec in &specs {
        inputs.push(spec.weight.slot());
        inputs.extend(spec.bias.iter().map(Var::slot));
    }
    for d in &deltas {
        inputs.extend([d.low_rank.a.slot(), d.low_rank.b.slot()]);
        inputs.extend(d.low_rank.b_bias.iter().map(Var::slot));
    }
    let x_slot = x.slot();
    let keeps_x = specs.iter().any(|s| s.weight.slot().is_tracked())
        || deltas.iter().any(|d| d.low_rank.a.is_tracked());
    let x_value = keeps_x.then(|| x.tensor().clone());
    Ok(tape.record(&inputs, outs, move |grads, sink| {
        let group = Group { fast, n, width, x_slot, x: x_value, specs, deltas };
        group.backward(grads, sink)
    }))
}

fn check(specs: &[LinearSpec], width: usize) -> Result<()> {
    for spec in specs {
        let (out, cols) = spec.weight.dims()?;
        if cols != width {
            return Err(Error::shape(
                "linear",
                format!("weight [{out}, {cols}] for an input of width {width}"),
            ));
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

fn base_fast(x: &Tensor, spec: &LinearSpec, n: usize) -> Result<Tensor> {
    let (out, width) = spec.weight.dims()?;
    let mut y = uninit(n * out);
    let accumulate = spec.bias.is_some();
    if let Some(bias) = &spec.bias {
        let bias = host(bias.tensor())?;
        y.chunks_exact_mut(out).for_each(|row| row.copy_from_slice(&bias));
    }
    let xs = host(x)?;
    spec.weight.with_view(|w| {
        matmul::linear(MatRef::new(&xs, n, width), w, &mut MatMut::new(&mut y, n, out), accumulate);
    })?;
    tensor_of(y, (n, out))
}

fn base_composed(x: &Tensor, spec: &LinearSpec) -> Result<Tensor> {
    let y = x.matmul(&spec.weight.to_tensor(x)?.t()?)?;
    Ok(match &spec.bias {
        Some(bias) => y.broadcast_add(bias.tensor())?,
        None => y,
    })
}

/// The u of every delta.
fn project<'m>(tape: &mut Tape<'m>, fast: bool, x: &Var, specs: &[LinearSpec]) -> Result<Vec<Delta>> {
    let mut deltas = Vec::new();
    for (layer, spec) in specs.iter().enumerate() {
        for low_rank in &spec.low_rank {
            let mask = if low_rank.dropout > 0.0 { tape.next_dropout_seed() } else { None };
            let input = match mask {
                Some(seed) => dropout::apply(seed, low_rank.dropout, x.tensor())?,
                None => x.tensor().clone(),
            };
            deltas.push(Delta { layer, low_rank: low_rank.clone(), u: input.clone(), input, mask });
        }
    }
    if !fast {
        for d in &mut deltas {
            d.u = d.input.matmul(&d.low_rank.a.tensor().t()?)?;
        }
        return Ok(deltas);
    }
    let (n, width) = dims2("linear", x.tensor())?;
    let shared: Vec<usize> = (0..deltas.len()).filter(|i| deltas[*i].mask.is_none()).collect();
    let stacked = stack_a(shared.iter().map(|i| &deltas[*i]), width)?;
    let total = stacked.len() / width.max(1);
    let all = times_t(&host(x.tensor())?, &stacked, n, width, total);
    let mut at = 0;
    for i in shared {
        let r = deltas[i].rank();
        let mut u = uninit(n * r);
        for (dst, src) in u.chunks_exact_mut(r).zip(all.chunks_exact(total)) {
            dst.copy_from_slice(&src[at..at + r]);
        }
        deltas[i].u = tensor_of(u, (n, r))?;
        at += r;
    }
    for d in deltas.iter_mut().filter(|d| d.mask.is_some()) {
        let r = d.rank();
        let u = times_t(&host(&d.input)?, &host(d.low_rank.a.tensor())?, n, width, r);
        d.u = tensor_of(u, (n, r))?;
    }
    Ok(deltas)
}

/// The A of some deltas, one below the other: `[Σr, in]`.
fn stack_a<'d>(deltas: impl Iterator<Item = &'d Delta>, width: usize) -> Result<Vec<f32>> {
    let mut rows = Vec::new();
    for d in deltas {
        let a = host(d.low_rank.a.tensor())?;
        debug_assert_eq!(a.len() % width, 0);
        rows.extend_from_slice(&a);
    }
    Ok(rows)
}

/// `x [n, k] · aᵀ`, a `[m, k]`.
fn times_t(x: &[f32], a: &[f32], n: usize, k: usize, m: usize) -> Vec<f32> {
    let mut out = uninit(n * m);
    matmul::sgemm(1.0, MatRef::new(x, n, k), MatRef::new(a, m, k).t(), 0.0, &mut MatMut::new(&mut out, n, m));
    out
}

/// `s · a [n, k] · b [k, m]`.
fn product(fast: bool, a: &Tensor, b: &Tensor, s: f32) -> Result<Tensor> {
    if !fast {
        return Ok((a.matmul(b)? * f64::from(s))?);
    }
    let ((n, k), (_, m)) = (a.dims2()?, b.dims2()?);
    let mut out = uninit(n * m);
    let (a, b) = (host(a)?, host(b)?);
    matmul::sgemm(s, MatRef::new(&a, n, k), MatRef::new(&b, k, m), 0.0, &mut MatMut::new(&mut out, n, m));
    tensor_of(out, (n, m))
}

/// `s · aᵀ · b` for a `[n, m]`, b `[n, k]`: `[m, k]`.
pub(crate) fn transposed_product(fast: bool, a: &Tensor, b: &Tensor, s: f32) -> Result<Tensor> {
    if !fast {
        return Ok((a.t()?.matmul(b)? * f64::from(s))?);
    }
    let ((n, m), (_, k)) = (a.dims2()?, b.dims2()?);
    let mut out = uninit(m * k);
    let (a, b) = (host(a)?, host(b)?);
    let (a, b) = (MatRef::new(&a, n, m).t(), MatRef::new(&b, n, k));
    matmul::sgemm(s, a, b, 0.0, &mut MatMut::new(&mut out, m, k));
    tensor_of(out, (m, k))
}

/// `y + s·(u·Bᵀ + bias)`.
fn add_up(fast: bool, y: &Tensor, d: &Delta) -> Result<Tensor> {
    let lr = &d.low_rank;
    let (n, out) = y.dims2()?;
    if !fast {
        let mut delta = d.u.matmul(&lr.b.tensor().t()?)?;
        if let Some(bias) = &lr.b_bias {
            delta = delta.broadcast_add(bias.tensor())?;
        }
        return Ok((y + (delta * f64::from(lr.scale))?)?);
    }
    let b = host(lr.b.tensor())?;
    let u = host(&d.u)?;
    let bias = lr.b_bias.as_ref().map(|v| host(v.tensor())).transpose()?;
    let r = d.rank();
    crate::host::update(y, |y| {
        matmul::sgemm(
            lr.scale,
            MatRef::new(&u, n, r),
            MatRef::new(&b, out, r).t(),
            1.0,
            &mut MatMut::new(y, n, out),
        );
        if let Some(bias) = &bias {
            for row in y.chunks_exact_mut(out) {
                engobe_kernels::elementwise::axpy(lr.scale, bias, row);
            }
        }
    })?;
    Ok(y.clone())
}

impl Delta {
    fn rank(&self) -> usize {
        self.low_rank.a.tensor().dims()[0]
    }

    /// The gradient of x from the gradient of this delta's input.
    fn through_mask(&self, grad: Tensor) -> Result<Tensor> {
        match self.mask {
            Some(seed) => dropout::apply(seed, self.low_rank.dropout, &grad),
            None => Ok(grad),
        }
    }
}

/// What the backward of a group works with.
struct Group {
    fast: bool,
    n: usize,
    width: usize,
    x_slot: Slot,
    x: Option<Tensor>,
    specs: Vec<LinearSpec>,
    deltas: Vec<Delta>,
}

impl Group {
    fn backward(self, mut grads: OutGrads, sink: &mut GradSink<'_>) -> Result<()> {
        let dys: Vec<Option<Tensor>> = (0..self.specs.len()).map(|i| grads.take(i)).collect();
        drop(grads);
        for (spec, dy) in self.specs.iter().zip(&dys) {
            let Some(dy) = dy else { continue };
            if let Some(bias) = spec.bias.as_ref().filter(|b| b.is_tracked()) {
                sink.add(bias.slot(), dy.sum(0)?)?;
            }
            if let (Matrix::Trained(w), Some(x)) = (&spec.weight, &self.x)
                && w.is_tracked()
            {
                sink.add(w.slot(), transposed_product(self.fast, dy, x, 1.0)?)?;
            }
        }
        let mut dx = if self.x_slot.is_tracked() { Some(self.base_input_grad(&dys)?) } else { None };
        self.delta_grads(&dys, dx.as_mut(), sink)?;
        match dx {
            Some(dx) => sink.add(self.x_slot, dx),
            None => Ok(()),
        }
    }

    /// Σ dyᵢ·Wᵢ.
    fn base_input_grad(&self, dys: &[Option<Tensor>]) -> Result<Tensor> {
        let device = dys.iter().flatten().next().map(|d| d.device().clone());
        let device = device.unwrap_or(candle_core::Device::Cpu);
        if !self.fast {
            let mut sum = Tensor::zeros((self.n, self.width), DType::F32, &device)?;
            for (spec, dy) in self.specs.iter().zip(dys) {
                if let Some(dy) = dy {
                    sum = (sum + dy.matmul(&spec.weight.to_tensor(dy)?)?)?;
                }
            }
            return Ok(sum);
        }
        let mut dx = uninit(self.n * self.width);
        let mut accumulate = false;
        for (spec, dy) in self.specs.iter().zip(dys) {
            let Some(dy) = dy else { continue };
            let (out, _) = spec.weight.dims()?;
            let dy = host(dy)?;
            spec.weight.with_view(|w| {
                let dx = &mut MatMut::new(&mut dx, self.n, self.width);
                matmul::linear_input_grad(MatRef::new(&dy, self.n, out), w, dx, accumulate);
            })?;
            accumulate = true;
        }
        if !accumulate {
            dx.fill(0.0);
        }
        tensor_of(dx, (self.n, self.width))
    }

    /// dA, dB and the deltas' share of dx.
    fn delta_grads(
        &self,
        dys: &[Option<Tensor>],
        mut dx: Option<&mut Tensor>,
        sink: &mut GradSink<'_>,
    ) -> Result<()> {
        let mut stacked: Vec<(&Delta, Tensor)> = Vec::new();
        for d in &self.deltas {
            let Some(dy) = &dys[d.layer] else { continue };
            let lr = &d.low_rank;
            if lr.b.is_tracked() {
                sink.add(lr.b.slot(), transposed_product(self.fast, dy, &d.u, lr.scale)?)?;
            }
            if let Some(bias) = lr.b_bias.as_ref().filter(|b| b.is_tracked()) {
                sink.add(bias.slot(), (dy.sum(0)? * f64::from(lr.scale))?)?;
            }
            if !lr.a.is_tracked() && dx.is_none() {
                continue;
            }
            let du = product(self.fast, dy, lr.b.tensor(), lr.scale)?;
            if self.fast && d.mask.is_none() {
                stacked.push((d, du));
                continue;
            }
            if lr.a.is_tracked() {
                sink.add(lr.a.slot(), transposed_product(self.fast, &du, &d.input, 1.0)?)?;
            }
            if let Some(dx) = dx.as_deref_mut() {
                let through = product(self.fast, &du, lr.a.tensor(), 1.0)?;
                *dx = (&*dx + d.through_mask(through)?)?;
            }
        }
        self.stacked_grads(&stacked, dx, sink)
    }

    /// One product over x for all dA, one into dx.
    fn stacked_grads(
        &self,
        stacked: &[(&Delta, Tensor)],
        dx: Option<&mut Tensor>,
        sink: &mut GradSink<'_>,
    ) -> Result<()> {
        if stacked.is_empty() {
            return Ok(());
        }
        let (n, k) = (self.n, self.width);
        let total: usize = stacked.iter().map(|(d, _)| d.rank()).sum();
        let mut du = uninit(n * total);
        let mut at = 0;
        for (d, part) in stacked {
            let (part, r) = (host(part)?, d.rank());
            for (dst, src) in du.chunks_exact_mut(total).zip(part.chunks_exact(r)) {
                dst[at..at + r].copy_from_slice(src);
            }
            at += r;
        }
        if let Some(dx) = dx {
            let a = stack_a(stacked.iter().map(|(d, _)| *d), k)?;
            crate::host::update(dx, |dx| {
                let (du, a) = (MatRef::new(&du, n, total), MatRef::new(&a, total, k));
                matmul::sgemm(1.0, du, a, 1.0, &mut MatMut::new(dx, n, k));
            })?;
        }
        let Some(x) = &self.x else { return Ok(()) };
        let mut da = uninit(total * k);
        let x = host(x)?;
        matmul::sgemm(
            1.0,
            MatRef::new(&du, n, total).t(),
            MatRef::new(&x, n, k),
            0.0,
            &mut MatMut::new(&mut da, total, k),
        );
        let mut at = 0;
        for (d, _) in stacked {
            let r = d.rank();
            if d.low_rank.a.is_tracked() {
                sink.add(d.low_rank.a.slot(), tensor_of(da[at * k..(at + r) * k].to_vec(), (r, k))?)?;
            }
            at += r;
        }
        Ok(())
    }
}
