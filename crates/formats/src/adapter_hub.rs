//! Bottleneck adapters in AdapterHub's format: `adapter_config.json`, whose `config` holds the settings, and
//! `adapter.safetensors`, as `save_adapter(.., use_safetensors=True)` of the `adapters` package writes them.
//!
//! A task's head lies beside them in `model_head.safetensors`, under the model's own names, and `modules_to_save` tells
//! in memory which modules it is of; [`heads`] says how the package's own heads come to have such names.
//!
//! In memory they are a [`PeftConfig`] of the type [`BOTTLENECK`] like any other method's: the settings, and beside them
//! the name of the adapter ([`NAME`]), which is part of the names of its tensors.

pub mod heads;

use crate::atomic::write_atomic;
use crate::peft::{PeftAdapter, PeftConfig};
use crate::safetensors_file::{SafetensorsFile, write_safetensors};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The type of these configurations; PEFT has no such method.
pub const BOTTLENECK: &str = "BOTTLENECK";
/// Key of the adapter's name.
pub const NAME: &str = "adapter_name";

/// Name of the weights' file.
pub const WEIGHTS: &str = "adapter.safetensors";
/// Name of the file of a task's head.
pub const HEAD_WEIGHTS: &str = "model_head.safetensors";
/// What names of bottlenecks have in them, and names of heads have not.
const MARK: &str = ".adapters.";
/// Ends of names of classes whose heads make next tokens: what the package saves of them is the base's own.
const LANGUAGE_MODELS: [&str; 4] = ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM"];
const SAVED: &str = "modules_to_save";

/// Keys of the file beside `config`, that describe the model.
const OF_MODEL: [&str; 4] = ["hidden_size", "model_class", "model_name", "model_type"];
/// Version of the package whose format we write.
const VERSION: &str = "adapters.1.3.0";

/// True if the JSON of an `adapter_config.json` is AdapterHub's.
pub(crate) fn is_ours(map: &Map<String, Value>) -> bool {
    !map.contains_key("peft_type") && map.get("config").is_some_and(Value::is_object)
}

/// The configuration of AdapterHub's JSON.
pub(crate) fn to_peft(map: Map<String, Value>) -> Map<String, Value> {
    let mut out = Map::new();
    for (key, value) in map {
        match (key.as_str(), value) {
            ("config", Value::Object(settings)) => out.extend(settings),
            ("name", name) => drop(out.insert(NAME.to_string(), name)),
            ("model_name", name) => drop(out.insert("base_model_name_or_path".to_string(), name)),
            (key, value) if OF_MODEL.contains(&key) => drop(out.insert(key.to_string(), value)),
            _ => {}
        }
    }
    out.insert("peft_type".to_string(), json!(BOTTLENECK));
    out
}

/// Reads the tensors of a directory.
pub(crate) fn load(dir: &Path, mut config: PeftConfig) -> Result<PeftAdapter> {
    let path = dir.join(WEIGHTS);
    if !path.exists() && dir.join("pytorch_adapter.bin").exists() {
        let what = "has its weights in pytorch_adapter.bin only, which can run code when read; save it again with use_safetensors=True";
        return Err(Error::corrupt(dir, what));
    }
    let file = SafetensorsFile::open(&path)?;
    let mut tensors: BTreeMap<_, _> = file.tensors().map(|t| (t.name.clone(), t.clone())).collect();
    if tensors.is_empty() {
        return Err(Error::corrupt(&path, "holds no tensors: the adapter was saved empty"));
    }
    let class = config.text("model_class").unwrap_or_default();
    let head = dir.join(HEAD_WEIGHTS);
    if head.exists() && !LANGUAGE_MODELS.iter().any(|end| class.ends_with(end)) {
        let file = SafetensorsFile::open(&head)?;
        let found = heads::renamed(dir, file.tensors().cloned().collect())?;
        let module =
            |name: &String| name.rsplit_once('.').map_or(&name[..], |(module, _)| module).to_string();
        let modules: BTreeSet<String> = found.keys().map(module).collect();
        config.set(SAVED, json!(modules));
        tensors.extend(found);
    }
    Ok(PeftAdapter { config, tensors })
}

/// Writes a directory.
pub(crate) fn save<B: AsRef<[u8]>>(
    dir: &Path,
    config: &PeftConfig,
    tensors: &[(String, Vec<usize>, B)],
) -> Result<()> {
    let all: Map<String, Value> = serde_json::from_str(&config.to_json()).unwrap_or_default();
    let labels =
        ["auto_mapping", "inference_mode", "peft_type", "peft_version", "revision", "task_type", SAVED];
    let (mut settings, mut file) = (BTreeMap::new(), BTreeMap::new());
    for (key, value) in all {
        match key.as_str() {
            NAME => drop(file.insert("name".to_string(), value)),
            "base_model_name_or_path" => drop(file.insert("model_name".to_string(), value)),
            key if OF_MODEL.contains(&key) => drop(file.insert(key.to_string(), value)),
            key if labels.contains(&key) => {}
            _ => drop(settings.insert(key, value)),
        }
    }
    file.insert("config".to_string(), json!(settings));
    file.insert("version".to_string(), json!(VERSION));
    let text = serde_json::to_string_pretty(&file).unwrap_or_default();
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let views = tensors.iter().map(|(name, shape, bytes)| (name.clone(), shape.clone(), bytes.as_ref()));
    let (own, head): (Vec<_>, Vec<_>) = views.partition(|(name, ..)| name.contains(MARK));
    write_safetensors(&dir.join(WEIGHTS), &own, &BTreeMap::new())?;
    if !head.is_empty() {
        write_safetensors(&dir.join(HEAD_WEIGHTS), &head, &BTreeMap::new())?;
    }
    write_atomic(&dir.join("adapter_config.json"), text.as_bytes())
}
