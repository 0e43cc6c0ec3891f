//! T5 (Raffel et al. 2020) and its v1.1, Flan and multilingual forms: pre-norm blocks by root mean square, attention whose
//! scores are not scaled but biased by distance (the first layer's table serves all layers of its stack; in UMT5 each has its
//! own), and a decoder that attends to the encoder's states.
//!
//! Module paths are those of transformers' `T5ForConditionalGeneration`.

mod config;

use crate::scope::Scope;
use crate::seq2seq::Seq2SeqArchitecture;
use crate::settings::DecoderSizes;
use crate::{Result, Weights};
use candle_core::{DType, Device, Tensor};
use config::{T5Config, bucket_of};
use engobe_autograd::ops::{self, HeadLoss, ScoreBias};
use engobe_autograd::{Result as OpResult, Tape, Var};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::attention::{AttentionShape, RelativeBias, Segment};
use engobe_nn::decoder::{Attention, CacheSlot, Context, Mlp, Projection, Up};
use engobe_nn::{
    Embedding, EncoderStates, Entry, KvCache, KvPrefix, Linear, ModelInfo, ModuleMut, ModuleTree, RmsNorm,
    Seq2Seq, Seq2SeqCache, SiteMut, SubLayer, SubLayerKind, Takes, TokenBatch, linear_group,
};
use rayon::prelude::*;
use std::sync::Arc;

/// The architecture.
pub static ARCHITECTURE: Seq2SeqArchitecture = Seq2SeqArchitecture { model_type: "t5", sizes, build };

const HEAD: &str = "lm_head.weight";

pub(crate) fn build(config: &HfConfig, weights: &Weights<'_>) -> Result<Box<dyn Seq2Seq>> {
    Ok(Box::new(T5::load(&T5Config::from_hf(config)?, weights)?))
}

pub(crate) fn sizes(config: &HfConfig) -> Result<DecoderSizes> {
    let c = T5Config::from_hf(config)?;
    Ok(DecoderSizes {
        layers: c.num_layers + c.num_decoder_layers,
        hidden: c.d_model,
        heads: c.num_heads,
        kv_heads: c.num_heads,
        head_dim: c.d_kv,
        mlp: c.d_ff,
        vocab: c.vocab_size,
        max_positions: c.n_positions,
        tied_head: c.tied,
        extra_kept: 0,
        plain_mlp: !c.gated,
        relative_rows: 0,
        cross_layers: c.num_decoder_layers,
    })
}

/// A T5 model with its output head.
#[derive(Debug)]
struct T5 {
    info: ModelInfo,
    config: T5Config,
    shared: Embedding,
    /// where adapters put rows before each source
    entry: Entry,
    /// where adapters put keys and values before each target
    target_entry: Entry,
    encoder: Stack,
    decoder: Stack,
    lm_head: Linear,
    device: Device,
}

/// The encoder's or the decoder's blocks.
#[derive(Debug)]
struct Stack {
    blocks: Vec<Block>,
    /// tables of biases: the first layer's, which serves all, or one a layer
    relative_attention_bias: Vec<Embedding>,
    final_norm: RmsNorm,
}

#[derive(Debug)]
struct Block {
    attention: Attention,
    attention_norm: RmsNorm,
    cross: Option<Cross>,
    mlp: Mlp,
    mlp_norm: RmsNorm,
    /// what stands before a target's keys; in the bias they are as far away as they lie
    prefix: KvPrefix,
    attention_end: SubLayer,
    mlp_end: SubLayer,
}

/// Attention to the encoder's states.
#[derive(Debug)]
struct Cross {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm: RmsNorm,
    shape: AttentionShape,
    end: SubLayer,
}

/// Where a decoder's block finds the sources.
enum Sources<'a> {
    /// the encoder's states
    States(&'a Var),
    /// their keys and values in this layer
    KeyValues(&'a (Tensor, Tensor)),
}

impl T5 {
    /// Builds the model over the weights of a checkpoint.
    fn load(config: &T5Config, weights: &Weights<'_>) -> Result<Self> {
        let c = config;
        let root = Scope::root(weights);
        let copies = ["encoder", "decoder"].map(|side| format!("{side}.embed_tokens"));
        // some checkpoints hold the embedding by one of its other names alone
        let names = ["shared", &copies[0], &copies[1]].map(|module| format!("{module}.weight"));
        let name = names.iter().find(|name| weights.contains(name)).unwrap_or(&names[0]);
        let embedding = weights.matrix(name, c.vocab_size, c.d_model)?;
        let as_tied = || weights.are_imagined() || weights.are_same(HEAD, name);
        let own_head = weights.contains(HEAD) && !(c.tied && as_tied());
        let lm_head = match own_head {
            true => weights.matrix(HEAD, c.vocab_size, c.d_model)?,
            false => embedding.clone(),
        };
        let shared = Embedding::new("shared", embedding).also_at(copies);
        let (encoder, decoder) = rayon::join(
            || Stack::load(c, &root.within("encoder"), c.num_layers, false),
            || Stack::load(c, &root.within("decoder"), c.num_decoder_layers, true),
        );
        let (encoder, decoder) = (encoder?, decoder?);
        let first = &encoder.blocks[0].mlp.down;
        Ok(Self {
            info: ModelInfo {
                model_type: c.model_type.clone(),
                vocab_size: c.vocab_size,
                hidden_size: c.d_model,
                num_layers: c.num_decoder_layers,
                kv_width: c.width(),
                max_positions: c.n_positions,
                tied_head: !own_head,
                blocks: first.weight().is_of_blocks(),
            },
            config: c.clone(),
            shared,
            entry: Entry::new("shared", c.d_model).taking(Takes::Rows),
            target_entry: Entry::new("shared", c.d_model).taking(Takes::KeyValues),
            encoder,
            decoder,
            lm_head: Linear::new("lm_head", lm_head, None),
            device: weights.device().clone(),
        })
    }

    /// What the head takes of the last block's output.
    fn before_head<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var) -> OpResult<Var> {
        let normed = self.decoder.final_norm.forward(tape, hidden)?;
        match self.config.scale_outputs {
            true => ops::scale(tape, &normed, 1.0 / (self.config.d_model as f32).sqrt()),
            false => Ok(normed),
        }
    }

    fn embed<'m>(&'m self, tape: &mut Tape<'m>, batch: &TokenBatch) -> OpResult<Var> {
        self.shared.forward(tape, batch.ids.clone(), &self.device)
    }
}

impl Stack {
    fn load(c: &T5Config, scope: &Scope<'_>, layers: usize, decoder: bool) -> Result<Self> {
        let bias = |i: usize| {
            let attention = scope.within(&format!("block.{i}.layer.0.SelfAttention"));
            attention.embedding("relative_attention_bias", c.buckets, c.num_heads)
        };
        let block = |i: usize| Block::load(c, &scope.within(&format!("block.{i}")), decoder);
        Ok(Self {
            blocks: (0..layers).into_par_iter().map(block).collect::<Result<_>>()?,
            relative_attention_bias: (0..if c.bias_a_layer { layers } else { 1 })
                .map(bias)
                .collect::<Result<_>>()?,
            final_norm: scope.rms_norm("final_layer_norm", c.d_model, c.eps)?,
        })
    }

    /// The biases of the segments at hand, as many as there are tables.
    fn biases<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        c: &T5Config,
        segments: &[Segment],
        device: &Device,
    ) -> OpResult<Vec<ScoreBias>> {
        let shape = self.blocks[0].attention.shape;
        let (distances, zero) = RelativeBias::needed(&shape, segments);
        let bucket = |i: usize| bucket_of(i as i64 - zero as i64, !shape.causal, c.buckets, c.max_distance);
        let buckets: Arc<[u32]> = (0..distances).map(bucket).collect();
        let bias = |table: &'m Embedding| {
            let rows = table.forward(tape, buckets.clone(), device)?;
            Ok(ScoreBias { table: ops::transpose(tape, &rows)?, zero })
        };
        self.relative_attention_bias.iter().map(bias).collect()
    }

    /// The blocks, each with the bias that is its own.
    fn with_biases(&self, biases: Vec<ScoreBias>) -> impl Iterator<Item = (&Block, ScoreBias)> {
        let last = biases.len().saturating_sub(1);
        self.blocks.iter().enumerate().map(move |(i, block)| (block, biases[i.min(last)].clone()))
    }

    fn visit(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.attention.visit(f);
            if let Some(bias) = self.relative_attention_bias.get_mut(i) {
                f(ModuleMut::Embedding(bias));
            }
            f(ModuleMut::RmsNorm(&mut block.attention_norm));
            if let Some(cross) = &mut block.cross {
                for linear in [&mut cross.q, &mut cross.k, &mut cross.v, &mut cross.o] {
                    f(ModuleMut::Linear(linear));
                }
                f(ModuleMut::RmsNorm(&mut cross.norm));
            }
            block.mlp.visit(f);
            f(ModuleMut::RmsNorm(&mut block.mlp_norm));
        }
        f(ModuleMut::RmsNorm(&mut self.final_norm));
    }
}

impl Block {
    fn load(c: &T5Config, scope: &Scope<'_>, decoder: bool) -> Result<Self> {
        let (d, all) = (c.d_model, c.width());
        let shape = |causal| AttentionShape::new(c.num_heads, c.num_heads, c.d_kv, 1.0, causal);
        let norm = |i: usize| scope.rms_norm(&format!("layer.{i}.layer_norm"), d, c.eps);
        let end = |name: &str| scope.path(name);
        let attention = scope.within("layer.0.SelfAttention");
        let cross = |scope: &Scope<'_>| -> Result<Cross> {
            Ok(Cross {
                q: scope.linear("q", all, d, false)?,
                k: scope.linear("k", all, d, false)?,
                v: scope.linear("v", all, d, false)?,
                o: scope.linear("o", d, all, false)?,
                norm: norm(1)?,
                shape: shape(false),
                end: SubLayer::new(end("layer.1.EncDecAttention"), SubLayerKind::CrossAttention, d),
            })
        };
        let last = if decoder { 2 } else { 1 };
        let mlp = scope.within(&format!("layer.{last}.DenseReluDense"));
        Ok(Self {
            attention: Attention {
                projection: Projection::Separate([
                    attention.linear("q", all, d, false)?,
                    attention.linear("k", all, d, false)?,
                    attention.linear("v", all, d, false)?,
                ]),
                head_norms: None,
                output: attention.linear("o", d, all, false)?,
                shape: shape(decoder),
                rope: None,
            },
            attention_norm: norm(0)?,
            cross: decoder.then(|| cross(&scope.within("layer.1.EncDecAttention"))).transpose()?,
            mlp: Mlp {
                up: match c.gated {
                    false => Up::Plain(mlp.linear("wi", c.d_ff, d, false)?),
                    true => Up::Gated {
                        gate: mlp.linear("wi_0", c.d_ff, d, false)?,
                        up: mlp.linear("wi_1", c.d_ff, d, false)?,
                    },
                },
                activation: c.activation,
                down: mlp.linear("wo", d, c.d_ff, false)?,
            },
            mlp_norm: norm(last)?,
            prefix: KvPrefix::new(end("layer.0.SelfAttention"), c.num_heads, c.d_kv),
            attention_end: SubLayer::new(end("layer.0.SelfAttention"), SubLayerKind::Attention, d),
            mlp_end: SubLayer::new(
                end(&format!("layer.{last}.DenseReluDense")),
                SubLayerKind::FeedForward,
                d,
            ),
        })
    }

    fn forward<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        x: &Var,
        context: &Context,
        cache: Option<CacheSlot<'_>>,
        sources: Option<(Sources<'_>, Arc<[Segment]>)>,
    ) -> OpResult<Var> {
        let normed = self.attention_norm.forward(tape, x)?;
        let attended = self.attention.attend(tape, &normed, context, &self.prefix, cache)?;
        drop(normed);
        let mut x = self.attention_end.close(tape, &self.attention.output, &attended, x)?;
        drop(attended);
        if let (Some(cross), Some((sources, segments))) = (&self.cross, sources) {
            let normed = cross.norm.forward(tape, &x)?;
            let q = cross.q.forward(tape, &normed)?;
            drop(normed);
            let [k, v] = match sources {
                Sources::States(states) => linear_group(tape, states, [&cross.k, &cross.v])?,
                Sources::KeyValues((k, v)) => [Var::constant(k.clone()), Var::constant(v.clone())],
            };
            let attended = ops::attention(tape, &q, &k, &v, cross.shape, segments)?;
            x = cross.end.close(tape, &cross.o, &attended, &x)?;
        }
        let normed = self.mlp_norm.forward(tape, &x)?;
        let inner = self.mlp.inner(tape, &normed)?;
        drop(normed);
        self.mlp_end.close_block(tape, &self.mlp.down, &inner, &x)
    }
}

/// What attention needs to know of the tokens at hand.
fn context(batch: &TokenBatch, table: &Var, zero: usize) -> Context {
    let bias = Some(ScoreBias { table: table.clone(), zero });
    Context { ropes: Arc::from([]), batch: batch.clone(), bias }
}

impl ModuleTree for T5 {
    fn visit_modules(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        f(ModuleMut::Embedding(&mut self.shared));
        self.encoder.visit(f);
        self.decoder.visit(f);
        f(ModuleMut::Linear(&mut self.lm_head));
    }

    fn visit_sites(&mut self, f: &mut dyn FnMut(SiteMut<'_>)) {
        f(SiteMut::Entry(&mut self.entry));
        f(SiteMut::Entry(&mut self.target_entry));
        for block in self.encoder.blocks.iter_mut().chain(&mut self.decoder.blocks) {
            if block.cross.is_some() {
                f(SiteMut::KvPrefix(&mut block.prefix));
            }
            f(SiteMut::SubLayer(&mut block.attention_end));
            if let Some(cross) = &mut block.cross {
                f(SiteMut::SubLayer(&mut cross.end));
            }
            f(SiteMut::SubLayer(&mut block.mlp_end));
        }
    }

    fn output_heads(&self) -> Vec<String> {
        vec![self.lm_head.path().to_string()]
    }
}

impl Seq2Seq for T5 {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn scales_head_input(&self) -> bool {
        self.config.scale_outputs
    }

    fn start_token(&self) -> u32 {
        self.config.start_token
    }

    fn encode<'m>(&'m self, tape: &mut Tape<'m>, source: &TokenBatch) -> OpResult<EncoderStates> {
        let x = self.embed(tape, source)?;
        let (mut x, source) = self.entry.enter(tape, x, source)?;
        let biases = self.encoder.biases(tape, &self.config, &source.segments, &self.device)?;
        for (block, bias) in self.encoder.with_biases(biases) {
            let (source, zero) = (source.clone(), bias.zero);
            x = tape.block(&[x, bias.table], move |tape, xs| {
                block.forward(tape, &xs[0], &context(&source, &xs[1], zero), None, None)
            })?;
        }
        let hidden = self.encoder.final_norm.forward(tape, &x)?;
        // the decoder sees the states of inserted rows too, as PEFT has it
        Ok(EncoderStates { hidden, rows: source.segments.iter().map(|s| s.q.clone()).collect() })
    }

    fn decoder_states<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        target: &TokenBatch,
        states: &EncoderStates,
    ) -> OpResult<Var> {
        let cross = states.cross(target)?;
        let x = self.embed(tape, target)?;
        let (mut x, target) = self.target_entry.enter(tape, x, target)?;
        let biases = self.decoder.biases(tape, &self.config, &target.segments, &self.device)?;
        for (block, bias) in self.decoder.with_biases(biases) {
            let (target, zero, cross) = (target.clone(), bias.zero, cross.clone());
            x = tape.block(&[x, bias.table, states.hidden.clone()], move |tape, xs| {
                let sources = Some((Sources::States(&xs[2]), cross.clone()));
                block.forward(tape, &xs[0], &context(&target, &xs[1], zero), None, sources)
            })?;
        }
        Ok(x)
    }

    fn new_cache<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        states: &EncoderStates,
        capacity: usize,
    ) -> OpResult<Seq2SeqCache> {
        let mut sources = Vec::with_capacity(self.decoder.blocks.len());
        for cross in self.decoder.blocks.iter().filter_map(|b| b.cross.as_ref()) {
            let [k, v] = linear_group(tape, &states.hidden, [&cross.k, &cross.v])?;
            sources.push((k.into_tensor(), v.into_tensor()));
        }
        let (layers, width, slots) = (self.info.num_layers, self.info.kv_width, states.rows.len());
        let lead = self.target_entry.lead();
        let own = KvCache::new(layers, width, slots, capacity + lead, DType::F32, &self.device)?;
        Ok(Seq2SeqCache { own: own.with_lead(lead), sources, rows: states.rows.clone() })
    }

    fn next_states<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        batch: &TokenBatch,
        cache: &mut Seq2SeqCache,
    ) -> OpResult<Var> {
        let cross = cache.cross(batch)?;
        let x = self.embed(tape, batch)?;
        let (mut x, entered) = self.target_entry.enter(tape, x, batch)?;
        let biases = self.decoder.biases(tape, &self.config, &entered.segments, &self.device)?;
        for (layer, (block, bias)) in self.decoder.with_biases(biases).enumerate() {
            let sources = Some((Sources::KeyValues(&cache.sources[layer]), cross.clone()));
            let slot = CacheSlot { kv: &mut cache.own, layer };
            let context = context(&entered, &bias.table, bias.zero);
            x = block.forward(tape, &x, &context, Some(slot), sources)?;
        }
        cache.own.advance(batch);
        Ok(x)
    }

    fn head_loss<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var, targets: Arc<[u32]>) -> OpResult<HeadLoss> {
        let x = self.before_head(tape, hidden)?;
        let (x, head) = self.lm_head.head(tape, &x)?;
        ops::head_loss(tape, &x, head, targets)
    }

    fn logits<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var) -> OpResult<Tensor> {
        let x = self.before_head(tape, hidden)?;
        Ok(self.lm_head.forward(tape, &x)?.into_tensor())
    }
}
