//! What a model's configuration alone says of its modules: no weight is read.

use crate::llama_config::LlamaConfig;
use crate::{Error, Result, gguf_names};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::rope::{Rope, RopeScaling, yarn_mscale};
use std::path::{Path, PathBuf};

/// A linear layer's place and size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearBlueprint {
    /// Hugging Face module path
    pub path: String,
    /// output features
    pub rows: usize,
    /// input features
    pub cols: usize,
    /// an output head
    pub head: bool,
}

/// An architecture's settings in a GGUF file.
#[derive(Clone, Debug)]
pub struct GgufSettings {
    /// keys and values
    pub metadata: Vec<(String, GgufValue)>,
    /// vectors that stand for settings, by name (`rope_freqs.weight`)
    pub tensors: Vec<(String, Vec<f32>)>,
}

/// The modules of a model, and how GGUF files name and order them.
#[derive(Clone, Debug)]
pub struct Blueprint {
    /// config.json or the GGUF file
    pub origin: PathBuf,
    /// GGUF's `general.architecture`
    pub architecture: &'static str,
    /// number of decoder blocks
    pub layers: usize,
    /// the output head is the embedding's matrix
    pub tied_head: bool,
    /// linear layers, heads included
    pub linears: Vec<LinearBlueprint>,
    config: LlamaConfig,
}

impl Blueprint {
    /// Reads the `config.json` of a directory, or the header of a GGUF file.
    pub fn read(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let config = HfConfig::open(path)?;
            return match config.model_type()? {
                "llama" => Ok(Self::llama(LlamaConfig::from_hf(&config)?, config.path())),
                other => {
                    Err(Error::Architecture { path: config.path().to_path_buf(), found: other.to_string() })
                }
            };
        }
        let gguf = Gguf::open(path)?;
        match gguf.str("general.architecture")? {
            "llama" => Ok(Self::llama(LlamaConfig::from_gguf(&gguf)?, path)),
            other => Err(Error::Architecture { path: path.to_path_buf(), found: other.to_string() }),
        }
    }

    fn llama(config: LlamaConfig, origin: &Path) -> Self {
        let linear = |path, (rows, cols), head| LinearBlueprint { path, rows, cols, head };
        let mut linears: Vec<_> =
            config.linears().into_iter().map(|(path, size)| linear(path, size, false)).collect();
        linears.push(linear("lm_head".to_string(), (config.vocab_size, config.hidden_size), true));
        Self {
            origin: origin.to_path_buf(),
            architecture: "llama",
            layers: config.num_hidden_layers,
            tied_head: config.tie_word_embeddings,
            linears,
            config,
        }
    }

    /// The linear layer at `path`.
    pub fn linear(&self, path: &str) -> Option<&LinearBlueprint> {
        self.linears.iter().find(|l| l.path == path)
    }

    /// GGUF's name of a tensor (`model.norm.weight`); `None` if it has none.
    pub fn gguf_name(&self, name: &str) -> Option<String> {
        gguf_names::from_hf(name)
    }

    /// Hugging Face's name of a GGUF tensor; `None` if it has none.
    pub fn hf_name(&self, name: &str) -> Option<String> {
        gguf_names::to_hf(name)
    }

    /// Number of heads by which GGUF reorders the rows of the tensor `name` (Hugging Face's name), if it does.
    pub fn permuted_heads(&self, name: &str) -> Option<usize> {
        gguf_names::permuted_heads(name, self.config.num_attention_heads, self.config.num_key_value_heads)
    }

    /// Vocabulary size.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// The settings as a GGUF file says them.
    ///
    /// # Errors
    /// A setting that llama.cpp cannot express.
    pub fn gguf_settings(&self) -> Result<GgufSettings> {
        let c = &self.config;
        let count = |n: usize| GgufValue::Unsigned(n as u64);
        let float = |v: f64| GgufValue::Float(v);
        let mut values = vec![
            ("block_count", count(c.num_hidden_layers)),
            ("context_length", count(c.max_position_embeddings)),
            ("embedding_length", count(c.hidden_size)),
            ("feed_forward_length", count(c.intermediate_size)),
            ("attention.head_count", count(c.num_attention_heads)),
            ("attention.head_count_kv", count(c.num_key_value_heads)),
            ("attention.layer_norm_rms_epsilon", float(f64::from(c.rms_norm_eps))),
            ("attention.key_length", count(c.head_dim)),
            ("attention.value_length", count(c.head_dim)),
            ("rope.dimension_count", count(c.head_dim)),
            ("rope.freq_base", float(c.rope_theta)),
            ("vocab_size", count(c.vocab_size)),
        ];
        let mut tensors = Vec::new();
        let cannot = |found: String, why: &str| Error::Config {
            path: self.origin.clone(),
            key: "rope_scaling".to_string(),
            found,
            expected: format!("what llama.cpp can express ({why})"),
        };
        let text = |v: &str| GgufValue::String(v.to_string());
        match &c.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => {
                values.push(("rope.scaling.type", text("linear")));
                values.push(("rope.scaling.factor", float(f64::from(*factor))));
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => {
                let usual = yarn_mscale(*factor, 1.0) as f32;
                if (attention_factor - usual).abs() > 1e-6 * usual || !truncate {
                    let found = format!("yarn with attention_factor {attention_factor}, truncate {truncate}");
                    return Err(cannot(found, &format!("yarn with attention_factor {usual}, truncate true")));
                }
                values.push(("rope.scaling.type", text("yarn")));
                values.push(("rope.scaling.factor", float(*factor)));
                values.push(("rope.scaling.original_context_length", count(*original)));
                values.push(("rope.scaling.yarn_beta_fast", float(*beta_fast)));
                values.push(("rope.scaling.yarn_beta_slow", float(*beta_slow)));
            }
            RopeScaling::Llama3 { original, .. } => {
                let frequencies = |scaling: RopeScaling| {
                    Rope::new(c.rope_theta, c.head_dim, scaling)
                        .inverse_frequencies(c.max_position_embeddings)
                        .0
                };
                let (plain, scaled) = (frequencies(RopeScaling::None), frequencies(c.rope_scaling.clone()));
                let factors = plain.iter().zip(&scaled).map(|(p, s)| p / s).collect();
                tensors.push(("rope_freqs.weight".to_string(), factors));
                values.push(("rope.scaling.original_context_length", count(*original)));
            }
            RopeScaling::Factors(factors) => tensors.push(("rope_freqs.weight".to_string(), factors.clone())),
            RopeScaling::Dynamic { .. } => {
                return Err(cannot("dynamic".to_string(), "no dynamic scaling: use yarn, linear or llama3"));
            }
            RopeScaling::LongRope { .. } => {
                return Err(cannot("longrope".to_string(), "longrope only in other architectures"));
            }
        }
        let named = values.into_iter().map(|(key, v)| (format!("{}.{key}", self.architecture), v));
        Ok(GgufSettings { metadata: named.collect(), tensors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engobe_testkit::golden;

    #[test]
    fn an_outline_needs_the_configuration_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(golden("llama/gqa_tied/config.json"), dir.path().join("config.json")).unwrap();
        let blueprint = Blueprint::read(dir.path()).unwrap();
        assert_eq!((blueprint.layers, blueprint.tied_head, blueprint.linears.len()), (2, true, 15));
        let k = blueprint.linear("model.layers.1.self_attn.k_proj").unwrap();
        assert_eq!((k.rows, k.cols, k.head), (16, 32, false));
        assert_eq!(blueprint.permuted_heads("model.layers.1.self_attn.k_proj.weight"), Some(2));
        assert_eq!(blueprint.permuted_heads("model.layers.1.self_attn.q_proj.bias"), Some(4));
        assert_eq!(blueprint.permuted_heads("model.layers.1.self_attn.v_proj.weight"), None);
        assert!(blueprint.linear("lm_head").unwrap().head);
    }

    #[test]
    fn settings_that_llama_cpp_lacks_are_named() {
        for (name, part) in [("dynamic", "rope_scaling is dynamic"), ("longrope", "rope_scaling is longrope")]
        {
            let blueprint = Blueprint::read(&golden(format!("llama/{name}"))).unwrap();
            let error = blueprint.gguf_settings().unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("config.json"), "{error}");
        }
    }
}
