//! Settings that decoders share: sizes, activations, windows.

use crate::family::Misfit;
use crate::rope_settings::Rotary;
use crate::{Error, Result};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_kernels::attention::AttentionShape;
use serde_json::{Value, json};
use std::path::Path;

/// Sizes of a decoder, as far as what a training step keeps depends on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderSizes {
    /// number of blocks
    pub layers: usize,
    /// width of the hidden states
    pub hidden: usize,
    /// query heads
    pub heads: usize,
    /// key/value heads
    pub kv_heads: usize,
    /// width of a head
    pub head_dim: usize,
    /// width of the MLP
    pub mlp: usize,
    /// rows of the output head
    pub vocab: usize,
    /// longest sequence that the model was trained for
    pub max_positions: usize,
    /// the output head is the embedding's matrix
    pub tied_head: bool,
    /// floats that a block keeps for each token beside those of a gated, pre-normed block
    pub extra_kept: usize,
    /// the MLP has no gate: one activation is kept of it instead of two
    pub plain_mlp: bool,
    /// rows of the tables of relative positions that attention's scores meet in every block, at most; 0: none
    pub relative_rows: usize,
    /// blocks, the last ones, that attend to the states of another stack as well: a decoder's behind an encoder
    pub cross_layers: usize,
}

impl DecoderSizes {
    /// `heads · head_dim`
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// `kv_heads · head_dim`
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The same where heads have norms, which keep queries and keys as they were before.
    pub fn with_head_norms(self) -> Self {
        Self { extra_kept: self.extra_kept + self.width() + self.kv_width(), ..self }
    }

    /// The same where norms stand after sub-layers, and keep their input and what they make.
    pub fn with_norms_after(self) -> Self {
        Self { extra_kept: self.extra_kept + 2 * self.hidden, ..self }
    }

    /// Causal attention with these heads.
    pub fn attention(&self, scale: f32, window: Option<usize>) -> AttentionShape {
        let shape = AttentionShape::new(self.heads, self.kv_heads, self.head_dim, scale, true);
        AttentionShape { window, ..shape }
    }

    /// 1/√head_dim
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Reads the keys that LLaMA and those after it have in `config.json`.
    pub fn from_hf(config: &HfConfig, tied_by_default: bool) -> Result<Self> {
        let heads = config.usize("num_attention_heads")?;
        let hidden = config.usize("hidden_size")?;
        let this = Self {
            layers: config.usize("num_hidden_layers")?,
            hidden,
            heads,
            kv_heads: config.opt_usize("num_key_value_heads")?.unwrap_or(heads),
            head_dim: config.opt_usize("head_dim")?.unwrap_or(hidden / heads.max(1)),
            mlp: config.usize("intermediate_size")?,
            vocab: config.usize("vocab_size")?,
            max_positions: config.opt_usize("max_position_embeddings")?.unwrap_or(2048),
            tied_head: config.bool_or("tie_word_embeddings", tied_by_default)?,
            extra_kept: 0,
            plain_mlp: false,
            relative_rows: 0,
            cross_layers: 0,
        };
        this.check().map_err(|m| m.at(config.path()))?;
        Ok(this)
    }

    /// Reads GGUF metadata of architecture `name`.
    pub fn from_gguf(gguf: &Gguf, name: &str) -> Result<Self> {
        let key = |key: &str| format!("{name}.{key}");
        let heads = gguf.u32(&key("attention.head_count"))? as usize;
        let hidden = gguf.u32(&key("embedding_length"))? as usize;
        let kv_heads = gguf.opt_u32(&key("attention.head_count_kv"))?.map_or(heads, |h| h as usize);
        let head_dim = gguf.opt_u32(&key("attention.key_length"))?.map(|d| d as usize);
        let this = Self {
            layers: gguf.u32(&key("block_count"))? as usize,
            hidden,
            heads,
            kv_heads,
            head_dim: head_dim.unwrap_or(hidden / heads.max(1)),
            mlp: gguf.u32(&key("feed_forward_length"))? as usize,
            vocab: gguf.tensor("token_embd.weight")?.shape.first().copied().unwrap_or(0),
            max_positions: gguf.opt_u32(&key("context_length"))?.unwrap_or(2048) as usize,
            tied_head: !gguf.contains("output.weight"),
            extra_kept: 0,
            plain_mlp: false,
            relative_rows: 0,
            cross_layers: 0,
        };
        this.check().map_err(|m| m.at(gguf.path()))?;
        Ok(this)
    }

    /// Refuses sizes that cannot be.
    pub fn check(&self) -> Result<(), Misfit> {
        let sizes = [
            ("vocab_size", self.vocab),
            ("hidden_size", self.hidden),
            ("intermediate_size", self.mlp),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
        ];
        // far above any model, far below what would overflow a product of two of them
        const MOST: usize = 1 << 28;
        if let Some((key, value)) = sizes.iter().find(|(_, v)| *v == 0 || *v > MOST) {
            return Err(Misfit::new(key, value, "a size between 1 and 2^28"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let found = format!("{} for {} heads", self.kv_heads, self.heads);
            return Err(Misfit::new("num_key_value_heads", found, "a divisor of num_attention_heads"));
        }
        Ok(())
    }

    /// The keys of `config.json` that LLaMA and those after it have.
    pub fn to_hf(&self) -> Value {
        json!({
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
        })
    }

    /// The keys of a GGUF file, without the architecture before them.
    pub fn to_gguf(&self) -> Vec<(String, GgufValue)> {
        let values = [
            ("block_count", self.layers),
            ("context_length", self.max_positions),
            ("embedding_length", self.hidden),
            ("feed_forward_length", self.mlp),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("vocab_size", self.vocab),
        ];
        values.map(|(key, n)| (key.to_string(), GgufValue::Unsigned(n as u64))).into()
    }
}

impl Misfit {
    /// The error that names the file.
    pub fn at(self, path: &Path) -> Error {
        let Self { key, found, expected } = self;
        Error::Config { path: path.to_path_buf(), key: key.to_string(), found, expected }
    }
}

/// A setting of `config.json` that cannot be.
pub fn bad(config: &HfConfig, key: &str, found: impl ToString, expected: &str) -> Error {
    Error::Config {
        path: config.path().to_path_buf(),
        key: key.to_string(),
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

/// The epsilon of norms under `key`.
pub fn epsilon(config: &HfConfig, key: &'static str, default: f64) -> Result<f32> {
    let eps = config.opt_f64(key)?.unwrap_or(default) as f32;
    match eps.is_finite() && eps >= 0.0 {
        true => Ok(eps),
        false => Err(bad(config, key, eps, "a small positive number")),
    }
}

/// An f32 as the shortest decimal that is it.
pub fn exact(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_default()
}

/// A cap on logits or scores: a number above 0, or none.
pub fn soft_cap(config: &HfConfig, key: &'static str, default: Option<f64>) -> Result<Option<f32>> {
    let cap = match config.raw().contains_key(key) {
        true => config.opt_f64(key)?,
        false => default,
    };
    match cap {
        Some(cap) if !(cap.is_finite() && cap > 0.0) => {
            Err(bad(config, key, cap, "a number above 0, or null"))
        }
        cap => Ok(cap.map(|c| c as f32)),
    }
}

/// The activation under `key`, one of `known` by Hugging Face's names.
pub fn activation(
    config: &HfConfig,
    key: &str,
    default: &str,
    known: &[(&str, Activation)],
) -> Result<Activation> {
    activation_named(config, key, config.opt_str(key)?.unwrap_or(default), known)
}

/// The activation that the value of `key` calls `found`.
pub fn activation_named(
    config: &HfConfig,
    key: &str,
    found: &str,
    known: &[(&str, Activation)],
) -> Result<Activation> {
    match known.iter().find(|(name, _)| *name == found) {
        Some((_, activation)) => Ok(*activation),
        None => {
            let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            Err(bad(config, key, found, &format!("one that these models use: {}", names.join(", "))))
        }
    }
}

/// The only activation of LLaMA and its like.
pub const SILU: &[(&str, Activation)] = &[("silu", Activation::Silu), ("swish", Activation::Silu)];

/// Those of models with a plain MLP.
pub const PLAIN: &[(&str, Activation)] = &[
    ("gelu_new", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("relu", Activation::Relu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("tanh", Activation::Tanh),
];

/// Hugging Face's name of an activation.
pub fn name_of(activation: Activation) -> &'static str {
    PLAIN.iter().find(|(_, a)| *a == activation).map_or("gelu_new", |(name, _)| name)
}

/// The window of each of `layers` layers: `layer_types` if it is there, else `local` says which have one.
pub fn windows(
    config: &HfConfig,
    layers: usize,
    window: Option<usize>,
    local: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>> {
    if window == Some(0) {
        return Err(bad(config, "sliding_window", 0, "a number of tokens above 0, or null"));
    }
    let Some(types) = config.get("layer_types") else {
        return Ok((0..layers).map(|i| window.filter(|_| local(i))).collect());
    };
    let expected = format!("a list of {layers} of \"full_attention\" and \"sliding_attention\"");
    let wrong = || bad(config, "layer_types", types, &expected);
    let list = types.as_array().filter(|list| list.len() == layers).ok_or_else(wrong)?;
    let of = |kind: &Value| match (kind.as_str(), window) {
        (Some("full_attention"), _) => Ok(None),
        (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
        (Some("sliding_attention"), None) => {
            Err(bad(config, "sliding_window", "null", "a number: layer_types names sliding layers"))
        }
        _ => Err(wrong()),
    };
    list.iter().map(of).collect()
}

/// The windows of Qwen's models: where `use_sliding_window` is on, layers from `max_window_layers` on have one.
pub fn upper_windows(config: &HfConfig, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match config.bool_or("use_sliding_window", false)? {
        true => Some(config.opt_usize("sliding_window")?.unwrap_or(4096)),
        false => None,
    };
    let lowest = config.opt_usize("max_window_layers")?.unwrap_or(28);
    windows(config, layers, window, |i| i >= lowest)
}

/// The `config.json` of a model with the usual keys, `extra` ones, and a rotary embedding.
pub fn merged(sizes: &DecoderSizes, extra: Value, rotary: Option<&Rotary>) -> Value {
    let mut json = sizes.to_hf();
    if let (Some(json), Value::Object(extra)) = (json.as_object_mut(), extra) {
        json.extend(extra);
    }
    if let Some(rotary) = rotary {
        rotary.to_hf(&mut json, sizes);
    }
    json
}
