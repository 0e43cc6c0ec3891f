//! Sizes and settings of a LLaMA decoder, from `config.json` or GGUF metadata.

use crate::{Error, Result};
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_nn::rope::{RopeScaling, yarn_mscale};
use serde_json::{Value, json};

/// What `LlamaConfig` of transformers holds, as far as the arithmetic needs it.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the field's own names
pub struct LlamaConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f32,
    pub max_position_embeddings: usize,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
}

impl LlamaConfig {
    /// `kv_heads · head_dim`
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Module paths and sizes (out, in) of the linear layers, without the output head.
    pub fn linears(&self) -> Vec<(String, (usize, usize))> {
        let (d, ff) = (self.hidden_size, self.intermediate_size);
        let (all, kv) = (self.num_attention_heads * self.head_dim, self.kv_width());
        let block = [
            ("self_attn.q_proj", (all, d)),
            ("self_attn.k_proj", (kv, d)),
            ("self_attn.v_proj", (kv, d)),
            ("self_attn.o_proj", (d, all)),
            ("mlp.gate_proj", (ff, d)),
            ("mlp.up_proj", (ff, d)),
            ("mlp.down_proj", (d, ff)),
        ];
        (0..self.num_hidden_layers)
            .flat_map(|i| block.map(|(name, dims)| (format!("model.layers.{i}.{name}"), dims)))
            .collect()
    }

    /// Reads a `config.json`, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).
    pub fn from_hf(config: &HfConfig) -> Result<Self> {
        let act = config.opt_str("hidden_act")?.unwrap_or("silu");
        if act != "silu" {
            return Err(config_error(config, "hidden_act", act, "\"silu\", the only one LLaMA models use"));
        }
        let heads = config.usize("num_attention_heads")?;
        let hidden_size = config.usize("hidden_size")?;
        let head_dim = match config.opt_usize("head_dim")? {
            Some(d) => d,
            None => hidden_size / heads.max(1),
        };
        let max_positions = config.opt_usize("max_position_embeddings")?.unwrap_or(2048);
        let (rope_theta, rope_scaling) = rope_from_hf(config, max_positions)?;
        let this = Self {
            vocab_size: config.usize("vocab_size")?,
            hidden_size,
            intermediate_size: config.usize("intermediate_size")?,
            num_hidden_layers: config.usize("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: config.opt_usize("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            rms_norm_eps: config.opt_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            max_position_embeddings: max_positions,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: config.bool_or("tie_word_embeddings", false)?,
            attention_bias: config.bool_or("attention_bias", false)?,
            mlp_bias: config.bool_or("mlp_bias", false)?,
        };
        this.check().map_err(|(key, found, expected)| config_error(config, key, &found, expected))?;
        Ok(this)
    }

    /// Reads GGUF metadata of architecture `llama`.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let heads = gguf.u32("llama.attention.head_count")? as usize;
        let hidden_size = gguf.u32("llama.embedding_length")? as usize;
        let head_dim = match gguf.opt_u32("llama.attention.key_length")? {
            Some(d) => d as usize,
            None => hidden_size / heads.max(1),
        };
        let vocab_size = gguf.tensor("token_embd.weight")?.shape.first().copied().unwrap_or(0);
        let kv_heads = gguf.opt_u32("llama.attention.head_count_kv")?.map_or(heads, |h| h as usize);
        let max_positions = gguf.opt_u32("llama.context_length")?.unwrap_or(2048) as usize;
        let this = Self {
            vocab_size,
            hidden_size,
            intermediate_size: gguf.u32("llama.feed_forward_length")? as usize,
            num_hidden_layers: gguf.u32("llama.block_count")? as usize,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: gguf.f32("llama.attention.layer_norm_rms_epsilon")?,
            max_position_embeddings: max_positions,
            rope_theta: f64::from(gguf.opt_f32("llama.rope.freq_base")?.unwrap_or(10_000.0)),
            rope_scaling: rope_from_gguf(gguf, max_positions)?,
            tie_word_embeddings: !gguf.contains("output.weight"),
            attention_bias: gguf.contains("blk.0.attn_q.bias"),
            mlp_bias: gguf.contains("blk.0.ffn_up.bias"),
        };
        this.check().map_err(|(key, found, expected)| Error::Config {
            path: gguf.path().to_path_buf(),
            key: key.to_string(),
            found,
            expected: expected.to_string(),
        })?;
        Ok(this)
    }

    /// Sizes that cannot be: key, what was found, what would be right.
    fn check(&self) -> std::result::Result<(), (&'static str, String, &'static str)> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ];
        // far above any model, far below what would overflow a product of two of them
        const MOST: usize = 1 << 28;
        if let Some((key, value)) = sizes.iter().find(|(_, v)| *v == 0 || *v > MOST) {
            return Err((key, value.to_string(), "a size between 1 and 2^28"));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let found = format!("{} for {} heads", self.num_key_value_heads, self.num_attention_heads);
            return Err(("num_key_value_heads", found, "a divisor of num_attention_heads"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(("head_dim", self.head_dim.to_string(), "an even number"));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(("rms_norm_eps", self.rms_norm_eps.to_string(), "a small positive number"));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(("rope_theta", self.rope_theta.to_string(), "a number above 0"));
        }
        let good = |v: &f64| v.is_finite() && *v > 0.0;
        if let Some((key, value)) = rope_numbers(&self.rope_scaling).into_iter().find(|(_, v)| !good(v)) {
            return Err((key, value.to_string(), "a number above 0"));
        }
        let half = self.head_dim / 2;
        let listed = match &self.rope_scaling {
            RopeScaling::LongRope { short_factor, long_factor, .. } => {
                Some(("rope_scaling.short_factor / long_factor", short_factor.len().min(long_factor.len())))
            }
            RopeScaling::Factors(f) => Some(("rope_freqs.weight", f.len())),
            _ => None,
        };
        match listed {
            Some((key, len)) if len != half => {
                Err((key, format!("{len} factors"), "one factor for every two of head_dim"))
            }
            _ => Ok(()),
        }
    }
}

/// The numbers of a scaling that must be above 0, with their keys.
fn rope_numbers(scaling: &RopeScaling) -> Vec<(&'static str, f64)> {
    let all = |key, list: &[f32]| list.iter().map(|f| (key, f64::from(*f))).collect::<Vec<_>>();
    match scaling {
        RopeScaling::None => vec![],
        RopeScaling::Linear { factor } => vec![("rope_scaling.factor", f64::from(*factor))],
        RopeScaling::Dynamic { factor, .. } => vec![("rope_scaling.factor", *factor)],
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => vec![
            ("rope_scaling.factor", f64::from(*factor)),
            ("rope_scaling.low_freq_factor", f64::from(*low_freq_factor)),
            ("rope_scaling.high_freq_factor", f64::from(*high_freq_factor)),
        ],
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, .. } => vec![
            ("rope_scaling.factor", *factor),
            ("rope_scaling.original_max_position_embeddings", *original as f64),
            ("rope_scaling.beta_fast", *beta_fast),
            ("rope_scaling.beta_slow", *beta_slow),
            ("rope_scaling.attention_factor", f64::from(*attention_factor)),
        ],
        RopeScaling::LongRope { short_factor, long_factor, attention_factor, .. } => {
            let mut numbers = all("rope_scaling.short_factor", short_factor);
            numbers.extend(all("rope_scaling.long_factor", long_factor));
            numbers.push(("rope_scaling.attention_factor", f64::from(*attention_factor)));
            numbers
        }
        RopeScaling::Factors(factors) => all("rope_freqs.weight", factors),
    }
}

fn config_error(config: &HfConfig, key: &str, found: &str, expected: &str) -> Error {
    Error::Config {
        path: config.path().to_path_buf(),
        key: key.to_string(),
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

/// The two layouts of rope settings, read as one.
fn rope_from_hf(config: &HfConfig, max_positions: usize) -> Result<(f64, RopeScaling)> {
    let new = config.get("rope_parameters").and_then(Value::as_object);
    let old = config.get("rope_scaling").and_then(Value::as_object);
    let (section, map) = match (new, old) {
        (Some(map), _) => ("rope_parameters", Some(map)),
        (None, old) => ("rope_scaling", old),
    };
    let number = |key: &str| -> Result<Option<f64>> {
        match map.and_then(|m| m.get(key)) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => match v.as_f64().filter(|f| f.is_finite()) {
                Some(f) => Ok(Some(f)),
                None => Err(config_error(config, &format!("{section}.{key}"), &v.to_string(), "a number")),
            },
        }
    };
    let needed = |key: &str| -> Result<f64> {
        let missing = || config_error(config, &format!("{section}.{key}"), "nothing", "a number above 0");
        number(key)?.filter(|f| *f > 0.0).ok_or_else(missing)
    };
    let list = |key: &str| -> Result<Vec<f32>> {
        let values = map.and_then(|m| m.get(key)).and_then(Value::as_array);
        let floats = values.map(|v| v.iter().filter_map(Value::as_f64).map(|f| f as f32).collect::<Vec<_>>());
        match (floats, values) {
            (Some(floats), Some(values)) if floats.len() == values.len() => Ok(floats),
            _ => Err(config_error(
                config,
                &format!("{section}.{key}"),
                "no list of numbers",
                "a list of numbers",
            )),
        }
    };
    let theta = match number("rope_theta")? {
        Some(theta) => theta,
        None => config.opt_f64("rope_theta")?.unwrap_or(10_000.0),
    };
    let kind = map.and_then(|m| m.get("rope_type").or_else(|| m.get("type"))).and_then(Value::as_str);
    let original = match config.opt_usize("original_max_position_embeddings")? {
        Some(n) => n,
        None => number("original_max_position_embeddings")?.map_or(max_positions, |n| n as usize),
    };
    let stretch = match number("factor")? {
        Some(f) => f,
        None => max_positions as f64 / original.max(1) as f64,
    };
    let scaling = match kind {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: needed("factor")? as f32 },
        Some("dynamic") => RopeScaling::Dynamic { factor: needed("factor")?, max_positions },
        Some("llama3") => RopeScaling::Llama3 {
            factor: needed("factor")? as f32,
            low_freq_factor: needed("low_freq_factor")? as f32,
            high_freq_factor: needed("high_freq_factor")? as f32,
            original,
        },
        Some("yarn") => {
            let attention_factor =
                match (number("attention_factor")?, number("mscale")?, number("mscale_all_dim")?) {
                    (Some(f), _, _) => f,
                    (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                        yarn_mscale(stretch, m) / yarn_mscale(stretch, all)
                    }
                    _ => yarn_mscale(stretch, 1.0),
                };
            RopeScaling::Yarn {
                factor: stretch,
                original,
                beta_fast: number("beta_fast")?.filter(|b| *b != 0.0).unwrap_or(32.0),
                beta_slow: number("beta_slow")?.filter(|b| *b != 0.0).unwrap_or(1.0),
                attention_factor: attention_factor as f32,
                truncate: map.and_then(|m| m.get("truncate")).and_then(Value::as_bool).unwrap_or(true),
            }
        }
        Some("longrope") => {
            let implied = match stretch <= 1.0 {
                true => 1.0,
                false => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
            };
            RopeScaling::LongRope {
                short_factor: list("short_factor")?,
                long_factor: list("long_factor")?,
                original,
                attention_factor: number("attention_factor")?.unwrap_or(implied) as f32,
            }
        }
        Some(other) => {
            let right = "default, linear, dynamic, llama3, yarn or longrope";
            return Err(config_error(config, &format!("{section}.rope_type"), other, right));
        }
    };
    Ok((theta, scaling))
}

/// llama.cpp keeps Llama 3's scaling as a tensor of factors, the rest as metadata.
fn rope_from_gguf(gguf: &Gguf, max_positions: usize) -> Result<RopeScaling> {
    if gguf.contains("rope_freqs.weight") {
        let view = gguf.tensor("rope_freqs.weight")?;
        let mut factors = vec![0f32; view.shape.iter().product()];
        engobe_kernels::codec::decode(view.storage()?, view.bytes(), &mut factors);
        return Ok(RopeScaling::Factors(factors));
    }
    let factor = gguf.opt_f32("llama.rope.scaling.factor")?.unwrap_or(1.0);
    let original = gguf.opt_u32("llama.rope.scaling.original_context_length")?;
    match gguf.opt_str("llama.rope.scaling.type")? {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor }),
        Some("yarn") => Ok(RopeScaling::Yarn {
            factor: f64::from(factor),
            original: original.map_or(max_positions, |n| n as usize),
            beta_fast: f64::from(gguf.opt_f32("llama.rope.scaling.yarn_beta_fast")?.unwrap_or(32.0)),
            beta_slow: f64::from(gguf.opt_f32("llama.rope.scaling.yarn_beta_slow")?.unwrap_or(1.0)),
            attention_factor: match gguf.opt_f32("llama.rope.scaling.attn_factor")? {
                Some(f) => f,
                None => yarn_mscale(f64::from(factor), 1.0) as f32,
            },
            truncate: true,
        }),
        Some(other) => Err(Error::Config {
            path: gguf.path().to_path_buf(),
            key: "llama.rope.scaling.type".to_string(),
            found: other.to_string(),
            expected: "none, linear or yarn".to_string(),
        }),
    }
}

/// The configuration of a GGUF file as `config.json` (transformers 4's keys, which 5 reads too).
pub(crate) fn to_hf(config: &LlamaConfig, gguf: &Gguf) -> Result<Value> {
    let mut json = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps.to_string().parse::<f64>().unwrap_or_default(),
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    });
    json["rope_scaling"] = rope_to_hf(&config.rope_scaling, config, gguf);
    for (key, name) in [("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id")] {
        if let Some(id) = gguf.opt_u32(&format!("tokenizer.ggml.{name}"))? {
            json[key] = json!(id);
        }
    }
    Ok(json)
}

fn rope_to_hf(scaling: &RopeScaling, config: &LlamaConfig, gguf: &Gguf) -> Value {
    match scaling {
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
            "truncate": truncate,
        }),
        // transformers has no plain list of factors, but longrope is one if both of its lists are the same
        RopeScaling::Factors(factors) => {
            let original = gguf.opt_u32("llama.rope.scaling.original_context_length").ok().flatten();
            json!({
                "rope_type": "longrope",
                "factor": 1.0,
                "attention_factor": 1.0,
                "short_factor": factors,
                "long_factor": factors,
                "original_max_position_embeddings":
                    original.map_or(config.max_position_embeddings, |n| n as usize),
            })
        }
        // the others never come from a GGUF file
        RopeScaling::None
        | RopeScaling::Dynamic { .. }
        | RopeScaling::Llama3 { .. }
        | RopeScaling::LongRope { .. } => Value::Null,
    }
}
