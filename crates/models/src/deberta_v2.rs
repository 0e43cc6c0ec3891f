//! DeBERTa-v2 and v3 (He et al. 2021): BERT's blocks with disentangled attention, whose scores also meet embeddings of
//! relative positions in logarithmic buckets; in some v2 models a convolution stands beside the first block.
//!
//! Module paths are those of transformers' `DebertaV2Model`.

mod positions;

use crate::bert::{info, shape};
use crate::encoders::{EncoderArchitecture, activation, bad};
use crate::scope::{Naming, Scope};
use crate::{Result, Weights};
use candle_core::{Device, Tensor};
use engobe_autograd::ops::{self, PositionTerms};
use engobe_autograd::{FrozenWeight, Result as OpResult, Tape, Var};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_kernels::attention::{AttentionShape, Segment};
use engobe_nn::decoder::Positions;
use engobe_nn::{
    Embedding, Encoder, Entry, LayerNorm, Linear, ModelInfo, ModuleMut, ModuleTree, SiteMut, SubLayer,
    SubLayerKind, TokenBatch, embed_types, linear_group,
};
use positions::RelativePositions;
use rayon::prelude::*;
use std::sync::Arc;

/// The architecture.
pub static ARCHITECTURE: EncoderArchitecture =
    EncoderArchitecture { model_type: "deberta-v2", class: "DebertaV2", also: &[], prefix: "deberta", build };

#[derive(Debug)]
struct DebertaV2 {
    info: ModelInfo,
    words: Embedding,
    entry: Entry,
    positions: Option<Positions>,
    token_types: Option<Embedding>,
    embed_proj: Option<Linear>,
    embedding_norm: LayerNorm,
    layers: Vec<Layer>,
    relative: Option<Relative>,
    conv: Option<Conv>,
    device: Device,
}

/// Embeddings of relative positions.
#[derive(Debug)]
struct Relative {
    embeddings: Embedding,
    norm: Option<LayerNorm>,
    places: RelativePositions,
}

/// The distances between the tokens of a batch.
#[derive(Clone)]
struct Distances {
    /// embeddings of relative positions `[rows, d]`
    embedded: Var,
    /// row of each distance
    rows: Arc<[u32]>,
    /// index of distance 0
    zero: usize,
}

#[derive(Debug)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    /// projections of relative positions; those of contents serve where they are shared
    pos_key: Option<Linear>,
    pos_query: Option<Linear>,
    attention_output: Linear,
    attention_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
    shape: AttentionShape,
    activation: Activation,
    terms: Terms,
    attention_end: SubLayer,
    mlp_end: SubLayer,
}

/// Which terms of positions the scores have.
#[derive(Clone, Copy, Debug)]
struct Terms {
    content_to_position: bool,
    position_to_content: bool,
}

/// The convolution over embedded tokens whose result joins the first block's.
#[derive(Debug)]
struct Conv {
    /// as a product with neighbours side by side: `[d, size·d]`
    product: Linear,
    size: usize,
    activation: Activation,
    norm: LayerNorm,
}

fn build(config: &HfConfig, weights: &Weights<'_>, naming: Naming) -> Result<Box<dyn Encoder>> {
    let (d, layers) = (config.usize("hidden_size")?, config.usize("num_hidden_layers")?);
    let (vocab, rows) = (config.usize("vocab_size")?, config.usize("max_position_embeddings")?);
    let width = config.opt_usize("embedding_size")?.unwrap_or(d);
    let eps = config.opt_f64("layer_norm_eps")?.unwrap_or(1e-7) as f32;
    let base = Scope::base(weights, ARCHITECTURE.prefix, naming, "embeddings.word_embeddings.weight");
    let (embeddings, encoder) = (base.within("embeddings"), base.within("encoder"));
    let relative = config.bool_or("relative_attention", false)?;
    let relative = relative.then(|| Relative::load(config, &encoder, d, rows, eps)).transpose()?;
    let types = config.opt_usize("type_vocab_size")?.unwrap_or(0);
    let parts = LayerParts::read(config, d, eps, relative.is_some())?;
    let layer = |i: usize| Layer::load(&parts, &encoder.within(&format!("layer.{i}")));
    let biased = config.bool_or("position_biased_input", true)?;
    let positions = || -> Result<Positions> {
        Ok(Positions { embedding: embeddings.embedding("position_embeddings", rows, width)?, first: 0 })
    };
    Ok(Box::new(DebertaV2 {
        info: info(ARCHITECTURE.model_type, vocab, d, layers, rows),
        words: embeddings.embedding("word_embeddings", vocab, width)?,
        entry: Entry::new(embeddings.path("word_embeddings"), width),
        positions: biased.then(positions).transpose()?,
        token_types: match types {
            0 => None,
            types => Some(embeddings.embedding("token_type_embeddings", types, width)?),
        },
        embed_proj: (width != d).then(|| embeddings.linear("embed_proj", d, width, false)).transpose()?,
        embedding_norm: embeddings.layer_norm("LayerNorm", d, eps, true)?,
        layers: (0..layers).into_par_iter().map(layer).collect::<Result<_>>()?,
        relative,
        conv: Conv::load(config, &encoder.within("conv"), d, eps)?,
        device: weights.device().clone(),
    }))
}

/// Half of the rows of relative positions.
pub(crate) fn span(config: &HfConfig) -> Result<usize> {
    Ok(places(config, config.opt_usize("max_position_embeddings")?.unwrap_or(512))?.span())
}

fn places(config: &HfConfig, positions: usize) -> Result<RelativePositions> {
    // -1 where there is none
    let number = |key: &str| Ok::<_, crate::Error>(config.opt_f64(key)?.unwrap_or(-1.0));
    let most = number("max_relative_positions")?;
    let most = if most < 1.0 { positions } else { most as usize };
    let buckets = number("position_buckets")?;
    let places = RelativePositions { buckets: (buckets > 0.0).then_some(buckets as usize), most };
    if !places.are_defined() {
        let most = places.most;
        let expected = format!(
            "2 or more, and a half that is not one less than max_relative_positions, {most}: what lies beyond has no bucket then"
        );
        return Err(bad(config, "position_buckets", places.span(), &expected));
    }
    Ok(places)
}

impl Relative {
    fn load(config: &HfConfig, encoder: &Scope<'_>, d: usize, rows: usize, eps: f32) -> Result<Self> {
        let places = places(config, rows)?;
        let norms = config.opt_str("norm_rel_ebd")?.unwrap_or("none").to_lowercase();
        let normed = norms.split('|').any(|n| n.trim() == "layer_norm");
        Ok(Self {
            embeddings: encoder.embedding("rel_embeddings", places.span().saturating_mul(2), d)?,
            norm: normed.then(|| encoder.layer_norm("LayerNorm", d, eps, true)).transpose()?,
            places,
        })
    }

    /// The embeddings that all layers project, those that rows of up to `longest` tokens need.
    fn embed<'m>(&'m self, tape: &mut Tape<'m>, longest: usize, device: &Device) -> OpResult<Distances> {
        let rows = self.places.rows(longest);
        // as a rule rows grow with the distance; not where there are more buckets than distances
        let first = rows.iter().copied().min().unwrap_or(0);
        let last = rows.iter().copied().max().unwrap_or(0);
        let embedded = self.embeddings.forward(tape, (first..=last).collect(), device)?;
        let embedded = match &self.norm {
            Some(norm) => norm.forward(tape, &embedded)?,
            None => embedded,
        };
        Ok(Distances { embedded, rows: rows.iter().map(|row| row - first).collect(), zero: longest - 1 })
    }
}

/// What all layers have in common.
struct LayerParts {
    d: usize,
    inner: usize,
    eps: f32,
    shape: AttentionShape,
    activation: Activation,
    terms: Terms,
    own_projections: bool,
}

impl LayerParts {
    fn read(config: &HfConfig, d: usize, eps: f32, relative: bool) -> Result<Self> {
        let kinds: Vec<String> = match config.get("pos_att_type") {
            None => Vec::new(),
            Some(serde_json::Value::String(text)) => {
                text.split('|').map(|k| k.trim().to_lowercase()).collect()
            }
            Some(serde_json::Value::Array(list)) => {
                list.iter().filter_map(|k| k.as_str()).map(str::to_lowercase).collect()
            }
            Some(other) => return Err(bad(config, "pos_att_type", other, "a list of \"c2p\" and \"p2c\"")),
        };
        let has = |kind: &str| kinds.iter().any(|k| k == kind);
        let (c2p, p2c) = (has("c2p"), has("p2c"));
        let plain = shape(config, "num_attention_heads", d)?;
        // as many kinds of scores share the variance, whether or not positions are there
        let scores = 1 + usize::from(c2p) + usize::from(p2c);
        let scale = 1.0 / ((plain.head_dim * scores) as f32).sqrt();
        Ok(Self {
            d,
            inner: config.usize("intermediate_size")?,
            eps,
            shape: AttentionShape { scale, ..plain },
            activation: activation(config, "hidden_act", "gelu")?,
            terms: Terms { content_to_position: relative && c2p, position_to_content: relative && p2c },
            own_projections: !config.bool_or("share_att_key", false)?,
        })
    }
}

impl Layer {
    fn load(p: &LayerParts, scope: &Scope<'_>) -> Result<Self> {
        let linear = |name: &str, out: usize, width: usize| scope.linear(name, out, width, true);
        let norm = |name: &str| scope.layer_norm(name, p.d, p.eps, true);
        let own = |wanted: bool, name: &str| {
            (wanted && p.own_projections).then(|| linear(name, p.d, p.d)).transpose()
        };
        Ok(Self {
            query: linear("attention.self.query_proj", p.d, p.d)?,
            key: linear("attention.self.key_proj", p.d, p.d)?,
            value: linear("attention.self.value_proj", p.d, p.d)?,
            pos_key: own(p.terms.content_to_position, "attention.self.pos_key_proj")?,
            pos_query: own(p.terms.position_to_content, "attention.self.pos_query_proj")?,
            attention_output: linear("attention.output.dense", p.d, p.d)?,
            attention_norm: norm("attention.output.LayerNorm")?,
            up: linear("intermediate.dense", p.inner, p.d)?,
            down: linear("output.dense", p.d, p.inner)?,
            norm: norm("output.LayerNorm")?,
            shape: p.shape,
            activation: p.activation,
            terms: p.terms,
            attention_end: SubLayer::new(scope.path("attention.output"), SubLayerKind::Attention, p.d),
            mlp_end: SubLayer::new(scope.path("output"), SubLayerKind::FeedForward, p.d),
        })
    }

    fn forward<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        x: &Var,
        segments: &Arc<[Segment]>,
        relative: Option<&Distances>,
    ) -> OpResult<Var> {
        let [q, k, v] = linear_group(tape, x, [&self.query, &self.key, &self.value])?;
        let attended = match relative {
            None => ops::attention(tape, &q, &k, &v, self.shape, segments.clone())?,
            Some(Distances { embedded, rows, zero }) => {
                let mut project = |wanted: bool, own: &'m Option<Linear>, shared: &'m Linear| {
                    wanted.then(|| own.as_ref().unwrap_or(shared).forward(tape, embedded)).transpose()
                };
                let keys = project(self.terms.content_to_position, &self.pos_key, &self.key)?;
                let queries = project(self.terms.position_to_content, &self.pos_query, &self.query)?;
                let terms = PositionTerms { keys, queries, rows: rows.clone(), zero: *zero };
                ops::disentangled_attention(tape, &q, &k, &v, self.shape, segments.clone(), &terms)?
            }
        };
        drop((q, k, v));
        let norm = |tape: &mut Tape<'m>, sum: &Var| self.attention_norm.forward(tape, sum);
        let x = self.attention_end.close_normed(tape, &self.attention_output, &attended, x, &norm)?;
        let up = self.up.forward(tape, &x)?;
        let inner = ops::activate(tape, self.activation, &up)?;
        let norm = |tape: &mut Tape<'m>, sum: &Var| self.norm.forward(tape, sum);
        self.mlp_end.close_normed(tape, &self.down, &inner, &x, &norm)
    }

    fn visit(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        for linear in [&mut self.query, &mut self.key, &mut self.value] {
            f(ModuleMut::Linear(linear));
        }
        for linear in [&mut self.pos_key, &mut self.pos_query].into_iter().flatten() {
            f(ModuleMut::Linear(linear));
        }
        f(ModuleMut::Linear(&mut self.attention_output));
        f(ModuleMut::LayerNorm(&mut self.attention_norm));
        f(ModuleMut::Linear(&mut self.up));
        f(ModuleMut::Linear(&mut self.down));
        f(ModuleMut::LayerNorm(&mut self.norm));
    }
}

impl Conv {
    fn load(config: &HfConfig, scope: &Scope<'_>, d: usize, eps: f32) -> Result<Option<Self>> {
        let size = config.opt_usize("conv_kernel_size")?.unwrap_or(0);
        if size == 0 {
            return Ok(None);
        }
        if size.is_multiple_of(2) {
            return Err(bad(config, "conv_kernel_size", size, "an odd number"));
        }
        match config.opt_usize("conv_groups")?.unwrap_or(1) {
            1 => {}
            groups => return Err(bad(config, "conv_groups", groups, "1")),
        }
        let (kernel, bias) = scope.convolution("conv", d, size)?;
        // [out, in, place] as [out, place·in], in the order of neighbours
        let product: Vec<f32> =
            (0..d * size * d).map(|i| kernel[(i / (size * d) * d + i % d) * size + i / d % size]).collect();
        let product = engobe_autograd::tensor_of(product, (d, size * d))?;
        let product = FrozenWeight::from_tensor(
            &product.to_device(scope.device()).map_err(engobe_autograd::Error::from)?,
        )?;
        Ok(Some(Self {
            product: Linear::new(scope.path("conv"), product, Some(bias)),
            size,
            activation: activation(config, "conv_act", "tanh")?,
            norm: scope.layer_norm("LayerNorm", d, eps, true)?,
        }))
    }

    /// The kernel `[out, in, place]` and the bias, as files have them.
    fn tensors(&self) -> OpResult<Vec<(String, Tensor)>> {
        let (d, product) = (self.product.out_features(), self.product.weight().to_tensor()?);
        let kernel = product.reshape((d, self.size, d))?.transpose(1, 2)?.contiguous()?;
        let named = |kind: &str, t: Tensor| (format!("{}.{kind}", self.product.path()), t);
        let bias = self.product.bias().map(|bias| named("bias", bias.clone()));
        Ok([named("weight", kernel)].into_iter().chain(bias).collect())
    }

    /// The norm of the first block's output and what the convolution makes of the embedded tokens.
    fn forward<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        embedded: &Var,
        output: &Var,
        segments: &Arc<[Segment]>,
    ) -> OpResult<Var> {
        let around = ops::neighbours(tape, embedded, segments.clone(), self.size)?;
        let y = self.product.forward(tape, &around)?;
        let y = ops::activate(tape, self.activation, &y)?;
        let sum = ops::add(tape, output, &y)?;
        self.norm.forward(tape, &sum)
    }
}

impl DebertaV2 {
    /// The hidden states that the first layer takes, `[n, d]`, and the batch with what adapters put before it.
    fn embed<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> OpResult<(Var, TokenBatch)> {
        let x = self.words.forward(tape, batch.ids.clone(), &self.device)?;
        let (mut x, batch) = self.entry.enter(tape, x, batch)?;
        if let Some(positions) = &self.positions {
            let embedded = positions.forward(tape, &batch, &self.device)?;
            x = ops::add(tape, &x, &embedded)?;
        }
        if let Some(token_types) = &self.token_types {
            let embedded = embed_types(tape, token_types, &batch, &self.device)?;
            x = ops::add(tape, &x, &embedded)?;
        }
        if let Some(project) = &self.embed_proj {
            x = project.forward(tape, &x)?;
        }
        Ok((self.embedding_norm.forward(tape, &x)?, batch))
    }
}

impl ModuleTree for DebertaV2 {
    fn visit_modules(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        f(ModuleMut::Embedding(&mut self.words));
        if let Some(positions) = &mut self.positions {
            f(ModuleMut::Embedding(&mut positions.embedding));
        }
        if let Some(token_types) = &mut self.token_types {
            f(ModuleMut::Embedding(token_types));
        }
        if let Some(project) = &mut self.embed_proj {
            f(ModuleMut::Linear(project));
        }
        f(ModuleMut::LayerNorm(&mut self.embedding_norm));
        self.layers.iter_mut().for_each(|layer| layer.visit(f));
        if let Some(relative) = &mut self.relative {
            f(ModuleMut::Embedding(&mut relative.embeddings));
            if let Some(norm) = &mut relative.norm {
                f(ModuleMut::LayerNorm(norm));
            }
        }
        if let Some(conv) = &mut self.conv {
            f(ModuleMut::LayerNorm(&mut conv.norm));
        }
    }

    fn visit_sites(&mut self, f: &mut dyn FnMut(SiteMut<'_>)) {
        f(SiteMut::Entry(&mut self.entry));
        for layer in &mut self.layers {
            f(SiteMut::SubLayer(&mut layer.attention_end));
            f(SiteMut::SubLayer(&mut layer.mlp_end));
        }
    }

    fn output_heads(&self) -> Vec<String> {
        Vec::new()
    }

    fn constants(&self) -> OpResult<Vec<(String, Tensor)>> {
        self.conv.as_ref().map_or(Ok(Vec::new()), Conv::tensors)
    }
}

impl Encoder for DebertaV2 {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn hidden_states<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> OpResult<Var> {
        let (x, batch) = self.hidden_rows(tape, batch)?;
        self.entry.leave(tape, x, &batch)
    }

    fn hidden_rows<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> OpResult<(Var, TokenBatch)> {
        let (embedded, batch) = self.embed(tape, batch)?;
        let longest = batch.segments.iter().map(|s| s.q.len()).max().unwrap_or(1).max(1);
        let relative = self.relative.as_ref();
        let relative = relative.map(|r| r.embed(tape, longest, &self.device)).transpose()?;
        let mut x = embedded.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            let segments = batch.segments.clone();
            x = match relative.clone() {
                None => tape.block(&[x], move |tape, xs| layer.forward(tape, &xs[0], &segments, None))?,
                Some(distances) => tape.block(&[x, distances.embedded.clone()], move |tape, xs| {
                    let distances = Distances { embedded: xs[1].clone(), ..distances.clone() };
                    layer.forward(tape, &xs[0], &segments, Some(&distances))
                })?,
            };
            if let (0, Some(conv)) = (i, &self.conv) {
                x = conv.forward(tape, &embedded, &x, &batch.segments)?;
            }
        }
        Ok((x, batch))
    }
}
