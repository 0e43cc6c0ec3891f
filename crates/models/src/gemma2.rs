//! Gemma 2 decoders (Gemma Team 2024): norms around each sub-layer, soft caps on attention's scores and on the logits,
//! every other layer seeing a window.
//!
//! Module paths are those of transformers' `Gemma2ForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, Misfit};
use crate::parts::Frame;
use crate::rope_settings::{Rotary, USUAL};
use crate::settings::{DecoderSizes, activation, epsilon, exact, merged, soft_cap, windows};
use crate::stored::Stored;
use crate::{GgufSettings, Result, Weights, gemma};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::attention::AttentionShape;
use engobe_nn::decoder::Decoder;
use engobe_nn::{CausalLm, Norm};
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    from_hf: |config| Ok(Box::new(Gemma2::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "gemma2",
        names: &gemma::NAMES,
        read: Some(|gguf| Ok(Box::new(Gemma2::from_gguf(gguf)?))),
    }),
};

/// Layers of the 27B model.
const LARGEST: usize = 46;

#[derive(Debug)]
struct Gemma2 {
    sizes: DecoderSizes,
    eps: f32,
    bias: bool,
    rotary: Rotary,
    query_scalar: f32,
    /// of each layer
    windows: Vec<Option<usize>>,
    score_cap: Option<f32>,
    logit_cap: Option<f32>,
}

impl Gemma2 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_activation", "gelu_pytorch_tanh", gemma::GELU)?;
        let sizes = DecoderSizes::from_hf(config, true)?;
        let window = config.opt_usize("sliding_window")?.or(Some(4096));
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-6)?,
            bias: config.bool_or("attention_bias", false)?,
            rotary: Rotary::from_hf(config, &sizes, USUAL)?,
            query_scalar: gemma::query_scalar(config)?,
            windows: windows(config, sizes.layers, window, |i| i % 2 == 0)?,
            score_cap: soft_cap(config, "attn_logit_softcapping", Some(50.0))?,
            logit_cap: soft_cap(config, "final_logit_softcapping", Some(30.0))?,
            sizes: gemma::with_norms_after(sizes),
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes::from_gguf(gguf, "gemma2")?;
        let window = gguf.opt_u32("gemma2.attention.sliding_window")?.map_or(4096, |w| w as usize);
        let cap = |key: &str, default| -> Result<Option<f32>> {
            Ok(Some(gguf.opt_f32(key)?.unwrap_or(default)).filter(|cap| *cap > 0.0))
        };
        Ok(Self {
            eps: gguf.f32("gemma2.attention.layer_norm_rms_epsilon")?,
            bias: false,
            rotary: Rotary::from_gguf(gguf, "gemma2", &sizes)?,
            query_scalar: gemma::implied_scalar(&sizes, LARGEST),
            windows: (0..sizes.layers).map(|i| (i % 2 == 0).then_some(window.max(1))).collect(),
            score_cap: cap("gemma2.attn_logit_softcapping", 50.0)?,
            logit_cap: cap("gemma2.final_logit_softcapping", 30.0)?,
            sizes: gemma::with_norms_after(sizes),
        })
    }
}

impl Family for Gemma2 {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let s = &self.sizes;
        let norm = Norm::Rms(gemma::norm(w, "model.norm", s.hidden, self.eps)?);
        let frame = Frame::usual("gemma2", s, norm, vec![self.rotary.rope()]);
        let decoder = frame.decoder(w, s, |i| {
            let plain = s.attention(1.0 / self.query_scalar.sqrt(), self.windows[i]);
            let shape = AttentionShape { soft_cap: self.score_cap, ..plain };
            gemma::block(w, s, i, (self.eps, self.bias), shape, 0, false)
        })?;
        let embed_scale = Some((s.hidden as f32).sqrt());
        Ok(Box::new(Decoder { embed_scale, soft_cap: self.logit_cap, ..decoder }))
    }

    fn stored(&self, name: &str) -> Stored {
        gemma::stored(name)
    }

    fn to_hf(&self) -> Value {
        let extra = json!({
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": exact(self.eps),
            "attention_bias": self.bias,
            "query_pre_attn_scalar": self.query_scalar,
            "sliding_window": self.windows.iter().flatten().next(),
            "layer_types": gemma::layer_types(&self.windows),
            "attn_logit_softcapping": self.score_cap,
            "final_logit_softcapping": self.logit_cap,
        });
        merged(&self.sizes, extra, Some(&self.rotary))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        let scalar = (self.query_scalar, LARGEST);
        let mut metadata = gemma::settings(&self.sizes, self.eps, scalar, (&self.windows, 2))?;
        for (key, cap) in
            [("attn_logit_softcapping", self.score_cap), ("final_logit_softcapping", self.logit_cap)]
        {
            let Some(cap) = cap else {
                return Err(Misfit::new(key, "null", "a number: llama.cpp caps Gemma 2's always"));
            };
            metadata.push((key.to_string(), GgufValue::Float(f64::from(cap))));
        }
        let tensors = self.rotary.to_gguf(&self.sizes, &mut metadata, false)?;
        Ok(GgufSettings { metadata, tensors })
    }
}
