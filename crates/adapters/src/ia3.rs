//! (IA)³ (Liu et al. 2022): trained factors on the outputs of attention's keys and values and on the input of the
//! feed-forward network's last layer, and nothing else.
//!
//! ```text
//! y = l ⊙ (W·x + b)        feedforward_modules:  y = W·(l ⊙ x) + b
//! ```

use crate::method::{Attached, Attaching, Card, Decides, Kind, Method, Setting, setting};
use crate::modules::{self, Selection};
use crate::random::{gaussian, generator};
use crate::target::{Targets, ends_with_module};
use crate::{AdapterSizes, Result};
use candle_core::{DType, Device, Tensor};
use engobe_autograd::ops::{self, LinearSpec, OutputScale};
use engobe_autograd::{Param, Result as OpResult, Tape, tensor_of};
use engobe_formats::peft::{LoraConfig, PeftConfig, TargetModules, modules_json};
use engobe_nn::{Linear, LinearAdapter, ModuleTree};
use serde_json::{Value, json};
use std::sync::Arc;

/// (IA)³.
#[derive(Debug)]
pub(crate) struct Ia3;

const SETTINGS: [Setting; 5] = [
    setting("target_modules", Kind::Names, modules::TARGETS_HELP),
    setting("exclude_modules", Kind::Names, modules::EXCLUDE_HELP),
    setting(
        FEEDFORWARD,
        Kind::Names,
        "ia3: targets whose input gets the factors [down_proj, fc2, ... of the targets]",
    ),
    setting("modules_to_save", Kind::Names, modules::SAVED_HELP),
    Setting {
        decides: Decides::Start,
        ..setting(INIT, Kind::Flag, "ia3: start from ones, which change nothing; off: random, for tests [on]")
    },
];
const FEEDFORWARD: &str = "feedforward_modules";
const INIT: &str = "init_ia3_weights";
/// Names of the last linear layer of feed-forward networks: what PEFT's mapping holds for the models that engobe loads.
const FEEDFORWARD_NAMES: [&str; 10] = [
    "down_proj",
    "fc2",
    "dense_4h_to_h",
    "wo",
    "output.dense",
    "c_proj",
    "mlp.c_proj",
    "lin2",
    "ffn.lin2",
    "mlp.Wo",
];
/// Names of keys and values, or of the layer that holds them too, and last the feed-forward's last layer: the first of
/// these that a model has all names of are its targets, if none are given.
const KEYS_VALUES_FEEDFORWARD: [&[&str]; 11] = [
    &["k_proj", "v_proj", "down_proj"],
    &["k_proj", "v_proj", "fc2"],
    &["k_proj", "v_proj", "mlp.c_proj"],
    &["qkv_proj", "down_proj"],
    &["c_attn", "mlp.c_proj"],
    &["query_key_value", "dense_4h_to_h"],
    &["key", "value", "output.dense"],
    &["key_proj", "value_proj", "output.dense"],
    &["k_lin", "v_lin", "ffn.lin2"],
    &["Wqkv", "mlp.Wo"],
    &["k", "v", "wo"],
];

const CARD: Card = Card {
    name: "ia3",
    about: "factors on keys, values and the feed-forward network",
    peft_type: "IA3",
    settings: &SETTINGS,
    learning_rate: Some(1e-2),
    head_learning_rate: None,
};

impl Method for Ia3 {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn defaults(&self) -> Vec<(&'static str, Value)> {
        Vec::new()
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        CARD.check_keys(config, &[], &["fan_in_fan_out"], &[])?;
        let mut out = config.clone();
        let (targets, feedforward) = (config.modules("target_modules")?, feedforward(config)?);
        if let (Some(TargetModules::List(all)), Some(TargetModules::List(some))) = (&targets, &feedforward)
            && let Some(name) = some.iter().find(|n| !all.contains(n))
        {
            return Err(config.bad(FEEDFORWARD, name, "names of target_modules").into());
        }
        out.set("target_modules", modules_json(&targets));
        out.set("exclude_modules", modules_json(&config.modules("exclude_modules")?));
        out.set(FEEDFORWARD, modules_json(&feedforward));
        out.set("modules_to_save", modules::list_or_null(config.names("modules_to_save")?));
        out.set(INIT, config.get(INIT).is_none() || config.flag(INIT)?);
        out.set("fan_in_fan_out", false);
        Ok(out)
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        let config = &with_targets(model, config);
        let lora = LoraConfig {
            target_modules: config.modules("target_modules")?,
            exclude_modules: config.modules("exclude_modules")?,
            modules_to_save: config.names("modules_to_save")?,
            ..LoraConfig::default()
        };
        let inputs =
            Targets::new(&LoraConfig { target_modules: feedforward(config)?, ..LoraConfig::default() }).ok();
        let random = !config.flag(INIT)?;
        let mut layers = Vec::new();
        let selection = Selection::attach(model, &lora, "ia3", &mut |linear: &mut Linear| {
            let input = inputs.as_ref().is_some_and(|t| t.adapts(linear.path(), true));
            let layer = Arc::new(Factors::new(linear, input, random, at)?);
            linear.attach(layer.clone());
            layers.push(layer);
            Ok(())
        })?;
        let mut config = config.clone();
        selection.name_targets(&mut config);
        Ok(Box::new(Attachment { config, layers, selection }))
    }

    fn sizes(&self, model: &mut dyn ModuleTree, config: &PeftConfig) -> Result<AdapterSizes> {
        let attached = self.attach(model, config, &Attaching::to_count(&Default::default()))?;
        Ok(AdapterSizes {
            kept: attached.params().into_iter().filter_map(kept).collect(),
            other: attached.params().into_iter().map(Param::len).collect(),
            ..AdapterSizes::default()
        })
    }
}

/// The configuration with targets, if any fit the model.
fn with_targets(model: &mut dyn ModuleTree, config: &PeftConfig) -> PeftConfig {
    let mut config = config.clone();
    if config.get("target_modules").is_none() {
        let mut paths = Vec::new();
        model.visit_modules(&mut |module| paths.push(module.path().to_string()));
        let has = |name: &&str| paths.iter().any(|path| ends_with_module(path, name));
        let fitting = KEYS_VALUES_FEEDFORWARD.iter().find(|names| names.iter().all(&has));
        if let Some([others @ .., last]) = fitting {
            config.set("target_modules", json!([others, &[*last]].concat()));
            if config.get(FEEDFORWARD).is_none() {
                config.set(FEEDFORWARD, json!([last]));
            }
        }
    }
    config
}

/// A layer whose output is kept for the gradient of its factors.
fn kept(param: &Param) -> Option<(String, usize)> {
    let output = param.name().ends_with(".ia3_l") && param.tensor().dims().last() == Some(&1);
    output.then(|| (param.name().to_string(), param.len()))
}

fn feedforward(config: &PeftConfig) -> Result<Option<TargetModules>> {
    let given = config.modules(FEEDFORWARD)?;
    let guess = |names: &[String]| {
        let known = names.iter().filter(|n| FEEDFORWARD_NAMES.contains(&n.as_str()));
        TargetModules::List(known.cloned().collect())
    };
    Ok(match (given, config.modules("target_modules")?) {
        (Some(given), _) => Some(given),
        (None, Some(TargetModules::List(names))) => Some(guess(&names)),
        // without targets the model decides on both
        (None, None) => None,
        (None, _) => Some(TargetModules::List(vec!["down_proj".to_string()])),
    })
}

/// The factors of one layer.
#[derive(Debug)]
struct Factors {
    path: String,
    /// `[out, 1]`, or `[1, in]` on the input: PEFT's shapes
    l: Param,
    input: bool,
}

impl Factors {
    fn new(linear: &Linear, input: bool, random: bool, at: &Attaching<'_>) -> Result<Self> {
        let path = linear.path().to_string();
        let shape = if input { (1, linear.in_features()) } else { (linear.out_features(), 1) };
        let start = match random {
            false => Tensor::ones(shape, DType::F32, at.device)?,
            true => {
                let numbers = gaussian(&mut generator(at.start.seed, &path), shape.0 * shape.1, 1.0);
                tensor_of(numbers, shape)?.to_device(at.device)?
            }
        };
        Ok(Self { l: Param::new(format!("base_model.model.{path}.ia3_l"), &start)?, path, input })
    }
}

impl LinearAdapter for Factors {
    fn changes_bias(&self) -> bool {
        !self.input
    }

    fn extend(&self, tape: &mut Tape<'_>, spec: &mut LinearSpec) -> OpResult<()> {
        let l = tape.param(&self.l);
        let l = ops::flatten(tape, &l)?;
        match self.input {
            true => spec.scale_input(tape, l),
            false => {
                spec.output_scale = Some(OutputScale { gain: l, covers_bias: true });
                Ok(())
            }
        }
    }
}

#[derive(Debug)]
struct Attachment {
    config: PeftConfig,
    layers: Vec<Arc<Factors>>,
    selection: Selection,
}

impl Attached for Attachment {
    fn config(&self) -> PeftConfig {
        self.config.clone()
    }

    fn params(&self) -> Vec<&Param> {
        self.layers.iter().map(|l| &l.l).chain(&self.selection.saved).collect()
    }

    fn unmatched_targets(&self) -> &[String] {
        &self.selection.unmatched
    }

    fn expand(&self, config: &mut PeftConfig) {
        self.selection.name_targets(config);
    }

    fn merged_weight(&self, path: &str, weight: Tensor) -> Result<Tensor> {
        let Some(layer) = self.layers.iter().find(|l| l.path == path) else { return Ok(weight) };
        Ok(weight.broadcast_mul(&layer.l.tensor().to_device(&Device::Cpu)?)?)
    }

    fn merged_bias(&self, path: &str, bias: Tensor) -> Result<Tensor> {
        let Some(layer) = self.layers.iter().find(|l| l.path == path && !l.input) else { return Ok(bias) };
        Ok((bias * layer.l.tensor().to_device(&Device::Cpu)?.flatten_all()?)?)
    }
}
