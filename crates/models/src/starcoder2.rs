//! StarCoder 2 decoders (Lozhkov et al. 2024): grouped-query attention with rotary positions and a window, as Mistral, but
//! layer norms, biases, and a plain MLP with GELU.
//!
//! Module paths are those of transformers' `Starcoder2ForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::gguf_names::{Names, OUTSIDE};
use crate::llama::layer_norm_settings;
use crate::parts::Frame;
use crate::rope_settings::{Rotary, USUAL};
use crate::settings::{DecoderSizes, PLAIN, activation, epsilon, exact, merged, name_of, windows};
use crate::{GgufSettings, Result, Weights};
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_nn::CausalLm;
use engobe_nn::decoder::{Attention, Block, Norms};
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "starcoder2",
    class: "Starcoder2ForCausalLM",
    stem: "Starcoder2",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(StarCoder2::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "starcoder2",
        names: &NAMES,
        read: Some(|gguf| Ok(Box::new(StarCoder2::from_gguf(gguf)?))),
    }),
};

const NAMES: Names = Names {
    block: "model.layers.",
    in_block: &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
    ],
    outside: OUTSIDE,
};

#[derive(Debug)]
struct StarCoder2 {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    activation: Activation,
    bias: bool,
    /// of all layers
    window: Option<usize>,
}

impl StarCoder2 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        let sizes = DecoderSizes { plain_mlp: true, ..DecoderSizes::from_hf(config, true)? };
        let window = config.opt_usize("sliding_window")?;
        Ok(Self {
            eps: epsilon(config, "norm_epsilon", 1e-5)?,
            rotary: Rotary::from_hf(config, &sizes, USUAL)?,
            activation: activation(config, "hidden_act", "gelu_pytorch_tanh", PLAIN)?,
            bias: config.bool_or("use_bias", true)?,
            window: windows(config, sizes.layers, window, |_| true)?.first().copied().flatten(),
            sizes,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes { plain_mlp: true, ..DecoderSizes::from_gguf(gguf, "starcoder2")? };
        Ok(Self {
            eps: gguf.f32("starcoder2.attention.layer_norm_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "starcoder2", &sizes)?,
            activation: Activation::GeluTanh,
            bias: true,
            window: None,
            sizes,
        })
    }
}

impl Family for StarCoder2 {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let s = &self.sizes;
        let norm = |path: &str| w.layer_norm_at(path, s.hidden, self.eps);
        let frame = Frame::usual("starcoder2", s, norm("model.norm")?, vec![self.rotary.rope()]);
        let decoder = frame.decoder(w, s, |i| {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            Ok(Block::new(
                Attention {
                    projection: w.separate_qkv(&at("self_attn"), s, self.bias)?,
                    head_norms: None,
                    output: w.linear_at(&at("self_attn.o_proj"), s.hidden, s.width(), self.bias)?,
                    shape: s.attention(s.scale(), self.window),
                    rope: Some(0),
                },
                w.plain_mlp(&at("mlp"), ["c_fc", "c_proj"], s, self.activation, self.bias)?,
                Norms::Pre([norm(&at("input_layernorm"))?, norm(&at("post_attention_layernorm"))?]),
            ))
        })?;
        Ok(Box::new(decoder))
    }

    fn to_hf(&self) -> Value {
        let extra = json!({
            "hidden_act": name_of(self.activation),
            "norm_epsilon": exact(self.eps),
            "use_bias": self.bias,
            "sliding_window": self.window,
        });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        if self.activation != Activation::GeluTanh {
            let expected = "gelu_pytorch_tanh, which llama.cpp takes for StarCoder 2";
            return Err(Misfit::new("hidden_act", name_of(self.activation), expected));
        }
        if !self.bias {
            return Err(Misfit::new("use_bias", false, "true: llama.cpp's StarCoder 2 has biases"));
        }
        match self.window.filter(|w| *w < self.sizes.max_positions) {
            Some(window) => {
                let expected =
                    "null, or at least max_position_embeddings: llama.cpp runs StarCoder 2 without a window";
                Err(Misfit::new("sliding_window", window, expected))
            }
            None => layer_norm_settings(&self.sizes, self.eps, &self.rotary),
        }
    }
}
