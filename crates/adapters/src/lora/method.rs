//! LoRA as a method: which layers it adapts, its settings, its files, its merge.

use super::LoraLayer;
use crate::method::{Attached, Attaching, Decides, Kind, Method, Setting, StartText, setting};
use crate::saved;
use crate::target::Targets;
use crate::{AdapterSizes, Error, LayerSizes, Result};
use candle_core::{Device, Tensor};
use engobe_autograd::Param;
use engobe_formats::peft::{BiasMode, LoraConfig, PeftConfig, TargetModules};
use engobe_nn::{Linear, ModuleMut, ModuleTree};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;

/// LoRA.
#[derive(Debug)]
pub(crate) struct Lora;

/// An adapter of LoRA on a model.
#[derive(Debug)]
struct LoraAdapter {
    config: LoraConfig,
    layers: Vec<Arc<LoraLayer>>,
    /// biases and modules trained in full
    others: Vec<Param>,
    /// entries of target_modules that no module answers to
    unmatched: Vec<String>,
    /// trained elements that are the base's own (biases)
    base_elements: usize,
    /// what `all-linear` stands for in this model
    linear_names: BTreeSet<String>,
}

const SETTINGS: [Setting; 13] = [
    setting("r", Kind::Whole, "rank [16]"),
    setting("lora_alpha", Kind::Number, "scale is lora_alpha / r [32]"),
    Setting {
        decides: Decides::Training,
        ..setting("lora_dropout", Kind::Number, "dropout on the adapter's input [0]")
    },
    setting("use_rslora", Kind::Flag, "scale by lora_alpha / sqrt(r) instead"),
    setting("target_modules", Kind::Names, "names, a regex, or all-linear [all-linear]"),
    setting("exclude_modules", Kind::Names, "names or a regex to leave out"),
    setting("layers_to_transform", Kind::Wholes, "layers to adapt [all]"),
    setting("layers_pattern", Kind::Names, "name of the list that the layers count in"),
    setting("rank_pattern", Kind::Table, "ranks by module pattern"),
    setting("alpha_pattern", Kind::Table, "alphas by module pattern"),
    setting("bias", Kind::Text, "biases to train: none, all, lora_only [none]"),
    setting("modules_to_save", Kind::Names, "modules to train in full"),
    Setting {
        decides: Decides::Start,
        ..setting("init_lora_weights", Kind::FlagOrText, "true (Kaiming A, zero B), gaussian, false [true]")
    },
];

impl Method for Lora {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn about(&self) -> &'static str {
        "low-rank factors beside linear layers"
    }

    fn peft_type(&self) -> &'static str {
        "LORA"
    }

    fn settings(&self) -> &'static [Setting] {
        &SETTINGS
    }

    fn defaults(&self) -> Vec<(&'static str, Value)> {
        vec![("r", json!(16)), ("lora_alpha", json!(32)), ("target_modules", json!("all-linear"))]
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        Ok(PeftConfig::from(&LoraConfig::read(config)?))
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        Ok(Box::new(LoraAdapter::attach(model, &LoraConfig::read(config)?, at)?))
    }

    /// It is attached with factors of rank 1, so that hardly any memory is taken whatever the ranks.
    fn sizes(&self, model: &mut dyn ModuleTree, config: &PeftConfig) -> Result<AdapterSizes> {
        let config = LoraConfig::read(config)?;
        let targets = Targets::new(&config)?;
        let mut thin = LoraConfig { r: 1, ..config.clone() };
        thin.rank_pattern.iter_mut().for_each(|(_, r)| *r = 1);
        let adapter = LoraAdapter::attach(model, &thin, &Attaching::to_count(&StartText::default()))?;
        let layers = adapter.layers.iter().map(|l| {
            let [a, b] = l.params().map(Param::len);
            let rank = targets.rank(l.path(), config.r);
            LayerSizes { path: l.path().to_string(), rank, in_features: a, out_features: b }
        });
        Ok(AdapterSizes {
            layers: layers.collect(),
            full: adapter.others.iter().map(Param::len).collect(),
            base_elements: adapter.base_elements,
            dropout: config.lora_dropout > 0.0,
            ..AdapterSizes::default()
        })
    }
}

impl LoraAdapter {
    fn attach(model: &mut dyn ModuleTree, config: &LoraConfig, at: &Attaching<'_>) -> Result<Self> {
        let targets = Targets::new(config)?;
        let heads = model.output_heads();
        let mut paths = Vec::new();
        model.visit_modules(&mut |m| paths.push(m.path().to_string()));
        let mut attached = Attach {
            config,
            targets: &targets,
            at,
            layers: vec![],
            others: vec![],
            base_elements: 0,
            linear_names: BTreeSet::new(),
            fan_in_fan_out: false,
        };
        let mut result = Ok(());
        model.visit_modules(&mut |mut module| {
            if result.is_ok() {
                result = attached.module(&mut module, &heads);
            }
        });
        result?;
        let Attach { layers, others, base_elements, linear_names, fan_in_fan_out, .. } = attached;
        if layers.is_empty() {
            if let Some(indices) = config.layers_to_transform.as_ref().filter(|l| !l.is_empty()) {
                let reason =
                    format!("= {indices:?} leaves no module of this model that target_modules names");
                return Err(Error::Conflict { keys: "layers_to_transform", reason: reason.into() });
            }
            return Err(nothing("target_modules", format!("{:?}", config.target_modules), &paths));
        }
        let (unmatched, unsaved) = targets.unmatched(&paths);
        if let Some(name) = unsaved.first() {
            return Err(nothing("modules_to_save", (*name).to_string(), &paths));
        }
        let unmatched = unmatched.into_iter().map(str::to_string).collect();
        let mut config = LoraConfig { fan_in_fan_out, ..config.clone() };
        if config.target_modules == Some(TargetModules::AllLinear) {
            // files name the layers, as PEFT's do: other readers need not know the shorthand
            config.target_modules = Some(TargetModules::List(linear_names.iter().cloned().collect()));
        }
        Ok(Self { config, layers, others, unmatched, base_elements, linear_names })
    }
}

impl Attached for LoraAdapter {
    fn config(&self) -> PeftConfig {
        PeftConfig::from(&self.config)
    }

    fn params(&self) -> Vec<&Param> {
        self.layers.iter().flat_map(|l| l.params()).chain(&self.others).collect()
    }

    fn base_elements(&self) -> usize {
        self.base_elements
    }

    fn unmatched_targets(&self) -> &[String] {
        &self.unmatched
    }

    fn expand(&self, config: &mut PeftConfig) {
        if config.text("target_modules").is_some_and(|t| t.eq_ignore_ascii_case("all-linear")) {
            config.set("target_modules", json!(self.linear_names));
        }
    }

    /// `W + s·B·A`.
    fn merged_weight(&self, path: &str, mut weight: Tensor) -> Result<Tensor> {
        for layer in self.layers.iter().filter(|l| l.path() == path) {
            weight = (weight + layer.delta()?.to_device(&Device::Cpu)?)?;
        }
        Ok(weight)
    }
}

/// The walk over a model's modules that attaches the adapter.
struct Attach<'a> {
    config: &'a LoraConfig,
    targets: &'a Targets,
    at: &'a Attaching<'a>,
    layers: Vec<Arc<LoraLayer>>,
    others: Vec<Param>,
    base_elements: usize,
    linear_names: BTreeSet<String>,
    fan_in_fan_out: bool,
}

impl Attach<'_> {
    fn module(&mut self, module: &mut ModuleMut<'_>, heads: &[String]) -> Result<()> {
        if self.targets.saves(module.path()) {
            if let ModuleMut::Linear(linear) = module
                && linear.is_transposed_in_files()
            {
                return Err(Error::Conv1d { path: linear.path().to_string() });
            }
            self.others.extend(saved::train_module(module)?);
            return Ok(());
        }
        let kind = match module {
            ModuleMut::Linear(linear) => {
                let plain = !heads.iter().any(|h| h == linear.path());
                if plain {
                    let name = linear.path().rsplit('.').next().unwrap_or_default();
                    self.linear_names.insert(name.to_string());
                }
                let adapted = self.targets.adapts(linear.path(), plain);
                if adapted {
                    self.linear(linear)?;
                }
                return self.bias(linear, adapted);
            }
            ModuleMut::Embedding(_) => "an embedding",
            ModuleMut::RmsNorm(_) | ModuleMut::LayerNorm(_) => "a norm",
        };
        match self.targets.adapts(module.path(), false) {
            true => Err(Error::Unsupported { path: module.path().to_string(), kind }),
            false => Ok(()),
        }
    }

    fn linear(&mut self, linear: &mut Linear) -> Result<()> {
        let path = linear.path().to_string();
        let r = self.targets.rank(&path, self.config.r);
        let alpha = self.targets.alpha(&path, self.config.lora_alpha);
        let scale = if self.config.use_rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 };
        let layer = LoraLayer::new(
            &path,
            (linear.out_features(), linear.in_features()),
            r,
            scale,
            self.config.lora_dropout,
            self.config.init_lora_weights,
            self.at.start.seed,
            self.at.device,
        )?;
        let layer = Arc::new(layer);
        linear.attach(layer.clone());
        self.fan_in_fan_out |= linear.is_transposed_in_files();
        self.layers.push(layer);
        Ok(())
    }

    fn bias(&mut self, linear: &mut Linear, adapted: bool) -> Result<()> {
        let wanted = match self.config.bias {
            BiasMode::None => false,
            BiasMode::All => true,
            BiasMode::LoraOnly => adapted,
        };
        if wanted {
            let bias = saved::train_bias(linear, adapted)?;
            self.base_elements += bias.as_ref().map_or(0, Param::len);
            self.others.extend(bias);
        }
        Ok(())
    }
}

/// The last parts of module paths, each once: what a user may put into `target_modules`.
fn nothing(key: &'static str, given: String, paths: &[String]) -> Error {
    let mut kinds: Vec<&str> = paths.iter().filter_map(|p| p.rsplit('.').next()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    Error::NothingMatches { key, given, available: kinds.join(", ") }
}
