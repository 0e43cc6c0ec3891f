//! Bottleneck adapters in AdapterHub's format: `adapter_config.json`, whose `config` holds the settings, and
//! `adapter.safetensors`, as `save_adapter(.., use_safetensors=True)` of the `adapters` package writes them.
//!
//! In memory they are a [`PeftConfig`] of the type [`BOTTLENECK`] like any other method's: the settings, and beside them
//! the name of the adapter ([`NAME`]), which is part of the names of its tensors.

use crate::atomic::write_atomic;
use crate::peft::{PeftAdapter, PeftConfig};
use crate::safetensors_file::{SafetensorsFile, write_safetensors};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The type of these configurations; PEFT has no such method.
pub const BOTTLENECK: &str = "BOTTLENECK";
/// Key of the adapter's name.
pub const NAME: &str = "adapter_name";

/// Name of the weights' file.
pub const WEIGHTS: &str = "adapter.safetensors";
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
pub(crate) fn load(dir: &Path, config: PeftConfig) -> Result<PeftAdapter> {
    let path = dir.join(WEIGHTS);
    if !path.exists() && dir.join("pytorch_adapter.bin").exists() {
        let what = "has its weights in pytorch_adapter.bin only, which can run code when read; save it again with use_safetensors=True";
        return Err(Error::corrupt(dir, what));
    }
    let file = SafetensorsFile::open(&path)?;
    let tensors: BTreeMap<_, _> = file.tensors().map(|t| (t.name.clone(), t.clone())).collect();
    if tensors.is_empty() {
        return Err(Error::corrupt(&path, "holds no tensors: the adapter was saved empty"));
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
    let labels = ["auto_mapping", "inference_mode", "peft_type", "peft_version", "revision", "task_type"];
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
    write_safetensors(&dir.join(WEIGHTS), tensors, &BTreeMap::new())?;
    write_atomic(&dir.join("adapter_config.json"), text.as_bytes())
}
