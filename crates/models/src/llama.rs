//! LLaMA decoders (Touvron et al. 2023): grouped-query attention, rotary positions, SwiGLU, RMSNorm.
//!
//! Module paths are those of transformers' `LlamaForCausalLM`.

use crate::Result;
use crate::llama_config::LlamaConfig;
use crate::weights::Weights;
use candle_core::{Device, Tensor};
use engobe_autograd::ops::{self, HeadLoss, RopeSpec};
use engobe_autograd::{Result as OpResult, Tape, Var};
use engobe_kernels::activation::Activation;
use engobe_kernels::attention::AttentionShape;
use engobe_nn::rope::Rope;
use engobe_nn::{
    CausalLm, Embedding, Entry, KvCache, KvPrefix, Linear, ModelInfo, ModuleMut, ModuleTree, RmsNorm,
    SiteMut, SubLayer, SubLayerKind, TokenBatch, linear_group,
};
use rayon::prelude::*;
use std::sync::Arc;

/// A LLaMA decoder with its output head.
#[derive(Debug)]
pub struct Llama {
    info: ModelInfo,
    embed_tokens: Embedding,
    entry: Entry,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
    rope: Rope,
    device: Device,
}

#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    prefix: KvPrefix,
    o_proj: Linear,
    attention_end: SubLayer,
    post_attention_layernorm: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    mlp_end: SubLayer,
    shape: AttentionShape,
}

/// What every layer needs to know of the tokens at hand.
#[derive(Clone)]
struct Context {
    rope: RopeSpec,
    batch: TokenBatch,
}

impl Llama {
    /// Builds the model over the weights of a checkpoint.
    pub fn load(config: &LlamaConfig, weights: &Weights<'_>) -> Result<Self> {
        let c = config;
        let (d, kv, all) = (c.hidden_size, c.kv_width(), c.num_attention_heads * c.head_dim);
        let embed = weights.matrix("model.embed_tokens.weight", c.vocab_size, d)?;
        let head = match c.tie_word_embeddings {
            true => embed.clone(),
            false => weights.matrix("lm_head.weight", c.vocab_size, d)?,
        };
        let linear = |path: &str, out: usize, width: usize, bias: bool| -> Result<Linear> {
            let weight = weights.linear(&format!("{path}.weight"), out, width)?;
            let bias = bias.then(|| weights.vector(&format!("{path}.bias"), out)).transpose()?;
            Ok(Linear::new(path, weight, bias))
        };
        let norm = |path: &str| -> Result<RmsNorm> {
            Ok(RmsNorm::new(path, weights.vector(&format!("{path}.weight"), d)?, c.rms_norm_eps))
        };
        let layer = |i: usize| -> Result<Layer> {
            let p = format!("model.layers.{i}");
            Ok(Layer {
                input_layernorm: norm(&format!("{p}.input_layernorm"))?,
                q_proj: linear(&format!("{p}.self_attn.q_proj"), all, d, c.attention_bias)?,
                k_proj: linear(&format!("{p}.self_attn.k_proj"), kv, d, c.attention_bias)?,
                v_proj: linear(&format!("{p}.self_attn.v_proj"), kv, d, c.attention_bias)?,
                prefix: KvPrefix::new(format!("{p}.self_attn"), c.num_key_value_heads, c.head_dim),
                o_proj: linear(&format!("{p}.self_attn.o_proj"), d, all, c.attention_bias)?,
                attention_end: SubLayer::new(format!("{p}.self_attn"), SubLayerKind::Attention, d),
                post_attention_layernorm: norm(&format!("{p}.post_attention_layernorm"))?,
                gate_proj: linear(&format!("{p}.mlp.gate_proj"), c.intermediate_size, d, c.mlp_bias)?,
                up_proj: linear(&format!("{p}.mlp.up_proj"), c.intermediate_size, d, c.mlp_bias)?,
                down_proj: linear(&format!("{p}.mlp.down_proj"), d, c.intermediate_size, c.mlp_bias)?,
                mlp_end: SubLayer::new(format!("{p}.mlp"), SubLayerKind::FeedForward, d),
                shape: AttentionShape::new(
                    c.num_attention_heads,
                    c.num_key_value_heads,
                    c.head_dim,
                    1.0 / (c.head_dim as f32).sqrt(),
                    true,
                ),
            })
        };
        let layers = (0..c.num_hidden_layers).into_par_iter().map(layer).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            info: ModelInfo {
                model_type: "llama".to_string(),
                vocab_size: c.vocab_size,
                hidden_size: d,
                num_layers: c.num_hidden_layers,
                kv_width: kv,
                max_positions: c.max_position_embeddings,
                tied_head: c.tie_word_embeddings,
                blocks: layers.iter().any(|l| l.q_proj.weight().is_of_blocks()),
            },
            embed_tokens: Embedding::new("model.embed_tokens", embed),
            entry: Entry::new("model.embed_tokens", d),
            layers,
            norm: norm("model.norm")?,
            lm_head: Linear::new("lm_head", head, None),
            rope: Rope::new(c.rope_theta, c.head_dim, c.rope_scaling.clone()),
            device: weights.device().clone(),
        })
    }
}

impl Layer {
    fn forward<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        x: &Var,
        context: &Context,
        cache: Option<(&mut KvCache, usize)>,
    ) -> OpResult<Var> {
        let normed = self.input_layernorm.forward(tape, x)?;
        let [q, k, v] = linear_group(tape, &normed, [&self.q_proj, &self.k_proj, &self.v_proj])?;
        drop(normed);
        let q = ops::rope(tape, &q, &context.rope, self.shape.head_dim)?;
        let k = ops::rope(tape, &k, &context.rope, self.shape.head_dim)?;
        let (mut k, mut v) = self.prefix.extend(tape, k, v, &context.batch)?;
        if let Some((cache, layer)) = cache {
            let (keys, values) = cache.append(layer, &context.batch, k.tensor(), v.tensor())?;
            (k, v) = (Var::constant(keys), Var::constant(values));
        }
        let attended = ops::attention(tape, &q, &k, &v, self.shape, context.batch.segments.clone())?;
        drop((q, k, v));
        let x = self.attention_end.close(tape, &self.o_proj, &attended, x)?;
        drop(attended);
        let normed = self.post_attention_layernorm.forward(tape, &x)?;
        let [gate, up] = linear_group(tape, &normed, [&self.gate_proj, &self.up_proj])?;
        drop(normed);
        let gated = ops::gated(tape, Activation::Silu, &gate, &up)?;
        drop((gate, up));
        self.mlp_end.close_block(tape, &self.down_proj, &gated, &x)
    }

    fn linears(&mut self) -> [&mut Linear; 7] {
        [
            &mut self.q_proj,
            &mut self.k_proj,
            &mut self.v_proj,
            &mut self.o_proj,
            &mut self.gate_proj,
            &mut self.up_proj,
            &mut self.down_proj,
        ]
    }
}

impl ModuleTree for Llama {
    fn visit_modules(&mut self, f: &mut dyn FnMut(ModuleMut<'_>)) {
        f(ModuleMut::Embedding(&mut self.embed_tokens));
        for layer in &mut self.layers {
            for linear in layer.linears() {
                f(ModuleMut::Linear(linear));
            }
            f(ModuleMut::RmsNorm(&mut layer.input_layernorm));
            f(ModuleMut::RmsNorm(&mut layer.post_attention_layernorm));
        }
        f(ModuleMut::RmsNorm(&mut self.norm));
        f(ModuleMut::Linear(&mut self.lm_head));
    }

    fn visit_sites(&mut self, f: &mut dyn FnMut(SiteMut<'_>)) {
        f(SiteMut::Entry(&mut self.entry));
        for layer in &mut self.layers {
            f(SiteMut::KvPrefix(&mut layer.prefix));
            f(SiteMut::SubLayer(&mut layer.attention_end));
            f(SiteMut::SubLayer(&mut layer.mlp_end));
        }
    }

    fn output_heads(&self) -> Vec<String> {
        vec![self.lm_head.path().to_string()]
    }
}

impl CausalLm for Llama {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn lead(&self) -> usize {
        self.entry.lead()
    }

    fn hidden_states<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        batch: &TokenBatch,
        mut cache: Option<&mut KvCache>,
    ) -> OpResult<Var> {
        let x = self.embed_tokens.forward(tape, batch.ids.clone(), &self.device)?;
        let (mut x, batch) = self.entry.enter(tape, x, batch)?;
        let longest = batch.positions.iter().max().map_or(0, |p| *p as usize + 1);
        let context = Context {
            rope: RopeSpec { table: self.rope.table(longest), positions: batch.positions.clone() },
            batch,
        };
        for (i, layer) in self.layers.iter().enumerate() {
            x = match cache.as_deref_mut() {
                Some(cache) => layer.forward(tape, &x, &context, Some((cache, i)))?,
                None => {
                    let context = context.clone();
                    tape.block(&[x], move |tape, xs| layer.forward(tape, &xs[0], &context, None))?
                }
            };
        }
        if let Some(cache) = cache {
            cache.advance(&context.batch);
        }
        self.entry.leave(tape, x, &context.batch)
    }

    fn head_loss<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var, targets: Arc<[u32]>) -> OpResult<HeadLoss> {
        let normed = self.norm.forward(tape, hidden)?;
        let (normed, head) = self.lm_head.head(tape, &normed)?;
        ops::head_loss(tape, &normed, head, targets)
    }

    fn logits<'m>(&'m self, tape: &mut Tape<'m>, hidden: &Var) -> OpResult<Tensor> {
        let normed = self.norm.forward(tape, hidden)?;
        Ok(self.lm_head.forward(tape, &normed)?.into_tensor())
    }
}
