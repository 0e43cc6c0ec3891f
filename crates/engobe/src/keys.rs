//! The settings of a run: one table that the configuration file, `--set` and the flags of `train` all share.

use anyhow::{Result, bail};
pub use engobe_adapters::method::Kind;
use engobe_adapters::method::METHODS;
use std::sync::LazyLock;
use toml::Value;

/// A setting.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// its name in files and `--set`; the flag has dashes
    pub name: &'static str,
    /// what it takes
    pub kind: Kind,
    /// heading in `--help`
    pub heading: &'static str,
    /// one line for `--help`, with the default
    pub help: &'static str,
    /// left out of `--help`, which would be too long: `engobe methods` shows it
    pub hidden: bool,
}

const fn key(name: &'static str, kind: Kind, heading: &'static str, help: &'static str) -> Key {
    Key { name, kind, heading, help, hidden: false }
}

const ADAPTER: &str = "Adapter (PEFT's names and rules)";
const LENGTH: &str = "How long, in what order";
const OPTIMIZER: &str = "Optimizer";
const UPKEEP: &str = "Evaluation and checkpoints";
const DATA: &str = "Data";
const MODEL: &str = "Model and machine";

/// Settings of every run.
const COMMON: [Key; 49] = [
    key("model", Kind::Text, MODEL, "Hugging Face directory, .gguf file, hub id, or a known name"),
    key(
        "dtype",
        Kind::Text,
        MODEL,
        "how base weights are kept: stored, f32, bf16, f16 (arithmetic is f32) [stored]",
    ),
    key("compute_dtype", Kind::Text, MODEL, "how kept activations are stored: f32, bf16 or f16 [f32]"),
    key("method", Kind::Text, MODEL, ""),
    key("quantize", Kind::Text, MODEL, "quantize the base's linear layers as they are read: nf4, fp4, int8"),
    key("double_quant", Kind::Flag, MODEL, "quantize the factors of 4-bit blocks too [on with qlora]"),
    key("quant_block_size", Kind::Whole, MODEL, "elements in a 4-bit block: 32 to 4096, a power of two [64]"),
    key("device", Kind::Text, MODEL, "cpu, cuda[:N] or metal [cpu]"),
    key("threads", Kind::Whole, MODEL, "threads [all cores]"),
    key("task", Kind::Text, DATA, "causal-lm, seq2seq-lm, seq-cls, token-cls, regression [by model, rows]"),
    key("data", Kind::Names, DATA, "training rows: JSONL, JSON, CSV, TSV, Parquet; several by commas"),
    key("val_data", Kind::Names, DATA, "validation rows"),
    key("val_split", Kind::Number, DATA, "share of the training rows to validate on [0]"),
    key("train_on", Kind::Text, DATA, "labels: completions, all, last [completions]"),
    key("template", Kind::Text, DATA, "prompts as chat turns or plain text: auto, chat, plain [auto]"),
    key("chat_template", Kind::Text, DATA, "file of a Jinja chat template, or chatml [the model's own]"),
    key("allow", Kind::Names, DATA, "kinds of findings that shall not stop the run"),
    key("out", Kind::Text, LENGTH, "directory to write into"),
    key("init_adapter", Kind::Text, ADAPTER, "start from this PEFT directory"),
    key("epochs", Kind::Number, LENGTH, "passes over the rows [3]"),
    key("max_steps", Kind::Whole, LENGTH, "optimizer steps, instead of epochs"),
    key("batch_size", Kind::Whole, LENGTH, "rows (packed: bins of max_seq_len tokens) in a micro-batch [1]"),
    key("gradient_accumulation", Kind::Whole, LENGTH, "micro-batches in a step [1]"),
    key("max_seq_len", Kind::Whole, LENGTH, "tokens after which a row is cut [512]"),
    key("packing", Kind::Flag, LENGTH, "fill bins with several rows, which never see each other [on]"),
    key("shuffle", Kind::Flag, LENGTH, "shuffle the rows in each epoch [on]"),
    key("seed", Kind::Whole, LENGTH, "seed of everything random [42]"),
    key(
        "optimizer",
        Kind::Text,
        OPTIMIZER,
        "adamw, adamw_8bit, paged_adamw, paged_adamw_8bit or sgd [adamw]",
    ),
    key("state_file", Kind::Text, OPTIMIZER, "file of a paged optimizer's state [OUT/optimizer.state]"),
    key("learning_rate", Kind::Number, OPTIMIZER, "peak learning rate [0.0002; prompts and prefixes more]"),
    key("lr_scheduler", Kind::Text, OPTIMIZER, "linear, cosine, constant [linear]"),
    key("warmup_steps", Kind::Whole, OPTIMIZER, "steps of linear warm-up [0]"),
    key("weight_decay", Kind::Number, OPTIMIZER, "weight decay [0.01]"),
    key("max_grad_norm", Kind::Number, OPTIMIZER, "clip gradients to this global norm; 0 turns it off [1]"),
    key("adam_beta1", Kind::Number, OPTIMIZER, "first decay rate [0.9]"),
    key("adam_beta2", Kind::Number, OPTIMIZER, "second decay rate [0.999]"),
    key("adam_epsilon", Kind::Number, OPTIMIZER, "epsilon [1e-8]"),
    key("momentum", Kind::Number, OPTIMIZER, "momentum of sgd [0]"),
    key("loraplus_lr_ratio", Kind::Number, OPTIMIZER, "LoRA+: learning rate of B over that of A [1]"),
    key(
        "loraplus_lr_embedding",
        Kind::Number,
        OPTIMIZER,
        "LoRA+: learning rate of factors beside embeddings [1e-6]",
    ),
    key("eval_steps", Kind::Whole, UPKEEP, "evaluate every so many steps; 0: at the end [0]"),
    key("save_steps", Kind::Whole, UPKEEP, "checkpoint every so many steps; 0: at the end [0]"),
    key("save_total_limit", Kind::Whole, UPKEEP, "checkpoints kept [2]"),
    key(
        "early_stopping_patience",
        Kind::Whole,
        UPKEEP,
        "stop after so many evaluations without gain; 0: never [0]",
    ),
    key("early_stopping_threshold", Kind::Number, UPKEEP, "less than this is no gain [0]"),
    key("metric_for_best_model", Kind::Text, UPKEEP, "what tells the best: accuracy, f1_macro, ... [loss]"),
    key("load_best", Kind::Flag, UPKEEP, "end with the adapter of the best evaluation"),
    key(
        "memory_limit",
        Kind::Text,
        MODEL,
        "memory to keep to (16GB, 12GiB, 8000MB); settings are chosen to fit",
    ),
    key(
        "activation_checkpointing",
        Kind::Flag,
        MODEL,
        "keep less, compute twice: less memory, a third more time",
    ),
];

/// All settings: those of every run, with the methods' own among them (a name that several have stands once).
pub static KEYS: LazyLock<Vec<Key>> = LazyLock::new(|| {
    let mut keys: Vec<Key> = COMMON.to_vec();
    for key in keys.iter_mut().filter(|k| k.name == "method") {
        key.help = method_help().leak();
    }
    let mut at = keys.iter().position(|k| k.name == "init_adapter").map_or(keys.len(), |i| i + 1);
    for method in METHODS {
        for setting in method.settings() {
            if !keys.iter().any(|k| k.name == setting.name) {
                let hidden = method.name() != "lora";
                keys.insert(at, Key { hidden, ..key(setting.name, setting.kind, ADAPTER, setting.help) });
                at += 1;
            }
        }
    }
    keys
});

fn method_help() -> String {
    let names: Vec<&str> = METHODS.iter().map(|m| m.name()).chain(["qlora"]).collect();
    format!("how to adapt: {} (`engobe methods` tells of each) [lora]", names.join(", "))
}

/// True for a setting of the adapter.
pub fn is_of_method(name: &str) -> bool {
    METHODS.iter().any(|m| m.settings().iter().any(|s| s.name == name))
}

/// Settings that only a file or `--set` can give.
pub const FILE_ONLY: [Key; 1] =
    [key("date", Kind::Text, DATA, "what chat templates print as today's date (2026-01-31)")];

/// Settings that are on unless turned off.
pub const ON_BY_DEFAULT: [&str; 2] = ["packing", "shuffle"];

/// The setting called `name`.
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().chain(&FILE_ONLY).find(|k| k.name == name)
}

/// The setting called `name`, or an error that suggests the nearest; `source` says where the name stands.
pub fn find_or_suggest(name: &str, source: &str) -> Result<&'static Key> {
    if let Some(key) = find(name) {
        return Ok(key);
    }
    let names = KEYS.iter().chain(&FILE_ONLY).map(|k| k.name);
    let nearest =
        names.max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
    bail!("{source}: unknown setting {name:?}; did you mean {:?}?", nearest.unwrap_or_default())
}

impl Key {
    /// The flag's name.
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// Reads what was typed after the flag or `--set name=`.
    pub fn parse(&self, text: &str, source: &str) -> Result<Value> {
        let wrong = |what: &str| anyhow::anyhow!("{source}: {} is {text:?}; expected {what}", self.name);
        let value = match self.kind {
            Kind::Whole => Value::Integer(text.parse().map_err(|_| wrong(self.expected()))?),
            Kind::Number => match text.parse::<f64>() {
                Ok(v) if v.is_finite() => Value::Float(v),
                _ => return Err(wrong(self.expected())),
            },
            Kind::Flag => Value::Boolean(text.parse().map_err(|_| wrong(self.expected()))?),
            Kind::Text => Value::String(text.to_string()),
            Kind::NumberOrText => match text.parse::<f64>() {
                Ok(v) if v.is_finite() => Value::Float(v),
                _ => Value::String(text.to_string()),
            },
            Kind::FlagOrText => match text.parse() {
                Ok(flag) => Value::Boolean(flag),
                Err(_) => Value::String(text.to_string()),
            },
            Kind::Names if text.trim_start().starts_with('[') => {
                inline(text).ok_or_else(|| wrong(self.expected()))?
            }
            Kind::Names => self.names(text),
            Kind::Wholes if text.trim_start().starts_with('[') => {
                inline(text).ok_or_else(|| wrong(self.expected()))?
            }
            Kind::Wholes => {
                let parts = text.split(',').map(|p| p.trim().parse().map(Value::Integer));
                Value::Array(parts.collect::<Result<_, _>>().map_err(|_| wrong(self.expected()))?)
            }
            Kind::NumberOrTable if !text.trim_start().starts_with('{') => match text.parse::<f64>() {
                Ok(v) if v.is_finite() => Value::Float(v),
                _ => return Err(wrong(self.expected())),
            },
            Kind::Table | Kind::NumberOrTable => inline(text).ok_or_else(|| wrong(self.expected()))?,
        };
        self.check(&value, source)?;
        Ok(value)
    }

    /// `a,b` is a list of names; what has a regex's characters, and `all-linear`, is one text.
    fn names(&self, text: &str) -> Value {
        let modules = matches!(self.name, "target_modules" | "exclude_modules");
        let regex = text.contains(['*', '(', '[', '\\', '|', '+', '?', '^', '$']);
        if modules && (regex || text.eq_ignore_ascii_case("all-linear")) {
            return Value::String(text.to_string());
        }
        let parts = text.split(',').map(str::trim).filter(|p| !p.is_empty());
        Value::Array(parts.map(|p| Value::String(p.to_string())).collect())
    }

    /// What the value must be, for errors.
    pub fn expected(&self) -> &'static str {
        match self.kind {
            Kind::Whole => "a whole number, 0 or above",
            Kind::Number => "a number",
            Kind::Flag => "true or false",
            Kind::Text => "text",
            Kind::Names => "a name or a list of names",
            Kind::Wholes => "a list of whole numbers, 0 or above",
            Kind::NumberOrTable => "a number, or a table such as { \"0\" = 8, \"default\" = 16 }",
            Kind::Table => "a table such as { \"q_proj\" = 4 }",
            Kind::FlagOrText => "true, false or a name",
            Kind::NumberOrText => "a number or a name",
        }
    }

    /// Checks the kind of a value.
    pub fn check(&self, value: &Value, source: &str) -> Result<()> {
        let whole = |v: &Value| v.as_integer().is_some_and(|i| i >= 0);
        let number = |v: &Value| v.is_float() || v.is_integer();
        let good = match self.kind {
            Kind::Whole => whole(value),
            Kind::Number => number(value),
            Kind::Flag => value.is_bool(),
            Kind::Text => value.is_str(),
            Kind::NumberOrText => number(value) || value.is_str(),
            Kind::FlagOrText => value.is_bool() || value.is_str(),
            Kind::Names => value.is_str() || value.as_array().is_some_and(|a| a.iter().all(Value::is_str)),
            Kind::Wholes => whole(value) || value.as_array().is_some_and(|a| a.iter().all(whole)),
            Kind::NumberOrTable if number(value) => true,
            Kind::Table | Kind::NumberOrTable => value.as_table().is_some_and(|t| t.values().all(number)),
        };
        if good {
            return Ok(());
        }
        bail!("{source}: {} is {value}; expected {}", self.name, self.expected())
    }
}

/// A TOML value on its own.
fn inline(text: &str) -> Option<Value> {
    let table: toml::Table = toml::from_str(&format!("v = {text}")).ok()?;
    table.get("v").cloned()
}
