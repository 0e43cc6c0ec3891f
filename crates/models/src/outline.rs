//! A model without its weights: its modules and the sizes of its tensors, from headers alone.
//!
//! The decoder is built by the same code that loads one, over zeros that are never read, so whatever walks over a
//! model's modules works on an outline too: memory is worked out from it, and files are converted by it.

use crate::blank::{Blank, TensorUse, Unstored};
use crate::family::GgufForm;
use crate::registry::{Described, check_quantization};
use crate::seq2seq::{Seq2SeqArchitecture, seq2seq_architecture};
use crate::settings::DecoderSizes;
use crate::stored::Stored;
use crate::weights::{Weights, hf_name_in};
use crate::{Error, LoadOptions, Result};
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::gguf::GgufValue;
use engobe_formats::hf_config::HfConfig;
use engobe_nn::{ModuleMut, ModuleTree};
use std::path::{Path, PathBuf};

/// A linear layer's place and size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearOutline {
    /// Hugging Face module path
    pub path: String,
    /// output features
    pub rows: usize,
    /// input features
    pub cols: usize,
    /// an output head
    pub head: bool,
    /// Hugging Face's files hold its matrix as `[cols, rows]`
    pub transposed: bool,
}

/// An architecture's settings in a GGUF file.
#[derive(Clone, Debug)]
pub struct GgufSettings {
    /// keys and values
    pub metadata: Vec<(String, GgufValue)>,
    /// vectors that stand for settings, by name (`rope_freqs.weight`)
    pub tensors: Vec<(String, Vec<f32>)>,
}

/// A model without its weights.
pub struct Outline {
    /// config.json or the GGUF file
    pub origin: PathBuf,
    /// the model; its weights must not be read
    pub model: Box<dyn ModuleTree>,
    /// sizes of its blocks
    pub sizes: DecoderSizes,
    /// its tensors
    pub tensors: Vec<TensorUse>,
    /// its linear layers, heads included
    pub linears: Vec<LinearOutline>,
    /// the weights are there, not only a configuration
    pub has_weights: bool,
    model_type: &'static str,
    /// what is known of a decoder alone
    described: Option<Described>,
}

/// `config.json` and the weights of a Hugging Face directory, if it has any, or of a configuration or file by itself.
pub(crate) fn headers(path: &Path) -> Result<(PathBuf, Option<Checkpoint>)> {
    Ok(match path.is_dir() {
        true => {
            let weights = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"];
            let there = weights.iter().any(|name| path.join(name).exists());
            (path.join("config.json"), there.then(|| Checkpoint::open(path)).transpose()?)
        }
        false if path.extension().is_some_and(|e| e == "json") => (path.to_path_buf(), None),
        false => (path.to_path_buf(), Some(Checkpoint::open(path)?)),
    })
}

impl Outline {
    /// Reads the headers of a Hugging Face directory or `.gguf` file. A directory without weights, or a `config.json`
    /// by itself, is taken to have weights of the type that it names.
    ///
    /// # Errors
    /// The files are broken, or not a model that [`crate::load_causal_lm`] or [`crate::load_seq2seq`] would load.
    pub fn read(path: &Path, options: &LoadOptions) -> Result<Self> {
        let (config_path, checkpoint) = headers(path)?;
        if let Some(gguf) = checkpoint.as_ref().and_then(Checkpoint::gguf) {
            return Self::build(
                Described::from_gguf(gguf)?,
                checkpoint.as_ref(),
                options,
                Unstored::default(),
            );
        }
        let config = HfConfig::read(&config_path)?;
        let unstored = Unstored::of(&config)?;
        if let Some(architecture) = seq2seq_architecture(&config)? {
            return Self::of_seq2seq(architecture, &config, checkpoint.as_ref(), options, unstored);
        }
        Self::build(Described::from_hf(&config)?, checkpoint.as_ref(), options, unstored)
    }

    /// The outline of a checkpoint that is open.
    pub(crate) fn of(described: Described, checkpoint: &Checkpoint) -> Result<Self> {
        Self::build(described, Some(checkpoint), &LoadOptions::default(), Unstored::default())
    }

    fn build(
        described: Described,
        checkpoint: Option<&Checkpoint>,
        options: &LoadOptions,
        unstored: Unstored,
    ) -> Result<Self> {
        let sizes = *described.family.sizes();
        let blank = Blank::new(unstored)?;
        let weights = Weights::blank(Some(&described), checkpoint, options, &blank)?;
        let model: Box<dyn ModuleTree> = described.family.build(&weights)?;
        let (origin, model_type) = (described.origin.clone(), described.architecture.model_type);
        Ok(Self::finish(origin, model_type, model, sizes, blank, checkpoint.is_some(), Some(described)))
    }

    fn of_seq2seq(
        architecture: &'static Seq2SeqArchitecture,
        config: &HfConfig,
        checkpoint: Option<&Checkpoint>,
        options: &LoadOptions,
        unstored: Unstored,
    ) -> Result<Self> {
        check_quantization(config)?;
        let sizes = (architecture.sizes)(config)?;
        let blank = Blank::new(unstored)?;
        let weights = Weights::blank(None, checkpoint, options, &blank)?;
        let model = (architecture.build)(config, &weights)?;
        // what the files hold decides
        let sizes = DecoderSizes { tied_head: model.info().tied_head, ..sizes };
        let model: Box<dyn ModuleTree> = model;
        let origin = config.path().to_path_buf();
        Ok(Self::finish(origin, architecture.model_type, model, sizes, blank, checkpoint.is_some(), None))
    }

    fn finish(
        origin: PathBuf,
        model_type: &'static str,
        mut model: Box<dyn ModuleTree>,
        sizes: DecoderSizes,
        blank: Blank,
        has_weights: bool,
        described: Option<Described>,
    ) -> Self {
        let heads = model.output_heads();
        let mut linears = Vec::new();
        model.visit_modules(&mut |module| {
            if let ModuleMut::Linear(linear) = module {
                linears.push(LinearOutline {
                    path: linear.path().to_string(),
                    rows: linear.out_features(),
                    cols: linear.in_features(),
                    head: heads.iter().any(|head| head == linear.path()),
                    transposed: linear.is_transposed_in_files(),
                });
            }
        });
        Self { origin, model, sizes, tensors: blank.into_seen(), linears, has_weights, model_type, described }
    }

    /// The linear layer at `path`.
    pub fn linear(&self, path: &str) -> Option<&LinearOutline> {
        self.linears.iter().find(|l| l.path == path)
    }

    /// Hugging Face's `model_type`.
    pub fn model_type(&self) -> &'static str {
        self.model_type
    }

    fn gguf(&self) -> Result<&'static GgufForm> {
        let none = || Error::NoGguf { path: self.origin.clone(), model_type: self.model_type() };
        self.described.as_ref().and_then(Described::gguf).ok_or_else(none)
    }

    /// GGUF's `general.architecture` for such models.
    ///
    /// # Errors
    /// llama.cpp has none.
    pub fn gguf_architecture(&self) -> Result<&'static str> {
        Ok(self.gguf()?.name)
    }

    /// GGUF's name of a tensor (`model.norm.weight`); `None` if it has none.
    pub fn gguf_name(&self, name: &str) -> Option<String> {
        self.described.as_ref()?.gguf()?.names.from_hf(name)
    }

    /// Hugging Face's name of a GGUF tensor; `None` if it has none.
    pub fn hf_name(&self, name: &str) -> Option<String> {
        self.described.as_ref()?.gguf()?.names.to_hf(name)
    }

    /// The name under which `checkpoint`, of this model, holds the tensor that Hugging Face calls `name`.
    pub fn name_in(&self, checkpoint: &Checkpoint, name: &str) -> String {
        let gguf = checkpoint.gguf().and_then(|_| self.gguf_name(name));
        gguf.unwrap_or_else(|| hf_name_in(checkpoint, name).to_string())
    }

    /// How GGUF files keep the tensor that Hugging Face calls `name`.
    pub fn stored(&self, name: &str) -> Stored {
        self.described.as_ref().map_or(Stored::AsIs, |d| d.family.stored(name))
    }

    /// Vocabulary size.
    pub fn vocab_size(&self) -> usize {
        self.sizes.vocab
    }

    /// The settings as a GGUF file says them.
    ///
    /// # Errors
    /// An architecture or a setting that llama.cpp cannot express.
    pub fn gguf_settings(&self) -> Result<GgufSettings> {
        let none = || Error::NoGguf { path: self.origin.clone(), model_type: self.model_type };
        let (architecture, described) = (self.gguf()?.name, self.described.as_ref().ok_or_else(none)?);
        let mut settings = described.family.to_gguf().map_err(|m| m.at(&self.origin))?;
        for (key, _) in &mut settings.metadata {
            *key = format!("{architecture}.{key}");
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engobe_testkit::golden;

    fn read(path: &Path) -> Outline {
        Outline::read(path, &LoadOptions::default()).unwrap()
    }

    #[test]
    fn an_outline_needs_the_configuration_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(golden("llama/gqa_tied/config.json"), dir.path().join("config.json")).unwrap();
        let outline = read(dir.path());
        assert_eq!((outline.sizes.layers, outline.sizes.tied_head, outline.linears.len()), (2, true, 15));
        let k = outline.linear("model.layers.1.self_attn.k_proj").unwrap();
        assert_eq!((k.rows, k.cols, k.head), (16, 32, false));
        let permuted = |heads| Stored::Permuted { heads };
        assert_eq!(outline.stored("model.layers.1.self_attn.k_proj.weight"), permuted(2));
        assert_eq!(outline.stored("model.layers.1.self_attn.q_proj.bias"), permuted(4));
        assert_eq!(outline.stored("model.layers.1.self_attn.v_proj.weight"), Stored::AsIs);
        assert!(outline.linear("lm_head").unwrap().head);
    }

    /// The sizes of google/t5-v1_1-xxl, whose 11 billion parameters Lester et al. (2021) tune prompts for.
    #[test]
    fn the_largest_t5_needs_no_weights() {
        let dir = tempfile::tempdir().unwrap();
        let config = r#"{"model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
            "num_heads": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;
        let path = dir.path().join("config.json");
        std::fs::write(&path, config).unwrap();
        let mut outline = read(&path);
        let mut total = 0;
        outline.model.visit_modules(&mut |module| {
            total += match module {
                ModuleMut::Linear(m) => m.in_features() * m.out_features(),
                ModuleMut::Embedding(m) => m.weight().dims().0 * m.weight().dims().1,
                ModuleMut::RmsNorm(m) => m.weight().elem_count(),
                ModuleMut::LayerNorm(_) => 0,
            }
        });
        // counted by transformers' T5ForConditionalGeneration over empty tensors
        assert_eq!(total, 11_135_332_352);
        assert!(!outline.has_weights && outline.gguf_architecture().is_err());
        let q = outline.linear("decoder.block.23.layer.1.EncDecAttention.q").unwrap();
        assert_eq!((q.rows, q.cols), (4096, 4096));
    }

    #[test]
    fn a_tied_head_is_one_matrix() {
        for (name, matrices) in [("v10", 1), ("v11", 2)] {
            let outline = read(&golden(format!("t5/{name}")));
            let of_words = outline.tensors.iter().filter(|t| t.rows == outline.vocab_size());
            assert_eq!(of_words.count(), matrices, "{name}");
        }
    }

    #[test]
    fn settings_that_llama_cpp_lacks_are_named() {
        for (name, part) in [("dynamic", "rope_scaling is dynamic"), ("longrope", "rope_scaling is longrope")]
        {
            let outline = read(&golden(format!("llama/{name}")));
            let error = outline.gguf_settings().unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("config.json"), "{error}");
        }
    }
}
