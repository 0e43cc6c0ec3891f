//! Rotary embeddings in configurations: `config.json` of transformers 4 and 5, and GGUF metadata.

use crate::family::Misfit;
use crate::settings::{DecoderSizes, bad, exact};
use crate::{Error, Result};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::rope::{Rope, RopeScaling, yarn_mscale};
use serde_json::{Map, Value, json};

/// A model's rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// the base of its frequencies
    pub theta: f64,
    /// how many elements of a head it turns
    pub dim: usize,
    /// how it is stretched
    pub scaling: RopeScaling,
    /// length trained for, where a GGUF file says it beside a list of factors
    original: Option<usize>,
}

/// What a family's configuration says where others have defaults.
#[derive(Clone, Copy, Debug)]
pub struct RotaryDefaults {
    /// key of the base at the top level, and the base where none is given
    pub theta: (&'static str, f64),
    /// key of the turned share of a head at the top level, and that share where none is given
    pub share: (&'static str, f64),
    /// what the kinds of stretching are called: name in the file, meaning
    pub kinds: &'static [(&'static str, &'static str)],
}

/// Those of LLaMA and most others.
pub const USUAL: RotaryDefaults =
    RotaryDefaults { theta: ("rope_theta", 10_000.0), share: ("partial_rotary_factor", 1.0), kinds: &[] };

impl Rotary {
    /// A rotary embedding that is not stretched.
    pub fn plain(theta: f64, dim: usize) -> Self {
        Self { theta, dim, scaling: RopeScaling::None, original: None }
    }

    /// Reads the two layouts of `config.json`: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.
    pub fn from_hf(config: &HfConfig, sizes: &DecoderSizes, defaults: RotaryDefaults) -> Result<Self> {
        let new = config.get("rope_parameters").and_then(Value::as_object);
        let old = config.get("rope_scaling").and_then(Value::as_object);
        let (section, map) = match (new, old) {
            (Some(map), _) => ("rope_parameters", Some(map)),
            (None, old) => ("rope_scaling", old),
        };
        Self::from_section(config, sizes, defaults, section, map)
    }

    /// Reads one section of `config.json`.
    pub fn from_section(
        config: &HfConfig,
        sizes: &DecoderSizes,
        defaults: RotaryDefaults,
        section: &str,
        map: Option<&Map<String, Value>>,
    ) -> Result<Self> {
        let read = Section { config, section, map };
        let theta = match read.number("rope_theta")? {
            Some(theta) => theta,
            None => config.opt_f64(defaults.theta.0)?.unwrap_or(defaults.theta.1),
        };
        let share = match read.number("partial_rotary_factor")? {
            Some(share) => share,
            None => config.opt_f64(defaults.share.0)?.unwrap_or(defaults.share.1),
        };
        if !(share > 0.0 && share <= 1.0) {
            return Err(bad(config, defaults.share.0, share, "a share of a head, above 0 and at most 1"));
        }
        let scaling = read.scaling(sizes.max_positions, defaults.kinds)?;
        let dim = (sizes.head_dim as f64 * share) as usize;
        let this = Self { theta, dim, scaling, original: None };
        this.check().map_err(|m| m.at(config.path()))?;
        Ok(this)
    }

    /// Reads GGUF metadata of architecture `name`.
    pub fn from_gguf(gguf: &Gguf, name: &str, sizes: &DecoderSizes) -> Result<Self> {
        let key = |key: &str| format!("{name}.{key}");
        let dim = gguf.opt_u32(&key("rope.dimension_count"))?.map_or(sizes.head_dim, |n| n as usize);
        let original = gguf.opt_u32(&key("rope.scaling.original_context_length"))?.map(|n| n as usize);
        let this = Self {
            theta: f64::from(gguf.opt_f32(&key("rope.freq_base"))?.unwrap_or(10_000.0)),
            dim,
            scaling: scaling_from_gguf(gguf, name, sizes.max_positions, original)?,
            original,
        };
        if dim > sizes.head_dim {
            let found = format!("{dim} for heads of {}", sizes.head_dim);
            return Err(Misfit::new("rope.dimension_count", found, "at most a head's width").at(gguf.path()));
        }
        this.check().map_err(|m| m.at(gguf.path()))?;
        Ok(this)
    }

    /// Refuses numbers that cannot be.
    fn check(&self) -> Result<(), Misfit> {
        if self.dim == 0 || !self.dim.is_multiple_of(2) {
            return Err(Misfit::new("head_dim", self.dim, "an even number of elements that are turned"));
        }
        let good = |v: &f64| v.is_finite() && *v > 0.0;
        if !good(&self.theta) {
            return Err(Misfit::new("rope_theta", self.theta, "a number above 0"));
        }
        if let Some((key, value)) = numbers(&self.scaling).into_iter().find(|(_, v)| !good(v)) {
            return Err(Misfit::new(key, value, "a number above 0"));
        }
        let listed = match &self.scaling {
            RopeScaling::LongRope { short_factor, long_factor, .. } => {
                Some(("rope_scaling.short_factor / long_factor", short_factor.len(), long_factor.len()))
            }
            RopeScaling::Factors(f) => Some(("rope_freqs.weight", f.len(), f.len())),
            _ => None,
        };
        match listed {
            Some((key, a, b)) if a != self.dim / 2 || b != self.dim / 2 => {
                let expected = "one factor for every two elements of a head that are turned";
                Err(Misfit::new(key, format!("{} factors", a.min(b)), expected))
            }
            _ => Ok(()),
        }
    }

    /// Tables of it.
    pub fn rope(&self) -> Rope {
        Rope::new(self.theta, self.dim, self.scaling.clone())
    }

    /// `rope_theta` and `rope_scaling` of a `config.json`, in `json`.
    pub fn to_hf(&self, json: &mut Value, sizes: &DecoderSizes) {
        json["rope_theta"] = json!(self.theta);
        if self.dim != sizes.head_dim {
            json["partial_rotary_factor"] = json!(self.dim as f64 / sizes.head_dim as f64);
        }
        json["rope_scaling"] = self.scaling_to_hf(sizes);
    }

    fn scaling_to_hf(&self, sizes: &DecoderSizes) -> Value {
        match &self.scaling {
            RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => {
                json!({
                    "rope_type": "yarn",
                    "factor": factor,
                    "original_max_position_embeddings": original,
                    "beta_fast": beta_fast,
                    "beta_slow": beta_slow,
                    "attention_factor": attention_factor,
                    "truncate": truncate,
                })
            }
            // transformers has no plain list of factors, but longrope is one if both of its lists are the same
            RopeScaling::Factors(factors) => json!({
                "rope_type": "longrope",
                "factor": 1.0,
                "attention_factor": 1.0,
                "short_factor": factors,
                "long_factor": factors,
                "original_max_position_embeddings": self.original.unwrap_or(sizes.max_positions),
            }),
            RopeScaling::LongRope { short_factor, long_factor, original, attention_factor } => json!({
                "rope_type": "longrope",
                "short_factor": short_factor,
                "long_factor": long_factor,
                "original_max_position_embeddings": original,
                "attention_factor": exact(*attention_factor),
            }),
            // the others never come from a GGUF file
            RopeScaling::None | RopeScaling::Dynamic { .. } | RopeScaling::Llama3 { .. } => Value::Null,
        }
    }

    /// The settings of a GGUF file, without the architecture before their keys, into `values`; vectors that stand for
    /// settings are returned. `longrope` says that llama.cpp reads two lists of factors for the architecture.
    ///
    /// # Errors
    /// A scaling that llama.cpp cannot express.
    pub fn to_gguf(
        &self,
        sizes: &DecoderSizes,
        values: &mut Vec<(String, GgufValue)>,
        longrope: bool,
    ) -> Result<Vec<(String, Vec<f32>)>, Misfit> {
        let count = |n: usize| GgufValue::Unsigned(n as u64);
        let float = |v: f64| GgufValue::Float(v);
        let text = |v: &str| GgufValue::String(v.to_string());
        let mut push = |key: &str, value| values.push((key.to_string(), value));
        push("rope.dimension_count", count(self.dim));
        push("rope.freq_base", float(self.theta));
        let mut tensors = Vec::new();
        let cannot = |found: String, why: &str| {
            Misfit::new("rope_scaling", found, format!("what llama.cpp can express ({why})"))
        };
        match &self.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => {
                push("rope.scaling.type", text("linear"));
                push("rope.scaling.factor", float(f64::from(*factor)));
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => {
                let usual = yarn_mscale(*factor, 1.0) as f32;
                if (attention_factor - usual).abs() > 1e-6 * usual || !truncate {
                    let found = format!("yarn with attention_factor {attention_factor}, truncate {truncate}");
                    return Err(cannot(found, &format!("yarn with attention_factor {usual}, truncate true")));
                }
                push("rope.scaling.type", text("yarn"));
                push("rope.scaling.factor", float(*factor));
                push("rope.scaling.original_context_length", count(*original));
                push("rope.scaling.yarn_beta_fast", float(*beta_fast));
                push("rope.scaling.yarn_beta_slow", float(*beta_slow));
            }
            RopeScaling::Llama3 { original, .. } => {
                let frequencies = |scaling: RopeScaling| {
                    Rope::new(self.theta, self.dim, scaling).inverse_frequencies(sizes.max_positions).0
                };
                let (plain, scaled) = (frequencies(RopeScaling::None), frequencies(self.scaling.clone()));
                let factors = plain.iter().zip(&scaled).map(|(p, s)| p / s).collect();
                tensors.push(("rope_freqs.weight".to_string(), factors));
                push("rope.scaling.original_context_length", count(*original));
            }
            RopeScaling::Factors(factors) => tensors.push(("rope_freqs.weight".to_string(), factors.clone())),
            RopeScaling::Dynamic { .. } => {
                return Err(cannot("dynamic".to_string(), "no dynamic scaling: use yarn, linear or llama3"));
            }
            RopeScaling::LongRope { .. } if !longrope => {
                return Err(cannot("longrope".to_string(), "longrope only in other architectures"));
            }
            RopeScaling::LongRope { short_factor, long_factor, original, attention_factor } => {
                tensors.push(("rope_factors_long.weight".to_string(), long_factor.clone()));
                tensors.push(("rope_factors_short.weight".to_string(), short_factor.clone()));
                push("rope.scaling.original_context_length", count(*original));
                push("rope.scaling.attn_factor", float(exact(*attention_factor)));
            }
        }
        Ok(tensors)
    }
}

/// A section of `config.json`.
struct Section<'a> {
    config: &'a HfConfig,
    section: &'a str,
    map: Option<&'a Map<String, Value>>,
}

impl Section<'_> {
    fn bad(&self, key: &str, found: impl ToString, expected: &str) -> Error {
        bad(self.config, &format!("{}.{key}", self.section), found, expected)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.map.and_then(|m| m.get(key)) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => match v.as_f64().filter(|f| f.is_finite()) {
                Some(f) => Ok(Some(f)),
                None => Err(self.bad(key, v, "a number")),
            },
        }
    }

    fn needed(&self, key: &str) -> Result<f64> {
        let missing = || self.bad(key, "nothing", "a number above 0");
        self.number(key)?.filter(|f| *f > 0.0).ok_or_else(missing)
    }

    fn list(&self, key: &str) -> Result<Vec<f32>> {
        let values = self.map.and_then(|m| m.get(key)).and_then(Value::as_array);
        let floats = values.map(|v| v.iter().filter_map(Value::as_f64).map(|f| f as f32).collect::<Vec<_>>());
        match (floats, values) {
            (Some(floats), Some(values)) if floats.len() == values.len() => Ok(floats),
            _ => Err(self.bad(key, "no list of numbers", "a list of numbers")),
        }
    }

    fn scaling(&self, max_positions: usize, kinds: &[(&str, &str)]) -> Result<RopeScaling> {
        let map = self.map;
        let kind = map.and_then(|m| m.get("rope_type").or_else(|| m.get("type"))).and_then(Value::as_str);
        let meant = |kind| kinds.iter().find(|(name, _)| *name == kind).map_or(kind, |(_, meaning)| *meaning);
        let original = match self.config.opt_usize("original_max_position_embeddings")? {
            Some(n) => n,
            None => self.number("original_max_position_embeddings")?.map_or(max_positions, |n| n as usize),
        };
        let stretch = match self.number("factor")? {
            Some(f) => f,
            None => max_positions as f64 / original.max(1) as f64,
        };
        Ok(match kind.map(meant) {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: self.needed("factor")? as f32 },
            Some("dynamic") => RopeScaling::Dynamic { factor: self.needed("factor")?, max_positions },
            Some("llama3") => RopeScaling::Llama3 {
                factor: self.needed("factor")? as f32,
                low_freq_factor: self.needed("low_freq_factor")? as f32,
                high_freq_factor: self.needed("high_freq_factor")? as f32,
                original,
            },
            Some("yarn") => {
                let attention_factor = match (
                    self.number("attention_factor")?,
                    self.number("mscale")?,
                    self.number("mscale_all_dim")?,
                ) {
                    (Some(f), _, _) => f,
                    (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                        yarn_mscale(stretch, m) / yarn_mscale(stretch, all)
                    }
                    _ => yarn_mscale(stretch, 1.0),
                };
                RopeScaling::Yarn {
                    factor: stretch,
                    original,
                    beta_fast: self.number("beta_fast")?.filter(|b| *b != 0.0).unwrap_or(32.0),
                    beta_slow: self.number("beta_slow")?.filter(|b| *b != 0.0).unwrap_or(1.0),
                    attention_factor: attention_factor as f32,
                    truncate: map.and_then(|m| m.get("truncate")).and_then(Value::as_bool).unwrap_or(true),
                }
            }
            Some("longrope") => {
                let implied = longrope_attention(stretch, original);
                RopeScaling::LongRope {
                    short_factor: self.list("short_factor")?,
                    long_factor: self.list("long_factor")?,
                    original,
                    attention_factor: self.number("attention_factor")?.unwrap_or(implied) as f32,
                }
            }
            Some(other) => {
                let right = "default, linear, dynamic, llama3, yarn or longrope";
                return Err(self.bad("rope_type", other, right));
            }
        })
    }
}

/// The numbers of a scaling that must be above 0, with their keys.
fn numbers(scaling: &RopeScaling) -> Vec<(&'static str, f64)> {
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

/// llama.cpp keeps Llama 3's and Phi-3's scalings as tensors of factors, the rest as metadata.
fn scaling_from_gguf(
    gguf: &Gguf,
    name: &str,
    max_positions: usize,
    original: Option<usize>,
) -> Result<RopeScaling> {
    let key = |key: &str| format!("{name}.rope.scaling.{key}");
    if gguf.contains("rope_freqs.weight") {
        return Ok(RopeScaling::Factors(factors(gguf, "rope_freqs.weight")?));
    }
    if gguf.contains("rope_factors_long.weight") {
        let original = original.unwrap_or(max_positions);
        let stretch = max_positions as f64 / original.max(1) as f64;
        let implied = longrope_attention(stretch, original);
        return Ok(RopeScaling::LongRope {
            short_factor: factors(gguf, "rope_factors_short.weight")?,
            long_factor: factors(gguf, "rope_factors_long.weight")?,
            original,
            attention_factor: gguf.opt_f32(&key("attn_factor"))?.unwrap_or(implied as f32),
        });
    }
    let factor = gguf.opt_f32(&key("factor"))?.unwrap_or(1.0);
    match gguf.opt_str(&key("type"))? {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor }),
        Some("yarn") => Ok(RopeScaling::Yarn {
            factor: f64::from(factor),
            original: original.unwrap_or(max_positions),
            beta_fast: f64::from(gguf.opt_f32(&key("yarn_beta_fast"))?.unwrap_or(32.0)),
            beta_slow: f64::from(gguf.opt_f32(&key("yarn_beta_slow"))?.unwrap_or(1.0)),
            attention_factor: match gguf.opt_f32(&key("attn_factor"))? {
                Some(f) => f,
                None => yarn_mscale(f64::from(factor), 1.0) as f32,
            },
            truncate: true,
        }),
        Some(other) => Err(Error::Config {
            path: gguf.path().to_path_buf(),
            key: key("type"),
            found: other.to_string(),
            expected: "none, linear or yarn".to_string(),
        }),
    }
}

/// A vector that stands for a setting.
fn factors(gguf: &Gguf, name: &str) -> Result<Vec<f32>> {
    let view = gguf.tensor(name)?;
    let mut factors = vec![0f32; view.shape.iter().product()];
    engobe_kernels::codec::decode(view.storage()?, view.bytes(), &mut factors);
    Ok(factors)
}

/// The factor on cosines and sines that a stretch implies (Ding et al. 2024, as Phi-3 has it).
fn longrope_attention(stretch: f64, original: usize) -> f64 {
    match stretch <= 1.0 {
        true => 1.0,
        false => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
    }
}
