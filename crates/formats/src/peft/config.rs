//! `adapter_config.json` of LoRA adapters: PEFT 0.21's `LoraConfig`.

use super::choices::{
    BiasMode, InitLoraWeights, LoftqConfig, TargetModules, TokenIndices, init, loftq, tokens,
};
use super::raw::{KnownKeys, PeftConfig, list_json, modules_json, number_json};
use crate::Result;
use serde_json::{Map, Value, json};
use std::path::Path;

/// LoRA's configuration. Fields are PEFT's.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// rank
    pub r: usize,
    /// numerator of the scale
    pub lora_alpha: f64,
    /// probability that an element of the adapter's input is dropped in training
    pub lora_dropout: f64,
    /// scale alpha/√r instead of alpha/r
    pub use_rslora: bool,
    /// modules to adapt
    pub target_modules: Option<TargetModules>,
    /// modules to leave out
    pub exclude_modules: Option<TargetModules>,
    /// layers to adapt; all if `None`
    pub layers_to_transform: Option<Vec<usize>>,
    /// names of the lists of layers that the indices count in
    pub layers_pattern: Vec<String>,
    /// ranks of modules that differ, by pattern
    pub rank_pattern: Vec<(String, usize)>,
    /// alphas of modules that differ, by pattern
    pub alpha_pattern: Vec<(String, f64)>,
    /// trained biases
    pub bias: BiasMode,
    /// modules trained in full
    pub modules_to_save: Vec<String>,
    /// start
    pub init_lora_weights: InitLoraWeights,
    /// weights as a direction and a trained magnitude (Liu et al. 2024)
    pub use_dora: bool,
    /// a bias behind B
    pub lora_bias: bool,
    /// settings of `"loftq"`
    pub loftq_config: Option<LoftqConfig>,
    /// tokens whose embeddings are trained
    pub trainable_token_indices: Option<TokenIndices>,
    /// what is trained of a tied embedding, the head has as well
    pub ensure_weight_tying: bool,
    /// adapted matrices lie as `[in, out]` in the base's files (GPT-2's `Conv1D`), which PEFT must know to merge
    pub fan_in_fan_out: bool,
    /// the base model's name or path, as a note
    pub base_model_name_or_path: Option<String>,
    /// kind of task, as a note
    pub task_type: Option<String>,
}

impl Default for LoraConfig {
    /// PEFT's defaults.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            bias: BiasMode::None,
            modules_to_save: Vec::new(),
            init_lora_weights: InitLoraWeights::Kaiming,
            use_dora: false,
            lora_bias: false,
            loftq_config: None,
            trainable_token_indices: None,
            ensure_weight_tying: false,
            fan_in_fan_out: false,
            base_model_name_or_path: None,
            task_type: Some("CAUSAL_LM".to_string()),
        }
    }
}

/// Keys that users do not set, beside those of every method.
const NOTES: [&str; 3] = ["fan_in_fan_out", "megatron_core", "qalora_group_size"];

/// Keys of features that engobe does not have. They may only be off.
const NOT_YET: [&str; 14] = [
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "layer_replication",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
    "convert_mode",
];

impl LoraConfig {
    /// Keys that say what the adapter is, as users set them.
    pub const SETTINGS: [&str; 18] = [
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "modules_to_save",
        "init_lora_weights",
        "use_dora",
        "lora_bias",
        "loftq_config",
        "trainable_token_indices",
        "ensure_weight_tying",
    ];

    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self> {
        Self::read(&PeftConfig::load(path)?)
    }

    /// Reads JSON; `path` is for errors.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::read(&PeftConfig::parse(path, bytes)?)
    }

    /// Reads a configuration whole.
    ///
    /// # Errors
    /// Another method, an unknown key, a value that cannot be.
    pub fn read(raw: &PeftConfig) -> Result<Self> {
        if raw.peft_type() != "LORA" {
            return Err(raw.bad("peft_type", &format!("{:?}", raw.peft_type()), "\"LORA\" here"));
        }
        raw.check_keys(KnownKeys { settings: &Self::SETTINGS, notes: &NOTES, not_yet: &NOT_YET })?;
        let this = Self::from_raw(raw)?;
        this.check().map_err(|(key, found, expected)| raw.bad(key, &found, expected))?;
        Ok(this)
    }

    /// Settings that cannot be: key, what it is, what would be right.
    pub fn check(&self) -> std::result::Result<(), (&'static str, String, &'static str)> {
        let positive = "a number above 0";
        if self.r == 0 {
            return Err(("r", "0".to_string(), "a whole number above 0"));
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            return Err(("lora_alpha", self.lora_alpha.to_string(), positive));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(("lora_dropout", self.lora_dropout.to_string(), "a probability in [0, 1)"));
        }
        if let Some((pattern, _)) = self.rank_pattern.iter().find(|(_, r)| *r == 0) {
            return Err(("rank_pattern", format!("0 for {pattern:?}"), "a whole number above 0"));
        }
        if let Some((pattern, a)) = self.alpha_pattern.iter().find(|(_, a)| !(a.is_finite() && *a > 0.0)) {
            return Err(("alpha_pattern", format!("{a} for {pattern:?}"), positive));
        }
        if self.lora_bias {
            let init = self.init_lora_weights;
            if !matches!(init, InitLoraWeights::Kaiming | InitLoraWeights::Random) {
                return Err(("lora_bias", "true".to_string(), "false, or init_lora_weights true or false"));
            }
            if self.use_dora {
                return Err(("lora_bias", "true".to_string(), "false beside use_dora"));
            }
        }
        if let Some(loftq) = self.loftq_config {
            if !matches!(loftq.bits, 4 | 8) {
                return Err(("loftq_config", format!("loftq_bits {}", loftq.bits), "loftq_bits 4 or 8"));
            }
            if loftq.iterations == 0 {
                return Err(("loftq_config", "loftq_iter 0".to_string(), "loftq_iter above 0"));
            }
        }
        let lists: Vec<&Vec<usize>> = match &self.trainable_token_indices {
            None => Vec::new(),
            Some(TokenIndices::Input(ids)) => vec![ids],
            Some(TokenIndices::Modules(modules)) => modules.iter().map(|(_, ids)| ids).collect(),
        };
        for ids in lists {
            let mut seen = ids.clone();
            seen.sort_unstable();
            if let Some(twice) = seen.windows(2).find(|w| w[0] == w[1]) {
                return Err(("trainable_token_indices", format!("{} twice", twice[0]), "each token once"));
            }
        }
        match &self.target_modules {
            Some(TargetModules::List(names)) if names.is_empty() => {
                Err(("target_modules", "an empty list".to_string(), "at least one name"))
            }
            _ => Ok(()),
        }
    }

    /// The file's text: keys sorted, two spaces of indent.
    pub fn to_json(&self) -> String {
        PeftConfig::from(self).to_json()
    }

    fn from_raw(raw: &PeftConfig) -> Result<Self> {
        let default = Self::default();
        let text = |key: &str| raw.text(key).map(str::to_string);
        Ok(Self {
            r: raw.whole("r")?.unwrap_or(default.r),
            lora_alpha: raw.number("lora_alpha")?.unwrap_or(default.lora_alpha),
            lora_dropout: raw.number("lora_dropout")?.unwrap_or(0.0),
            use_rslora: raw.flag("use_rslora")?,
            target_modules: raw.modules("target_modules")?,
            exclude_modules: raw.modules("exclude_modules")?,
            layers_to_transform: raw.layers("layers_to_transform")?,
            layers_pattern: raw.names("layers_pattern")?,
            rank_pattern: raw.pattern("rank_pattern", "a whole number above 0", |v| {
                v.as_u64().and_then(|r| usize::try_from(r).ok())
            })?,
            alpha_pattern: raw.pattern("alpha_pattern", "a number above 0", Value::as_f64)?,
            bias: raw.choice(
                "bias",
                &[("none", BiasMode::None), ("all", BiasMode::All), ("lora_only", BiasMode::LoraOnly)],
                BiasMode::None,
            )?,
            modules_to_save: raw.names("modules_to_save")?,
            init_lora_weights: init(raw)?,
            use_dora: raw.flag("use_dora")?,
            lora_bias: raw.flag("lora_bias")?,
            loftq_config: loftq(raw)?,
            trainable_token_indices: tokens(raw, "trainable_token_indices")?,
            ensure_weight_tying: raw.flag("ensure_weight_tying")?,
            fan_in_fan_out: raw.flag("fan_in_fan_out")?,
            base_model_name_or_path: text("base_model_name_or_path"),
            task_type: text("task_type"),
        })
    }
}

impl From<&LoraConfig> for PeftConfig {
    fn from(c: &LoraConfig) -> Self {
        let mut raw = Self::new("LORA");
        for off in
            ["alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "layer_replication"]
        {
            raw.set(off, Value::Null);
        }
        for off in ["megatron_config", "target_parameters"] {
            raw.set(off, Value::Null);
        }
        let tokens = match &c.trainable_token_indices {
            None => Value::Null,
            Some(TokenIndices::Input(ids)) => json!(ids),
            Some(TokenIndices::Modules(modules)) => {
                Value::Object(modules.iter().map(|(name, ids)| (name.clone(), json!(ids))).collect())
            }
        };
        let loftq = match c.loftq_config {
            None => json!({}),
            Some(l) => json!({ "loftq_bits": l.bits, "loftq_iter": l.iterations }),
        };
        raw.set("ensure_weight_tying", c.ensure_weight_tying);
        raw.set("loftq_config", loftq);
        raw.set("lora_bias", c.lora_bias);
        raw.set("trainable_token_indices", tokens);
        raw.set("use_dora", c.use_dora);
        raw.set("megatron_core", "megatron.core");
        let alphas: Map<String, Value> =
            c.alpha_pattern.iter().map(|(p, a)| (p.clone(), number_json(*a))).collect();
        let ranks: Map<String, Value> = c.rank_pattern.iter().map(|(p, r)| (p.clone(), json!(r))).collect();
        let bias = match c.bias {
            BiasMode::None => "none",
            BiasMode::All => "all",
            BiasMode::LoraOnly => "lora_only",
        };
        raw.set("alpha_pattern", alphas);
        raw.set("base_model_name_or_path", c.base_model_name_or_path.clone());
        raw.set("bias", bias);
        raw.set("fan_in_fan_out", c.fan_in_fan_out);
        raw.set("exclude_modules", modules_json(&c.exclude_modules));
        raw.set("init_lora_weights", c.init_lora_weights.to_json());
        raw.set("layers_pattern", list_json(&c.layers_pattern));
        raw.set("layers_to_transform", json!(c.layers_to_transform));
        raw.set("lora_alpha", number_json(c.lora_alpha));
        raw.set("lora_dropout", c.lora_dropout);
        raw.set("modules_to_save", list_json(&c.modules_to_save));
        raw.set("r", c.r);
        raw.set("rank_pattern", ranks);
        raw.set("target_modules", modules_json(&c.target_modules));
        raw.set("task_type", c.task_type.clone());
        raw.set("use_rslora", c.use_rslora);
        raw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<LoraConfig> {
        LoraConfig::parse(Path::new("adapter_config.json"), json.as_bytes())
    }

    #[test]
    fn what_we_write_we_read() {
        let config = LoraConfig {
            r: 4,
            lora_alpha: 2.5,
            rank_pattern: vec![("z".into(), 2), ("a.*".into(), 3)],
            alpha_pattern: vec![("q_proj".into(), 7.0)],
            layers_to_transform: Some(vec![1, 2]),
            target_modules: Some(TargetModules::Regex(".*q_proj".into())),
            exclude_modules: Some(TargetModules::List(vec!["lm_head".into()])),
            modules_to_save: vec!["norm".into()],
            bias: BiasMode::LoraOnly,
            init_lora_weights: InitLoraWeights::Gaussian,
            loftq_config: Some(LoftqConfig { bits: 8, iterations: 3 }),
            use_dora: true,
            trainable_token_indices: Some(TokenIndices::Input(vec![3, 1])),
            ensure_weight_tying: true,
            ..Default::default()
        };
        assert_eq!(parse(&config.to_json()).unwrap(), config);
        let tokens = TokenIndices::Modules(vec![("embed_tokens".into(), vec![7])]);
        let inits = [InitLoraWeights::Pissa(None), InitLoraWeights::Pissa(Some(4)), InitLoraWeights::Olora];
        for init_lora_weights in inits.into_iter().chain([InitLoraWeights::Loftq]) {
            let tokens = Some(tokens.clone());
            let config = LoraConfig { init_lora_weights, trainable_token_indices: tokens, ..config.clone() };
            assert_eq!(parse(&config.to_json()).unwrap(), config);
        }
    }

    #[test]
    fn wrong_values_are_named() {
        for (json, part) in [
            (r#"{"peft_type":"IA3"}"#, "peft_type"),
            (r#"{"r":4}"#, "peft_type is missing"),
            (r#"{"peft_type":"LORA","r":-1}"#, "r is -1"),
            (r#"{"peft_type":"LORA","r":0}"#, "r is 0"),
            (r#"{"peft_type":"LORA","lora_alpha":0}"#, "lora_alpha is 0"),
            (r#"{"peft_type":"LORA","use_qalora":true}"#, "use_qalora"),
            (r#"{"peft_type":"LORA","use_dora":true,"lora_bias":true}"#, "lora_bias is true"),
            (r#"{"peft_type":"LORA","loftq_config":{"loftq_bits":3}}"#, "loftq_bits 3"),
            (r#"{"peft_type":"LORA","trainable_token_indices":[1,-1]}"#, "trainable_token_indices"),
            (r#"{"peft_type":"LORA","trainable_token_indices":[1,2,1]}"#, "1 twice"),
            (r#"{"peft_type":"LORA","lora_alfa":3}"#, "did you mean \"lora_alpha\""),
            (r#"{"peft_type":"LORA","init_lora_weights":"corda"}"#, "corda"),
            (r#"{"peft_type":"LORA","target_modules":[]}"#, "empty list"),
            (r#"{"peft_type":"LORA","rank_pattern":{"q":0}}"#, "rank_pattern"),
            (r#"{"peft_type":"LORA","bias":"some"}"#, "some"),
            (r#"[1]"#, "not a JSON object"),
            (r#"{"#, "not valid JSON"),
        ] {
            let error = parse(json).unwrap_err().to_string();
            assert!(error.contains(part), "{json}: {error}");
        }
    }
}
