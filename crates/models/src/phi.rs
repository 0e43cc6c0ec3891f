//! Phi decoders (Phi-1, 1.5 and 2; Gunasekar et al. 2023): attention and a plain MLP side by side behind one layer norm, a
//! share of each head turned, biases everywhere, the output head's too.
//!
//! Module paths are those of transformers' `PhiForCausalLM`. llama.cpp calls the architecture phi2.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::gguf_names::Names;
use crate::llama::layer_norm_settings;
use crate::parts::Frame;
use crate::rope_settings::{Rotary, RotaryDefaults, USUAL};
use crate::settings::{DecoderSizes, PLAIN, activation, bad, epsilon, exact, merged, name_of};
use crate::{GgufSettings, Result, Weights};
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_nn::CausalLm;
use engobe_nn::decoder::{Attention, Block, Norms};
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "phi",
    class: "PhiForCausalLM",
    stem: "Phi",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(Phi::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "phi2",
        names: &NAMES,
        read: Some(|gguf| Ok(Box::new(Phi::from_gguf(gguf)?))),
    }),
};

const NAMES: Names = Names {
    block: "model.layers.",
    in_block: &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.dense", "attn_output"),
        ("mlp.fc1", "ffn_up"),
        ("mlp.fc2", "ffn_down"),
    ],
    outside: &[
        ("model.embed_tokens", "token_embd"),
        ("model.final_layernorm", "output_norm"),
        ("lm_head", "output"),
    ],
};

const ROTARY: RotaryDefaults = RotaryDefaults { share: ("partial_rotary_factor", 0.5), ..USUAL };

#[derive(Debug)]
struct Phi {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    activation: Activation,
}

impl Phi {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        if config.bool_or("qk_layernorm", false)? {
            let expected = "false: layer norms of heads are not supported (Phi-1, 1.5 and 2 have none)";
            return Err(bad(config, "qk_layernorm", true, expected));
        }
        let sizes = DecoderSizes { plain_mlp: true, ..DecoderSizes::from_hf(config, false)? };
        Ok(Self {
            eps: epsilon(config, "layer_norm_eps", 1e-5)?,
            rotary: Rotary::from_hf(config, &sizes, ROTARY)?,
            activation: activation(config, "hidden_act", "gelu_new", PLAIN)?,
            sizes,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes { plain_mlp: true, ..DecoderSizes::from_gguf(gguf, "phi2")? };
        Ok(Self {
            eps: gguf.f32("phi2.attention.layer_norm_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "phi2", &sizes)?,
            activation: Activation::GeluTanh,
            sizes,
        })
    }
}

impl Family for Phi {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let s = &self.sizes;
        let norm = |path: &str| w.layer_norm_at(path, s.hidden, self.eps);
        let usual = Frame::usual("phi", s, norm("model.final_layernorm")?, vec![self.rotary.rope()]);
        let decoder = Frame { head_bias: true, ..usual }.decoder(w, s, |i| {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            Ok(Block::new(
                Attention {
                    projection: w.separate_qkv(&at("self_attn"), s, true)?,
                    head_norms: None,
                    output: w.linear_at(&at("self_attn.dense"), s.hidden, s.width(), true)?,
                    shape: s.attention(s.scale(), None),
                    rope: Some(0),
                },
                w.plain_mlp(&at("mlp"), ["fc1", "fc2"], s, self.activation, true)?,
                Norms::Shared(norm(&at("input_layernorm"))?),
            ))
        })?;
        Ok(Box::new(decoder))
    }

    fn to_hf(&self) -> Value {
        let extra = json!({
            "hidden_act": name_of(self.activation),
            "layer_norm_eps": exact(self.eps),
            // heads' widths are not among its settings, and the default share is not all
            "partial_rotary_factor": self.rotary.dim as f64 / self.sizes.head_dim as f64,
        });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        if self.activation != Activation::GeluTanh {
            let expected = "gelu_new, which llama.cpp takes for Phi-2";
            return Err(Misfit::new("hidden_act", name_of(self.activation), expected));
        }
        if self.sizes.tied_head {
            let expected = "false: llama.cpp's Phi-2 has a head of its own";
            return Err(Misfit::new("tie_word_embeddings", true, expected));
        }
        layer_norm_settings(&self.sizes, self.eps, &self.rotary)
    }
}
