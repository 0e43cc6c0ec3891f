//! Values that LoRA's settings choose from.

use super::raw::PeftConfig;
use crate::Result;
use serde_json::{Value, json};

/// Which modules a setting names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// names, or ends of names
    List(Vec<String>),
    /// a regular expression for the whole name
    Regex(String),
    /// every linear layer but the output head
    AllLinear,
}

/// How a new adapter starts (`init_lora_weights`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: A by Kaiming's rule, B zero
    Kaiming,
    /// `"gaussian"`: A normal with standard deviation 1/r, B zero
    Gaussian,
    /// `false`: A and B both random; for tests
    Random,
    /// `"pissa"`: the base's largest singular values and vectors; `Some(n)`: `"pissa_niter_n"`, found by n iterations
    /// from random directions. The base gets what is left (Meng et al. 2024)
    Pissa(Option<usize>),
    /// `"olora"`: the first columns of the base's QR decomposition; the base gets what is left (Büyükakyüz 2024)
    Olora,
    /// `"loftq"`: what quantizing the base loses (Li et al. 2023)
    Loftq,
}

impl InitLoraWeights {
    /// The base's weight is no longer its own: it gets `W - s·B₀·A₀`, or is quantized.
    pub fn changes_base(self) -> bool {
        matches!(self, Self::Pissa(_) | Self::Olora | Self::Loftq)
    }

    pub(super) fn to_json(self) -> Value {
        match self {
            Self::Kaiming => json!(true),
            Self::Gaussian => json!("gaussian"),
            Self::Random => json!(false),
            Self::Pissa(None) => json!("pissa"),
            Self::Pissa(Some(n)) => json!(format!("pissa_niter_{n}")),
            Self::Olora => json!("olora"),
            Self::Loftq => json!("loftq"),
        }
    }

    fn from_json(value: &Value) -> Option<Self> {
        let text = match value {
            Value::Bool(true) => return Some(Self::Kaiming),
            Value::Bool(false) => return Some(Self::Random),
            other => other.as_str()?.to_ascii_lowercase(),
        };
        match text.as_str() {
            "gaussian" => Some(Self::Gaussian),
            "pissa" => Some(Self::Pissa(None)),
            "olora" => Some(Self::Olora),
            "loftq" => Some(Self::Loftq),
            other => other.strip_prefix("pissa_niter_")?.parse().ok().map(|n| Self::Pissa(Some(n))),
        }
    }
}

/// How `"loftq"` quantizes (`loftq_config`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoftqConfig {
    /// 4: NF4; 8: int8
    pub bits: usize,
    /// rounds of quantizing and decomposing
    pub iterations: usize,
}

impl Default for LoftqConfig {
    /// PEFT's defaults.
    fn default() -> Self {
        Self { bits: 4, iterations: 1 }
    }
}

/// Tokens whose embeddings are trained (`trainable_token_indices`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenIndices {
    /// of the input embedding
    Input(Vec<usize>),
    /// of the embeddings named (names, or ends of names)
    Modules(Vec<(String, Vec<usize>)>),
}

/// Which biases are trained (`bias`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BiasMode {
    /// none
    None,
    /// all of the model
    All,
    /// those of adapted layers
    LoraOnly,
}

pub(super) fn init(raw: &PeftConfig) -> Result<InitLoraWeights> {
    let Some(value) = raw.get("init_lora_weights") else { return Ok(InitLoraWeights::Kaiming) };
    let right = "true, false, \"gaussian\", \"pissa\", \"pissa_niter_N\", \"olora\" or \"loftq\"";
    InitLoraWeights::from_json(value).ok_or_else(|| raw.bad("init_lora_weights", &value.to_string(), right))
}

pub(super) fn loftq(raw: &PeftConfig) -> Result<Option<LoftqConfig>> {
    let Some(value) = raw.get("loftq_config") else { return Ok(None) };
    let wrong = || {
        let right = "an object with whole numbers loftq_bits and loftq_iter";
        raw.bad("loftq_config", &value.to_string(), right)
    };
    let map = value.as_object().ok_or_else(wrong)?;
    let mut loftq = LoftqConfig::default();
    for (key, value) in map {
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(wrong)?;
        match key.as_str() {
            "loftq_bits" => loftq.bits = number,
            "loftq_iter" => loftq.iterations = number,
            _ => return Err(wrong()),
        }
    }
    Ok((!map.is_empty()).then_some(loftq))
}

/// Tokens: a list of ids, or lists by module.
pub fn tokens(raw: &PeftConfig, key: &str) -> Result<Option<TokenIndices>> {
    let Some(value) = raw.get(key) else { return Ok(None) };
    let ids = |v: &Value| -> Option<Vec<usize>> {
        v.as_array()?.iter().map(|n| usize::try_from(n.as_u64()?).ok()).collect()
    };
    let tokens = match value {
        Value::Object(map) => map
            .iter()
            .map(|(name, v)| Some((name.clone(), ids(v)?)))
            .collect::<Option<_>>()
            .map(TokenIndices::Modules),
        list => ids(list).map(TokenIndices::Input),
    };
    let right = "a list of token ids, or an object of modules and lists";
    tokens.map(Some).ok_or_else(|| raw.bad(key, &value.to_string(), right))
}
