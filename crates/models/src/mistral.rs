//! Mistral decoders (Jiang et al. 2023): LLaMA whose tokens see a sliding window.
//!
//! Module paths are those of transformers' `MistralForCausalLM`. llama.cpp writes these models as LLaMA, without a
//! window.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::llama::{rope_rows, rope_settings};
use crate::parts::LlamaBlocks;
use crate::rope_settings::{Rotary, USUAL};
use crate::settings::{DecoderSizes, SILU, activation, epsilon, exact, merged, windows};
use crate::stored::Stored;
use crate::{GgufSettings, Result, Weights, gguf_names};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::CausalLm;
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "mistral",
    class: "MistralForCausalLM",
    stem: "Mistral",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(Mistral::from_hf(config)?)),
    gguf: Some(GgufForm { name: "llama", names: &gguf_names::LLAMA, read: None }),
};

#[derive(Debug)]
struct Mistral {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    /// of each layer
    windows: Vec<Option<usize>>,
}

impl Mistral {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_act", "silu", SILU)?;
        let sizes = DecoderSizes::from_hf(config, false)?;
        let window = match config.raw().contains_key("sliding_window") {
            true => config.opt_usize("sliding_window")?,
            false => Some(4096),
        };
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-6)?,
            rotary: Rotary::from_hf(config, &sizes, USUAL)?,
            windows: windows(config, sizes.layers, window, |_| true)?,
            sizes,
        })
    }
}

impl Family for Mistral {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let plain = LlamaBlocks::new(&self.sizes, self.eps);
        LlamaBlocks { windows: &self.windows, ..plain }.build(w, "mistral", self.rotary.rope())
    }

    fn stored(&self, name: &str) -> Stored {
        rope_rows(&self.sizes, name)
    }

    fn to_hf(&self) -> Value {
        let window = self.windows.iter().flatten().next();
        let extra = json!({
            "hidden_act": "silu",
            "rms_norm_eps": exact(self.eps),
            "sliding_window": window,
        });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        match self.windows.iter().flatten().find(|w| **w < self.sizes.max_positions) {
            Some(window) => {
                let expected =
                    "null, or at least max_position_embeddings: llama.cpp runs Mistral without a window";
                Err(Misfit::new("sliding_window", window, expected))
            }
            None => rope_settings(&self.sizes, self.eps, &self.rotary),
        }
    }
}
