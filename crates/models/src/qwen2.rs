//! Qwen 2 and 2.5 decoders (Yang et al. 2024): LLaMA with biases on queries, keys and values; in some, the upper layers
//! see a sliding window.
//!
//! Module paths are those of transformers' `Qwen2ForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::llama::rope_settings;
use crate::parts::LlamaBlocks;
use crate::rope_settings::{Rotary, USUAL};
use crate::settings::{DecoderSizes, SILU, activation, epsilon, exact, merged, upper_windows};
use crate::{GgufSettings, Result, Weights, gguf_names};
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_nn::CausalLm;
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    stem: "Qwen2",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(Qwen2::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "qwen2",
        names: &gguf_names::LLAMA,
        read: Some(|gguf| Ok(Box::new(Qwen2::from_gguf(gguf)?))),
    }),
};

#[derive(Debug)]
struct Qwen2 {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    /// of each layer
    windows: Vec<Option<usize>>,
}

impl Qwen2 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_act", "silu", SILU)?;
        let sizes = DecoderSizes::from_hf(config, false)?;
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-6)?,
            rotary: Rotary::from_hf(config, &sizes, USUAL)?,
            windows: upper_windows(config, sizes.layers)?,
            sizes,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes::from_gguf(gguf, "qwen2")?;
        Ok(Self {
            eps: gguf.f32("qwen2.attention.layer_norm_rms_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "qwen2", &sizes)?,
            windows: vec![None; sizes.layers],
            sizes,
        })
    }
}

impl Family for Qwen2 {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let plain = LlamaBlocks::new(&self.sizes, self.eps);
        LlamaBlocks { qkv_bias: true, windows: &self.windows, ..plain }.build(w, "qwen2", self.rotary.rope())
    }

    fn to_hf(&self) -> Value {
        let extra =
            json!({ "hidden_act": "silu", "rms_norm_eps": exact(self.eps), "use_sliding_window": false });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        no_windows(&self.windows)?;
        rope_settings(&self.sizes, self.eps, &self.rotary)
    }
}

/// llama.cpp runs Qwen's models without windows.
pub(crate) fn no_windows(windows: &[Option<usize>]) -> Result<(), Misfit> {
    match windows.iter().flatten().next() {
        Some(window) => {
            let expected = "use_sliding_window false: llama.cpp runs these models without a window";
            Err(Misfit::new("sliding_window", window, expected))
        }
        None => Ok(()),
    }
}
