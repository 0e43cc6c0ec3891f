//! LLaMA decoders (Touvron et al. 2023): grouped-query attention, rotary positions, SwiGLU, RMSNorm.
//!
//! Module paths are those of transformers' `LlamaForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::parts::LlamaBlocks;
use crate::rope_settings::{Rotary, USUAL};
use crate::settings::{DecoderSizes, SILU, activation, epsilon, exact, merged};
use crate::stored::Stored;
use crate::{GgufSettings, Result, Weights, gguf_names};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::CausalLm;
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "llama",
    class: "LlamaForCausalLM",
    stem: "Llama",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(Llama::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "llama",
        names: &gguf_names::LLAMA,
        read: Some(|gguf| Ok(Box::new(Llama::from_gguf(gguf)?))),
    }),
};

/// What `LlamaConfig` of transformers holds, as far as the arithmetic needs it.
#[derive(Debug)]
struct Llama {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    attention_bias: bool,
    mlp_bias: bool,
}

impl Llama {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_act", "silu", SILU)?;
        let sizes = DecoderSizes::from_hf(config, false)?;
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-6)?,
            rotary: Rotary::from_hf(config, &sizes, USUAL)?,
            attention_bias: config.bool_or("attention_bias", false)?,
            mlp_bias: config.bool_or("mlp_bias", false)?,
            sizes,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes::from_gguf(gguf, "llama")?;
        Ok(Self {
            eps: gguf.f32("llama.attention.layer_norm_rms_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "llama", &sizes)?,
            attention_bias: gguf.contains("blk.0.attn_q.bias"),
            mlp_bias: gguf.contains("blk.0.ffn_up.bias"),
            sizes,
        })
    }
}

impl Family for Llama {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let bias = self.attention_bias;
        let plain = LlamaBlocks::new(&self.sizes, self.eps);
        LlamaBlocks { qkv_bias: bias, output_bias: bias, mlp_bias: self.mlp_bias, ..plain }.build(
            w,
            "llama",
            self.rotary.rope(),
        )
    }

    fn stored(&self, name: &str) -> Stored {
        rope_rows(&self.sizes, name)
    }

    fn to_hf(&self) -> Value {
        let extra = json!({
            "hidden_act": "silu",
            "rms_norm_eps": exact(self.eps),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        rope_settings(&self.sizes, self.eps, &self.rotary)
    }
}

/// llama.cpp turns neighbours in this architecture, so its converter reorders the rows of queries and keys.
pub(crate) fn rope_rows(sizes: &DecoderSizes, name: &str) -> Stored {
    match name {
        _ if name.contains(".self_attn.q_proj.") => Stored::Permuted { heads: sizes.heads },
        _ if name.contains(".self_attn.k_proj.") => Stored::Permuted { heads: sizes.kv_heads },
        _ => Stored::AsIs,
    }
}

/// The settings of a GGUF file of a decoder with a root-mean-square norm and one rotary embedding.
pub(crate) fn rope_settings(sizes: &DecoderSizes, eps: f32, rotary: &Rotary) -> Result<GgufSettings, Misfit> {
    settings_with(sizes, ("attention.layer_norm_rms_epsilon", eps), rotary)
}

/// The same of one with a layer norm.
pub(crate) fn layer_norm_settings(
    sizes: &DecoderSizes,
    eps: f32,
    rotary: &Rotary,
) -> Result<GgufSettings, Misfit> {
    settings_with(sizes, ("attention.layer_norm_epsilon", eps), rotary)
}

fn settings_with(
    sizes: &DecoderSizes,
    (key, eps): (&str, f32),
    rotary: &Rotary,
) -> Result<GgufSettings, Misfit> {
    let mut metadata = sizes.to_gguf();
    metadata.push((key.to_string(), GgufValue::Float(f64::from(eps))));
    let tensors = rotary.to_gguf(sizes, &mut metadata, false)?;
    Ok(GgufSettings { metadata, tensors })
}
