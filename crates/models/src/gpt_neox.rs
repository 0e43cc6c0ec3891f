//! GPT-NeoX decoders (Black et al. 2022; Pythia): attention and MLP side by side over one residual, rotary positions on a
//! share of each head, one layer whose output is each head's query, key and value.
//!
//! Module paths are those of transformers' `GPTNeoXForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::gguf_names::Names;
use crate::gpt2::whole_heads;
use crate::llama::layer_norm_settings;
use crate::parts::Frame;
use crate::rope_settings::{Rotary, RotaryDefaults};
use crate::settings::{DecoderSizes, PLAIN, activation, epsilon, exact, name_of};
use crate::stored::Stored;
use crate::{GgufSettings, Result, Weights};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_nn::CausalLm;
use engobe_nn::decoder::{Attention, Block, Norms, Projection};
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "gpt_neox",
    class: "GPTNeoXForCausalLM",
    stem: "GPTNeoX",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(GptNeox::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "gptneox",
        names: &NAMES,
        read: Some(|gguf| Ok(Box::new(GptNeox::from_gguf(gguf)?))),
    }),
};

const NAMES: Names = Names {
    block: "gpt_neox.layers.",
    in_block: &[
        ("input_layernorm", "attn_norm"),
        ("attention.query_key_value", "attn_qkv"),
        ("attention.dense", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.dense_h_to_4h", "ffn_up"),
        ("mlp.dense_4h_to_h", "ffn_down"),
    ],
    outside: &[
        ("gpt_neox.embed_in", "token_embd"),
        ("gpt_neox.final_layer_norm", "output_norm"),
        ("embed_out", "output"),
    ],
};

const ROTARY: RotaryDefaults =
    RotaryDefaults { theta: ("rotary_emb_base", 10_000.0), share: ("rotary_pct", 0.25), kinds: &[] };

#[derive(Debug)]
struct GptNeox {
    sizes: DecoderSizes,
    eps: f32,
    rotary: Rotary,
    activation: Activation,
    parallel: bool,
    attention_bias: bool,
}

impl GptNeox {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        let sizes = DecoderSizes { plain_mlp: true, ..DecoderSizes::from_hf(config, false)? };
        whole_heads(&sizes).map_err(|m| m.at(config.path()))?;
        Ok(Self {
            eps: epsilon(config, "layer_norm_eps", 1e-5)?,
            rotary: Rotary::from_hf(config, &sizes, ROTARY)?,
            activation: activation(config, "hidden_act", "gelu", PLAIN)?,
            parallel: config.bool_or("use_parallel_residual", true)?,
            attention_bias: config.bool_or("attention_bias", true)?,
            sizes,
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes { plain_mlp: true, ..DecoderSizes::from_gguf(gguf, "gptneox")? };
        whole_heads(&sizes).map_err(|m| m.at(gguf.path()))?;
        Ok(Self {
            eps: gguf.f32("gptneox.attention.layer_norm_epsilon")?,
            rotary: Rotary::from_gguf(gguf, "gptneox", &sizes)?,
            // what the models were trained with; ggml computes it by tanh
            activation: Activation::Gelu,
            parallel: gguf.opt_bool("gptneox.use_parallel_residual")?.unwrap_or(true),
            attention_bias: true,
            sizes,
        })
    }
}

impl Family for GptNeox {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let s = &self.sizes;
        let norm = |path: &str| w.layer_norm_at(path, s.hidden, self.eps);
        let frame = Frame {
            model_type: "gpt_neox",
            embedding: "gpt_neox.embed_in",
            embedding_width: s.hidden,
            head: "embed_out",
            head_bias: false,
            norm: Some(norm("gpt_neox.final_layer_norm")?),
            ropes: vec![self.rotary.rope()],
        };
        let decoder = frame.decoder(w, s, |i| {
            let at = |name: &str| format!("gpt_neox.layers.{i}.{name}");
            let norms = [norm(&at("input_layernorm"))?, norm(&at("post_attention_layernorm"))?];
            let bias = self.attention_bias;
            let qkv = w.linear_at(&at("attention.query_key_value"), 3 * s.hidden, s.hidden, bias)?;
            Ok(Block::new(
                Attention {
                    projection: Projection::ByHead(qkv),
                    head_norms: None,
                    output: w.linear_at(&at("attention.dense"), s.hidden, s.hidden, bias)?,
                    shape: s.attention(s.scale(), None),
                    rope: Some(0),
                },
                w.plain_mlp(&at("mlp"), ["dense_h_to_4h", "dense_4h_to_h"], s, self.activation, true)?,
                if self.parallel { Norms::Parallel(norms) } else { Norms::Pre(norms) },
            ))
        })?;
        Ok(Box::new(decoder))
    }

    fn stored(&self, name: &str) -> Stored {
        match name.contains(".attention.query_key_value.") {
            true => Stored::Ungrouped { heads: self.sizes.heads },
            false => Stored::AsIs,
        }
    }

    fn to_hf(&self) -> Value {
        let s = &self.sizes;
        json!({
            "vocab_size": s.vocab,
            "hidden_size": s.hidden,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "intermediate_size": s.mlp,
            "max_position_embeddings": s.max_positions,
            "hidden_act": name_of(self.activation),
            "layer_norm_eps": exact(self.eps),
            "rotary_pct": self.rotary.dim as f64 / s.head_dim as f64,
            "rotary_emb_base": self.rotary.theta,
            "use_parallel_residual": self.parallel,
            "attention_bias": self.attention_bias,
        })
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        if self.activation != Activation::Gelu {
            let found = name_of(self.activation);
            return Err(Misfit::new(
                "hidden_act",
                found,
                "gelu, the only one that llama.cpp has for GPT-NeoX",
            ));
        }
        if !self.attention_bias {
            return Err(Misfit::new("attention_bias", false, "true: llama.cpp's GPT-NeoX has biases"));
        }
        let mut settings = layer_norm_settings(&self.sizes, self.eps, &self.rotary)?;
        settings.metadata.push(("use_parallel_residual".to_string(), GgufValue::Bool(self.parallel)));
        Ok(settings)
    }
}
