//! OPT decoders (Zhang et al. 2022), the open models of GPT-3's shape: embedded positions from row 2 on, LayerNorm before
//! each sub-layer (after it in the 350m model, whose embedding is narrower than its blocks), a plain MLP with ReLU.
//!
//! Module paths are those of transformers' `OPTForCausalLM`. llama.cpp has no such architecture.

use crate::family::{Architecture, Family, Misfit};
use crate::gpt2::whole_heads;
use crate::parts::Frame;
use crate::settings::{DecoderSizes, PLAIN, activation, bad, name_of};
use crate::{GgufSettings, HeadKind, Result, Weights};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_nn::CausalLm;
use engobe_nn::decoder::{Attention, Block, Decoder, Norms, Positions};
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "opt",
    class: "OPTForCausalLM",
    stem: "OPT",
    heads: &[HeadKind::Sequence],
    from_hf: |config| Ok(Box::new(Opt::from_hf(config)?)),
    gguf: None,
};

/// torch's default, which OPT never sets otherwise
const EPS: f32 = 1e-5;
/// Row of the positions' embedding that position 0 has.
const FIRST: usize = 2;

#[derive(Debug)]
struct Opt {
    sizes: DecoderSizes,
    embedding_width: usize,
    activation: Activation,
    norm_before: bool,
    norm_last: bool,
    bias: bool,
}

impl Opt {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        let (hidden, heads) = (config.usize("hidden_size")?, config.usize("num_attention_heads")?);
        let sizes = DecoderSizes {
            layers: config.usize("num_hidden_layers")?,
            hidden,
            heads,
            kv_heads: heads,
            head_dim: hidden / heads.max(1),
            mlp: config.usize("ffn_dim")?,
            vocab: config.usize("vocab_size")?,
            max_positions: config.opt_usize("max_position_embeddings")?.unwrap_or(2048),
            tied_head: config.bool_or("tie_word_embeddings", true)?,
            extra_kept: 0,
            plain_mlp: true,
            relative_rows: 0,
            cross_layers: 0,
        };
        sizes.check().map_err(|m| m.at(config.path()))?;
        whole_heads(&sizes).map_err(|m| m.at(config.path()))?;
        if !config.bool_or("layer_norm_elementwise_affine", true)? {
            let expected = "true: norms without weights are not supported";
            return Err(bad(config, "layer_norm_elementwise_affine", false, expected));
        }
        let embedding_width = config.opt_usize("word_embed_proj_dim")?.unwrap_or(hidden);
        if embedding_width == 0 || embedding_width > hidden {
            let expected = "a width above 0 and at most hidden_size";
            return Err(bad(config, "word_embed_proj_dim", embedding_width, expected));
        }
        let norm_before = config.bool_or("do_layer_norm_before", true)?;
        Ok(Self {
            sizes,
            embedding_width,
            activation: activation(config, "activation_function", "relu", PLAIN)?,
            norm_before,
            norm_last: norm_before && !config.bool_or("_remove_final_layer_norm", false)?,
            bias: config.bool_or("enable_bias", true)?,
        })
    }
}

impl Family for Opt {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let s = &self.sizes;
        let norm = |path: &str| w.layer_norm_at(path, s.hidden, EPS);
        let last = self.norm_last.then(|| norm("model.decoder.final_layer_norm")).transpose()?;
        let frame = Frame {
            model_type: "opt",
            embedding: "model.decoder.embed_tokens",
            embedding_width: self.embedding_width,
            head: "lm_head",
            head_bias: false,
            norm: last,
            ropes: Vec::new(),
        };
        let decoder = frame.decoder(w, s, |i| {
            let layer = &format!("model.decoder.layers.{i}");
            let at = |name: &str| format!("{layer}.{name}");
            let norms = [norm(&at("self_attn_layer_norm"))?, norm(&at("final_layer_norm"))?];
            Ok(Block::new(
                Attention {
                    projection: w.separate_qkv(&at("self_attn"), s, self.bias)?,
                    head_norms: None,
                    output: w.linear_at(&at("self_attn.out_proj"), s.hidden, s.hidden, self.bias)?,
                    shape: s.attention(s.scale(), None),
                    rope: None,
                },
                w.plain_mlp(layer, ["fc1", "fc2"], s, self.activation, self.bias)?,
                if self.norm_before { Norms::Pre(norms) } else { Norms::Post(norms) },
            ))
        })?;
        let rows = s.max_positions + FIRST;
        let embedding = w.embedding_at("model.decoder.embed_positions", rows, s.hidden)?;
        let narrow = self.embedding_width != s.hidden;
        let project = |name: &str, out, width| {
            narrow.then(|| w.linear_at(&format!("model.decoder.{name}"), out, width, false)).transpose()
        };
        Ok(Box::new(Decoder {
            positions: Some(Positions { embedding, first: FIRST as u32 }),
            project_in: project("project_in", s.hidden, self.embedding_width)?,
            project_out: project("project_out", self.embedding_width, s.hidden)?,
            ..decoder
        }))
    }

    fn to_hf(&self) -> Value {
        let s = &self.sizes;
        json!({
            "vocab_size": s.vocab,
            "hidden_size": s.hidden,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "ffn_dim": s.mlp,
            "max_position_embeddings": s.max_positions,
            "word_embed_proj_dim": self.embedding_width,
            "do_layer_norm_before": self.norm_before,
            "activation_function": name_of(self.activation),
            "enable_bias": self.bias,
        })
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        Err(Misfit::new("model_type", "opt", "an architecture that llama.cpp knows"))
    }
}
