//! `engobe inspect`

use crate::any_model::AnyModel;
use crate::args::InspectArgs;
use crate::memory::bytes_text;
use crate::terminal::{Note, print, print_json};
use crate::workbench::{self, thousands};
use anyhow::{Context, Result, bail};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use engobe_formats::peft::PeftAdapter;
use engobe_formats::safetensors_file::SafetensorsFile;
use engobe_formats::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What was found, for people and machines.
struct Found {
    kind: &'static str,
    path: PathBuf,
    /// what it says of itself
    facts: Vec<(String, Value)>,
    tensors: Vec<TensorView>,
}

/// Says what is in a file or directory.
pub fn run(args: &InspectArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    let path = workbench::resolve(&args.what, &args.common, &mut note)?;
    let mut found = look(&path)?;
    if let Some(model) = &args.model {
        let base = workbench::resolve(model, &args.common, &mut note)?;
        let mut whole = AnyModel::load(&base, &path)?;
        let of_base = whole.base_parameters()?;
        let (_, adapter) = whole.parts()?;
        let (trainable, all) = (adapter.num_parameters(), adapter.num_added() + of_base);
        found.fact("trainable_parameters", trainable);
        found.fact("all_parameters", all);
        let line = workbench::trainable_text(trainable, all);
        if !args.common.json {
            print(&format!("{line}\n"))?;
        }
    }
    match args.common.json {
        true => print_json(&found.to_json(args.tensors)),
        false => print(&found.to_text(args.tensors)),
    }
}

fn look(path: &Path) -> Result<Found> {
    let has = |name: &str| path.join(name).exists();
    if path.is_dir() && has("adapter_config.json") {
        return adapter(path);
    }
    if path.is_dir() && has("state.json") {
        return run_checkpoint(path);
    }
    if path.is_dir() && !has("config.json") && has("checkpoints") {
        let newest = engobe_train::checkpoint::latest(path)?;
        return run_checkpoint(
            &newest.with_context(|| format!("{}: holds no whole checkpoint yet", path.display()))?,
        );
    }
    if path.is_dir() {
        return hf_model(path);
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("safetensors") => {
            let tensors = SafetensorsFile::open(path)?.tensors().cloned().collect();
            Ok(Found { kind: "safetensors file", path: path.to_path_buf(), facts: vec![], tensors })
        }
        Some("gguf") => gguf(path),
        _ => bail!("{}: neither a directory, a .safetensors nor a .gguf file", path.display()),
    }
}

fn hf_model(path: &Path) -> Result<Found> {
    let config = HfConfig::open(path)?;
    let tensors: Vec<TensorView> = Checkpoint::open(path)?.tensors().cloned().collect();
    let facts = config.raw().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    Ok(Found { kind: "Hugging Face model", path: path.to_path_buf(), facts, tensors })
}

fn gguf(path: &Path) -> Result<Found> {
    let file = Gguf::open(path)?;
    let facts = file.metadata().iter().map(|(k, v)| (k.clone(), json!(v.describe()))).collect();
    let tensors = file.tensors().values().cloned().collect();
    Ok(Found { kind: "GGUF file", path: path.to_path_buf(), facts, tensors })
}

fn adapter(path: &Path) -> Result<Found> {
    let file = PeftAdapter::load(path)?;
    let config: Value = serde_json::from_str(&file.config.to_json())?;
    let set = |v: &Value| match v {
        Value::Null | Value::Bool(false) => false,
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
        _ => true,
    };
    let facts = config.as_object().into_iter().flatten().filter(|(_, v)| set(v));
    let facts = facts.map(|(k, v)| (k.clone(), v.clone())).collect();
    let mut found = Found {
        kind: match file.config.peft_type() {
            engobe_formats::adapter_hub::BOTTLENECK => "AdapterHub adapter",
            _ => "PEFT adapter",
        },
        path: path.to_path_buf(),
        facts,
        tensors: file.tensors.into_values().collect(),
    };
    let steps = engobe_train::metrics::read(&path.join("metrics.jsonl"))?;
    if let Some(last) = steps.last() {
        found.fact("steps", last.step);
        found.fact("last_loss", last.loss);
    }
    Ok(found)
}

fn run_checkpoint(path: &Path) -> Result<Found> {
    let state: Value = serde_json::from_slice(&std::fs::read(path.join("state.json"))?)
        .with_context(|| path.join("state.json").display().to_string())?;
    let mut tensors = Vec::new();
    for name in ["adapter.safetensors", "optimizer.safetensors"] {
        tensors.extend(SafetensorsFile::open(&path.join(name))?.tensors().cloned());
    }
    let facts = state.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    Ok(Found { kind: "checkpoint of a run", path: path.to_path_buf(), facts, tensors })
}

impl Found {
    fn fact(&mut self, name: &str, value: impl Into<Value>) {
        self.facts.push((name.to_string(), value.into()));
    }

    fn parameters(&self) -> usize {
        self.tensors.iter().map(TensorView::elements).sum()
    }

    fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes().len() as u64).sum()
    }

    /// Number of tensors and elements by type.
    fn types(&self) -> BTreeMap<String, (usize, usize)> {
        let mut types = BTreeMap::new();
        for tensor in &self.tensors {
            let entry: &mut (usize, usize) = types.entry(tensor.dtype.to_string()).or_default();
            entry.0 += 1;
            entry.1 += tensor.elements();
        }
        types
    }

    fn to_json(&self, all: bool) -> Value {
        let facts: serde_json::Map<String, Value> = self.facts.iter().cloned().collect();
        let types: serde_json::Map<String, Value> = self
            .types()
            .into_iter()
            .map(|(name, (count, elements))| (name, json!({ "tensors": count, "elements": elements })))
            .collect();
        let mut json = json!({
            "kind": self.kind,
            "path": self.path,
            "parameters": self.parameters(),
            "bytes": self.bytes(),
            "dtypes": types,
            "config": facts,
        });
        if all {
            let one =
                |t: &TensorView| json!({ "name": t.name, "shape": t.shape, "dtype": t.dtype.to_string() });
            json["tensors"] = self.tensors.iter().map(one).collect();
        }
        json
    }

    fn to_text(&self, all: bool) -> String {
        let mut text = format!(
            "{}: {}\n{} parameters in {} tensors, {}\n",
            self.path.display(),
            self.kind,
            thousands(self.parameters()),
            self.tensors.len(),
            bytes_text(self.bytes())
        );
        for (name, (count, elements)) in self.types() {
            text += &format!("  {name:<8} {count:>5} tensors {:>16} elements\n", thousands(elements));
        }
        for (name, value) in &self.facts {
            text += &format!("  {name} = {}\n", shorten(value));
        }
        if all {
            let width = self.tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
            for tensor in &self.tensors {
                text +=
                    &format!("{:<width$}  {:<6} {:?}\n", tensor.name, tensor.dtype.to_string(), tensor.shape);
            }
        } else {
            text += "--tensors lists every tensor\n";
        }
        text
    }
}

/// A value in one short line.
fn shorten(value: &Value) -> String {
    const MOST: usize = 120;
    let text = match value {
        Value::String(s) => s.replace('\n', "\\n"),
        other => other.to_string(),
    };
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
