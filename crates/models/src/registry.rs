//! The architectures, by name. Adding one is its file, its line here, and a golden configuration.

use crate::family::{Architecture, Family, GgufForm};
use crate::{Error, Result, not_of};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::gguf::Gguf;
use engobe_formats::hf_config::HfConfig;
use std::path::{Path, PathBuf};

/// All that we know.
pub static ARCHITECTURES: &[&Architecture] = &[
    &crate::gemma::ARCHITECTURE,
    &crate::gemma2::ARCHITECTURE,
    &crate::gemma3::ARCHITECTURE,
    &crate::gpt2::ARCHITECTURE,
    &crate::gpt_neox::ARCHITECTURE,
    &crate::granite::ARCHITECTURE,
    &crate::llama::ARCHITECTURE,
    &crate::mistral::ARCHITECTURE,
    &crate::olmo2::ARCHITECTURE,
    &crate::opt::ARCHITECTURE,
    &crate::phi::ARCHITECTURE,
    &crate::phi3::ARCHITECTURE,
    &crate::qwen2::ARCHITECTURE,
    &crate::qwen3::ARCHITECTURE,
    &crate::smollm3::ARCHITECTURE,
    &crate::stablelm::ARCHITECTURE,
    &crate::starcoder2::ARCHITECTURE,
];

/// A model's configuration, read.
#[derive(Debug)]
pub struct Described {
    /// config.json or the GGUF file
    pub origin: PathBuf,
    /// what it is
    pub architecture: &'static Architecture,
    /// its settings
    pub family: Box<dyn Family>,
    /// it was read from a GGUF file
    pub is_gguf: bool,
}

impl Described {
    /// The configuration of a checkpoint: GGUF metadata, or the `config.json` of its directory.
    pub fn of(checkpoint: &Checkpoint, path: &Path) -> Result<Self> {
        match checkpoint.gguf() {
            Some(gguf) => Self::from_gguf(gguf),
            None => Self::from_hf(&HfConfig::open(path)?),
        }
    }

    /// Reads `config.json`.
    pub fn from_hf(config: &HfConfig) -> Result<Self> {
        check_quantization(config)?;
        let found = config.model_type()?;
        let Some(architecture) = ARCHITECTURES.iter().find(|a| a.model_type == found) else {
            return Err(not_of(config, found, ARCHITECTURES.iter().map(|a| a.model_type)));
        };
        let family = (architecture.from_hf)(config)?;
        Ok(Self { origin: config.path().to_path_buf(), architecture, family, is_gguf: false })
    }

    /// Reads GGUF metadata.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let found = gguf.str("general.architecture")?;
        let readers =
            || ARCHITECTURES.iter().filter_map(|a| Some((*a, a.gguf.as_ref()?.name, a.gguf.as_ref()?.read?)));
        let Some((architecture, _, read)) = readers().find(|(_, name, _)| *name == found) else {
            return Err(unknown(gguf.path(), found, readers().map(|(_, name, _)| name)));
        };
        Ok(Self { origin: gguf.path().to_path_buf(), architecture, family: read(gguf)?, is_gguf: true })
    }

    /// How GGUF files hold it.
    pub fn gguf(&self) -> Option<&'static GgufForm> {
        self.architecture.gguf.as_ref()
    }
}

fn unknown<'a>(path: &Path, found: &str, known: impl Iterator<Item = &'a str>) -> Error {
    let known: Vec<&str> = known.collect();
    Error::Architecture { path: path.to_path_buf(), found: found.to_string(), known: known.join(", ") }
}

/// Refuses models quantized by anybody but bitsandbytes.
pub fn check_quantization(config: &HfConfig) -> Result<()> {
    let Some(quantization) = config.get("quantization_config") else { return Ok(()) };
    match quantization.get("quant_method").and_then(serde_json::Value::as_str) {
        Some("bitsandbytes") => Ok(()),
        other => Err(Error::Config {
            path: config.path().to_path_buf(),
            key: "quantization_config.quant_method".to_string(),
            found: other.map_or("missing".to_string(), |name| format!("{name:?}")),
            expected: "\"bitsandbytes\", or a model that is not quantized".to_string(),
        }),
    }
}
