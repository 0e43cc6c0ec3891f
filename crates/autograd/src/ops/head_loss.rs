//! Output head and cross entropy in one op: the logits never exist whole.
//!
//! With a frozen head the gradient of the hidden states is made in the forward pass, while a block of
//! logits is at hand, and that alone is saved. A head that is itself trained (or carries a low-rank delta)
//! keeps the hidden states and one log-sum-exp a row and goes over the vocabulary again.

use crate::ops::Matrix;
use crate::ops::linear::Borrowed;
use crate::{Error, Result, Tape, Var, host, ops::dims2, tensor_of, uninit};
use candle_core::{D, Device, Tensor};
use engobe_kernels::cross_entropy::{self as kernel, HeadLowRank, TokenStats};
use std::sync::Arc;

/// The output head: logits = h·Wᵀ + bias + u·Bᵀ, squashed if they shall be.
#[derive(Clone, Debug)]
pub struct Head {
    /// `[vocab, d]`
    pub weight: Matrix,
    /// `[vocab]`
    pub bias: Option<Var>,
    /// a low-rank delta: u `[n, r]` (scale included) and B `[vocab, r]`
    pub low_rank: Option<(Var, Var)>,
    /// logits z become c·tanh(z/c)
    pub soft_cap: Option<f32>,
}

/// Loss of some labelled positions.
pub struct HeadLoss {
    /// sum of the tokens' losses, one element
    pub loss: Var,
    /// loss and hit of each token
    pub tokens: Vec<TokenStats>,
}

/// Summed cross entropy of `hidden` `[n, d]` (labelled rows only) against `targets` `[n]`.
pub fn head_loss<'m>(tape: &mut Tape<'m>, hidden: &Var, head: Head, targets: Arc<[u32]>) -> Result<HeadLoss> {
    let (n, d) = dims2("head_loss", hidden.tensor())?;
    let (vocab, cols) = head.weight.dims()?;
    if cols != d || targets.len() != n {
        let what = format!("hidden [{n}, {d}], head [{vocab}, {cols}], {} targets", targets.len());
        return Err(Error::shape("head_loss", what));
    }
    if let Some(t) = targets.iter().find(|t| **t as usize >= vocab) {
        return Err(Error::shape("head_loss", format!("label {t} in a vocabulary of {vocab}")));
    }
    if tape.fast(hidden.tensor()) {
        fast(tape, hidden, head, targets)
    } else {
        composed(tape, hidden, head, targets)
    }
}

impl Head {
    fn slots(&self) -> [crate::Slot; 4] {
        let of = |v: Option<&Var>| v.map(Var::slot).unwrap_or_default();
        let (u, b) = (self.low_rank.as_ref().map(|l| &l.0), self.low_rank.as_ref().map(|l| &l.1));
        [self.weight.slot(), of(self.bias.as_ref()), of(u), of(b)]
    }

    /// Runs `f` on the head as the kernels take it.
    fn with_view<R>(&self, f: impl FnOnce(&kernel::Head<'_>) -> Result<R>) -> Result<R> {
        let bias = self.bias.as_ref().map(|b| host(b.tensor())).transpose()?;
        let soft_cap = self.soft_cap;
        let weight = Borrowed::of(&self.weight)?;
        let call =
            |low_rank| f(&kernel::Head { weight: weight.view(), bias: bias.as_deref(), low_rank, soft_cap });
        match &self.low_rank {
            None => call(None),
            Some((u, b)) => {
                let (ut, bt) = (host(u.tensor())?, host(b.tensor())?);
                let r = b.tensor().dim(1)?;
                call(Some(HeadLowRank { a_out: &ut, b: &bt, r }))
            }
        }
    }
}

fn fast<'m>(tape: &mut Tape<'m>, hidden: &Var, head: Head, targets: Arc<[u32]>) -> Result<HeadLoss> {
    let (n, d) = dims2("head_loss", hidden.tensor())?;
    let h = hidden.tensor().clone();
    let head_slots = head.slots();
    let trained_head = head_slots.iter().any(|s| s.is_tracked());
    let mut tokens = vec![TokenStats::default(); n];
    let mut d_hidden = (hidden.is_tracked() && !trained_head).then(|| uninit(n * d));
    let mut lse = vec![0f32; if trained_head { n } else { 0 }];
    head.with_view(|view| {
        kernel::cross_entropy(
            &host(&h)?,
            view,
            &targets,
            &mut tokens,
            trained_head.then_some(&mut lse),
            d_hidden.as_deref_mut(),
        );
        Ok(())
    })?;
    let sum: f64 = tokens.iter().map(|t| f64::from(t.loss)).sum();
    let value = tensor_of(vec![sum as f32], 1)?;
    let slot = hidden.slot();
    if !trained_head {
        let loss = tape.record1(&[slot], value, move |dy, sink| {
            let Some(mut dh) = d_hidden else { return Ok(()) };
            engobe_kernels::elementwise::scale(&mut dh, host(&dy)?[0]);
            sink.add(slot, tensor_of(dh, (n, d))?)
        });
        return Ok(HeadLoss { loss, tokens });
    }
    let [w_slot, bias_slot, u_slot, b_slot] = head_slots;
    let (vocab, _) = head.weight.dims()?;
    let r = head.low_rank.as_ref().map_or(0, |(_, b)| b.tensor().dims()[1]);
    let inputs = [slot, w_slot, bias_slot, u_slot, b_slot];
    let loss = tape.record1(&inputs, value, move |dy, sink| {
        let zeros = |wanted: bool, len: usize| wanted.then(|| vec![0f32; len]);
        let mut dh = slot.is_tracked().then(|| uninit(n * d));
        let mut dw = zeros(w_slot.is_tracked(), vocab * d);
        let mut dbias = zeros(bias_slot.is_tracked(), vocab);
        let mut du = u_slot.is_tracked().then(|| uninit(n * r));
        let mut db = zeros(b_slot.is_tracked(), vocab * r);
        head.with_view(|view| {
            kernel::cross_entropy_backward(
                &host(&h)?,
                view,
                &targets,
                &lse,
                host(&dy)?[0],
                dh.as_deref_mut(),
                dw.as_deref_mut(),
                dbias.as_deref_mut(),
                du.as_deref_mut(),
                db.as_deref_mut(),
            );
            Ok(())
        })?;
        let mut give = |slot, grad: Option<Vec<f32>>, rows: usize, cols: usize| match grad {
            Some(grad) => sink.add(slot, tensor_of(grad, (rows, cols))?),
            None => Ok(()),
        };
        give(slot, dh, n, d)?;
        give(w_slot, dw, vocab, d)?;
        give(u_slot, du, n, r)?;
        give(b_slot, db, vocab, r)?;
        match dbias {
            Some(dbias) => sink.add(bias_slot, tensor_of(dbias, vocab)?),
            None => Ok(()),
        }
    });
    Ok(HeadLoss { loss, tokens })
}

/// The whole logits, softmax and its gradient, with candle's operations.
fn composed<'m>(tape: &mut Tape<'m>, hidden: &Var, head: Head, targets: Arc<[u32]>) -> Result<HeadLoss> {
    let h = hidden.tensor().clone();
    let n = targets.len();
    let w = head.weight.to_tensor(&h)?;
    let mut logits = h.matmul(&w.t()?)?;
    if let Some(bias) = &head.bias {
        logits = logits.broadcast_add(bias.tensor())?;
    }
    if let Some((u, b)) = &head.low_rank {
        logits = (logits + u.tensor().matmul(&b.tensor().t()?)?)?;
    }
    let mut slope = None;
    if let Some(cap) = head.soft_cap.map(f64::from) {
        logits = ((logits / cap)?.tanh()? * cap)?;
        slope = Some((1.0 - (&logits / cap)?.sqr()?)?);
    }
    let index = Tensor::from_slice(&targets, (n, 1), h.device())?;
    let max = logits.max_keepdim(D::Minus1)?;
    let e = logits.broadcast_sub(&max)?.exp()?;
    let sum = e.sum_keepdim(D::Minus1)?;
    let losses = ((sum.log()? + &max)? - logits.gather(&index, 1)?)?.squeeze(1)?;
    let best = logits.argmax(D::Minus1)?.to_device(&Device::Cpu)?.to_vec1::<u32>()?;
    let each = losses.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
    let tokens: Vec<TokenStats> = each
        .into_iter()
        .zip(best.iter().zip(targets.iter()))
        .map(|(loss, (best, target))| TokenStats { loss, correct: best == target })
        .collect();
    let value = losses.sum_all()?.reshape(1)?;
    let slot = hidden.slot();
    let [w_slot, bias_slot, u_slot, b_slot] = head.slots();
    let p = e.broadcast_div(&sum)?;
    let loss = tape.record1(&[slot, w_slot, bias_slot, u_slot, b_slot], value, move |dy, sink| {
        let ones = Tensor::ones((n, 1), p.dtype(), p.device())?;
        let mut dlogits = p.scatter_add(&index, &ones.neg()?, 1)?.broadcast_mul(&dy.reshape((1, 1))?)?;
        if let Some(slope) = &slope {
            dlogits = (dlogits * slope)?;
        }
        sink.add(slot, dlogits.matmul(&w)?)?;
        if w_slot.is_tracked() {
            sink.add(w_slot, dlogits.t()?.matmul(&h)?)?;
        }
        if bias_slot.is_tracked() {
            sink.add(bias_slot, dlogits.sum(0)?)?;
        }
        if let Some((u, b)) = &head.low_rank {
            sink.add(u_slot, dlogits.matmul(b.tensor())?)?;
            sink.add(b_slot, dlogits.t()?.matmul(u.tensor())?)?;
        }
        Ok(())
    });
    Ok(HeadLoss { loss, tokens })
}
