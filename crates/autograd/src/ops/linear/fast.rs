//! The linear ops on the kernels' products: few parallel jobs, each with all that can run side by side.

use super::{Borrowed, Group, Saved, preset};
use crate::tape::{Slot, add_in_place};
use crate::var::Kept;
use crate::{GradSink, Host, Result, host, tensor_of, uninit};
use candle_core::Tensor;
use engobe_kernels::mat::{MatMut, MatRef};
use engobe_kernels::matmul::{self, Job, Right, Term};

/// Tensors as slices.
fn hosts<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Vec<Host<'a>>> {
    tensors.into_iter().map(host).collect()
}

impl Group {
    /// Outputs, and u of every delta.
    pub(super) fn fast_forward(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let n = self.n;
        let us = self.project(x)?;
        let mut outs = Vec::with_capacity(self.specs.len());
        let mut accumulate = Vec::with_capacity(self.specs.len());
        for spec in &self.specs {
            let mut y = uninit(n * spec.weight.dims()?.0);
            accumulate.push(preset(spec, residual, &mut y)?);
            outs.push(y);
        }
        {
            let x = host(x)?;
            let x = MatRef::new(&x, n, self.width);
            let b = self.factors(|low_rank| &low_rank.b)?;
            let (u, b) = (hosts(&us)?, hosts(&b)?);
            let weights = self.specs.iter().map(|s| Borrowed::of(&s.weight)).collect::<Result<Vec<_>>>()?;
            let mut ys: Vec<MatMut> =
                outs.iter_mut().zip(&weights).map(|(y, w)| MatMut::new(y, n, w.view().rows())).collect();
            let deltas = |layer: usize| {
                let of = self.deltas.iter().zip(u.iter().zip(&b)).filter(move |(d, _)| d.layer == layer);
                of.map(|(d, (u, b))| {
                    let (r, out) = (d.rank(), b.len() / d.rank().max(1));
                    let b = Right::Dense(MatRef::new(b, out, r).t());
                    Term { a: MatRef::new(u, n, r), b, scale: d.low_rank.scale }
                })
            };
            if matmul::few(&x) {
                for (layer, y) in ys.iter_mut().enumerate() {
                    matmul::linear(x, weights[layer].view(), y, accumulate[layer]);
                    let terms: Vec<Term> = deltas(layer).collect();
                    if !terms.is_empty() {
                        matmul::run(&[Job::new(y, true, terms)]);
                    }
                }
            } else {
                let jobs: Vec<Job> = ys
                    .iter_mut()
                    .enumerate()
                    .map(|(layer, y)| {
                        let base = Term::new(x, Right::WeightT(weights[layer].view()));
                        Job::new(y, accumulate[layer], [base].into_iter().chain(deltas(layer)).collect())
                    })
                    .collect();
                matmul::run(&jobs);
            }
        }
        let outs = outs.into_iter().map(|y| {
            let out = y.len() / n.max(1);
            tensor_of(y, (n, out))
        });
        Ok((outs.collect::<Result<_>>()?, us))
    }

    /// The u of every delta.
    pub(super) fn project(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let inputs = self.deltas.iter().map(|d| d.input(x)).collect::<Result<Vec<_>>>()?;
        let mut us: Vec<Vec<f32>> = self.deltas.iter().map(|d| uninit(self.n * d.rank())).collect();
        {
            let a = self.factors(|low_rank| &low_rank.a)?;
            let (xs, a) = (hosts(&inputs)?, hosts(&a)?);
            let mut cs: Vec<MatMut> =
                us.iter_mut().zip(&self.deltas).map(|(u, d)| MatMut::new(u, self.n, d.rank())).collect();
            let jobs: Vec<Job> = cs
                .iter_mut()
                .zip(xs.iter().zip(&a))
                .map(|(u, (x, a))| {
                    let a = MatRef::new(a, u.cols, self.width).t();
                    Job::new(u, false, vec![Term::new(MatRef::new(x, self.n, self.width), Right::Dense(a))])
                })
                .collect();
            matmul::run(&jobs);
        }
        us.into_iter().zip(&self.deltas).map(|(u, d)| tensor_of(u, (self.n, d.rank()))).collect()
    }

    /// Gradients of x, of trained weights, and of the deltas.
    pub(super) fn fast_backward(
        &self,
        saved: Saved,
        dys: &[Option<Tensor>],
        x_slot: Slot,
        sink: &mut GradSink<'_>,
    ) -> Result<()> {
        let (n, width) = (self.n, self.width);
        let x = saved.x.map(Kept::take).transpose()?;
        let us = saved.us.into_iter().map(Kept::take).collect::<Result<Vec<_>>>()?;
        let a = self.factors(|low_rank| &low_rank.a)?;
        let dus = self.delta_output_grads(dys, x_slot)?;
        let inputs = self.deltas.iter().map(|d| x.as_ref().map(|x| d.input(x)).transpose());
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let dy = dys.iter().map(|dy| dy.as_ref().map(host).transpose()).collect::<Result<Vec<_>>>()?;
        let du = dus.iter().map(|du| du.as_ref().map(host).transpose()).collect::<Result<Vec<_>>>()?;
        let xs = inputs.iter().map(|x| x.as_ref().map(host).transpose()).collect::<Result<Vec<_>>>()?;
        let base_x = x.as_ref().map(host).transpose()?;
        let (us, a) = (hosts(&us)?, hosts(&a)?);
        let weights = self.specs.iter().map(|s| Borrowed::of(&s.weight)).collect::<Result<Vec<_>>>()?;

        let mut wanted: Vec<Wanted<'_>> = Vec::new();
        let mut dx_terms = Vec::new();
        for ((spec, w), dy) in self.specs.iter().zip(&weights).zip(&dy) {
            let Some(dy) = dy else { continue };
            let (w, slot) = (w.view(), spec.weight.slot());
            let dy = MatRef::new(dy, n, w.rows());
            dx_terms.push(Term::new(dy, Right::Weight(w)));
            if let (true, Some(x)) = (slot.is_tracked(), &base_x) {
                let term = Term::new(dy.t(), Right::Dense(MatRef::new(x, n, width)));
                wanted.push(Wanted::param(slot, w.rows(), width, term));
            }
        }
        for (i, d) in self.deltas.iter().enumerate() {
            let (lr, r) = (&d.low_rank, d.rank());
            if let (true, Some(dy)) = (lr.b.is_tracked(), &dy[d.layer]) {
                let out = dy.len() / n.max(1);
                let u = Right::Dense(MatRef::new(&us[i], n, r));
                let term = Term { a: MatRef::new(dy, n, out).t(), b: u, scale: lr.scale };
                wanted.push(Wanted::param(lr.b.slot(), out, r, term));
            }
            let Some(du) = &du[i] else { continue };
            let du = MatRef::new(du, n, r);
            if let (true, Some(x)) = (lr.a.is_tracked(), &xs[i]) {
                let term = Term::new(du.t(), Right::Dense(MatRef::new(x, n, width)));
                wanted.push(Wanted::param(lr.a.slot(), r, width, term));
            }
            let through = Term::new(du, Right::Dense(MatRef::new(&a[i], r, width)));
            match d.mask {
                None => dx_terms.push(through),
                Some(_) if x_slot.is_tracked() => {
                    let terms = vec![through];
                    wanted.push(Wanted { to: To::Masked(i), rows: n, cols: width, terms });
                }
                Some(_) => {}
            }
        }
        if x_slot.is_tracked() {
            // first, as the largest
            wanted.insert(0, Wanted { to: To::Input, rows: n, cols: width, terms: dx_terms });
        }
        let mut dx: Option<Tensor> = None;
        for (to, grad) in compute(wanted)? {
            match (to, &dx) {
                (To::Param(slot), _) => sink.add(slot, grad)?,
                (To::Masked(i), Some(dx)) => add_in_place(dx, &self.deltas[i].masked(grad)?)?,
                (To::Input | To::Masked(_), _) => dx = Some(grad),
            }
        }
        match dx {
            Some(dx) => sink.add(x_slot, dx),
            None => Ok(()),
        }
    }

    /// du = s·dy·B of every delta, where something wants it.
    fn delta_output_grads(&self, dys: &[Option<Tensor>], x_slot: Slot) -> Result<Vec<Option<Tensor>>> {
        let n = self.n;
        let dy = dys.iter().map(|dy| dy.as_ref().map(host).transpose()).collect::<Result<Vec<_>>>()?;
        let b = self.factors(|low_rank| &low_rank.b)?;
        let b = hosts(&b)?;
        let mut wanted = Vec::new();
        for (i, d) in self.deltas.iter().enumerate() {
            let Some(dy) = &dy[d.layer] else { continue };
            if d.low_rank.a.is_tracked() || x_slot.is_tracked() {
                let (r, out) = (d.rank(), dy.len() / n.max(1));
                let b = Right::Dense(MatRef::new(&b[i], out, r));
                let terms = vec![Term { a: MatRef::new(dy, n, out), b, scale: d.low_rank.scale }];
                wanted.push(Wanted { to: To::Masked(i), rows: n, cols: r, terms });
            }
        }
        let mut dus: Vec<Option<Tensor>> = self.deltas.iter().map(|_| None).collect();
        for (to, du) in compute(wanted)? {
            if let To::Masked(i) = to {
                dus[i] = Some(du);
            }
        }
        Ok(dus)
    }
}

/// Where a computed matrix goes.
enum To {
    /// gradient of a parameter
    Param(Slot),
    /// gradient of x
    Input,
    /// belongs to delta i
    Masked(usize),
}

/// A matrix to compute.
struct Wanted<'a> {
    to: To,
    rows: usize,
    cols: usize,
    terms: Vec<Term<'a>>,
}

impl<'a> Wanted<'a> {
    fn param(slot: Slot, rows: usize, cols: usize, term: Term<'a>) -> Self {
        Self { to: To::Param(slot), rows, cols, terms: vec![term] }
    }
}

/// Computes all in one parallel job.
fn compute(wanted: Vec<Wanted<'_>>) -> Result<Vec<(To, Tensor)>> {
    let mut data: Vec<Vec<f32>> = wanted.iter().map(|w| uninit(w.rows * w.cols)).collect();
    let mut goals = Vec::with_capacity(wanted.len());
    {
        let mut mats: Vec<MatMut> =
            data.iter_mut().zip(&wanted).map(|(data, w)| MatMut::new(data, w.rows, w.cols)).collect();
        let mut jobs = Vec::with_capacity(wanted.len());
        for (mat, w) in mats.iter_mut().zip(wanted) {
            goals.push((w.to, w.rows, w.cols));
            jobs.push(Job::new(mat, false, w.terms));
        }
        matmul::run(&jobs);
    }
    let done = goals.into_iter().zip(data);
    done.map(|((to, rows, cols), data)| Ok((to, tensor_of(data, (rows, cols))?))).collect()
}
