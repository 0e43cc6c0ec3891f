//! LoRA on an embedding: row t of the matrix gets `s·B·A[:, t]`, with A `[r, vocab]` and B `[d, r]`.

use crate::Result;
use crate::method::Attaching;
use crate::random::{gaussian, generator};
use candle_core::{DType, Device, Tensor};
use engobe_autograd::ops::{self, LinearSpec, Matrix};
use engobe_autograd::{Param, Result as OpResult, Tape, Var, tensor_of};
use engobe_nn::{Embedding, EmbeddingAdapter};
use std::sync::Arc;

/// The factors beside an embedding.
#[derive(Debug)]
pub(crate) struct LoraEmbedding {
    path: String,
    a: Param,
    b: Param,
    scale: f32,
}

impl LoraEmbedding {
    /// A is zero and B normal, as `nn.Embedding` starts.
    pub fn new(embedding: &Embedding, r: usize, scale: f64, at: &Attaching<'_>) -> Result<Self> {
        let path = embedding.path().to_string();
        let (vocab, d) = embedding.weight().dims();
        let name = |kind: &str| format!("base_model.model.{path}.lora_embedding_{kind}");
        let a = Tensor::zeros((r, vocab), DType::F32, at.device)?;
        let b = gaussian(&mut generator(at.start.seed, &path), d * r, 1.0);
        let b = tensor_of(b, (d, r))?.to_device(at.device)?;
        Ok(Self { a: Param::new(name("A"), &a)?, b: Param::new(name("B"), &b)?, scale: scale as f32, path })
    }

    /// Path of the embedding.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A and B.
    pub fn factors(&self) -> [&Param; 2] {
        [&self.a, &self.b]
    }

    /// The embedding's matrix `[vocab, d]` with this in it; on the CPU.
    pub fn merged(&self, weight: Tensor) -> Result<Tensor> {
        let delta = (self.b.tensor().matmul(self.a.tensor())?.t()? * f64::from(self.scale))?;
        Ok((weight + delta.to_device(&Device::Cpu)?)?)
    }
}

impl EmbeddingAdapter for LoraEmbedding {
    fn apply(&self, tape: &mut Tape<'_>, ids: &Arc<[u32]>, rows: Var) -> OpResult<Var> {
        let (a, b) = (tape.param(&self.a), tape.param(&self.b));
        let u = ops::select_columns(tape, &a, ids.clone())?;
        let delta = ops::linear(tape, &u, LinearSpec::plain(Matrix::Trained(b)))?;
        let delta = ops::scale(tape, &delta, self.scale)?;
        ops::add(tape, &rows, &delta)
    }
}
