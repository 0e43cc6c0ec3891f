//! LoRA adapters in mlx-lm's format: a directory with `adapter_config.json` and `adapters.safetensors`.
//!
//! mlx-lm (`mlx_lm/tuner/utils.py`, `lora.py`) wraps the modules that `lora_parameters.keys` names, by their path
//! within a block (in the last `num_layers` blocks) or by their whole path, and then loads what tensors there are:
//! `PATH.lora_a` `[in, r]` and `PATH.lora_b` `[r, out]`. All modules share `rank`, `scale` and `dropout`; `scale` is
//! the factor on B·A as it stands, not an alpha to be divided by the rank.

use crate::atomic::write_atomic;
use crate::hf_config::HfConfig;
use crate::safetensors_file::{SafetensorsFile, write_safetensors};
use crate::tensor::TensorView;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapters.safetensors";

/// What `adapter_config.json` says of a LoRA adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct MlxConfig {
    /// the base model's name or path, as a note
    pub model: Option<String>,
    /// blocks, counted from the last, in which modules are wrapped; -1 is all
    pub num_layers: i64,
    /// rank of every module
    pub rank: usize,
    /// factor on B·A
    pub scale: f64,
    /// probability that an element of the adapter's input is dropped in training
    pub dropout: f64,
    /// wrapped modules, by path within a block or by whole path
    pub keys: Vec<String>,
}

/// An adapter as it lies in its directory.
#[derive(Debug)]
pub struct MlxAdapter {
    /// its configuration; `keys` may be empty, where mlx-lm's own defaults were taken
    pub config: MlxConfig,
    /// its tensors by name
    pub tensors: BTreeMap<String, TensorView>,
}

/// True if a directory holds an mlx-lm adapter.
pub fn is_mlx_dir(dir: &Path) -> bool {
    dir.join(WEIGHTS).is_file()
}

impl MlxAdapter {
    /// Reads a directory.
    ///
    /// # Errors
    /// Missing or broken files, DoRA or full fine-tuning, settings of the wrong kind.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = read_config(&HfConfig::read(&dir.join(CONFIG))?)?;
        let path = dir.join(WEIGHTS);
        let tensors: BTreeMap<_, _> =
            SafetensorsFile::open(&path)?.tensors().map(|t| (t.name.clone(), t.clone())).collect();
        if tensors.is_empty() {
            return Err(Error::corrupt(&path, "holds no tensors: the adapter was saved empty"));
        }
        Ok(Self { config, tensors })
    }

    /// Writes a directory from f32 tensors (name, shape, little-endian bytes), the weights first.
    pub fn save(dir: &Path, config: &MlxConfig, tensors: &[(String, Vec<usize>, Vec<u8>)]) -> Result<()> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let metadata = BTreeMap::from([("format".to_string(), "mlx".to_string())]);
        write_safetensors(&dir.join(WEIGHTS), tensors, &metadata)?;
        let json = json!({
            "fine_tune_type": "lora",
            "lora_parameters": {
                "dropout": config.dropout,
                "keys": config.keys,
                "rank": config.rank,
                "scale": config.scale,
            },
            "model": config.model,
            "num_layers": config.num_layers,
        });
        write_atomic(&dir.join(CONFIG), &serde_json::to_vec_pretty(&json).unwrap_or_default())
    }
}

fn read_config(file: &HfConfig) -> Result<MlxConfig> {
    let bad = |key: &str, found: &Value, expected: &str| Error::BadValue {
        path: file.path().to_path_buf(),
        key: key.to_string(),
        found: found.to_string(),
        expected: expected.to_string(),
    };
    let kind = file.opt_str("fine_tune_type")?.unwrap_or("lora");
    if kind != "lora" || file.bool_or("use_dora", false)? {
        return Err(bad(
            "fine_tune_type",
            &json!(kind),
            "\"lora\" without DoRA, the one kind supported so far",
        ));
    }
    let Some(Value::Object(lora)) = file.get("lora_parameters") else {
        let found = file.get("lora_parameters").cloned().unwrap_or(Value::Null);
        return Err(bad("lora_parameters", &found, "an object with rank and scale, as mlx-lm writes it"));
    };
    let get = |key: &str| lora.get(key).filter(|v| !v.is_null());
    let key_name = |key: &str| format!("lora_parameters.{key}");
    let number = |key: &str| -> Result<Option<f64>> {
        let Some(value) = get(key) else { return Ok(None) };
        let found = value.as_f64().filter(|f| f.is_finite());
        found.map(Some).ok_or_else(|| bad(&key_name(key), value, "a number"))
    };
    let scale = match number("scale")? {
        Some(scale) if scale > 0.0 => scale,
        found => return Err(bad("lora_parameters.scale", &json!(found), "a number above 0")),
    };
    let dropout = number("dropout")?.unwrap_or(0.0);
    if !(0.0..1.0).contains(&dropout) {
        return Err(bad("lora_parameters.dropout", &json!(dropout), "a probability in [0, 1)"));
    }
    let rank = match get("rank").map(|v| (v, v.as_u64().and_then(|r| usize::try_from(r).ok()))) {
        Some((_, Some(rank))) if rank > 0 => rank,
        found => {
            let found = found.map_or(Value::Null, |(v, _)| v.clone());
            return Err(bad("lora_parameters.rank", &found, "a whole number above 0"));
        }
    };
    let keys = match get("keys") {
        None => Vec::new(),
        Some(value) => {
            let names =
                value.as_array().and_then(|a| a.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
            let names = names.ok_or_else(|| bad("lora_parameters.keys", value, "a list of module names"))?;
            names.into_iter().map(str::to_string).collect()
        }
    };
    // (older versions called it lora_layers)
    let layers = file.get("num_layers").or_else(|| file.get("lora_layers"));
    let num_layers = match layers {
        None => -1,
        Some(value) => value.as_i64().ok_or_else(|| bad("num_layers", value, "a whole number"))?,
    };
    let model = file.opt_str("model")?.map(str::to_string);
    Ok(MlxConfig { model, num_layers, rank, scale, dropout, keys })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MlxConfig {
        MlxConfig {
            model: Some("org/base".into()),
            num_layers: 4,
            rank: 8,
            scale: 2.5,
            dropout: 0.05,
            keys: vec!["self_attn.q_proj".into(), "mlp.down_proj".into()],
        }
    }

    #[test]
    fn goes_there_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = [("model.layers.0.mlp.down_proj.lora_a".to_string(), vec![3, 2], vec![0u8; 24])];
        assert!(!is_mlx_dir(dir.path()));
        MlxAdapter::save(dir.path(), &config(), &tensors).unwrap();
        assert!(is_mlx_dir(dir.path()));
        let back = MlxAdapter::load(dir.path()).unwrap();
        assert_eq!(back.config, config());
        assert_eq!(back.tensors["model.layers.0.mlp.down_proj.lora_a"].shape, [3, 2]);
        MlxAdapter::save(dir.path(), &config(), &[]).unwrap();
        assert!(MlxAdapter::load(dir.path()).unwrap_err().to_string().contains("holds no tensors"));
    }

    #[test]
    fn wrong_values_are_named() {
        let good = json!({"rank": 8, "scale": 20.0, "dropout": 0.0});
        for (json, part) in [
            (json!({"fine_tune_type": "dora", "lora_parameters": good}), "fine_tune_type is \"dora\""),
            (json!({"fine_tune_type": "full"}), "fine_tune_type is \"full\""),
            (json!({"use_dora": true, "lora_parameters": good}), "without DoRA"),
            (json!({}), "lora_parameters is null"),
            (json!({"lora_parameters": 3}), "lora_parameters is 3"),
            (json!({"lora_parameters": {"rank": 8}}), "lora_parameters.scale"),
            (json!({"lora_parameters": {"rank": 8, "scale": -1}}), "lora_parameters.scale is -1"),
            (json!({"lora_parameters": {"rank": 0, "scale": 1}}), "lora_parameters.rank is 0"),
            (json!({"lora_parameters": {"rank": 8, "scale": 1, "dropout": 1}}), "dropout is 1"),
            (json!({"lora_parameters": {"rank": 8, "scale": 1, "keys": [1]}}), "keys is [1]"),
            (json!({"lora_parameters": good, "num_layers": "all"}), "num_layers is \"all\""),
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(CONFIG), json.to_string()).unwrap();
            let error = MlxAdapter::load(dir.path()).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("adapter_config.json"), "{json}: {error}");
        }
    }
}
