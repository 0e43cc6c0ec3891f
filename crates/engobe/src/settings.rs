//! From what was typed to what it means: defaults, then the file, then flags and `--set`.

use crate::Usage;
use crate::keys::{self, Kind};
use crate::quantization::Asked;
use crate::workbench;
use anyhow::{Context, Result, bail};
use engobe_adapters::method::{self, Decides, METHODS};
use engobe_adapters::{Adapter, Method};
use engobe_formats::peft::PeftConfig;
use engobe_models::LoadOptions;
use engobe_train::Plan;
use engobe_train::plan::{Compute, Optimization, Schedule, Upkeep};
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// LoRA over a base that is quantized as it is read.
pub const QLORA: &str = "qlora";

/// The settings that were given, by name.
#[derive(Clone, Debug, Default)]
pub struct Given {
    table: Table,
    /// names given on the command line
    typed: Vec<String>,
}

impl Given {
    /// Reads the file, if any, and lays `flags` (name and text) and `sets` (`name=value`) over it.
    pub fn collect(config: Option<&Path>, flags: &[(String, String)], sets: &[String]) -> Result<Self> {
        let mut given = Self::default();
        if let Some(path) = config {
            given.read(path)?;
        }
        for (name, text) in flags {
            let source = format!("--{}", name.replace('_', "-"));
            let key = keys::find_or_suggest(name, &source)?;
            given.set(name, key.parse(text, &source)?);
        }
        given.lay_over(sets)?;
        given.conflicts()?;
        Ok(given)
    }

    fn read(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let table: Table = match toml::from_str(&text) {
            Ok(table) => table,
            Err(e) => {
                let line = e.span().map_or(1, |s| text[..s.start].lines().count().max(1));
                bail!("{} line {line}: {}", path.display(), e.message())
            }
        };
        for (name, value) in table {
            let at = text
                .lines()
                .position(|l| sets(l, &name))
                .map_or(String::new(), |i| format!(" line {}", i + 1));
            let source = format!("{}{at}", path.display());
            keys::find_or_suggest(&name, &source)?.check(&value, &source)?;
            self.table.insert(name, value);
        }
        Ok(())
    }

    fn set(&mut self, name: &str, value: Value) {
        // repeated lists on the command line add up
        if let (true, Some(Value::Array(old)), Value::Array(new)) =
            (self.typed.iter().any(|t| t == name), self.table.get_mut(name), &value)
        {
            old.extend(new.iter().cloned());
            return;
        }
        self.table.insert(name.to_string(), value);
        self.typed.push(name.to_string());
    }

    /// Pairs of settings that exclude each other. What was typed takes the place of what the file has.
    fn conflicts(&mut self) -> Result<()> {
        for (a, b) in [("max_steps", "epochs"), ("val_data", "val_split")] {
            let typed = |name: &str| self.typed.iter().any(|t| t == name);
            match (typed(a), typed(b)) {
                (true, false) => drop(self.table.remove(b)),
                (false, true) => drop(self.table.remove(a)),
                _ if self.has(a) && self.has(b) => bail!("{a} and {b} contradict each other: give one"),
                _ => {}
            }
        }
        Ok(())
    }

    /// These settings with others (`name=value`) over them.
    pub fn with_sets(&self, sets: &[String]) -> Result<Self> {
        let mut given = self.clone();
        given.lay_over(sets)?;
        given.conflicts()?;
        Ok(given)
    }

    fn lay_over(&mut self, sets: &[String]) -> Result<()> {
        for set in sets {
            let (name, text) =
                set.split_once('=').with_context(|| format!("--set {set}: expected name=value"))?;
            let (name, source) = (name.trim(), format!("--set {set}"));
            let key = keys::find_or_suggest(name, &source)?;
            self.set(name, key.parse(text.trim(), &source)?);
        }
        Ok(())
    }

    /// These settings, and the date that templates print.
    pub fn with_date(&self, date: Option<String>) -> Self {
        let mut given = self.clone();
        if let Some(date) = date {
            given.table.insert("date".to_string(), Value::String(date));
        }
        given
    }

    /// True if the setting stands in the file or on the command line.
    pub fn has(&self, name: &str) -> bool {
        self.table.contains_key(name)
    }

    /// A text.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.table.get(name).and_then(Value::as_str)
    }

    /// A path.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from)
    }

    /// One or more paths.
    pub fn paths(&self, name: &str) -> Vec<PathBuf> {
        self.names(name).into_iter().map(PathBuf::from).collect()
    }

    /// One or more texts.
    pub fn names(&self, name: &str) -> Vec<String> {
        match self.table.get(name) {
            Some(Value::String(s)) => vec![s.clone()],
            Some(Value::Array(a)) => a.iter().filter_map(|v| v.as_str().map(str::to_string)).collect(),
            _ => Vec::new(),
        }
    }

    /// A number.
    pub fn number(&self, name: &str) -> Option<f64> {
        let value = self.table.get(name)?;
        value.as_float().or_else(|| value.as_integer().map(|i| i as f64))
    }

    /// A whole number.
    pub fn whole(&self, name: &str) -> Option<usize> {
        self.table.get(name)?.as_integer().and_then(|i| usize::try_from(i).ok())
    }

    /// How the base shall be held.
    pub fn load_options(&self) -> Result<LoadOptions> {
        let asked = Asked {
            method: self.text("method"),
            to: self.text("quantize"),
            double: self.table.get("double_quant").and_then(Value::as_bool),
            block: self.whole("quant_block_size"),
        };
        let (dtype, device) = (self.text("dtype").unwrap_or("stored"), self.text("device").unwrap_or("cpu"));
        workbench::load_options(dtype, device, asked)
    }

    /// The training plan, validated.
    pub fn plan(&self) -> Result<Plan> {
        let mut plan = Plan {
            schedule: self.group::<Schedule>()?,
            optimization: self.group::<Optimization>()?,
            upkeep: self.group::<Upkeep>()?,
            compute: self.group::<Compute>()?,
        };
        if let (false, Some(rate)) = (self.has("learning_rate"), self.method()?.card().learning_rate) {
            plan.optimization.learning_rate = rate;
        }
        plan.validate()?;
        Ok(plan)
    }

    /// The settings of one group of the plan.
    fn group<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        // kinds are checked already: what is left to go wrong is the name of a choice
        Value::Table(self.floats()).try_into().map_err(|e: toml::de::Error| {
            let message = e.message().replace('\n', " ");
            for name in ["optimizer", "lr_scheduler", "memory_limit", "compute_dtype"] {
                if let Some(value) = self.text(name)
                    && [format!("`{value}`"), format!("{value:?}")].iter().any(|v| message.contains(v))
                {
                    return anyhow::anyhow!("{name} is {value:?}: {message}");
                }
            }
            anyhow::anyhow!("{message}")
        })
    }

    /// The table with whole numbers as floats where a float is meant.
    fn floats(&self) -> Table {
        let convert = |(name, value): (&String, &Value)| {
            let number = keys::find(name).is_some_and(|k| k.kind == Kind::Number);
            let value = match value {
                Value::Integer(i) if number => Value::Float(*i as f64),
                other => other.clone(),
            };
            (name.clone(), value)
        };
        self.table.iter().map(convert).collect()
    }

    /// The method that was asked for; QLoRA is LoRA over a base that is quantized.
    pub fn method(&self) -> Result<&'static dyn Method> {
        match self.text("method") {
            None | Some(QLORA) => Ok(method::find("lora").context("lora is a method")?),
            Some(name) => method::find(name).ok_or_else(|| {
                let known: Vec<&str> = METHODS.iter().map(|m| m.name()).chain([QLORA]).collect();
                Usage(format!("method is {name:?}; expected one of {}", known.join(", "))).into()
            }),
        }
    }

    /// The adapter's configuration: what was given, over engobe's defaults, over PEFT's.
    ///
    /// # Errors
    /// A setting of another method, a value that cannot be.
    pub fn adapter(&self, base: &str) -> Result<PeftConfig> {
        let method = self.method()?;
        let mut config = PeftConfig::new(method.peft_type());
        config.set("base_model_name_or_path", base);
        for (name, value) in method.defaults() {
            config.set(name, value);
        }
        for (name, value) in self.table.iter().filter(|(name, _)| keys::is_of_method(name)) {
            if !method.settings().iter().any(|s| s.name == name) {
                let known: Vec<&str> = method.settings().iter().map(|s| s.name).collect();
                bail!("{name} is no setting of {}; it has {}", method.name(), known.join(", "));
            }
            config.set(name, to_json(value));
        }
        Ok(method.normalize(&config)?)
    }

    /// The given settings that say how an adapter is trained, as `asked` (of [`Given::adapter`]) has them.
    pub fn training_changes(&self, asked: &PeftConfig) -> Vec<(&'static str, Json)> {
        let settings = method::of(asked).map_or(&[][..], |m| m.settings());
        let given = settings.iter().filter(|s| s.decides == Decides::Training && self.has(s.name));
        given.map(|s| (s.name, asked.get(s.name).cloned().unwrap_or_default())).collect()
    }

    /// Settings that contradict an adapter that was loaded from `dir`.
    pub fn check_against(&self, loaded: &Adapter, dir: &Path) -> Result<()> {
        if self.has("method") && self.method()?.name() != loaded.method().name() {
            let (mine, theirs) = (self.text("method").unwrap_or_default(), loaded.method().name());
            bail!("method = {mine:?} contradicts {}, which is an adapter of {theirs}", dir.display());
        }
        let (mut asked, theirs) = (self.adapter("")?, loaded.config());
        loaded.expand(&mut asked);
        let same = |a: Option<&Json>, b: Option<&Json>| a.map(sorted) == b.map(sorted);
        for setting in loaded.method().settings() {
            let (name, mine) = (setting.name, asked.get(setting.name));
            if setting.decides != Decides::Adapter || !self.has(name) || same(mine, theirs.get(name)) {
                continue;
            }
            let show = |v: Option<&Json>| v.map_or("null".to_string(), Json::to_string);
            let (mine, theirs) = (show(mine), show(theirs.get(name)));
            bail!("{name} = {mine} contradicts {}, which has {theirs}", dir.display());
        }
        Ok(())
    }

    /// The whole resolved configuration as TOML: what was given, and the defaults of what was not.
    pub fn resolved(&self, plan: &Plan, adapter: &PeftConfig) -> Result<Table> {
        let mut table = Table::new();
        for name in [
            "model",
            "dtype",
            "method",
            "quantize",
            "double_quant",
            "quant_block_size",
            "device",
            "task",
            "data",
            "val_data",
            "val_split",
            "train_on",
            "template",
            "chat_template",
            "date",
            "allow",
            "init_adapter",
        ] {
            if let Some(value) = self.table.get(name) {
                table.insert(name.to_string(), value.clone());
            }
        }
        for setting in method::of(adapter)?.settings() {
            // what only a start needs may have no place in the adapter's file
            let given = || self.table.get(setting.name).cloned();
            if let Some(value) = adapter.get(setting.name).and_then(from_json).or_else(given) {
                table.insert(setting.name.to_string(), value);
            }
        }
        for group in [
            Table::try_from(&plan.schedule)?,
            Table::try_from(&plan.optimization)?,
            Table::try_from(&plan.upkeep)?,
            Table::try_from(&plan.compute)?,
        ] {
            table.extend(group);
        }
        if plan.schedule.max_steps.is_some() {
            table.remove("epochs");
        }
        // tables last: TOML would read what follows as part of them
        let (tables, plain): (Vec<_>, Vec<_>) = table.into_iter().partition(|(_, v)| v.is_table());
        Ok(plain.into_iter().chain(tables).collect())
    }
}

/// Lists in order: where they name modules, their order means nothing.
fn sorted(value: &Json) -> Json {
    let Json::Array(list) = value else { return value.clone() };
    let mut list = list.clone();
    list.sort_by_key(Json::to_string);
    Json::Array(list)
}

/// True for the line of a TOML file that sets `name`.
fn sets(line: &str, name: &str) -> bool {
    let line = line.trim_start().trim_start_matches('[').trim_start_matches(['"', '\'']);
    let rest = line.strip_prefix(name).map(|r| r.trim_start_matches(['"', '\'']).trim_start());
    rest.is_some_and(|r| r.starts_with(['=', '.', ']']))
}

fn to_json(value: &Value) -> Json {
    match value {
        Value::String(s) => json!(s),
        Value::Integer(i) => json!(i),
        Value::Float(f) => json!(f),
        Value::Boolean(b) => json!(b),
        Value::Array(a) => Json::Array(a.iter().map(to_json).collect()),
        Value::Table(t) => Json::Object(t.iter().map(|(k, v)| (k.clone(), to_json(v))).collect()),
        Value::Datetime(d) => json!(d.to_string()),
    }
}

fn from_json(value: &Json) -> Option<Value> {
    Some(match value {
        Json::Null => return None,
        Json::Bool(b) => Value::Boolean(*b),
        Json::Number(n) => match n.as_i64() {
            Some(i) => Value::Integer(i),
            None => Value::Float(n.as_f64()?),
        },
        Json::String(s) => Value::String(s.clone()),
        Json::Array(a) => Value::Array(a.iter().filter_map(from_json).collect()),
        Json::Object(o) if o.is_empty() => return None,
        Json::Object(o) => {
            Value::Table(o.iter().filter_map(|(k, v)| Some((k.clone(), from_json(v)?))).collect())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(flags: &[(&str, &str)], sets: &[&str]) -> Result<Given> {
        let flags: Vec<_> = flags.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
        let sets: Vec<_> = sets.iter().map(|s| s.to_string()).collect();
        Given::collect(None, &flags, &sets)
    }

    #[test]
    fn flags_and_sets_mean_the_same() {
        let a =
            given(&[("learning_rate", "1e-4"), ("target_modules", "q_proj,v_proj"), ("max_steps", "7")], &[])
                .unwrap();
        let b = given(&[], &["learning_rate=1e-4", "target_modules=[\"q_proj\", \"v_proj\"]", "max_steps=7"])
            .unwrap();
        assert_eq!(a.plan().unwrap(), b.plan().unwrap());
        assert_eq!(a.adapter("x").unwrap(), b.adapter("x").unwrap());
        assert_eq!(a.plan().unwrap().schedule.max_steps, Some(7));
    }

    #[test]
    fn a_regex_stays_a_regex() {
        let g = given(&[("target_modules", r".*\.(q|v)_proj")], &[]).unwrap();
        assert_eq!(g.adapter("").unwrap().text("target_modules"), Some(r".*\.(q|v)_proj"));
        let g = given(&[], &["rank_pattern={ \"q_proj\" = 4 }"]).unwrap();
        assert_eq!(g.adapter("").unwrap().get("rank_pattern"), Some(&json!({ "q_proj": 4 })));
    }

    #[test]
    fn mistakes_are_named() {
        for (flags, sets, part) in [
            (vec![("r", "-1")], vec![], "r is"),
            (vec![], vec!["lerning_rate=1"], "did you mean \"learning_rate\""),
            (vec![("learning_rate", "fast")], vec![], "expected a number"),
            (vec![("max_steps", "3"), ("epochs", "2")], vec![], "contradict"),
            (vec![], vec!["packing"], "expected name=value"),
            (vec![("val_split", "0.1"), ("val_data", "v.jsonl")], vec![], "contradict"),
        ] {
            let error = given(&flags, &sets).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        for (flags, part) in [
            (vec![("lr_scheduler", "triangle")], "lr_scheduler is \"triangle\""),
            (vec![("batch_size", "0")], "batch_size = 0"),
            (vec![("compute_dtype", "fp8")], "compute_dtype is \"fp8\""),
            (vec![("learning_rate", "-1")], "learning_rate = -1"),
        ] {
            let error = given(&flags, &[]).unwrap().plan().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert!(given(&[("r", "0")], &[]).unwrap().adapter("").unwrap_err().to_string().contains("r is 0"));
    }

    #[test]
    fn run_toml_repeats_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        let first = given(
            &[
                ("data", "a.jsonl,b.jsonl"),
                ("r", "4"),
                ("epochs", "2"),
                ("packing", "false"),
                ("compute_dtype", "bf16"),
            ],
            &["rank_pattern={ \"q_proj\" = 4 }", "weight_decay=0"],
        )
        .unwrap();
        let table = first.resolved(&first.plan().unwrap(), &first.adapter("").unwrap()).unwrap();
        std::fs::write(&path, toml::to_string(&table).unwrap()).unwrap();
        let second = Given::collect(Some(&path), &[], &[]).unwrap();
        assert_eq!(first.plan().unwrap(), second.plan().unwrap());
        assert_eq!(first.adapter("").unwrap(), second.adapter("").unwrap());
        assert_eq!(second.paths("data").len(), 2);
    }

    #[test]
    fn what_is_typed_takes_the_place_of_what_the_file_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "max_steps = 3\nval_data = 'v.jsonl'\n").unwrap();
        let flags = [("epochs", "2"), ("val_split", "0.5")].map(|(a, b)| (a.to_string(), b.to_string()));
        let given = Given::collect(Some(&path), &flags, &[]).unwrap();
        assert!(!given.has("max_steps") && !given.has("val_data"));
        assert_eq!((given.number("epochs"), given.number("val_split")), (Some(2.0), Some(0.5)));
    }

    #[test]
    fn a_file_with_a_mistake_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        for (text, part) in [
            ("r = 4\nleraning_rate = 1.0\n", "line 2"),
            ("r = 4\nseed = \"x\"\n", "line 2: seed"),
            ("r = \n", "line 1"),
            ("rank_pattern = { q = 2 }\n'r' = -3\n", "line 2: r"),
            ("[rank_pattern]\nq = 0.5\n[lora]\nr = 3\n", "line 3: unknown"),
            ("max_steps = 3\nepochs = 2\n", "max_steps and epochs contradict"),
            ("val_data = 'v.jsonl'\nval_split = 0.2\n", "val_data and val_split contradict"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Given::collect(Some(&path), &[], &[]).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
