//! Gemma 3 decoders (Gemma Team 2025), text: Gemma 2 without caps but with norms on query and key heads, and a rotary
//! embedding of its own for the layers that see a window, five of six.
//!
//! Module paths are those of transformers' `Gemma3ForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, Misfit};
use crate::parts::Frame;
use crate::qwen3::with_head_norms;
use crate::rope_settings::{Rotary, RotaryDefaults, USUAL};
use crate::settings::{DecoderSizes, activation, bad, epsilon, exact, merged, soft_cap, windows};
use crate::stored::Stored;
use crate::{GgufSettings, Result, Weights, gemma};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::attention::AttentionShape;
use engobe_nn::decoder::Decoder;
use engobe_nn::{CausalLm, Norm};
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    from_hf: |config| Ok(Box::new(Gemma3::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "gemma3",
        names: &gemma::NAMES,
        read: Some(|gguf| Ok(Box::new(Gemma3::from_gguf(gguf)?))),
    }),
};

/// Layers of the 27B model.
const LARGEST: usize = 62;

#[derive(Debug)]
struct Gemma3 {
    sizes: DecoderSizes,
    eps: f32,
    bias: bool,
    /// of layers that see all, and of those that see a window
    rotary: [Rotary; 2],
    query_scalar: f32,
    /// of each layer
    windows: Vec<Option<usize>>,
    score_cap: Option<f32>,
    logit_cap: Option<f32>,
}

impl Gemma3 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        activation(config, "hidden_activation", "gelu_pytorch_tanh", gemma::GELU)?;
        if config.bool_or("use_bidirectional_attention", false)? {
            return Err(bad(
                config,
                "use_bidirectional_attention",
                true,
                "false: only decoders are supported",
            ));
        }
        let sizes = DecoderSizes::from_hf(config, true)?;
        let window = config.opt_usize("sliding_window")?.or(Some(4096));
        let every = config.opt_usize("sliding_window_pattern")?.unwrap_or(6).max(1);
        Ok(Self {
            eps: epsilon(config, "rms_norm_eps", 1e-6)?,
            bias: config.bool_or("attention_bias", false)?,
            rotary: rotary_from_hf(config, &sizes)?,
            query_scalar: gemma::query_scalar(config)?,
            windows: windows(config, sizes.layers, window, |i| (i + 1) % every != 0)?,
            score_cap: soft_cap(config, "attn_logit_softcapping", None)?,
            logit_cap: soft_cap(config, "final_logit_softcapping", None)?,
            sizes: with_head_norms(gemma::with_norms_after(sizes)),
        })
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let sizes = DecoderSizes::from_gguf(gguf, "gemma3")?;
        let window = gguf.opt_u32("gemma3.attention.sliding_window")?.map(|w| (w as usize).max(1));
        let all = Rotary::from_gguf(gguf, "gemma3", &sizes)?;
        let local = Rotary::plain(
            f64::from(gguf.opt_f32("gemma3.rope.freq_base_swa")?.unwrap_or(10_000.0)),
            sizes.head_dim,
        );
        // files of the first converters, before windows, have one base for all layers
        let rotary = if window.is_some() { [all, local] } else { [all.clone(), all] };
        Ok(Self {
            eps: gguf.f32("gemma3.attention.layer_norm_rms_epsilon")?,
            bias: false,
            rotary,
            query_scalar: gemma::implied_scalar(&sizes, LARGEST),
            windows: (0..sizes.layers).map(|i| window.filter(|_| (i + 1) % 6 != 0)).collect(),
            score_cap: None,
            logit_cap: gguf.opt_f32("gemma3.final_logit_softcapping")?.filter(|cap| *cap > 0.0),
            sizes: with_head_norms(gemma::with_norms_after(sizes)),
        })
    }
}

/// transformers 5 has a section for each kind of layer, 4 two bases side by side.
fn rotary_from_hf(config: &HfConfig, sizes: &DecoderSizes) -> Result<[Rotary; 2]> {
    let all = RotaryDefaults { theta: ("rope_theta", 1_000_000.0), ..USUAL };
    let local = RotaryDefaults { theta: ("rope_local_base_freq", 10_000.0), ..USUAL };
    let new = config.get("rope_parameters").and_then(Value::as_object);
    let section = |kind: &str| new.and_then(|map| map.get(kind)).and_then(Value::as_object);
    let one = |kind: &str, defaults, old| {
        let map = section(kind).or(old);
        Rotary::from_section(config, sizes, defaults, &format!("rope_parameters.{kind}"), map)
    };
    let old = config.get("rope_scaling").and_then(Value::as_object);
    Ok([one("full_attention", all, old)?, one("sliding_attention", local, None)?])
}

impl Family for Gemma3 {
    fn sizes(&self) -> &DecoderSizes {
        &self.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let s = &self.sizes;
        let norm = Norm::Rms(gemma::norm(w, "model.norm", s.hidden, self.eps)?);
        let ropes = self.rotary.iter().map(Rotary::rope).collect();
        let decoder = Frame::usual("gemma3_text", s, norm, ropes).decoder(w, s, |i| {
            let plain = s.attention(1.0 / self.query_scalar.sqrt(), self.windows[i]);
            let shape = AttentionShape { soft_cap: self.score_cap, ..plain };
            let rope = usize::from(self.windows[i].is_some());
            gemma::block(w, s, i, (self.eps, self.bias), shape, rope, true)
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
            "rope_local_base_freq": self.rotary[1].theta,
        });
        merged(&self.sizes, extra, Some(&self.rotary[0]))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        if let Some(cap) = self.score_cap {
            return Err(Misfit::new("attn_logit_softcapping", cap, "null, as llama.cpp has it for Gemma 3"));
        }
        let [all, local] = &self.rotary;
        let scalar = (self.query_scalar, LARGEST);
        let mut metadata = gemma::settings(&self.sizes, self.eps, scalar, (&self.windows, 6))?;
        metadata.push(("rope.freq_base_swa".to_string(), GgufValue::Float(local.theta)));
        if let Some(cap) = self.logit_cap {
            metadata.push(("final_logit_softcapping".to_string(), GgufValue::Float(f64::from(cap))));
        }
        let tensors = all.to_gguf(&self.sizes, &mut metadata, false)?;
        Ok(GgufSettings { metadata, tensors })
    }
}
