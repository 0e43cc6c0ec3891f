//! What Gemma 2 and Gemma 3 share: norms with a factor of 1 + weight around each sub-layer, embeddings scaled by √d,
//! GELU gates, layers that see a window between layers that see all.

use crate::family::Misfit;
use crate::gguf_names::{Names, OUTSIDE};
use crate::parts::Frame;
use crate::settings::{DecoderSizes, activation, bad, epsilon, exact, soft_cap, windows};
use crate::stored::Stored;
use crate::{Result, Weights};
use engobe_formats::gguf::GgufValue;
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_kernels::attention::AttentionShape;
use engobe_nn::decoder::{Attention, Block, Decoder, Norms};
use engobe_nn::rope::Rope;
use engobe_nn::{CausalLm, Norm, RmsNorm};
use serde_json::{Map, Value, json};

pub const NAMES: Names = Names {
    block: "model.layers.",
    in_block: &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ],
    outside: OUTSIDE,
};

/// Names under which `config.json` has the activation; all mean GELU by tanh.
pub const GELU: &[(&str, Activation)] =
    &[("gelu_pytorch_tanh", Activation::GeluTanh), ("gelu", Activation::GeluTanh)];

/// The settings of both families.
#[derive(Debug)]
pub struct Gemma {
    pub sizes: DecoderSizes,
    pub eps: f32,
    pub bias: bool,
    /// scores are divided by its root
    pub query_scalar: f32,
    /// of each layer
    pub windows: Vec<Option<usize>>,
    pub score_cap: Option<f32>,
    pub logit_cap: Option<f32>,
}

impl Gemma {
    /// Reads a `config.json` in which, unless it says otherwise, the layers that `sees_window` names see a window, and
    /// scores and logits have these caps.
    pub fn from_hf(
        config: &HfConfig,
        sizes: DecoderSizes,
        sees_window: impl Fn(usize) -> bool,
        [score_cap, logit_cap]: [Option<f64>; 2],
    ) -> Result<Self> {
        activation(config, "hidden_activation", "gelu_pytorch_tanh", GELU)?;
        let window = config.opt_usize("sliding_window")?.or(Some(4096));
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-6)?,
            bias: config.bool_or("attention_bias", false)?,
            query_scalar: query_scalar(config)?,
            windows: windows(config, sizes.layers, window, sees_window)?,
            score_cap: soft_cap(config, "attn_logit_softcapping", score_cap)?,
            logit_cap: soft_cap(config, "final_logit_softcapping", logit_cap)?,
            sizes: sizes.with_norms_after(),
        })
    }

    /// The decoder; each layer turns by the rotary embedding that `rope` tells.
    pub fn build(
        &self,
        w: &Weights<'_>,
        model_type: &'static str,
        ropes: Vec<Rope>,
        rope: impl Fn(usize) -> usize + Sync + Send,
        head_norms: bool,
    ) -> Result<Box<dyn CausalLm>> {
        let s = &self.sizes;
        let last = Norm::Rms(norm(w, "model.norm", s.hidden, self.eps)?);
        let decoder = Frame::usual(model_type, s, last, ropes).decoder(w, s, |i| {
            let plain = s.attention(1.0 / self.query_scalar.sqrt(), self.windows[i]);
            let shape = AttentionShape { soft_cap: self.score_cap, ..plain };
            block(w, s, i, (self.eps, self.bias), shape, rope(i), head_norms)
        })?;
        let embed_scale = Some((s.hidden as f32).sqrt());
        Ok(Box::new(Decoder { embed_scale, soft_cap: self.logit_cap, ..decoder }))
    }

    /// As `config.json` has them, beside the sizes.
    pub fn to_hf(&self) -> Map<String, Value> {
        let json = json!({
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": exact(self.eps),
            "attention_bias": self.bias,
            "query_pre_attn_scalar": self.query_scalar,
            "sliding_window": self.windows.iter().flatten().next(),
            "layer_types": layer_types(&self.windows),
            "attn_logit_softcapping": self.score_cap,
            "final_logit_softcapping": self.logit_cap,
        });
        json.as_object().cloned().unwrap_or_default()
    }
}

/// llama.cpp's converter adds the 1 to norms' weights.
pub fn stored(name: &str) -> Stored {
    if name.ends_with("norm.weight") { Stored::PlusOne } else { Stored::AsIs }
}

/// The norm at `path`.
pub fn norm(w: &Weights<'_>, path: &str, d: usize, eps: f32) -> Result<RmsNorm> {
    Ok(RmsNorm::plus_one(path, w.vector(&format!("{path}.weight"), d)?, eps)?)
}

/// One block.
pub fn block(
    w: &Weights<'_>,
    sizes: &DecoderSizes,
    layer: usize,
    (eps, bias): (f32, bool),
    shape: AttentionShape,
    rope: usize,
    head_norms: bool,
) -> Result<Block> {
    let s = sizes;
    let at = |name: &str| format!("model.layers.{layer}.{name}");
    let of_block = |name: &str| -> Result<Norm> { Ok(Norm::Rms(norm(w, &at(name), s.hidden, eps)?)) };
    let of_heads = |name: &str| norm(w, &at(name), s.head_dim, eps);
    Ok(Block::new(
        Attention {
            projection: w.separate_qkv(&at("self_attn"), s, bias)?,
            head_norms: match head_norms {
                true => Some([of_heads("self_attn.q_norm")?, of_heads("self_attn.k_norm")?]),
                false => None,
            },
            output: w.linear_at(&at("self_attn.o_proj"), s.hidden, s.width(), bias)?,
            shape,
            rope: Some(rope),
        },
        w.gated_mlp(&at("mlp"), s, Activation::GeluTanh, false)?,
        Norms::Sandwich([
            of_block("input_layernorm")?,
            of_block("post_attention_layernorm")?,
            of_block("pre_feedforward_layernorm")?,
            of_block("post_feedforward_layernorm")?,
        ]),
    ))
}

/// `query_pre_attn_scalar`: scores are divided by its root.
pub fn query_scalar(config: &HfConfig) -> Result<f32> {
    let scalar = config.opt_f64("query_pre_attn_scalar")?.unwrap_or(256.0);
    match scalar.is_finite() && scalar > 0.0 {
        true => Ok(scalar as f32),
        false => Err(bad(config, "query_pre_attn_scalar", scalar, "a number above 0")),
    }
}

/// What llama.cpp, whose files do not say it, takes for `query_pre_attn_scalar`: a head's width, but in the largest
/// model of each family, of so many layers, the hidden width by the number of heads.
pub fn implied_scalar(sizes: &DecoderSizes, layers_of_largest: usize) -> f32 {
    match sizes.layers == layers_of_largest {
        true => sizes.hidden as f32 / sizes.heads as f32,
        false => sizes.head_dim as f32,
    }
}

/// The settings of a GGUF file that both families have, the largest model of this one having so many layers.
pub fn settings(c: &Gemma, largest: usize, every: usize) -> Result<Vec<(String, GgufValue)>, Misfit> {
    let implied = implied_scalar(&c.sizes, largest);
    if c.query_scalar != implied {
        let expected = format!("{implied}, which llama.cpp takes for a model of these sizes");
        return Err(Misfit::new("query_pre_attn_scalar", c.query_scalar, expected));
    }
    let window = c.windows.iter().flatten().next().copied();
    if c.windows.iter().enumerate().any(|(i, w)| *w != window.filter(|_| (i + 1) % every != 0)) {
        let expected = format!("each {every}th layer full and the others sliding, as llama.cpp has it");
        return Err(Misfit::new("layer_types", "another pattern", expected));
    }
    let mut metadata = c.sizes.to_gguf();
    let mut push = |key: &str, value| metadata.push((key.to_string(), value));
    push("attention.layer_norm_rms_epsilon", GgufValue::Float(f64::from(c.eps)));
    if let Some(window) = window {
        push("attention.sliding_window", GgufValue::Unsigned(window as u64));
    }
    Ok(metadata)
}

/// `layer_types` of a `config.json`.
pub fn layer_types(windows: &[Option<usize>]) -> Vec<&'static str> {
    let kind = |w: &Option<usize>| if w.is_some() { "sliding_attention" } else { "full_attention" };
    windows.iter().map(kind).collect()
}
