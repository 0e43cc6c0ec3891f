//! The linear ops with candle's operations, for any device.

use super::{Group, Matrix, Saved};
use crate::tape::Slot;
use crate::var::Kept;
use crate::{GradSink, Result};
use candle_core::Tensor;

impl Group {
    /// Outputs, and u of every delta.
    pub(super) fn composed_forward(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let mut outs = Vec::new();
        for spec in &self.specs {
            let mut y = x.matmul(&spec.weight.to_tensor(x)?.t()?)?;
            if let Some(bias) = &spec.bias {
                y = y.broadcast_add(bias.tensor())?;
            }
            outs.push(match residual {
                Some(residual) => (y + residual)?,
                None => y,
            });
        }
        let mut us = Vec::new();
        let (a, b) = (self.factors(|l| &l.a)?, self.factors(|l| &l.b)?);
        for (d, (a, b)) in self.deltas.iter().zip(a.iter().zip(&b)) {
            let lr = &d.low_rank;
            let u = d.input(x)?.matmul(&a.t()?)?;
            let mut delta = u.matmul(&b.t()?)?;
            if let Some(bias) = &lr.b_bias {
                delta = delta.broadcast_add(bias.tensor())?;
            }
            outs[d.layer] = (&outs[d.layer] + (delta * f64::from(lr.scale))?)?;
            us.push(u);
        }
        Ok((outs, us))
    }

    /// Gradients of x, of trained weights, and of the deltas.
    pub(super) fn composed_backward(
        &self,
        saved: Saved,
        dys: &[Option<Tensor>],
        x_slot: Slot,
        sink: &mut GradSink<'_>,
    ) -> Result<()> {
        let x = saved.x.map(Kept::take).transpose()?;
        let us = saved.us.into_iter().map(Kept::take).collect::<Result<Vec<_>>>()?;
        let (a, b) = (self.factors(|l| &l.a)?, self.factors(|l| &l.b)?);
        let mut dx: Option<Tensor> = None;
        let mut add = |term: Tensor| -> Result<()> {
            dx = Some(match dx.take() {
                Some(sum) => (sum + term)?,
                None => term,
            });
            Ok(())
        };
        for (spec, dy) in self.specs.iter().zip(dys) {
            let Some(dy) = dy else { continue };
            if let (Matrix::Trained(w), Some(x)) = (&spec.weight, &x)
                && w.is_tracked()
            {
                sink.add(w.slot(), dy.t()?.matmul(x)?)?;
            }
            if x_slot.is_tracked() {
                add(dy.matmul(&spec.weight.to_tensor(dy)?)?)?;
            }
        }
        for (d, (u, (a, b))) in self.deltas.iter().zip(us.iter().zip(a.iter().zip(&b))) {
            let Some(dy) = &dys[d.layer] else { continue };
            let (lr, scale) = (&d.low_rank, f64::from(d.low_rank.scale));
            if lr.b.is_tracked() {
                sink.add(lr.b.slot(), (dy.t()?.matmul(u)? * scale)?)?;
            }
            let du = (dy.matmul(b)? * scale)?;
            if let (true, Some(x)) = (lr.a.is_tracked(), &x) {
                sink.add(lr.a.slot(), du.t()?.matmul(&d.input(x)?)?)?;
            }
            if x_slot.is_tracked() {
                add(d.masked(du.matmul(a)?)?)?;
            }
        }
        match dx {
            Some(dx) => sink.add(x_slot, dx),
            None => Ok(()),
        }
    }
}
