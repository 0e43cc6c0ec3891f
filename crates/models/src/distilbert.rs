//! DistilBERT (Sanh et al. 2019): BERT's blocks without token types and pooler.
//!
//! Module paths are those of transformers' `DistilBertModel`.

use crate::bert::{PostNorm, PostNormNames, info, shape};
use crate::encoders::{EncoderArchitecture, activation};
use crate::scope::{Naming, Scope};
use crate::{Result, Weights};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::decoder::Positions;
use engobe_nn::{Encoder, EncoderStack, Entry, Norm};
use rayon::prelude::*;

/// The architecture.
pub static ARCHITECTURE: EncoderArchitecture = EncoderArchitecture {
    model_type: "distilbert",
    class: "DistilBert",
    also: &[],
    prefix: "distilbert",
    build,
};

const NAMES: PostNormNames = PostNormNames {
    attention: ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"],
    attention_norm: "sa_layer_norm",
    mlp: ["ffn.lin1", "ffn.lin2"],
    mlp_norm: "output_layer_norm",
};

/// fixed in transformers
const EPS: f32 = 1e-12;

fn build(config: &HfConfig, weights: &Weights<'_>, naming: Naming) -> Result<Box<dyn Encoder>> {
    let (d, layers) = (config.usize("dim")?, config.usize("n_layers")?);
    let (vocab, rows) = (config.usize("vocab_size")?, config.usize("max_position_embeddings")?);
    let sizes = PostNorm {
        width: d,
        inner: config.usize("hidden_dim")?,
        shape: shape(config, "n_heads", d)?,
        activation: activation(config, "activation", "gelu")?,
        eps: EPS,
    };
    let base = Scope::base(weights, ARCHITECTURE.prefix, naming, "embeddings.word_embeddings.weight");
    let embeddings = base.within("embeddings");
    let block = |i: usize| sizes.block(&base.within(&format!("transformer.layer.{i}")), &NAMES);
    Ok(Box::new(EncoderStack {
        info: info(ARCHITECTURE.model_type, vocab, d, layers, rows),
        words: embeddings.embedding("word_embeddings", vocab, d)?,
        entry: Entry::new(embeddings.path("word_embeddings"), d),
        positions: Some(Positions {
            embedding: embeddings.embedding("position_embeddings", rows, d)?,
            first: 0,
        }),
        token_types: None,
        embedding_norm: Norm::Layer(embeddings.layer_norm("LayerNorm", d, EPS, true)?),
        projection: None,
        blocks: (0..layers).into_par_iter().map(block).collect::<Result<_>>()?,
        ropes: Vec::new(),
        final_norm: None,
        pooler: None,
        device: weights.device().clone(),
    }))
}
