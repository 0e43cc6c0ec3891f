//! A task model without its weights: an encoder or a decoder and its head, from headers alone, as [`crate::Outline`] is of a decoder.

use crate::blank::{Blank, TensorUse, Unstored};
use crate::encoders::head_dim;
use crate::outline::headers;
use crate::settings::DecoderSizes;
use crate::task_heads::{HeadKind, TaskBase, described_config};
use crate::{LoadOptions, Result, Weights};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::TaskModel;
use std::path::Path;

/// An encoder, or a decoder without its output head, with a head of its own, without weights.
pub struct TaskOutline {
    /// the model; its weights must not be read
    pub model: TaskModel,
    /// sizes of its blocks; the vocabulary is the head's: its logits
    pub sizes: DecoderSizes,
    /// tokens that are embedded
    pub vocab: usize,
    /// its tensors
    pub tensors: Vec<TensorUse>,
    /// the weights are there, not only a configuration
    pub has_weights: bool,
}

impl TaskOutline {
    /// Reads the headers of a Hugging Face directory or GGUF file, or a `config.json` by itself, for a head of `labels` logits.
    ///
    /// # Errors
    /// The files are broken, or not a model that [`crate::load_task_model`] would load.
    pub fn read(path: &Path, options: &LoadOptions, kind: HeadKind, labels: usize) -> Result<Self> {
        let (file, checkpoint) = headers(path)?;
        let config = described_config(&file, checkpoint.as_ref())?;
        let base = TaskBase::of(&config, checkpoint.as_ref())?;
        let (sizes, vocab) = match base.described().map(|d| *d.family.sizes()) {
            Some(s) => (DecoderSizes { vocab: labels, tied_head: false, ..s }, s.vocab),
            None => (sizes(&config, labels)?, config.usize("vocab_size")?),
        };
        let blank = Blank::new(Unstored::of(&config)?)?;
        let weights = Weights::blank(base.described(), checkpoint.as_ref(), options, &blank)?;
        // the numbers that a new head begins with matter to nobody
        let model = base.build(&config, weights, kind, labels, 0)?;
        Ok(Self { model, sizes, vocab, tensors: blank.into_seen(), has_weights: checkpoint.is_some() })
    }
}

/// Sizes of an encoder's blocks. Post-normed ones keep as many sums as pre-normed ones keep inputs.
fn sizes(config: &HfConfig, labels: usize) -> Result<DecoderSizes> {
    // DistilBERT has names of its own
    let either = |key: &'static str, own: &'static str| -> Result<(&'static str, usize)> {
        Ok(match config.opt_usize(key)? {
            Some(value) => (key, value),
            None => (own, config.opt_usize(own)?.map_or_else(|| config.usize(key), Ok)?),
        })
    };
    let ((_, hidden), (_, layers)) =
        (either("hidden_size", "dim")?, either("num_hidden_layers", "n_layers")?);
    let (key, heads) = either("num_attention_heads", "n_heads")?;
    Ok(DecoderSizes {
        layers,
        hidden,
        heads,
        kv_heads: heads,
        head_dim: head_dim(config, key, hidden, heads)?,
        mlp: either("intermediate_size", "hidden_dim")?.1,
        vocab: labels,
        max_positions: config.opt_usize("max_position_embeddings")?.unwrap_or(8192),
        tied_head: false,
        extra_kept: 0,
        plain_mlp: config.model_type()? != "modernbert",
        relative_rows: match config.bool_or("relative_attention", false)? {
            true => crate::deberta_v2::span(config)?.saturating_mul(2),
            false => 0,
        },
        cross_layers: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use engobe_nn::ModuleTree;
    use engobe_testkit::golden;

    /// The modules and tensors of an outline are those of the model that is loaded, for all families.
    #[test]
    fn an_outline_has_the_models_modules() {
        let options = LoadOptions::default();
        let encoders =
            ["bert", "roberta", "distilbert", "electra_task", "deberta_v2_conv_task", "modernbert_bias_task"];
        let decoders = ["gpt2", "opt", "phi3", "gemma3", "qwen2"];
        let all = encoders.map(|n| ("encoders", n)).into_iter().chain(decoders.map(|n| ("decoders", n)));
        for (group, name) in all {
            let dir = golden(format!("{group}/{name}"));
            let mut outline = TaskOutline::read(&dir, &options, HeadKind::Sequence, 3).unwrap();
            let mut whole = crate::load_task_model(&dir, &options, HeadKind::Sequence, 3, 0).unwrap();
            let paths = |model: &mut TaskModel| {
                let mut paths = Vec::new();
                model.visit_modules(&mut |m| paths.push(m.path().to_string()));
                paths
            };
            assert_eq!(paths(&mut outline.model), paths(&mut whole), "{name}");
            assert_eq!(outline.model.head().saved, whole.head().saved, "{name}");
            assert!(outline.has_weights && outline.tensors.len() > 5, "{name}");
            // matrices of the files are 16 bits a number
            let words = outline.tensors.iter().find(|t| t.rows == outline.vocab).unwrap();
            // ELECTRA's are narrower than its blocks
            let width = if name == "electra_task" { 24 } else { outline.sizes.hidden };
            assert_eq!(words.mapped, outline.vocab * 2 * width, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let base = r#""vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 20"#;
        let found = |model_type: &str, more: &str| {
            let config = format!(r#"{{"model_type": "{model_type}", {base}, {more}}}"#);
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            match TaskOutline::read(dir.path(), &LoadOptions::default(), HeadKind::Sequence, 2) {
                Ok(_) => String::new(),
                Err(error) => error.to_string(),
            }
        };
        assert_eq!(found("bert", r#""type_vocab_size": 2"#), "");
        let huge = found("bert", r#""type_vocab_size": 9000000000000000000"#);
        assert!(huge.contains("token_type_embeddings.weight would be [9000000000000000000, 8]"), "{huge}");
        let far =
            r#""relative_attention": true, "pos_att_type": ["c2p"], "position_buckets": 9000000000000000000"#;
        let huge = found("deberta-v2", far);
        assert!(huge.contains("rel_embeddings.weight would be"), "{huge}");
        // more rows than words, and still a model
        let many = far.replace("9000000000000000000", "100000");
        assert_eq!(found("deberta-v2", &many), "");
        let all = found("bert", r#""type_vocab_size": 2, "classifier_dropout": 1.0"#);
        assert!(all.contains("classifier_dropout") && all.contains("below 1"), "{all}");
    }

    #[test]
    fn a_configuration_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let config = r#"{"model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536,
            "num_hidden_layers": 6, "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2}"#;
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let outline = TaskOutline::read(dir.path(), &LoadOptions::default(), HeadKind::Token, 9).unwrap();
        assert_eq!((outline.sizes.mlp, outline.sizes.vocab, outline.has_weights), (1536, 9, false));
        // all-MiniLM-L6-v2's weights, in f32, and a head of 9 tags
        let bytes: usize = outline.tensors.iter().map(|t| t.mapped).sum();
        assert_eq!(bytes / 4, 30522 * 384 + 514 * 384 + 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384);
    }
}
