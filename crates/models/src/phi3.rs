//! Phi-3 and Phi-4 decoders (Abdin et al. 2024): LLaMA with one layer for queries, keys and values, one for gate and what
//! it gates, perhaps a share of each head turned, perhaps stretched by two lists of factors (LongRoPE).
//!
//! Module paths are those of transformers' `Phi3ForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::gguf_names::{Names, OUTSIDE};
use crate::parts::Frame;
use crate::rope_settings::{Rotary, RotaryDefaults, USUAL};
use crate::settings::{DecoderSizes, SILU, activation, epsilon, exact, merged, windows};
use crate::{GgufSettings, Result, Weights};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_nn::decoder::{Attention, Block, Mlp, Norms, Projection, Up};
use engobe_nn::{CausalLm, Norm};
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "phi3",
    class: "Phi3ForCausalLM",
    stem: "Phi3",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(Phi3::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "phi3",
        names: &NAMES,
        read: Some(|gguf| Ok(Box::new(Phi3::from_gguf(gguf)?))),
    }),
};

const NAMES: Names = Names {
    block: "model.layers.",
    in_block: &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ],
    outside: OUTSIDE,
};

/// The first releases called LongRoPE by the name of its first draft.
const ROTARY: RotaryDefaults = RotaryDefaults { kinds: &[("su", "longrope"), ("yarn", "longrope")], ..USUAL };

#[derive(Debug)]
struct Phi3 {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    window: Option<usize>,
}

impl Phi3 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_act", "silu", SILU)?;
        let sizes = DecoderSizes::from_hf(config, false)?;
        let window = config.opt_usize("sliding_window")?;
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-5)?,
            rotary: Rotary::from_hf(config, &sizes, ROTARY)?,
            window: windows(config, sizes.layers, window, |_| true)?.first().copied().flatten(),
            sizes,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes::from_gguf(gguf, "phi3")?;
        Ok(Self {
            eps: gguf.f32("phi3.attention.layer_norm_rms_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "phi3", &sizes)?,
            window: gguf.opt_u32("phi3.attention.sliding_window")?.map(|w| w as usize).filter(|w| *w > 0),
            sizes,
        })
    }
}

impl Family for Phi3 {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let s = &self.sizes;
        let norm = |path: &str| -> Result<Norm> { Ok(Norm::Rms(w.rms_norm_at(path, s.hidden, self.eps)?)) };
        let frame = Frame::usual("phi3", s, norm("model.norm")?, vec![self.rotary.rope()]);
        let decoder = frame.decoder(w, s, |i| {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            let linear = |name: &str, out, width| w.linear_at(&at(name), out, width, false);
            let qkv = linear("self_attn.qkv_proj", s.width() + 2 * s.kv_width(), s.hidden)?;
            Ok(Block::new(
                Attention {
                    projection: Projection::Joined(qkv),
                    head_norms: None,
                    output: linear("self_attn.o_proj", s.hidden, s.width())?,
                    shape: s.attention(s.scale(), self.window),
                    rope: Some(0),
                },
                Mlp {
                    up: Up::JoinedGate(linear("mlp.gate_up_proj", 2 * s.mlp, s.hidden)?),
                    activation: Activation::Silu,
                    down: linear("mlp.down_proj", s.hidden, s.mlp)?,
                },
                Norms::Pre([norm(&at("input_layernorm"))?, norm(&at("post_attention_layernorm"))?]),
            ))
        })?;
        Ok(Box::new(decoder))
    }

    fn to_hf(&self) -> Value {
        let extra = json!({
            "hidden_act": "silu",
            "rms_norm_eps": exact(self.eps),
            "sliding_window": self.window,
            // transformers' default is a token that small vocabularies lack
            "pad_token_id": null,
        });
        let mut json = merged(&self.sizes, extra, Some(&self.rotary));
        if let Some(original) = json["rope_scaling"].get("original_max_position_embeddings").cloned() {
            json["original_max_position_embeddings"] = original;
        }
        json
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        let mut metadata = self.sizes.to_gguf();
        metadata
            .push(("attention.layer_norm_rms_epsilon".to_string(), GgufValue::Float(f64::from(self.eps))));
        let window = self.window.unwrap_or(0) as u64;
        metadata.push(("attention.sliding_window".to_string(), GgufValue::Unsigned(window)));
        let tensors = self.rotary.to_gguf(&self.sizes, &mut metadata, true)?;
        Ok(GgufSettings { metadata, tensors })
    }
}
