//! Qwen 3 decoders (Yang et al. 2025): LLaMA whose query and key heads are normed before they are turned.
//!
//! Module paths are those of transformers' `Qwen3ForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::llama::rope_settings;
use crate::parts::LlamaBlocks;
use crate::qwen2::no_windows;
use crate::rope_settings::{Rotary, USUAL};
use crate::settings::{DecoderSizes, SILU, activation, epsilon, exact, merged, upper_windows};
use crate::{GgufSettings, Result, Weights, gguf_names};
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_nn::CausalLm;
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    stem: "Qwen3",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(Qwen3::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "qwen3",
        names: &gguf_names::LLAMA,
        read: Some(|gguf| Ok(Box::new(Qwen3::from_gguf(gguf)?))),
    }),
};

#[derive(Debug)]
struct Qwen3 {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    attention_bias: bool,
    /// of each layer
    windows: Vec<Option<usize>>,
}

impl Qwen3 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_act", "silu", SILU)?;
        let mut sizes = DecoderSizes::from_hf(config, false)?;
        if config.get("head_dim").is_none() {
            sizes.head_dim = 128;
        }
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-6)?,
            rotary: Rotary::from_hf(config, &sizes, USUAL)?,
            attention_bias: config.bool_or("attention_bias", false)?,
            windows: upper_windows(config, sizes.layers)?,
            sizes: sizes.with_head_norms(),
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes::from_gguf(gguf, "qwen3")?;
        Ok(Self {
            eps: gguf.f32("qwen3.attention.layer_norm_rms_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "qwen3", &sizes)?,
            attention_bias: gguf.contains("blk.0.attn_q.bias"),
            windows: vec![None; sizes.layers],
            sizes: sizes.with_head_norms(),
        })
    }
}

impl Family for Qwen3 {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let bias = self.attention_bias;
        let plain = LlamaBlocks::new(&self.sizes, self.eps);
        let blocks = LlamaBlocks { qkv_bias: bias, output_bias: bias, head_norms: true, ..plain };
        LlamaBlocks { windows: &self.windows, ..blocks }.build(w, "qwen3", self.rotary.rope())
    }

    fn to_hf(&self) -> Value {
        let extra = json!({
            "hidden_act": "silu",
            "rms_norm_eps": exact(self.eps),
            "attention_bias": self.attention_bias,
            "use_sliding_window": false,
        });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        no_windows(&self.windows)?;
        rope_settings(&self.sizes, self.eps, &self.rotary)
    }
}
