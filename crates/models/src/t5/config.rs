//! T5's settings, and the buckets of its distances.

use crate::settings::{PLAIN, activation_named, bad};
use crate::{Error, Result};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;

const START: &str = "decoder_start_token_id";

/// What `T5Config` of transformers holds, as far as the arithmetic needs it.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names of transformers where they are its own
pub(super) struct T5Config {
    pub model_type: String,
    pub vocab_size: usize,
    pub d_model: usize,
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_layers: usize,
    pub num_decoder_layers: usize,
    pub num_heads: usize,
    /// each layer has a table of biases of its own (UMT5)
    pub bias_a_layer: bool,
    /// of distances
    pub buckets: usize,
    /// distances from here on share a bucket
    pub max_distance: usize,
    pub eps: f32,
    /// f(gate) ⊙ up (v1.1)
    pub gated: bool,
    pub activation: Activation,
    /// the head reads states times d_model^-0.5 (v1.0)
    pub scale_outputs: bool,
    /// the head is likely the embedding's matrix; the checkpoint knows
    pub tied: bool,
    /// what a decoder's row begins with
    pub start_token: u32,
    pub n_positions: usize,
}

impl T5Config {
    /// `num_heads · d_kv`
    pub fn width(&self) -> usize {
        self.num_heads * self.d_kv
    }

    /// Reads `config.json`.
    pub fn from_hf(config: &HfConfig) -> Result<Self> {
        let model_type = config.model_type()?;
        let (mt5, umt5) = (model_type == "mt5", model_type == "umt5");
        let (gated, activation) = feed_forward(config, if mt5 || umt5 { "gated-gelu" } else { "relu" })?;
        // transformers 5 writes `tie_word_embeddings: true` whatever it read, and what it means beside it
        let tied = config.bool_or("tie_word_embeddings", true)?;
        let scale_outputs = !mt5 && config.bool_or("scale_decoder_outputs", tied)?;
        let layers = config.usize("num_layers")?;
        let start = config.opt_usize(START)?;
        let pad = config.opt_usize("pad_token_id")?;
        let this = Self {
            model_type: model_type.to_string(),
            bias_a_layer: umt5,
            vocab_size: config.usize("vocab_size")?,
            d_model: config.usize("d_model")?,
            d_kv: config.usize("d_kv")?,
            d_ff: config.usize("d_ff")?,
            num_layers: layers,
            num_decoder_layers: config.opt_usize("num_decoder_layers")?.unwrap_or(layers),
            num_heads: config.usize("num_heads")?,
            buckets: config.opt_usize("relative_attention_num_buckets")?.unwrap_or(32),
            max_distance: config.opt_usize("relative_attention_max_distance")?.unwrap_or(128),
            eps: config.opt_f64("layer_norm_epsilon")?.unwrap_or(1e-6) as f32,
            gated,
            activation,
            scale_outputs,
            tied: tied && (mt5 || scale_outputs),
            start_token: u32::try_from(start.or(pad).unwrap_or(0)).unwrap_or(u32::MAX),
            n_positions: config.opt_usize("n_positions")?.unwrap_or(512),
        };
        this.check(config)?;
        Ok(this)
    }

    fn check(&self, config: &HfConfig) -> Result<(), Error> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("d_kv", self.d_kv),
            ("d_ff", self.d_ff),
            ("num_layers", self.num_layers),
            ("num_decoder_layers", self.num_decoder_layers),
            ("num_heads", self.num_heads),
        ];
        // far above any model, far below what would overflow a product of two of them
        const MOST: usize = 1 << 28;
        if let Some((key, value)) = sizes.iter().find(|(_, v)| *v == 0 || *v > MOST) {
            return Err(bad(config, key, value, "a size between 1 and 2^28"));
        }
        if self.buckets < 4 || self.buckets > MOST {
            return Err(bad(config, "relative_attention_num_buckets", self.buckets, "4 to 2^28"));
        }
        if self.start_token as usize >= self.vocab_size {
            let key = if config.get(START).is_some() { START } else { "pad_token_id" };
            let expected = format!("a token: below the vocabulary's {}", self.vocab_size);
            return Err(bad(config, key, self.start_token, &expected));
        }
        if self.max_distance <= self.buckets / 2 {
            let expected = format!("more than half of the {} buckets", self.buckets);
            return Err(bad(config, "relative_attention_max_distance", self.max_distance, &expected));
        }
        Ok(())
    }
}

/// `feed_forward_proj`: an activation, or `gated-` and one. `gated-gelu` means the approximation by tanh.
fn feed_forward(config: &HfConfig, usual: &str) -> Result<(bool, Activation)> {
    let key = "feed_forward_proj";
    let found = config.opt_str(key)?.unwrap_or(usual);
    match found.strip_prefix("gated-") {
        Some("gelu") => Ok((true, Activation::GeluTanh)),
        Some(name) => Ok((true, activation_named(config, key, name, PLAIN)?)),
        None => Ok((false, activation_named(config, key, found, PLAIN)?)),
    }
}

/// The bucket of a distance (key minus query), as transformers' `_relative_position_bucket` has it: half of the buckets
/// for as many small distances, the others for spans that grow by a constant factor up to `max_distance`. The logarithm
/// is taken in f32, as there, so that distances at a boundary fall on the same side.
pub(super) fn bucket_of(distance: i64, both_ways: bool, buckets: usize, max_distance: usize) -> u32 {
    let (count, first) = match both_ways {
        true => (buckets / 2, if distance > 0 { buckets / 2 } else { 0 }),
        false => (buckets, 0),
    };
    let far = if both_ways { distance.unsigned_abs() } else { distance.min(0).unsigned_abs() } as usize;
    let exact = count / 2;
    if far < exact {
        return (first + far) as u32;
    }
    let factor = (max_distance as f64 / exact as f64).ln() as f32;
    let log = (far as f32 / exact as f32).ln() / factor * (count - exact) as f32;
    (first + (exact + log as usize).min(count - 1)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Printed by transformers 5.23's `T5Attention._relative_position_bucket` with 32 buckets up to 128.
    #[test]
    fn buckets_are_those_of_transformers() {
        let distances =
            [-200, -128, -127, -91, -64, -32, -23, -16, -15, -9, -8, -7, -1, 0, 1, 7, 8, 11, 12, 90, 91, 300];
        let both: Vec<u32> = distances.iter().map(|d| bucket_of(*d, true, 32, 128)).collect();
        assert_eq!(both, BOTH);
        let back: Vec<u32> = distances.iter().map(|d| bucket_of(*d, false, 32, 128)).collect();
        assert_eq!(back, BACK);
    }

    const BOTH: [u32; 22] =
        [15, 15, 15, 15, 14, 12, 11, 10, 9, 8, 8, 7, 1, 0, 17, 23, 24, 24, 25, 30, 31, 31];
    const BACK: [u32; 22] = [31, 31, 31, 29, 26, 21, 18, 16, 15, 9, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
}
