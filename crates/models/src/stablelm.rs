//! StableLM decoders (Stability AI 2023; StableLM 2, StableLM Zephyr): LLaMA with layer norms, a share of each head turned,
//! perhaps biases on queries, keys and values, perhaps attention and MLP side by side.
//!
//! Module paths are those of transformers' `StableLmForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::gpt2::whole_heads;
use crate::llama::layer_norm_settings;
use crate::parts::LlamaBlocks;
use crate::rope_settings::{Rotary, RotaryDefaults, USUAL};
use crate::settings::{DecoderSizes, SILU, activation, bad, epsilon, exact, merged};
use crate::{GgufSettings, Result, Weights, gguf_names};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::CausalLm;
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "stablelm",
    class: "StableLmForCausalLM",
    stem: "StableLm",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(StableLm::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "stablelm",
        names: &gguf_names::LLAMA,
        read: Some(|gguf| Ok(Box::new(StableLm::from_gguf(gguf)?))),
    }),
};

const ROTARY: RotaryDefaults = RotaryDefaults { share: ("partial_rotary_factor", 0.25), ..USUAL };

#[derive(Debug)]
struct StableLm {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    qkv_bias: bool,
    parallel: bool,
}

impl StableLm {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_act", "silu", SILU)?;
        if config.bool_or("qk_layernorm", false)? {
            let expected = "false: a layer norm for each head (StableLM 2 12B) is not supported";
            return Err(bad(config, "qk_layernorm", true, expected));
        }
        let sizes = DecoderSizes::from_hf(config, false)?;
        whole_heads(&sizes).map_err(|m| m.at(config.path()))?;
        Ok(Self {
            eps: epsilon(config, "layer_norm_eps", 1e-5)?,
            rotary: Rotary::from_hf(config, &sizes, ROTARY)?,
            qkv_bias: config.bool_or("use_qkv_bias", false)?,
            parallel: config.bool_or("use_parallel_residual", false)?,
            sizes,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let key = "blk.0.attn_q_norm.weight";
        if gguf.contains(key) {
            let expected = "no such tensor: a layer norm for each head (StableLM 2 12B) is not supported";
            return Err(Misfit::new(key, "there", expected).at(gguf.path()));
        }
        let sizes = DecoderSizes::from_gguf(gguf, "stablelm")?;
        whole_heads(&sizes).map_err(|m| m.at(gguf.path()))?;
        Ok(Self {
            eps: gguf.f32("stablelm.attention.layer_norm_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "stablelm", &sizes)?,
            qkv_bias: gguf.contains("blk.0.attn_q.bias"),
            // as llama.cpp tells it
            parallel: !gguf.contains("blk.0.ffn_norm.weight"),
            sizes,
        })
    }
}

impl Family for StableLm {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let blocks = LlamaBlocks {
            qkv_bias: self.qkv_bias,
            norm: |w, path, d, eps| w.layer_norm_at(path, d, eps),
            parallel: self.parallel,
            ..LlamaBlocks::new(&self.sizes, self.eps)
        };
        blocks.build(w, "stablelm", self.rotary.rope())
    }

    fn to_hf(&self) -> Value {
        let extra = json!({
            "hidden_act": "silu",
            "layer_norm_eps": exact(self.eps),
            "use_qkv_bias": self.qkv_bias,
            "use_parallel_residual": self.parallel,
            "partial_rotary_factor": self.rotary.dim as f64 / self.sizes.head_dim as f64,
        });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        if self.sizes.tied_head {
            let expected = "false: llama.cpp's StableLM has a head of its own";
            return Err(Misfit::new("tie_word_embeddings", true, expected));
        }
        let mut settings = layer_norm_settings(&self.sizes, self.eps, &self.rotary)?;
        settings.metadata.push(("use_parallel_residual".to_string(), GgufValue::Bool(self.parallel)));
        Ok(settings)
    }
}
