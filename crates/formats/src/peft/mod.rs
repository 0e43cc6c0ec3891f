//! Adapters in PEFT's format: a directory with `adapter_config.json` and `adapter_model.safetensors`.

mod choices;
mod config;
mod raw;

pub use choices::{BiasMode, InitLoraWeights, LoftqConfig, TargetModules, TokenIndices, tokens};
pub use config::LoraConfig;
pub use raw::{KnownKeys, PeftConfig, list_json, modules_json, number_json};

use crate::atomic::write_atomic;
use crate::safetensors_file::{SafetensorsFile, write_safetensors};
use crate::tensor::TensorView;
use crate::{Error, Result, adapter_hub};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// An adapter as it lies in its directory.
#[derive(Debug)]
pub struct PeftAdapter {
    /// its configuration
    pub config: PeftConfig,
    /// its tensors by name (`base_model.model.….lora_A.weight`)
    pub tensors: BTreeMap<String, TensorView>,
}

impl PeftAdapter {
    /// Reads a directory.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = PeftConfig::in_dir(dir)?;
        if config.peft_type() == adapter_hub::BOTTLENECK {
            return adapter_hub::load(dir, config);
        }
        let path = dir.join(WEIGHTS);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            let what = "has its weights in adapter_model.bin only, which can run code when read; save it again with safe_serialization=True";
            return Err(Error::corrupt(dir, what));
        }
        let file = SafetensorsFile::open(&path)?;
        let tensors: BTreeMap<_, _> = file.tensors().map(|t| (t.name.clone(), t.clone())).collect();
        if tensors.is_empty() {
            return Err(Error::corrupt(&path, "holds no tensors: the adapter was saved empty"));
        }
        Ok(Self { config, tensors })
    }

    /// Writes a directory from f32 tensors (name, shape, little-endian bytes).
    ///
    /// Each file is replaced atomically, the weights first: a kill in between leaves a new directory without a
    /// configuration, which no reader takes for an adapter.
    pub fn save<B: AsRef<[u8]>>(
        dir: &Path,
        config: impl Into<PeftConfig>,
        tensors: &[(String, Vec<usize>, B)],
    ) -> Result<()> {
        let config = config.into();
        if config.peft_type() == adapter_hub::BOTTLENECK {
            return adapter_hub::save(dir, &config, tensors);
        }
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        write_safetensors(&dir.join(WEIGHTS), tensors, &metadata)?;
        write_atomic(&dir.join(CONFIG), config.to_json().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> LoraConfig {
        LoraConfig {
            target_modules: Some(TargetModules::List(vec!["v_proj".into(), "q_proj".into()])),
            ..Default::default()
        }
    }

    #[test]
    fn goes_there_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = [("base_model.model.a.lora_A.weight".to_string(), vec![1, 2], vec![0u8; 8])];
        PeftAdapter::save(dir.path(), &config(), &tensors).unwrap();
        let back = PeftAdapter::load(dir.path()).unwrap();
        assert_eq!(back.tensors["base_model.model.a.lora_A.weight"].shape, [1, 2]);
        assert_eq!(
            LoraConfig::read(&back.config).unwrap(),
            LoraConfig {
                target_modules: Some(TargetModules::List(vec!["q_proj".into(), "v_proj".into()])),
                ..config()
            }
        );
    }

    #[test]
    fn an_empty_adapter_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        PeftAdapter::save::<Vec<u8>>(dir.path(), &config(), &[]).unwrap();
        assert!(PeftAdapter::load(dir.path()).unwrap_err().to_string().contains("holds no tensors"));
    }

    #[test]
    fn a_pickle_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG), config().to_json()).unwrap();
        fs::write(dir.path().join("adapter_model.bin"), b"x").unwrap();
        assert!(PeftAdapter::load(dir.path()).unwrap_err().to_string().contains("can run code"));
    }
}
