//! Gemma 2 decoders (Gemma Team 2024): norms around each sub-layer, soft caps on attention's scores and on the logits,
//! every other layer seeing a window.
//!
//! Module paths are those of transformers' `Gemma2ForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, HEADS, Misfit};
use crate::gemmas::Gemma;
use crate::rope_settings::{Rotary, USUAL};
use crate::settings::{DecoderSizes, merged};
use crate::stored::Stored;
use crate::{GgufSettings, Result, Weights, gemmas};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::CausalLm;
use serde_json::Value;

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    stem: "Gemma2",
    heads: HEADS,
    from_hf: |config| Ok(Box::new(Gemma2::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "gemma2",
        names: &gemmas::NAMES,
        read: Some(|gguf| Ok(Box::new(Gemma2::from_gguf(gguf)?))),
    }),
};

/// Layers of the 27B model.
const LARGEST: usize = 46;

#[derive(Debug)]
struct Gemma2 {
    common: Gemma,
    rotary: Rotary,
}

impl Gemma2 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        let sizes = DecoderSizes::from_hf(config, true)?;
        let rotary = Rotary::from_hf(config, &sizes, USUAL)?;
        let common = Gemma::from_hf(config, sizes, |i| i % 2 == 0, [Some(50.0), Some(30.0)])?;
        Ok(Self { common, rotary })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes::from_gguf(gguf, "gemma2")?;
        let window = gguf.opt_u32("gemma2.attention.sliding_window")?.map_or(4096, |w| w as usize);
        let cap = |key: &str, default| -> Result<Option<f32>> {
            Ok(Some(gguf.opt_f32(key)?.unwrap_or(default)).filter(|cap| *cap > 0.0))
        };
        let rotary = Rotary::from_gguf(gguf, "gemma2", &sizes)?;
        let common = Gemma {
            eps: gguf.f32("gemma2.attention.layer_norm_rms_epsilon")?,
            bias: false,
            query_scalar: gemmas::implied_scalar(&sizes, LARGEST),
            windows: (0..sizes.layers).map(|i| (i % 2 == 0).then_some(window.max(1))).collect(),
            score_cap: cap("gemma2.attn_logit_softcapping", 50.0)?,
            logit_cap: cap("gemma2.final_logit_softcapping", 30.0)?,
            sizes: sizes.with_norms_after(),
        };
        Ok(Self { common, rotary })
    }
}

impl Family for Gemma2 {
    fn sizes(&self) -> &DecoderSizes {
        &self.common.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        self.common.build(w, "gemma2", vec![self.rotary.rope()], |_| 0, false)
    }

    fn stored(&self, name: &str) -> Stored {
        gemmas::stored(name)
    }

    fn to_hf(&self) -> Value {
        merged(&self.common.sizes, self.common.to_hf().into(), Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        let c = &self.common;
        let mut metadata = gemmas::settings(c, LARGEST, 2)?;
        for (key, cap) in [("attn_logit_softcapping", c.score_cap), ("final_logit_softcapping", c.logit_cap)]
        {
            let Some(cap) = cap else {
                return Err(Misfit::new(key, "null", "a number: llama.cpp caps Gemma 2's always"));
            };
            metadata.push((key.to_string(), GgufValue::Float(f64::from(cap))));
        }
        let tensors = self.rotary.to_gguf(&c.sizes, &mut metadata, false)?;
        Ok(GgufSettings { metadata, tensors })
    }
}
