//! The settings of bottleneck adapters: AdapterHub's keys, read and written whole.

use crate::Result;
use crate::method::{Decides, Kind, Setting, setting};
use crate::modules::SAVED_HELP;
use engobe_formats::adapter_hub::NAME;
use engobe_formats::peft::{KnownKeys, PeftConfig};
use engobe_kernels::activation::Activation;
use engobe_nn::{SubLayer, SubLayerKind};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

pub(super) const SETTINGS: [Setting; 15] = [
    Setting {
        decides: Decides::Start,
        ..setting("architecture", Kind::Text, "bottlenecks of pfeiffer, houlsby or parallel [pfeiffer]")
    },
    setting(
        "reduction_factor",
        Kind::NumberOrTable,
        "width of the model over that of a bottleneck, or a table of it by layer and \"default\" [16]",
    ),
    setting("non_linearity", Kind::Text, "relu, gelu, gelu_new, silu (or swish), tanh [the architecture's]"),
    setting("leave_out", Kind::Wholes, "layers without bottlenecks"),
    setting(
        "scaling",
        Kind::NumberOrText,
        "factor on what it adds: a number, learned, channel [the architecture's]",
    ),
    setting("ln_after", Kind::Flag, "a new layer norm on what a bottleneck adds"),
    setting("adapter_residual_before_ln", Kind::Flag, "the skip connection goes into that norm"),
    setting("mh_adapter", Kind::Flag, "bottlenecks after attention [the architecture's]"),
    setting("cross_adapter", Kind::Flag, "bottlenecks after a decoder's attention to its encoder [off]"),
    setting("output_adapter", Kind::Flag, "bottlenecks after the feed-forward [the architecture's]"),
    setting("is_parallel", Kind::Flag, "beside the sub-layer instead of behind it [the architecture's]"),
    setting("original_ln_before", Kind::Flag, "a bottleneck reads the residual sum [the architecture's]"),
    setting("residual_before_ln", Kind::Flag, "skip connection from before that sum [the architecture's]"),
    Setting {
        decides: Decides::Start,
        ..setting("init_weights", Kind::Text, "bert (normal, 0.02), mam_adapter (up zero) [mam_adapter]")
    },
    setting("modules_to_save", Kind::Names, SAVED_HELP),
];

/// Keys of the package that change nothing here, or of what is not there.
const NOTES: [&str; 16] = [
    NAME,
    "hidden_size",
    "model_class",
    "model_name",
    "model_type",
    "init_weights_seed",
    "original_ln_after",
    "phm_dim",
    "factorized_phm_W",
    "shared_phm_rule",
    "phm_c_init",
    "phm_init_range",
    "learn_phm",
    "hypercomplex_nonlinearity",
    "phm_rank",
    "phm_bias",
];
const NOT_YET: [&str; 10] = [
    "ln_before",
    "use_gating",
    "inv_adapter",
    "inv_adapter_reduction_factor",
    "dropout",
    "phm_layer",
    "shared_W_phm",
    "factorized_phm_rule",
    "stochastic_depth",
    "architecture_config",
];

const ACTIVATIONS: [(&str, Activation); 6] = [
    ("relu", Activation::Relu),
    ("gelu", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("tanh", Activation::Tanh),
];

/// The factor on what a bottleneck adds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scaling {
    /// as it is set
    Fixed(f32),
    /// one number, trained
    Learned,
    /// a number for each feature, trained
    Channel,
}

/// How a bottleneck starts; biases are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Init {
    /// normal numbers of standard deviation 0.02
    Bert,
    /// down as `nn.Linear` starts, up zero
    Zero,
    /// normal numbers of standard deviation 0.01, cut off at two of them
    Houlsby,
}

const INITS: [(&str, Init); 3] =
    [("bert", Init::Bert), ("mam_adapter", Init::Zero), ("houlsby", Init::Houlsby)];

/// What the settings say.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Settings {
    /// by number of the layer; the last word has `None`
    pub(super) reduction: BTreeMap<Option<usize>, f64>,
    pub(super) activation: Activation,
    pub(super) leave_out: Vec<usize>,
    pub(super) scaling: Scaling,
    pub(super) after_attention: bool,
    pub(super) after_cross: bool,
    pub(super) after_mlp: bool,
    pub(super) parallel: bool,
    pub(super) ln_before: bool,
    pub(super) ln_after: bool,
    pub(super) residual_before_ln: bool,
    /// a new layer norm on what is added
    pub(super) norms: bool,
    /// the skip connection is inside that norm
    pub(super) norms_residual: bool,
    pub(super) init: Init,
}

impl Settings {
    pub(super) fn read(config: &PeftConfig) -> Result<Self> {
        let names: Vec<&str> = SETTINGS.iter().map(|s| s.name).collect();
        // a number that is off is 0 there
        let mut shown = config.clone();
        for key in ["dropout", "stochastic_depth"] {
            if config.number(key)? == Some(0.0) {
                shown.set(key, Value::Null);
            }
        }
        shown.check_keys(KnownKeys { settings: &names, notes: &NOTES, not_yet: &NOT_YET })?;
        let flag = |key: &str, default: bool| match config.get(key) {
            None => Ok(default),
            Some(_) => config.flag(key),
        };
        let scaling = match config.get("scaling") {
            None => Scaling::Fixed(1.0),
            Some(Value::String(kind)) if kind == "learned" => Scaling::Learned,
            Some(Value::String(kind)) if kind == "channel" => Scaling::Channel,
            Some(v) => match v.as_f64() {
                Some(factor) => Scaling::Fixed(factor as f32),
                None => {
                    let right = "a number, \"learned\" or \"channel\"";
                    return Err(config.bad("scaling", &v.to_string(), right).into());
                }
            },
        };
        Ok(Self {
            reduction: Self::reduction(config)?,
            activation: config.choice("non_linearity", &ACTIVATIONS, Activation::Relu)?,
            leave_out: config.layers("leave_out")?.unwrap_or_default(),
            scaling,
            after_attention: flag("mh_adapter", false)?,
            after_cross: flag("cross_adapter", false)?,
            after_mlp: flag("output_adapter", true)?,
            parallel: flag("is_parallel", false)?,
            ln_before: flag("original_ln_before", false)?,
            ln_after: flag("original_ln_after", true)?,
            residual_before_ln: flag("residual_before_ln", true)?,
            norms: flag("ln_after", false)?,
            norms_residual: flag("adapter_residual_before_ln", false)?,
            init: config.choice("init_weights", &INITS, Init::Bert)?,
        })
    }

    fn reduction(config: &PeftConfig) -> Result<BTreeMap<Option<usize>, f64>> {
        let key = "reduction_factor";
        let right = "a number above 0, or an object of them by layer and \"default\"";
        let mut all = BTreeMap::new();
        let mut put = |layer: Option<usize>, v: &Value| -> Result<()> {
            let factor = v.as_f64().filter(|f| *f > 0.0);
            all.insert(layer, factor.ok_or_else(|| config.bad(key, &v.to_string(), right))?);
            Ok(())
        };
        match config.get(key) {
            None => put(None, &json!(16))?,
            Some(Value::Object(map)) => {
                for (layer, v) in map {
                    let number = layer.parse().ok().filter(|_| layer != "default");
                    if number.is_none() && layer != "default" {
                        return Err(config.bad(key, &format!("an object with {layer:?}"), right).into());
                    }
                    put(number, v)?;
                }
            }
            Some(v) => put(None, v)?,
        }
        Ok(all)
    }

    /// True if a bottleneck stands at the end of this sub-layer, of the layer with this number.
    pub(super) fn adapts(&self, end: &SubLayer, layer: Option<usize>) -> bool {
        let wanted = match end.kind() {
            SubLayerKind::Attention => self.after_attention,
            SubLayerKind::FeedForward => self.after_mlp,
            SubLayerKind::CrossAttention => self.after_cross,
        };
        wanted && !layer.is_some_and(|n| self.leave_out.contains(&n))
    }

    /// Width of the bottleneck of a layer of width `d`.
    pub(super) fn width(&self, layer: usize, d: usize) -> Option<usize> {
        let factor = self.reduction.get(&Some(layer)).or_else(|| self.reduction.get(&None))?;
        Some(((d as f64 / factor).floor() as usize).max(1))
    }

    /// Floats that a bottleneck of width `m` keeps of each token for its backward: what it reads (for a parallel one,
    /// that is the residual, which is kept anyway), what goes into the activation, and what is scaled and normed.
    pub(super) fn kept(&self, m: usize, d: usize) -> usize {
        let scaled = !matches!(self.scaling, Scaling::Fixed(_));
        m + d * (usize::from(!self.parallel) + usize::from(scaled) + usize::from(self.norms))
    }

    /// All keys, as the package writes them.
    pub(super) fn write(&self, config: &mut PeftConfig) {
        let number = |f: f64| if f.fract() == 0.0 { json!(f as i64) } else { json!(f) };
        let reduction = match self.reduction.len() {
            1 => self.reduction.values().next().map_or(Value::Null, |f| number(*f)),
            _ => {
                let name = |l: &Option<usize>| l.map_or("default".to_string(), |l| l.to_string());
                let all: Map<String, Value> =
                    self.reduction.iter().map(|(l, f)| (name(l), number(*f))).collect();
                Value::Object(all)
            }
        };
        let activation = ACTIVATIONS.iter().find(|(_, a)| *a == self.activation);
        config.set("architecture", Value::Null);
        config.set("reduction_factor", reduction);
        config.set("non_linearity", activation.map_or("relu", |(name, _)| name));
        config.set("leave_out", json!(self.leave_out));
        match self.scaling {
            Scaling::Fixed(factor) => config.set("scaling", f64::from(factor)),
            Scaling::Learned => config.set("scaling", "learned"),
            Scaling::Channel => config.set("scaling", "channel"),
        }
        config.set("mh_adapter", self.after_attention);
        config.set("cross_adapter", self.after_cross);
        config.set("output_adapter", self.after_mlp);
        config.set("is_parallel", self.parallel);
        config.set("original_ln_before", self.ln_before);
        config.set("original_ln_after", self.ln_after);
        config.set("residual_before_ln", self.residual_before_ln);
        let init = INITS.iter().find(|(_, init)| *init == self.init);
        config.set("init_weights", init.map_or("bert", |(name, _)| name));
        config.set("ln_after", self.norms);
        config.set("adapter_residual_before_ln", self.norms_residual);
        for off in ["ln_before", "use_gating", "phm_layer"] {
            config.set(off, false);
        }
        config.set("inv_adapter", Value::Null);
        config.set("inv_adapter_reduction_factor", Value::Null);
        config.set("dropout", 0.0);
        config.set("stochastic_depth", 0.0);
        if config.get(NAME).is_none() {
            config.set(NAME, "engobe");
        }
    }
}

/// What the architectures of the papers set.
pub(super) fn architecture(config: &PeftConfig) -> Result<Vec<(&'static str, Value)>> {
    let names = [("pfeiffer", 0), ("houlsby", 1), ("parallel", 2)];
    Ok(match config.choice("architecture", &names, 0)? {
        0 => vec![("original_ln_before", json!(true)), ("non_linearity", json!("relu"))],
        1 => vec![("mh_adapter", json!(true)), ("non_linearity", json!("swish"))],
        _ => vec![
            ("is_parallel", json!(true)),
            ("scaling", json!(4.0)),
            ("reduction_factor", json!(2)),
            ("non_linearity", json!("relu")),
        ],
    })
}

/// Numbers of layers as the package has them: it counts a decoder's on behind its encoder's.
#[derive(Default)]
pub(super) struct Numbers {
    /// path of the layer that was met last
    last: String,
    met: usize,
}

impl Numbers {
    /// The number of the layer that the sub-layer at `path` is in. Sub-layers must come in their order.
    pub(super) fn of(&mut self, path: &str) -> Option<usize> {
        let mut end = 0;
        let is_number = |part: &str| {
            end += part.len() + 1;
            part.parse::<usize>().is_ok()
        };
        path.split('.').any(is_number).then_some(())?;
        let layer = &path[..end - 1];
        if layer != self.last {
            self.last = layer.to_string();
            self.met += 1;
        }
        Some(self.met - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::Numbers;

    #[test]
    fn layers_of_a_decoder_count_on_behind_those_of_its_encoder() {
        let mut numbers = Numbers::default();
        let paths = [
            "encoder.block.0.layer.0.SelfAttention",
            "encoder.block.0.layer.1.DenseReluDense",
            "encoder.block.1.layer.0.SelfAttention",
            "decoder.block.0.layer.0.SelfAttention",
            "decoder.block.0.layer.1.EncDecAttention",
            "decoder.block.10.layer.0.SelfAttention",
            "shared",
        ];
        let found = paths.map(|path| numbers.of(path));
        assert_eq!(found, [Some(0), Some(0), Some(1), Some(2), Some(2), Some(3), None]);
    }
}
