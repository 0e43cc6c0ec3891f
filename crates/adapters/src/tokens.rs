//! Trained embeddings of some tokens (PEFT's trainable tokens): their rows of the embedding are replaced by rows that
//! are trained, and a head that is the embedding's matrix has them as well.

use crate::method::Attaching;
use crate::target::ends_with_module;
use crate::{Error, Result};
use candle_core::Tensor;
use engobe_autograd::ops::{self, LinearSpec, LowRank};
use engobe_autograd::{Param, Result as OpResult, Tape, Var, tensor_of};
use engobe_nn::{Embedding, EmbeddingAdapter, LinearAdapter};
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

/// The rows of one embedding.
#[derive(Debug)]
pub(crate) struct TokenRows {
    path: String,
    /// other paths of the embedding
    copies: Vec<String>,
    /// `[tokens, d]`
    rows: Param,
    ids: Vec<u32>,
    /// token to row
    places: HashMap<u32, u32>,
    /// the base's rows
    original: Tensor,
    /// `[vocab, tokens]` with a one where a token is trained
    places_of_head: Tensor,
    /// path of a head that is the embedding's matrix
    head: OnceLock<String>,
}

impl TokenRows {
    /// Rows that start as the base's. `part` comes after the module's path in the tensor's name.
    pub fn new(embedding: &Embedding, ids: &[usize], part: &str, at: &Attaching<'_>) -> Result<Self> {
        let path = embedding.path().to_string();
        let (vocab, _) = embedding.weight().dims();
        if let Some(id) = ids.iter().find(|id| **id >= vocab) {
            let reason = format!("names token {id}; {path} has {vocab}");
            return Err(Error::Conflict { keys: "trainable_token_indices", reason: reason.into() });
        }
        let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        let plain = ops::embedding(
            &mut Tape::inference(),
            &embedding.weight().on(&mut Tape::inference()),
            ids.as_slice().into(),
            at.device,
        )?;
        let original = plain.into_tensor();
        let mut ones = vec![0f32; vocab * ids.len()];
        ids.iter().enumerate().for_each(|(row, id)| ones[*id as usize * ids.len() + row] = 1.0);
        let name = format!("base_model.model.{path}.{part}trainable_tokens_delta");
        Ok(Self {
            rows: Param::new(name, &original)?,
            places: ids.iter().enumerate().map(|(row, id)| (*id, row as u32)).collect(),
            places_of_head: tensor_of(ones, (vocab, ids.len()))?.to_device(at.device)?,
            head: OnceLock::new(),
            copies: embedding.copies().to_vec(),
            original,
            ids,
            path,
        })
    }

    /// Path of the embedding.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Says that the head at `path` is this embedding's matrix.
    pub fn tie(&self, path: &str) {
        self.head.get_or_init(|| path.to_string());
    }

    /// True for the embedding and a head that is tied to it.
    pub fn covers(&self, path: &str) -> bool {
        self.path == path || self.head.get().is_some_and(|head| head == path)
    }

    /// [`TokenRows::covers`] for a name, or the end of one.
    pub fn covers_name(&self, name: &str) -> bool {
        let ends = |path: &str| ends_with_module(path, name);
        ends(&self.path) || self.head.get().is_some_and(|head| ends(head))
    }

    /// Names of the copies that PEFT's files hold for other paths of the embedding and a head that is tied to it.
    pub fn names_of_copies(&self) -> impl Iterator<Item = String> + '_ {
        let paths = self.copies.iter().chain(self.head.get());
        paths.map(|path| format!("base_model.model.{path}.trainable_tokens_delta"))
    }

    /// What is trained.
    pub fn param(&self) -> &Param {
        &self.rows
    }

    /// The embedding's matrix with the rows in it; on the CPU.
    pub fn merged(&self, weight: Tensor) -> Result<Tensor> {
        let rows = self.rows.tensor().to_device(weight.device())?;
        for (row, id) in self.ids.iter().enumerate() {
            weight.slice_set(&rows.narrow(0, row, 1)?.contiguous()?, 0, *id as usize)?;
        }
        Ok(weight)
    }
}

impl EmbeddingAdapter for TokenRows {
    fn apply(&self, tape: &mut Tape<'_>, ids: &Arc<[u32]>, rows: Var) -> OpResult<Var> {
        let found = ids.iter().enumerate().filter_map(|(i, id)| Some((i as u32, *self.places.get(id)?)));
        let found: Vec<(u32, u32)> = found.collect();
        let by = tape.param(&self.rows);
        ops::replace_rows(tape, &rows, &by, found.into())
    }
}

impl LinearAdapter for TokenRows {
    /// `h·W'ᵀ = h·Wᵀ + (h·(rows - original)ᵀ)·onesᵀ`.
    fn extend(&self, tape: &mut Tape<'_>, spec: &mut LinearSpec) -> OpResult<()> {
        let rows = tape.param(&self.rows);
        let a = ops::add(tape, &rows, &Var::constant(self.original.neg()?))?;
        let b = Var::constant(self.places_of_head.clone());
        spec.low_rank.push(LowRank { a, b, b_bias: None, scale: 1.0, dropout: 0.0 });
        Ok(())
    }
}
