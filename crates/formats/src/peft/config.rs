//! `adapter_config.json` of LoRA adapters: PEFT 0.21's `LoraConfig`.

use crate::{Error, Result, nearest};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Version of PEFT whose format we write.
const PEFT_VERSION: &str = "0.21.2";

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
            fan_in_fan_out: false,
            base_model_name_or_path: None,
            task_type: Some("CAUSAL_LM".to_string()),
        }
    }
}

/// Keys that change nothing that we compute.
const NOTES: [&str; 7] = [
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Keys of features that engobe does not have. They may only be off.
const NOT_YET: [&str; 20] = [
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
    "convert_mode",
    "peft_task_config",
];

/// Keys beside [`LoraConfig::SETTINGS`].
const LABELS: [&str; 4] = ["base_model_name_or_path", "fan_in_fan_out", "task_type", "peft_type"];

/// True for values that mean "not used".
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    }
}

impl LoraConfig {
    /// Keys that say what the adapter is, as users set them.
    pub const SETTINGS: [&str; 13] = [
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
    ];

    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io(path))?;
        Self::parse(path, &bytes)
    }

    /// Reads JSON; `path` is for errors.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let map = match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => map,
            Ok(_) => return Err(Error::corrupt(path, "is not a JSON object")),
            Err(e) => return Err(Error::corrupt(path, format!("is not valid JSON: {e}"))),
        };
        let reader = Reader { path: path.to_path_buf(), map };
        reader.check_keys()?;
        let this = reader.config()?;
        this.check().map_err(|(key, found, expected)| reader.bad(key, &found, expected))?;
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
        match &self.target_modules {
            Some(TargetModules::List(names)) if names.is_empty() => {
                Err(("target_modules", "an empty list".to_string(), "at least one name"))
            }
            _ => Ok(()),
        }
    }

    /// The file's text: keys sorted, two spaces of indent.
    pub fn to_json(&self) -> String {
        let targets = |t: &Option<TargetModules>| match t {
            None => Value::Null,
            Some(TargetModules::AllLinear) => json!("all-linear"),
            Some(TargetModules::Regex(pattern)) => json!(pattern),
            Some(TargetModules::List(names)) => {
                let mut names = names.clone();
                names.sort();
                json!(names)
            }
        };
        let list = |l: &[String]| if l.is_empty() { Value::Null } else { json!(l) };
        let number = |v: f64| if v.fract() == 0.0 && v.abs() < 1e15 { json!(v as i64) } else { json!(v) };
        let alphas: Map<String, Value> =
            self.alpha_pattern.iter().map(|(p, a)| (p.clone(), number(*a))).collect();
        let ranks: Map<String, Value> =
            self.rank_pattern.iter().map(|(p, r)| (p.clone(), json!(r))).collect();
        let value = json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": alphas,
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": match self.bias { BiasMode::None => "none", BiasMode::All => "all", BiasMode::LoraOnly => "lora_only" },
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": targets(&self.exclude_modules),
            "fan_in_fan_out": self.fan_in_fan_out,
            "inference_mode": true,
            "init_lora_weights": match self.init_lora_weights {
                InitLoraWeights::Kaiming => json!(true),
                InitLoraWeights::Gaussian => json!("gaussian"),
                InitLoraWeights::Random => json!(false),
            },
            "layer_replication": null,
            "layers_pattern": list(&self.layers_pattern),
            "layers_to_transform": self.layers_to_transform,
            "loftq_config": {},
            "lora_alpha": number(self.lora_alpha),
            "lora_bias": false,
            "lora_dropout": self.lora_dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": list(&self.modules_to_save),
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
            "r": self.r,
            "rank_pattern": ranks,
            "revision": null,
            "target_modules": targets(&self.target_modules),
            "target_parameters": null,
            "task_type": self.task_type,
            "trainable_token_indices": null,
            "use_dora": false,
            "use_rslora": self.use_rslora,
        });
        serde_json::to_string_pretty(&value).unwrap_or_default()
    }
}

/// A parsed file on its way to a configuration.
struct Reader {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Reader {
    fn bad(&self, key: &str, found: &str, expected: &str) -> Error {
        Error::BadValue {
            path: self.path.clone(),
            key: key.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Refuses other methods, features that we lack, and keys that we do not know and that are on: an adapter
    /// that is read as something else would silently compute something else.
    fn check_keys(&self) -> Result<()> {
        match self.get("peft_type") {
            Some(Value::String(t)) if t == "LORA" => {}
            other => {
                let found = other.map_or("missing".to_string(), Value::to_string);
                return Err(self.bad("peft_type", &found, "\"LORA\", the one method supported so far"));
            }
        }
        for (key, value) in &self.map {
            let key = key.as_str();
            if LoraConfig::SETTINGS.contains(&key)
                || LABELS.contains(&key)
                || NOTES.contains(&key)
                || is_off(value)
            {
                continue;
            }
            if NOT_YET.contains(&key) {
                return Err(self.bad(
                    key,
                    &value.to_string(),
                    "this feature to be off: engobe does not have it yet",
                ));
            }
            let near = nearest(key, LoraConfig::SETTINGS.into_iter().chain(LABELS));
            return Err(self.bad(key, &value.to_string(), &format!("only known keys to be set{near}")));
        }
        Ok(())
    }

    fn config(&self) -> Result<LoraConfig> {
        let default = LoraConfig::default();
        let text = |key: &str| self.get(key).and_then(Value::as_str).map(str::to_string);
        Ok(LoraConfig {
            r: self.whole("r")?.unwrap_or(default.r),
            lora_alpha: self.number("lora_alpha")?.unwrap_or(default.lora_alpha),
            lora_dropout: self.number("lora_dropout")?.unwrap_or(0.0),
            use_rslora: self.flag("use_rslora")?,
            target_modules: self.modules("target_modules")?,
            exclude_modules: self.modules("exclude_modules")?,
            layers_to_transform: self.layers()?,
            layers_pattern: self.names("layers_pattern")?,
            rank_pattern: self.pattern("rank_pattern", "a whole number above 0", |v| {
                v.as_u64().and_then(|r| usize::try_from(r).ok())
            })?,
            alpha_pattern: self.pattern("alpha_pattern", "a number above 0", Value::as_f64)?,
            bias: match self.get("bias").map(|v| v.as_str().unwrap_or_default()) {
                None | Some("none") => BiasMode::None,
                Some("all") => BiasMode::All,
                Some("lora_only") => BiasMode::LoraOnly,
                Some(other) => return Err(self.bad("bias", other, "none, all or lora_only")),
            },
            modules_to_save: self.names("modules_to_save")?,
            init_lora_weights: match self.get("init_lora_weights") {
                None | Some(Value::Bool(true)) => InitLoraWeights::Kaiming,
                Some(Value::Bool(false)) => InitLoraWeights::Random,
                Some(Value::String(s)) if s.eq_ignore_ascii_case("gaussian") => InitLoraWeights::Gaussian,
                Some(other) => {
                    let right = "true, false or \"gaussian\" (others change the base weights or are not supported yet)";
                    return Err(self.bad("init_lora_weights", &other.to_string(), right));
                }
            },
            fan_in_fan_out: self.flag("fan_in_fan_out")?,
            base_model_name_or_path: text("base_model_name_or_path"),
            task_type: text("task_type"),
        })
    }

    fn whole(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        number.map(Some).ok_or_else(|| self.bad(key, &value.to_string(), "a whole number above 0"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.bad(key, &value.to_string(), "a number"))
    }

    fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.bad(key, &value.to_string(), "true or false"))
    }

    fn modules(&self, key: &str) -> Result<Option<TargetModules>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) if s.eq_ignore_ascii_case("all-linear") => {
                Ok(Some(TargetModules::AllLinear))
            }
            Some(Value::String(s)) => Ok(Some(TargetModules::Regex(s.clone()))),
            Some(_) => Ok(Some(TargetModules::List(self.names(key)?))),
        }
    }

    /// A string or a list of strings.
    fn names(&self, key: &str) -> Result<Vec<String>> {
        let names = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::String(s)) => Some(vec![s.clone()]),
            Some(Value::Array(a)) => a.iter().map(|v| v.as_str().map(str::to_string)).collect(),
            Some(_) => None,
        };
        let found = || self.get(key).map(Value::to_string).unwrap_or_default();
        names.ok_or_else(|| self.bad(key, &found(), "a string or a list of strings"))
    }

    fn layers(&self) -> Result<Option<Vec<usize>>> {
        let index = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let found = match self.get("layers_to_transform") {
            None => return Ok(None),
            Some(Value::Array(a)) => a.iter().map(index).collect(),
            Some(one) => index(one).map(|i| vec![i]),
        };
        let shown = || self.get("layers_to_transform").map(Value::to_string).unwrap_or_default();
        found
            .map(Some)
            .ok_or_else(|| self.bad("layers_to_transform", &shown(), "a layer's number or a list of them"))
    }

    fn pattern<T>(
        &self,
        key: &str,
        right: &str,
        as_type: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(p, v)| {
                    let value = as_type(v);
                    value
                        .map(|v| (p.clone(), v))
                        .ok_or_else(|| self.bad(&format!("{key}[{p:?}]"), &v.to_string(), right))
                })
                .collect(),
            Some(other) => Err(self.bad(key, &other.to_string(), "an object of patterns and numbers")),
        }
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
            ..Default::default()
        };
        assert_eq!(parse(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn wrong_values_are_named() {
        for (json, part) in [
            (r#"{"peft_type":"IA3"}"#, "peft_type"),
            (r#"{"r":4}"#, "peft_type is missing"),
            (r#"{"peft_type":"LORA","r":-1}"#, "r is -1"),
            (r#"{"peft_type":"LORA","r":0}"#, "r is 0"),
            (r#"{"peft_type":"LORA","lora_alpha":0}"#, "lora_alpha is 0"),
            (r#"{"peft_type":"LORA","use_dora":true}"#, "use_dora"),
            (r#"{"peft_type":"LORA","lora_alfa":3}"#, "did you mean \"lora_alpha\""),
            (r#"{"peft_type":"LORA","init_lora_weights":"pissa"}"#, "pissa"),
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
