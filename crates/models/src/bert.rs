//! BERT (Devlin et al. 2019): post-norm blocks over tokens, positions and token types, and a pooler.
//!
//! Module paths are those of transformers' `BertModel`. RoBERTa's file builds on this one, which differs in where
//! positions begin, and ELECTRA's.

use crate::encoders::{EncoderArchitecture, activation, bad, head_dim};
use crate::scope::{Naming, Scope};
use crate::{Result, Weights};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_kernels::attention::AttentionShape;
use engobe_nn::decoder::{Attention, Block, Mlp, Norms, Positions, Projection, Up};
use engobe_nn::{Encoder, EncoderStack, Entry, ModelInfo, Norm, Pooler};
use rayon::prelude::*;

/// The architecture.
pub static ARCHITECTURE: EncoderArchitecture =
    EncoderArchitecture { model_type: "bert", class: "Bert", also: &[], prefix: "bert", build };

fn build(config: &HfConfig, weights: &Weights<'_>, naming: Naming) -> Result<Box<dyn Encoder>> {
    Ok(Box::new(stack(config, weights, naming, &ARCHITECTURE, 0)?))
}

/// The encoder whose position 0 has row `first_position` of the table.
pub(crate) fn stack(
    config: &HfConfig,
    weights: &Weights<'_>,
    naming: Naming,
    architecture: &EncoderArchitecture,
    first_position: u32,
) -> Result<EncoderStack> {
    if let Some(kind) = config.opt_str("position_embedding_type")?.filter(|kind| *kind != "absolute") {
        return Err(bad(config, "position_embedding_type", kind, "\"absolute\""));
    }
    if config.bool_or("is_decoder", false)? {
        return Err(bad(config, "is_decoder", true, "false: this architecture is known as an encoder"));
    }
    let (d, layers) = (config.usize("hidden_size")?, config.usize("num_hidden_layers")?);
    let (vocab, rows) = (config.usize("vocab_size")?, config.usize("max_position_embeddings")?);
    // ELECTRA's configurations alone have it
    let width = config.opt_usize("embedding_size")?.unwrap_or(d);
    let eps = config.opt_f64("layer_norm_eps")?.unwrap_or(1e-12) as f32;
    let sizes = PostNorm {
        width: d,
        inner: config.usize("intermediate_size")?,
        shape: shape(config, "num_attention_heads", d)?,
        activation: activation(config, "hidden_act", "gelu")?,
        eps,
    };
    let base = Scope::base(weights, architecture.prefix, naming, "embeddings.word_embeddings.weight");
    let embeddings = base.within("embeddings");
    let block = |i: usize| sizes.block(&base.within(&format!("encoder.layer.{i}")), &NAMES);
    let pooler = match base.has("pooler.dense", "weight") {
        true => {
            Some(Pooler { dense: base.linear("pooler.dense", d, d, true)?, activation: Activation::Tanh })
        }
        false => None,
    };
    Ok(EncoderStack {
        info: info(config.model_type()?, vocab, d, layers, rows.saturating_sub(first_position as usize)),
        words: embeddings.embedding("word_embeddings", vocab, width)?,
        entry: Entry::new(embeddings.path("word_embeddings"), width),
        positions: Some(Positions {
            embedding: embeddings.embedding("position_embeddings", rows, width)?,
            first: first_position,
        }),
        token_types: match config.opt_usize("type_vocab_size")?.unwrap_or(2) {
            0 => None,
            types => Some(embeddings.embedding("token_type_embeddings", types, width)?),
        },
        embedding_norm: Norm::Layer(embeddings.layer_norm("LayerNorm", width, eps, true)?),
        projection: (width != d).then(|| base.linear("embeddings_project", d, width, true)).transpose()?,
        blocks: (0..layers).into_par_iter().map(block).collect::<Result<_>>()?,
        ropes: Vec::new(),
        final_norm: None,
        pooler,
        device: weights.device().clone(),
    })
}

/// Sizes of an encoder without a head.
pub(crate) fn info(kind: &str, vocab: usize, d: usize, layers: usize, positions: usize) -> ModelInfo {
    ModelInfo {
        model_type: kind.to_string(),
        vocab_size: vocab,
        hidden_size: d,
        num_layers: layers,
        kv_width: d,
        max_positions: positions,
        tied_head: false,
        blocks: false,
    }
}

/// Bidirectional attention of `key` heads over the width `d`.
pub(crate) fn shape(config: &HfConfig, key: &str, d: usize) -> Result<AttentionShape> {
    let heads = config.usize(key)?;
    let hd = head_dim(config, key, d, heads)?;
    Ok(AttentionShape::new(heads, heads, hd, 1.0 / (hd as f32).sqrt(), false))
}

/// Module paths in a post-norm block.
pub(crate) struct PostNormNames {
    /// queries, keys, values and the output projection
    pub attention: [&'static str; 4],
    /// the norm behind attention
    pub attention_norm: &'static str,
    /// the two layers of the feed-forward
    pub mlp: [&'static str; 2],
    /// the norm behind it
    pub mlp_norm: &'static str,
}

const NAMES: PostNormNames = PostNormNames {
    attention: [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ],
    attention_norm: "attention.output.LayerNorm",
    mlp: ["intermediate.dense", "output.dense"],
    mlp_norm: "output.LayerNorm",
};

/// What a post-norm block is made of.
pub(crate) struct PostNorm {
    /// of the hidden states
    pub width: usize,
    /// of the feed-forward
    pub inner: usize,
    /// of attention
    pub shape: AttentionShape,
    /// of the feed-forward
    pub activation: Activation,
    /// of the norms
    pub eps: f32,
}

impl PostNorm {
    /// The block in `scope`.
    pub fn block(&self, scope: &Scope<'_>, names: &PostNormNames) -> Result<Block> {
        let (d, inner) = (self.width, self.inner);
        let linear = |name: &str, out: usize, width: usize| scope.linear(name, out, width, true);
        let norm = |name: &str| scope.layer_norm(name, d, self.eps, true).map(Norm::Layer);
        let [q, k, v, o] = names.attention;
        let [up, down] = names.mlp;
        Ok(Block::new(
            Attention {
                projection: Projection::Separate([linear(q, d, d)?, linear(k, d, d)?, linear(v, d, d)?]),
                head_norms: None,
                output: linear(o, d, d)?,
                shape: self.shape,
                rope: None,
            },
            Mlp {
                up: Up::Plain(linear(up, inner, d)?),
                activation: self.activation,
                down: linear(down, d, inner)?,
            },
            Norms::Post([norm(names.attention_norm)?, norm(names.mlp_norm)?]),
        ))
    }
}
