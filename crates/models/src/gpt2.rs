//! GPT-2 decoders (Radford et al. 2019): embedded positions, LayerNorm before each sub-layer, one layer for queries, keys
//! and values, a plain MLP with GELU.
//!
//! Module paths are those of transformers' `GPT2LMHeadModel`, which keeps the matrices of its linear layers transposed
//! (`Conv1D`).

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::gguf_names::Names;
use crate::parts::Frame;
use crate::settings::{DecoderSizes, PLAIN, activation, epsilon, exact, name_of};
use crate::{GgufSettings, Result, Weights};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_nn::CausalLm;
use engobe_nn::decoder::{Attention, Block, Decoder, Mlp, Norms, Positions, Projection, Up};
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "gpt2",
    class: "GPT2LMHeadModel",
    stem: "GPT2",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(Gpt2::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "gpt2",
        names: &NAMES,
        read: Some(|gguf| Ok(Box::new(Gpt2::from_gguf(gguf)?))),
    }),
};

const NAMES: Names = Names {
    block: "transformer.h.",
    in_block: &[
        ("ln_1", "attn_norm"),
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("ln_2", "ffn_norm"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
    ],
    outside: &[
        ("transformer.wte", "token_embd"),
        ("transformer.wpe", "position_embd"),
        ("transformer.ln_f", "output_norm"),
        ("lm_head", "output"),
    ],
};

#[derive(Debug)]
struct Gpt2 {
    sizes: DecoderSizes,
    eps: f32,
    activation: Activation,
    /// scores are divided by √head_dim
    scaled: bool,
    /// and by the number of the layer
    scaled_by_layer: bool,
}

impl Gpt2 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        let (hidden, heads) = (config.usize("n_embd")?, config.usize("n_head")?);
        let sizes = DecoderSizes {
            layers: config.usize("n_layer")?,
            hidden,
            heads,
            kv_heads: heads,
            head_dim: hidden / heads.max(1),
            mlp: config.opt_usize("n_inner")?.unwrap_or(4 * hidden),
            vocab: config.usize("vocab_size")?,
            max_positions: config.opt_usize("n_positions")?.unwrap_or(1024),
            tied_head: config.bool_or("tie_word_embeddings", true)?,
            extra_kept: 0,
            plain_mlp: true,
            relative_rows: 0,
            cross_layers: 0,
        };
        sizes.check().map_err(|m| m.at(config.path()))?;
        whole_heads(&sizes).map_err(|m| m.at(config.path()))?;
        Ok(Self {
            sizes,
            eps: epsilon(config, "layer_norm_epsilon", 1e-5)?,
            activation: activation(config, "activation_function", "gelu_new", PLAIN)?,
            scaled: config.bool_or("scale_attn_weights", true)?,
            scaled_by_layer: config.bool_or("scale_attn_by_inverse_layer_idx", false)?,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes { plain_mlp: true, ..DecoderSizes::from_gguf(gguf, "gpt2")? };
        whole_heads(&sizes).map_err(|m| m.at(gguf.path()))?;
        Ok(Self {
            sizes,
            eps: gguf.f32("gpt2.attention.layer_norm_epsilon")?,
            activation: Activation::GeluTanh,
            scaled: true,
            scaled_by_layer: false,
        })
    }
}

/// Heads share the hidden width out.
pub(crate) fn whole_heads(sizes: &DecoderSizes) -> Result<(), Misfit> {
    match sizes.width() == sizes.hidden {
        true => Ok(()),
        false => Err(Misfit::new("num_attention_heads", sizes.heads, "a divisor of the hidden size")),
    }
}

impl Family for Gpt2 {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let s = &self.sizes;
        let norm = |path: &str| w.layer_norm_at(path, s.hidden, self.eps);
        let frame = Frame {
            model_type: "gpt2",
            embedding: "transformer.wte",
            embedding_width: s.hidden,
            head: "lm_head",
            head_bias: false,
            norm: Some(norm("transformer.ln_f")?),
            ropes: Vec::new(),
        };
        let positions = w.embedding_at("transformer.wpe", s.max_positions, s.hidden)?;
        let decoder = frame.decoder(w, s, |i| {
            let at = |name: &str| format!("transformer.h.{i}.{name}");
            let scale = if self.scaled { s.scale() } else { 1.0 };
            let scale = if self.scaled_by_layer { scale / (i + 1) as f32 } else { scale };
            Ok(Block::new(
                Attention {
                    projection: Projection::Joined(w.conv1d_at(
                        &at("attn.c_attn"),
                        3 * s.hidden,
                        s.hidden,
                    )?),
                    head_norms: None,
                    output: w.conv1d_at(&at("attn.c_proj"), s.hidden, s.hidden)?,
                    shape: s.attention(scale, None),
                    rope: None,
                },
                Mlp {
                    up: Up::Plain(w.conv1d_at(&at("mlp.c_fc"), s.mlp, s.hidden)?),
                    activation: self.activation,
                    down: w.conv1d_at(&at("mlp.c_proj"), s.hidden, s.mlp)?,
                },
                Norms::Pre([norm(&at("ln_1"))?, norm(&at("ln_2"))?]),
            ))
        })?;
        let positions = Some(Positions { embedding: positions, first: 0 });
        Ok(Box::new(Decoder { positions, ..decoder }))
    }

    fn to_hf(&self) -> Value {
        let s = &self.sizes;
        json!({
            "vocab_size": s.vocab,
            "n_positions": s.max_positions,
            "n_embd": s.hidden,
            "n_layer": s.layers,
            "n_head": s.heads,
            "n_inner": s.mlp,
            "activation_function": name_of(self.activation),
            "layer_norm_epsilon": exact(self.eps),
            "scale_attn_weights": self.scaled,
            "scale_attn_by_inverse_layer_idx": self.scaled_by_layer,
        })
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        if self.activation != Activation::GeluTanh {
            let found = name_of(self.activation);
            return Err(Misfit::new(
                "activation_function",
                found,
                "gelu_new, which llama.cpp takes for GPT-2",
            ));
        }
        if !self.scaled || self.scaled_by_layer {
            let found = format!("{}, by layer {}", self.scaled, self.scaled_by_layer);
            let expected = "true, and scale_attn_by_inverse_layer_idx false, as llama.cpp has it";
            return Err(Misfit::new("scale_attn_weights", found, expected));
        }
        let mut metadata = self.sizes.to_gguf();
        metadata.push(("attention.layer_norm_epsilon".to_string(), GgufValue::Float(f64::from(self.eps))));
        Ok(GgufSettings { metadata, tensors: Vec::new() })
    }
}
