//! Granite decoders (IBM 2024): LLaMA with four factors, on what enters the blocks, on what each sub-layer adds, on
//! attention's scores, and (one over it) on logits.
//!
//! Module paths are those of transformers' `GraniteForCausalLM`, which has no heads for tasks.

use crate::family::{Architecture, Family, GgufForm, Misfit};
use crate::llama::{rope_rows, rope_settings};
use crate::parts::LlamaBlocks;
use crate::rope_settings::{Rotary, USUAL};
use crate::settings::{DecoderSizes, SILU, activation, bad, epsilon, exact, merged};
use crate::stored::Stored;
use crate::{GgufSettings, Result, Weights, gguf_names};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::CausalLm;
use engobe_nn::decoder::Decoder;
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "granite",
    class: "GraniteForCausalLM",
    stem: "Granite",
    heads: &[],
    from_hf: |config| Ok(Box::new(Granite::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "granite",
        names: &gguf_names::LLAMA,
        read: Some(|gguf| Ok(Box::new(Granite::from_gguf(gguf)?))),
    }),
};

/// Hugging Face's names of the factors, and llama.cpp's.
const FACTORS: [(&str, &str); 4] = [
    ("embedding_multiplier", "embedding_scale"),
    ("residual_multiplier", "residual_scale"),
    ("attention_multiplier", "attention.scale"),
    ("logits_scaling", "logit_scale"),
];

#[derive(Debug)]
struct Granite {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    attention_bias: bool,
    mlp_bias: bool,
    /// as [`FACTORS`] names them
    factors: [f32; 4],
}

impl Granite {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_act", "silu", SILU)?;
        let sizes = DecoderSizes::from_hf(config, false)?;
        let mut factors = [1.0; 4];
        for (factor, (key, _)) in factors.iter_mut().zip(FACTORS) {
            *factor = config.opt_f64(key)?.unwrap_or(1.0) as f32;
            if !(factor.is_finite() && *factor > 0.0) {
                return Err(bad(config, key, *factor, "a number above 0"));
            }
        }
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-6)?,
            rotary: Rotary::from_hf(config, &sizes, USUAL)?,
            attention_bias: config.bool_or("attention_bias", false)?,
            mlp_bias: config.bool_or("mlp_bias", false)?,
            factors,
            sizes,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes::from_gguf(gguf, "granite")?;
        let mut factors = [1.0, 1.0, sizes.scale(), 1.0];
        for (factor, (_, key)) in factors.iter_mut().zip(FACTORS) {
            // llama.cpp takes 0 for none
            let found = gguf.opt_f32(&format!("granite.{key}"))?.filter(|f| f.is_finite() && *f > 0.0);
            *factor = found.unwrap_or(*factor);
        }
        Ok(Self {
            eps: gguf.f32("granite.attention.layer_norm_rms_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "granite", &sizes)?,
            attention_bias: gguf.contains("blk.0.attn_q.bias"),
            mlp_bias: gguf.contains("blk.0.ffn_up.bias"),
            factors,
            sizes,
        })
    }
}

impl Family for Granite {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let [embedding, residual, attention, logits] = self.factors;
        let blocks = LlamaBlocks {
            qkv_bias: self.attention_bias,
            output_bias: self.attention_bias,
            mlp_bias: self.mlp_bias,
            score_scale: attention,
            sub_layer_scale: Some(residual),
            ..LlamaBlocks::new(&self.sizes, self.eps)
        };
        let decoder = blocks.decoder(w, "granite", self.rotary.rope())?;
        Ok(Box::new(Decoder { entry_scale: Some(embedding), head_scale: Some(1.0 / logits), ..decoder }))
    }

    fn stored(&self, name: &str) -> Stored {
        rope_rows(&self.sizes, name)
    }

    fn to_hf(&self) -> Value {
        let mut extra = json!({
            "hidden_act": "silu",
            "rms_norm_eps": exact(self.eps),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        });
        for (factor, (key, _)) in self.factors.iter().zip(FACTORS) {
            extra[key] = json!(exact(*factor));
        }
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        let mut settings = rope_settings(&self.sizes, self.eps, &self.rotary)?;
        for (factor, (_, key)) in self.factors.iter().zip(FACTORS) {
            settings.metadata.push((key.to_string(), GgufValue::Float(exact(*factor))));
        }
        Ok(settings)
    }
}
