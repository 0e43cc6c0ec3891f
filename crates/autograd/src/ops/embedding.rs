//! Token embedding: rows of a frozen or trained matrix.

use crate::ops::Matrix;
use crate::{Error, Result, Tape, Var, host, tensor_of, uninit};
use candle_core::{Device, Tensor};
use engobe_kernels::embedding as kernel;
use engobe_kernels::storage::WeightView;
use std::sync::Arc;

/// Rows `ids` of `weight` `[vocab, d]`: `[n, d]`, on `device`.
pub fn embedding<'m>(tape: &mut Tape<'m>, weight: &Matrix, ids: Arc<[u32]>, device: &Device) -> Result<Var> {
    let (vocab, d) = weight.dims()?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
        return Err(Error::shape("embedding", format!("token id {id} in a vocabulary of {vocab}")));
    }
    let (n, slot) = (ids.len(), weight.slot());
    let mut out = uninit(n * d);
    let y = match weight {
        Matrix::Frozen(w) => match w.view() {
            Ok(view) => {
                kernel::gather(view, &ids, &mut out);
                tensor_of(out, (n, d))?.to_device(device)?
            }
            Err(_) => w.to_tensor(device)?.index_select(&Tensor::from_slice(&ids, n, device)?, 0)?,
        },
        Matrix::Trained(w) if w.tensor().device().is_cpu() => {
            kernel::gather(WeightView::f32(&host(w.tensor())?, vocab, d), &ids, &mut out);
            tensor_of(out, (n, d))?
        }
        Matrix::Trained(w) => w.tensor().index_select(&Tensor::from_slice(&ids, n, device)?, 0)?,
    };
    Ok(tape.record1(&[slot], y, move |dy, sink| {
        let dw = if dy.device().is_cpu() {
            let mut dw = vec![0f32; vocab * d];
            kernel::scatter_add(&ids, &host(&dy)?, &mut dw, d);
            tensor_of(dw, (vocab, d))?
        } else {
            let index = Tensor::from_slice(&ids, n, dy.device())?;
            Tensor::zeros((vocab, d), dy.dtype(), dy.device())?.index_add(&index, &dy, 0)?
        };
        sink.add(slot, dw)
    }))
}
