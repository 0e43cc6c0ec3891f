//! SmolLM3 decoders (Hugging Face 2025): LLaMA in which every fourth layer does not turn its queries and keys (NoPE), and
//! may see a window instead.
//!
//! Module paths are those of transformers' `SmolLM3ForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::llama::{rope_rows, rope_settings};
use crate::parts::LlamaBlocks;
use crate::qwen2::no_windows;
use crate::rope_settings::{Rotary, RotaryDefaults, USUAL};
use crate::settings::{DecoderSizes, SILU, activation, bad, epsilon, exact, merged, windows};
use crate::stored::Stored;
use crate::{GgufSettings, Result, Weights, gguf_names};
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_nn::CausalLm;
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "smollm3",
    class: "SmolLM3ForCausalLM",
    stem: "SmolLM3",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(SmolLm3::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "smollm3",
        names: &gguf_names::LLAMA,
        read: Some(|gguf| Ok(Box::new(SmolLm3::from_gguf(gguf)?))),
    }),
};

const ROTARY: RotaryDefaults = RotaryDefaults { theta: ("rope_theta", 2_000_000.0), ..USUAL };

#[derive(Debug)]
struct SmolLm3 {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    attention_bias: bool,
    mlp_bias: bool,
    /// of each layer: it turns queries and keys
    turned: Vec<bool>,
    /// of each layer
    windows: Vec<Option<usize>>,
}

impl SmolLm3 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_act", "silu", SILU)?;
        let sizes = DecoderSizes::from_hf(config, true)?;
        let turned = turned(config, sizes.layers)?;
        let window = match config.bool_or("use_sliding_window", false)? {
            true => config.opt_usize("sliding_window")?,
            false => None,
        };
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-6)?,
            rotary: Rotary::from_hf(config, &sizes, ROTARY)?,
            attention_bias: config.bool_or("attention_bias", false)?,
            mlp_bias: config.bool_or("mlp_bias", false)?,
            windows: windows(config, sizes.layers, window, |i| !turned[i])?,
            turned,
            sizes,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes::from_gguf(gguf, "smollm3")?;
        Ok(Self {
            eps: gguf.f32("smollm3.attention.layer_norm_rms_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "smollm3", &sizes)?,
            attention_bias: false,
            mlp_bias: false,
            turned: all_but_every(4, sizes.layers),
            windows: Vec::new(),
            sizes,
        })
    }
}

/// All of `layers` layers but each `n`th.
fn all_but_every(n: usize, layers: usize) -> Vec<bool> {
    (1..=layers).map(|i| !i.is_multiple_of(n)).collect()
}

/// `no_rope_layers` if it is there (1 for layers that turn), else all but every `no_rope_layer_interval`th.
fn turned(config: &HfConfig, layers: usize) -> Result<Vec<bool>> {
    let Some(list) = config.get("no_rope_layers").filter(|list| !list.is_null()) else {
        return match config.opt_usize("no_rope_layer_interval")?.unwrap_or(4) {
            0 => Err(bad(config, "no_rope_layer_interval", 0, "a number of layers above 0")),
            n => Ok(all_but_every(n, layers)),
        };
    };
    let of = |flag: &Value| flag.as_u64().filter(|f| *f < 2).map(|f| f == 1);
    let flags = list.as_array().and_then(|list| list.iter().map(of).collect::<Option<Vec<bool>>>());
    match flags.filter(|flags| flags.len() >= layers) {
        Some(flags) => Ok(flags[..layers].to_vec()),
        None => Err(bad(config, "no_rope_layers", list, &format!("a list of {layers} of 0 and 1"))),
    }
}

impl Family for SmolLm3 {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let blocks = LlamaBlocks {
            qkv_bias: self.attention_bias,
            output_bias: self.attention_bias,
            mlp_bias: self.mlp_bias,
            turned: &self.turned,
            windows: &self.windows,
            ..LlamaBlocks::new(&self.sizes, self.eps)
        };
        blocks.build(w, "smollm3", self.rotary.rope())
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
            "no_rope_layers": self.turned.iter().map(|t| u8::from(*t)).collect::<Vec<_>>(),
            "use_sliding_window": false,
            // transformers' default is a token that small vocabularies lack
            "pad_token_id": null,
        });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        if self.turned != all_but_every(4, self.sizes.layers) {
            let expected = "0 for each fourth layer and 1 for the others, as llama.cpp has it";
            return Err(Misfit::new("no_rope_layers", "another pattern", expected));
        }
        for (key, found) in [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)] {
            if found {
                return Err(Misfit::new(key, true, "false: llama.cpp's SmolLM3 has no biases"));
            }
        }
        no_windows(&self.windows)?;
        rope_settings(&self.sizes, self.eps, &self.rotary)
    }
}
