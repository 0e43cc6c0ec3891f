//! ModernBERT (Warner et al. 2024): pre-norm blocks with rotary positions, GeGLU, and attention that is local in most
//! layers and global in every third.
//!
//! Module paths are those of transformers' `ModernBertModel`.

use crate::bert::{info, shape};
use crate::encoders::{EncoderArchitecture, activation, bad};
use crate::scope::{Naming, Scope};
use crate::{Result, Weights};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::attention::AttentionShape;
use engobe_nn::decoder::{Attention, Block, Mlp, Norms, Projection, Up};
use engobe_nn::rope::{Rope, RopeScaling};
use engobe_nn::{Encoder, EncoderStack, Entry, Norm};
use rayon::prelude::*;
use serde_json::Value;

/// The architecture.
pub static ARCHITECTURE: EncoderArchitecture =
    EncoderArchitecture { model_type: "modernbert", class: "ModernBert", also: &[], prefix: "model", build };

/// A layer's kind: name in `layer_types`, key of the base of its angles in older files, that base.
const KINDS: [(&str, &str, f64); 2] =
    [("full_attention", "global_rope_theta", 160_000.0), ("sliding_attention", "local_rope_theta", 10_000.0)];

fn build(config: &HfConfig, weights: &Weights<'_>, naming: Naming) -> Result<Box<dyn Encoder>> {
    let (d, layers) = (config.usize("hidden_size")?, config.usize("num_hidden_layers")?);
    let vocab = config.usize("vocab_size")?;
    let inner = config.usize("intermediate_size")?;
    let eps = config.opt_f64("norm_eps")?.unwrap_or(1e-5) as f32;
    let norm_bias = config.bool_or("norm_bias", false)?;
    let attention_bias = config.bool_or("attention_bias", false)?;
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let (kinds, shape) = (layer_kinds(config, layers)?, shape(config, "num_attention_heads", d)?);
    // half of the window on each side, and the token itself
    let window = config.opt_usize("local_attention")?.unwrap_or(128) / 2 + 1;
    let activation = activation(config, "hidden_activation", "gelu")?;
    let base = Scope::base(weights, ARCHITECTURE.prefix, naming, "embeddings.tok_embeddings.weight");
    let embeddings = base.within("embeddings");
    let block = |i: usize| -> Result<Block> {
        let scope = base.within(&format!("layers.{i}"));
        let norm = |name: &str| scope.layer_norm(name, d, eps, norm_bias).map(Norm::Layer);
        let window = (kinds[i] == 1).then_some(window);
        Ok(Block::new(
            Attention {
                projection: Projection::Joined(scope.linear("attn.Wqkv", 3 * d, d, attention_bias)?),
                head_norms: None,
                output: scope.linear("attn.Wo", d, d, attention_bias)?,
                shape: AttentionShape { window, ..shape },
                rope: Some(kinds[i]),
            },
            Mlp {
                up: Up::JoinedGate(scope.linear("mlp.Wi", 2 * inner, d, mlp_bias)?),
                activation,
                down: scope.linear("mlp.Wo", d, inner, mlp_bias)?,
            },
            match i {
                0 => Norms::PreMlp(norm("mlp_norm")?),
                _ => Norms::Pre([norm("attn_norm")?, norm("mlp_norm")?]),
            },
        ))
    };
    let positions = config.opt_usize("max_position_embeddings")?.unwrap_or(8192);
    let rope = |kind| Ok(Rope::new(theta(config, kind)?, shape.head_dim, RopeScaling::None));
    Ok(Box::new(EncoderStack {
        info: info(ARCHITECTURE.model_type, vocab, d, layers, positions),
        words: embeddings.embedding("tok_embeddings", vocab, d)?,
        entry: Entry::new(embeddings.path("tok_embeddings"), d),
        positions: None,
        token_types: None,
        embedding_norm: Norm::Layer(embeddings.layer_norm("norm", d, eps, norm_bias)?),
        projection: None,
        blocks: (0..layers).into_par_iter().map(block).collect::<Result<_>>()?,
        ropes: KINDS.iter().map(rope).collect::<Result<_>>()?,
        final_norm: Some(Norm::Layer(base.layer_norm("final_norm", d, eps, norm_bias)?)),
        pooler: None,
        device: weights.device().clone(),
    }))
}

/// Index into [`KINDS`] of each layer: from `layer_types`, or every n-th is global (transformers 4).
fn layer_kinds(config: &HfConfig, layers: usize) -> Result<Vec<usize>> {
    let Some(types) = config.get("layer_types") else {
        let every = config.opt_usize("global_attn_every_n_layers")?.unwrap_or(3).max(1);
        return Ok((0..layers).map(|i| usize::from(!i.is_multiple_of(every))).collect());
    };
    let kind = |t: &Value| KINDS.iter().position(|(name, ..)| Some(*name) == t.as_str());
    let kinds: Option<Vec<usize>> = types.as_array().and_then(|list| list.iter().map(kind).collect());
    let expected = format!("a list of {layers} of \"full_attention\" and \"sliding_attention\"");
    kinds.filter(|k| k.len() == layers).ok_or_else(|| bad(config, "layer_types", types, &expected))
}

/// The base of a kind's angles: `rope_parameters` (transformers 5), or a key of its own.
fn theta(config: &HfConfig, (name, key, default): &(&str, &str, f64)) -> Result<f64> {
    let Some(section) = config.get("rope_parameters").and_then(|all| all.get(*name)).filter(|s| !s.is_null())
    else {
        return Ok(config.opt_f64(key)?.unwrap_or(*default));
    };
    let setting = format!("rope_parameters.{name}");
    match section.get("rope_type").and_then(Value::as_str) {
        None | Some("default") => {}
        Some(other) => return Err(bad(config, &setting, other, "rope_type \"default\"")),
    }
    match section.get("rope_theta") {
        None => Ok(*default),
        Some(theta) => theta
            .as_f64()
            .filter(|t| *t > 0.0)
            .ok_or_else(|| bad(config, &setting, theta, "a rope_theta above 0")),
    }
}
