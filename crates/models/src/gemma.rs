//! Gemma decoders (Gemma Team 2024, the first of them): LLaMA with norms whose factor is 1 + weight, embeddings scaled by
//! √d, GELU gates.
//!
//! Module paths are those of transformers' `GemmaForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::llama::rope_settings;
use crate::parts::LlamaBlocks;
use crate::rope_settings::{Rotary, USUAL};
use crate::settings::{DecoderSizes, activation, bad, epsilon, exact, merged};
use crate::stored::Stored;
use crate::{GgufSettings, Result, Weights, gemmas, gguf_names};
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_nn::decoder::Decoder;
use engobe_nn::{CausalLm, Norm};
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "gemma",
    class: "GemmaForCausalLM",
    stem: "Gemma",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(Gemma1::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "gemma",
        names: &gguf_names::LLAMA,
        read: Some(|gguf| Ok(Box::new(Gemma1::from_gguf(gguf)?))),
    }),
};

#[derive(Debug)]
struct Gemma1 {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    bias: bool,
}

impl Gemma1 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_act", "gelu_pytorch_tanh", gemmas::GELU)?;
        if config.bool_or("use_bidirectional_attention", false)? {
            let expected = "false: only decoders are supported";
            return Err(bad(config, "use_bidirectional_attention", true, expected));
        }
        let mut sizes = DecoderSizes::from_hf(config, true)?;
        if config.get("head_dim").is_none() {
            sizes.head_dim = 256;
        }
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-6)?,
            rotary: Rotary::from_hf(config, &sizes, USUAL)?,
            bias: config.bool_or("attention_bias", false)?,
            sizes,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes::from_gguf(gguf, "gemma")?;
        Ok(Self {
            eps: gguf.f32("gemma.attention.layer_norm_rms_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "gemma", &sizes)?,
            bias: false,
            sizes,
        })
    }
}

impl Family for Gemma1 {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let blocks = LlamaBlocks {
            qkv_bias: self.bias,
            output_bias: self.bias,
            norm: |w, path, d, eps| Ok(Norm::Rms(gemmas::norm(w, path, d, eps)?)),
            activation: Activation::GeluTanh,
            ..LlamaBlocks::new(&self.sizes, self.eps)
        };
        let embed_scale = Some((self.sizes.hidden as f32).sqrt());
        Ok(Box::new(Decoder { embed_scale, ..blocks.decoder(w, "gemma", self.rotary.rope())? }))
    }

    fn stored(&self, name: &str) -> Stored {
        gemmas::stored(name)
    }

    fn to_hf(&self) -> Value {
        let extra = json!({
            "hidden_act": "gelu_pytorch_tanh",
            "rms_norm_eps": exact(self.eps),
            "attention_bias": self.bias,
        });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        if self.bias {
            return Err(Misfit::new("attention_bias", true, "false: llama.cpp's Gemma has no biases"));
        }
        if !self.sizes.tied_head {
            let expected = "true: llama.cpp's Gemma has no head of its own";
            return Err(Misfit::new("tie_word_embeddings", false, expected));
        }
        rope_settings(&self.sizes, self.eps, &self.rotary)
    }
}
