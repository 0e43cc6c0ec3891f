//! OLMo 2 decoders (OLMo Team 2024): LLaMA whose norms stand behind the sub-layers and not before them, with norms over all
//! queries and all keys of a token.
//!
//! Module paths are those of transformers' `Olmo2ForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, Misfit};
use crate::gguf_names::{Names, OUTSIDE};
use crate::llama::rope_settings;
use crate::parts::Frame;
use crate::rope_settings::{Rotary, USUAL};
use crate::settings::{DecoderSizes, SILU, activation, epsilon, exact, merged};
use crate::{GgufSettings, HeadKind, Result, Weights};
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_nn::decoder::{Attention, Block, Norms};
use engobe_nn::{CausalLm, Norm};
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "olmo2",
    class: "Olmo2ForCausalLM",
    stem: "Olmo2",
    heads: &[HeadKind::Sequence],
    from_hf: |config| Ok(Box::new(Olmo2::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "olmo2",
        names: &NAMES,
        read: Some(|gguf| Ok(Box::new(Olmo2::from_gguf(gguf)?))),
    }),
};

const NAMES: Names = Names {
    block: "model.layers.",
    in_block: &[
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ],
    outside: OUTSIDE,
};

#[derive(Debug)]
struct Olmo2 {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    bias: bool,
}

impl Olmo2 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_act", "silu", SILU)?;
        let sizes = DecoderSizes::from_hf(config, false)?;
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-5)?,
            rotary: Rotary::from_hf(config, &sizes, USUAL)?,
            bias: config.bool_or("attention_bias", false)?,
            sizes: sizes.with_norms_after().with_head_norms(),
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let key = "olmo2.attention.sliding_window";
        if let Some(window) = gguf.opt_u32(key)?.filter(|w| *w > 0) {
            // llama.cpp calls OLMo 3 by the same name
            let expected = "none: this is OLMo 3, which is not supported";
            return Err(Misfit::new(key, window, expected).at(gguf.path()));
        }
        let sizes = DecoderSizes::from_gguf(gguf, "olmo2")?;
        Ok(Self {
            eps: gguf.f32("olmo2.attention.layer_norm_rms_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "olmo2", &sizes)?,
            bias: false,
            sizes: sizes.with_norms_after().with_head_norms(),
        })
    }
}

impl Family for Olmo2 {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let s = &self.sizes;
        let norm = |path: &str| -> Result<Norm> { Ok(Norm::Rms(w.rms_norm_at(path, s.hidden, self.eps)?)) };
        let frame = Frame::usual("olmo2", s, norm("model.norm")?, vec![self.rotary.rope()]);
        let decoder = frame.decoder(w, s, |i| {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            Ok(Block::new(
                Attention {
                    projection: w.separate_qkv(&at("self_attn"), s, self.bias)?,
                    head_norms: Some([
                        w.rms_norm_at(&at("self_attn.q_norm"), s.width(), self.eps)?,
                        w.rms_norm_at(&at("self_attn.k_norm"), s.kv_width(), self.eps)?,
                    ]),
                    output: w.linear_at(&at("self_attn.o_proj"), s.hidden, s.width(), self.bias)?,
                    shape: s.attention(s.scale(), None),
                    rope: Some(0),
                },
                w.gated_mlp(&at("mlp"), s, Activation::Silu, false)?,
                Norms::After([
                    norm(&at("post_attention_layernorm"))?,
                    norm(&at("post_feedforward_layernorm"))?,
                ]),
            ))
        })?;
        Ok(Box::new(decoder))
    }

    fn to_hf(&self) -> Value {
        let extra = json!({
            "hidden_act": "silu",
            "rms_norm_eps": exact(self.eps),
            "attention_bias": self.bias,
            // transformers' default is a token that small vocabularies lack
            "pad_token_id": null,
        });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        if self.bias {
            return Err(Misfit::new("attention_bias", true, "false: llama.cpp's OLMo 2 has no biases"));
        }
        rope_settings(&self.sizes, self.eps, &self.rotary)
    }
}
