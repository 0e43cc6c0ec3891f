//! Gemma 3 decoders (Gemma Team 2025), text: Gemma 2 without caps but with norms on query and key heads, and a rotary
//! embedding of its own for the layers that see a window, five of six.
//!
//! Module paths are those of transformers' `Gemma3ForCausalLM`.

use crate::family::{Architecture, Family, GgufForm, Misfit};
use crate::gemmas::Gemma;
use crate::rope_settings::{Rotary, RotaryDefaults, USUAL};
use crate::settings::{DecoderSizes, bad, merged};
use crate::stored::Stored;
use crate::{GgufSettings, HeadKind, Result, Weights, gemmas};
use engobe_formats::gguf::{Gguf, GgufValue};
use engobe_formats::hf_config::HfConfig;
use engobe_nn::CausalLm;
use serde_json::{Value, json};

pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    stem: "Gemma3Text",
    heads: &[HeadKind::Sequence],
    from_hf: |config| Ok(Box::new(Gemma3::from_hf(config)?)),
    gguf: Some(GgufForm {
        name: "gemma3",
        names: &gemmas::NAMES,
        read: Some(|gguf| Ok(Box::new(Gemma3::from_gguf(gguf)?))),
    }),
};

/// Layers of the 27B model.
const LARGEST: usize = 62;

#[derive(Debug)]
struct Gemma3 {
    common: Gemma,
    /// of layers that see all, and of those that see a window
    rotary: [Rotary; 2],
}

impl Gemma3 {
    fn from_hf(config: &HfConfig) -> Result<Self> {
        if config.bool_or("use_bidirectional_attention", false)? {
            return Err(bad(
                config,
                "use_bidirectional_attention",
                true,
                "false: only decoders are supported",
            ));
        }
        let sizes = DecoderSizes::from_hf(config, true)?;
        let every = config.opt_usize("sliding_window_pattern")?.unwrap_or(6).max(1);
        let rotary = rotary_from_hf(config, &sizes)?;
        let common = Gemma::from_hf(config, sizes.with_head_norms(), |i| (i + 1) % every != 0, [None, None])?;
        Ok(Self { common, rotary })
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
        let common = Gemma {
            eps: gguf.f32("gemma3.attention.layer_norm_rms_epsilon")?,
            bias: false,
            query_scalar: gemmas::implied_scalar(&sizes, LARGEST),
            windows: (0..sizes.layers).map(|i| window.filter(|_| (i + 1) % 6 != 0)).collect(),
            score_cap: None,
            logit_cap: gguf.opt_f32("gemma3.final_logit_softcapping")?.filter(|cap| *cap > 0.0),
            sizes: sizes.with_norms_after().with_head_norms(),
        };
        Ok(Self { common, rotary })
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
        &self.common.sizes
    }

    fn build(&self, w: &Weights<'_>) -> Result<Box<dyn CausalLm>> {
        let ropes = self.rotary.iter().map(Rotary::rope).collect();
        let of_layer = |i: usize| usize::from(self.common.windows[i].is_some());
        self.common.build(w, "gemma3_text", ropes, of_layer, true)
    }

    fn stored(&self, name: &str) -> Stored {
        gemmas::stored(name)
    }

    fn to_hf(&self) -> Value {
        let mut extra = self.common.to_hf();
        extra.insert("rope_local_base_freq".to_string(), json!(self.rotary[1].theta));
        merged(&self.common.sizes, extra.into(), Some(&self.rotary[0]))
    }

    fn to_gguf(&self) -> Result<GgufSettings, Misfit> {
        let c = &self.common;
        if let Some(cap) = c.score_cap {
            return Err(Misfit::new("attn_logit_softcapping", cap, "null, as llama.cpp has it for Gemma 3"));
        }
        let [all, local] = &self.rotary;
        let mut metadata = gemmas::settings(c, LARGEST, 6)?;
        metadata.push(("rope.freq_base_swa".to_string(), GgufValue::Float(local.theta)));
        if let Some(cap) = c.logit_cap {
            metadata.push(("final_logit_softcapping".to_string(), GgufValue::Float(f64::from(cap))));
        }
        let tensors = all.to_gguf(&c.sizes, &mut metadata, false)?;
        Ok(GgufSettings { metadata, tensors })
    }
}
