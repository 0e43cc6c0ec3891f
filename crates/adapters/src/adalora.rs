//! AdaLoRA (Zhang et al. 2023): a change of each weight in the form of a singular value decomposition, whose least
//! important parts are given up while training goes on, so that a budget of ranks goes where it is worth most.
//!
//! ```text
//! y = W·x + s·B·(E ⊙ A·x)        s = alpha / (init_r + 1e-5);  A [r, in], E [r, 1], B [out, r]
//! loss + orth_reg_weight · mean over all A and B of ‖A·Aᵀ - 1‖_F, ‖Bᵀ·B - 1‖_F
//! ```
//!
//! With M = A·Aᵀ - 1 the penalty's gradient is 2·M·A/‖M‖, and 2·B·M/‖M‖ for B. What is given up when is
//! [`allocator`](crate::adalora::allocator)'s; all is as PEFT's `RankAllocator` does it.

pub(crate) mod allocator;

use crate::method::{
    Attached, Attaching, Card, Decides, Kind, Method, Purpose, Setting, StepTaken, by_name, setting,
};
use crate::modules::{self, Selection};
use crate::random::{gaussian, generator};
use crate::{AdapterSizes, LayerSizes, Result};
use allocator::{Allocator, Schedule};
use candle_core::{DType, Device, Tensor};
use engobe_autograd::ops::{self, LinearSpec, LowRank};
use engobe_autograd::{Gradients, Param, Result as OpResult, Tape, tensor_of};
use engobe_formats::peft::{PeftConfig, number_json};
use engobe_nn::{Linear, LinearAdapter, ModuleTree};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

/// AdaLoRA.
#[derive(Debug)]
pub(crate) struct AdaLora;

/// A setting of the schedule or the penalty.
const fn training(name: &'static str, kind: Kind, help: &'static str) -> Setting {
    Setting { decides: Decides::Training, ..setting(name, kind, help) }
}

const SETTINGS: [Setting; 17] = [
    setting("init_r", Kind::Whole, "adalora: rank to start from [12]"),
    training("target_r", Kind::Whole, "adalora: rank to come to, on average [8]"),
    training("tinit", Kind::Whole, "adalora: steps before the budget falls [0]"),
    training("tfinal", Kind::Whole, "adalora: steps after it has fallen [0]"),
    training("deltaT", Kind::Whole, "adalora: steps between choices [1]"),
    training("beta1", Kind::Number, "adalora: decay of the mean importance [0.85]"),
    training("beta2", Kind::Number, "adalora: decay of its uncertainty [0.85]"),
    training(
        "orth_reg_weight",
        Kind::Number,
        "adalora: weight of the penalty that keeps factors orthogonal [0.5]",
    ),
    training("total_step", Kind::Whole, "adalora: steps of the schedule [those of the run]"),
    setting("lora_alpha", Kind::Number, modules::ALPHA_HELP),
    training("lora_dropout", Kind::Number, modules::DROPOUT_HELP),
    setting("target_modules", Kind::Names, modules::TARGETS_HELP),
    setting("exclude_modules", Kind::Names, modules::EXCLUDE_HELP),
    setting("layers_to_transform", Kind::Wholes, modules::LAYERS_HELP),
    setting("layers_pattern", Kind::Names, modules::PATTERN_HELP),
    setting("modules_to_save", Kind::Names, modules::SAVED_HELP),
    Setting { decides: Decides::Start, ..setting("rank_pattern", Kind::Table, modules::RANKS_HELP) },
];
/// Keys that PEFT's configuration takes over from LoRA's, and does not use or have on.
const UNUSED: [&str; 5] = ["r", "init_lora_weights", "megatron_core", "qalora_group_size", "bias"];

const CARD: Card = Card {
    name: "adalora",
    about: "low-rank factors whose ranks are shared out while training",
    peft_type: "ADALORA",
    settings: &SETTINGS,
    learning_rate: Some(2e-3),
    head_learning_rate: None,
};

impl Method for AdaLora {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn defaults(&self) -> Vec<(&'static str, Value)> {
        vec![("lora_alpha", json!(32)), ("target_modules", json!("all-linear"))]
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        CARD.check_keys(config, &[], &UNUSED, &["fan_in_fan_out", "use_dora"])?;
        config.choice("bias", &[("none", ())], ())?;
        let mut out = config.clone();
        for (key, default) in [("init_r", 12), ("target_r", 8), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)] {
            out.set(key, config.whole(key)?.unwrap_or(default));
        }
        for (key, default) in
            [("beta1", 0.85), ("beta2", 0.85), ("orth_reg_weight", 0.5), ("lora_alpha", 8.0)]
        {
            out.set(key, number_json(config.number(key)?.unwrap_or(default)));
        }
        for key in ["beta1", "beta2"] {
            let beta = out.number(key)?.unwrap_or_default();
            if !(beta > 0.0 && beta < 1.0) {
                return Err(config.bad(key, &beta.to_string(), "a number between 0 and 1").into());
            }
        }
        if out.number("orth_reg_weight")?.is_some_and(|w| !(w.is_finite() && w >= 0.0)) {
            return Err(config.bad("orth_reg_weight", "below 0", "a number, 0 or above").into());
        }
        if out.number("lora_alpha")?.is_none_or(|a| !(a.is_finite() && a > 0.0)) {
            return Err(config.bad("lora_alpha", "not above 0", "a number above 0").into());
        }
        for key in ["init_r", "deltaT", "target_r"] {
            config.count(key)?;
        }
        out.set("lora_dropout", config.dropout("lora_dropout")?);
        modules::write_rules(&modules::rules(config)?, &mut out);
        patterns(config)?;
        Ok(out)
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        let rules = modules::rules(config)?;
        let init_r = config.whole("init_r")?.unwrap_or(12);
        let scale = config.number("lora_alpha")?.unwrap_or(8.0) / (init_r as f64 + 1e-5);
        let dropout = config.dropout("lora_dropout")? as f32;
        let kept = if at.purpose == Purpose::Load { patterns(config)? } else { BTreeMap::new() };
        let mut triplets = Vec::new();
        let selection = Selection::attach(model, &rules, "adalora", &mut |linear: &mut Linear| {
            let of = kept.get(&format!("{}.lora_E", linear.path()));
            let r = of.map_or(init_r, |kept| kept.iter().filter(|k| **k).count());
            let triplet = Arc::new(Triplet::new(linear, r, scale as f32, dropout, at)?);
            linear.attach(triplet.clone());
            triplets.push(triplet);
            Ok(())
        })?;
        let mut config = config.clone();
        config.set("rank_pattern", Value::Null);
        selection.name_targets(&mut config);
        let number = |key: &str| config.number(key);
        let schedule = Schedule {
            initial: triplets.iter().map(|t| t.rank()).sum(),
            target: config.whole("target_r")?.unwrap_or(8) * triplets.len(),
            tinit: config.whole("tinit")?.unwrap_or(0),
            tfinal: config.whole("tfinal")?.unwrap_or(0),
            interval: config.whole("deltaT")?.unwrap_or(1),
            beta1: number("beta1")?.unwrap_or(0.85) as f32,
            beta2: number("beta2")?.unwrap_or(0.85) as f32,
        };
        let allocator = Allocator::new(schedule, &triplets)?;
        let penalty = number("orth_reg_weight")?.unwrap_or(0.5);
        Ok(Box::new(Attachment { config, triplets, allocator, penalty, total: OnceLock::new(), selection }))
    }

    fn sizes(&self, model: &mut dyn ModuleTree, config: &PeftConfig) -> Result<AdapterSizes> {
        let (r, mut thin) = (config.whole("init_r")?.unwrap_or(12), config.clone());
        thin.set("init_r", 1);
        let attached = self.attach(model, &thin, &Attaching::to_count(&Default::default()))?;
        let params = attached.params();
        let of = |end: &'static str| params.iter().filter(move |p| p.name().ends_with(end));
        let layers = of(".lora_A").zip(of(".lora_B")).map(|(a, b)| LayerSizes {
            path: a.name().to_string(),
            rank: r,
            in_features: a.len(),
            out_features: b.len(),
        });
        let saved = params
            .iter()
            .filter(|p| ![".lora_A", ".lora_B", ".lora_E"].iter().any(|e| p.name().ends_with(e)));
        Ok(AdapterSizes {
            layers: layers.collect(),
            vectors: of(".lora_E").map(|_| r).collect(),
            full: saved.map(|p| p.len()).collect(),
            dropout: config.dropout("lora_dropout")? > 0.0,
            ..AdapterSizes::default()
        })
    }
}

/// Which directions of each layer a file still has.
fn patterns(config: &PeftConfig) -> Result<BTreeMap<String, Vec<bool>>> {
    let right = "lists of true and false by layer";
    let flags = |v: &Value| v.as_array()?.iter().map(Value::as_bool).collect::<Option<Vec<bool>>>();
    Ok(config.pattern("rank_pattern", right, flags)?.into_iter().collect())
}

/// The change of one layer.
#[derive(Debug)]
pub(crate) struct Triplet {
    path: String,
    pub a: Param,
    pub e: Param,
    pub b: Param,
    scale: f32,
    dropout: f32,
}

impl Triplet {
    fn new(linear: &Linear, r: usize, scale: f32, dropout: f32, at: &Attaching<'_>) -> Result<Self> {
        let path = linear.path().to_string();
        let (out, width) = (linear.out_features(), linear.in_features());
        let mut rng = generator(at.start.seed, &path);
        let mut param = |kind: &str, shape: (usize, usize), std: f32| -> Result<Param> {
            let start = tensor_of(gaussian(&mut rng, shape.0 * shape.1, std), shape)?;
            Ok(Param::new(format!("base_model.model.{path}.lora_{kind}"), &start.to_device(at.device)?)?)
        };
        let (a, b) = (param("A", (r, width), 0.02)?, param("B", (out, r), 0.02)?);
        let e = param("E", (r, 1), 0.0)?;
        Ok(Self { a, e, b, scale, dropout, path })
    }

    /// Directions.
    pub fn rank(&self) -> usize {
        self.e.len()
    }
}

impl LinearAdapter for Triplet {
    fn extend(&self, tape: &mut Tape<'_>, spec: &mut LinearSpec) -> OpResult<()> {
        if self.rank() == 0 {
            return Ok(());
        }
        let (a, e, b) = (tape.param(&self.a), tape.param(&self.e), tape.param(&self.b));
        let a = ops::scale_rows(tape, &a, &e)?;
        spec.low_rank.push(LowRank { a, b, b_bias: None, scale: self.scale, dropout: self.dropout });
        Ok(())
    }
}

#[derive(Debug)]
struct Attachment {
    config: PeftConfig,
    triplets: Vec<Arc<Triplet>>,
    allocator: Allocator,
    penalty: f64,
    /// steps of the run
    total: OnceLock<usize>,
    selection: Selection,
}

impl Attachment {
    fn total(&self) -> Option<usize> {
        self.config.whole("total_step").ok().flatten().or_else(|| self.total.get().copied())
    }
}

impl Attached for Attachment {
    fn config(&self) -> PeftConfig {
        let mut config = self.config.clone();
        if let Some(total) = self.total() {
            config.set("total_step", total);
        }
        config
    }

    fn params(&self) -> Vec<&Param> {
        self.triplets.iter().flat_map(|t| [&t.a, &t.e, &t.b]).chain(&self.selection.saved).collect()
    }

    fn buffers(&self) -> Vec<&Param> {
        self.allocator.buffers()
    }

    fn begin(&self, total_steps: usize) -> Result<()> {
        let total = *self.total.get_or_init(|| total_steps);
        self.allocator.check(self.total().unwrap_or(total), &self.config)
    }

    fn penalty(&self, grads: &mut Gradients) -> Result<f64> {
        let (mut sum, count) = (0.0, 2 * self.triplets.len());
        for t in self.triplets.iter().filter(|t| self.penalty > 0.0 && t.rank() > 0) {
            let (a, b) = (t.a.tensor(), t.b.tensor());
            for (param, gram, is_a) in [(&t.a, a.matmul(&a.t()?)?, true), (&t.b, b.t()?.matmul(b)?, false)] {
                let m = (gram - Tensor::eye(t.rank(), DType::F32, a.device())?)?;
                let norm = f64::from(m.sqr()?.sum_all()?.to_device(&Device::Cpu)?.to_scalar::<f32>()?).sqrt();
                sum += norm;
                if norm > 0.0 {
                    let along = if is_a { m.matmul(a)? } else { b.matmul(&m)? };
                    grads.add(param.id(), (along * (2.0 * self.penalty / (norm * count as f64)))?)?;
                }
            }
        }
        Ok(self.penalty * sum / count.max(1) as f64)
    }

    fn after_step(&self, step: &StepTaken<'_>) -> Result<()> {
        self.allocator.after_step(&self.triplets, step, self.total().unwrap_or(step.total))
    }

    /// Directions that were given up are left out, as in PEFT's files.
    fn export(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = by_name(&self.params())?;
        for (t, kept) in self.triplets.iter().zip(self.allocator.kept()?) {
            let rows: Vec<u32> = (0u32..).zip(&kept).filter(|(_, kept)| **kept).map(|(i, _)| i).collect();
            if rows.len() == kept.len() {
                continue;
            }
            let index = Tensor::from_slice(&rows, rows.len(), &Device::Cpu)?;
            for (param, dim) in [(&t.a, 0), (&t.e, 0), (&t.b, 1)] {
                if let Some(value) = tensors.get_mut(param.name()) {
                    *value = value.index_select(&index, dim)?.contiguous()?;
                }
            }
        }
        Ok(tensors)
    }

    fn file_config(&self) -> PeftConfig {
        let mut config = self.config();
        if let (true, Ok(kept)) = (self.allocator.has_chosen(), self.allocator.kept()) {
            let pattern: Map<String, Value> = self
                .triplets
                .iter()
                .zip(kept)
                .map(|(t, kept)| (format!("{}.lora_E", t.path), json!(kept)))
                .collect();
            config.set("rank_pattern", pattern);
        }
        config
    }

    fn file_is_whole(&self) -> bool {
        !self.allocator.has_chosen()
    }

    fn unmatched_targets(&self) -> &[String] {
        &self.selection.unmatched
    }

    fn expand(&self, config: &mut PeftConfig) {
        self.selection.name_targets(config);
    }

    fn merged_weight(&self, path: &str, weight: Tensor) -> Result<Tensor> {
        let Some(t) = self.triplets.iter().find(|t| t.path == path && t.rank() > 0) else {
            return Ok(weight);
        };
        let delta = t.b.tensor().matmul(&t.a.tensor().broadcast_mul(t.e.tensor())?)?;
        Ok((weight + (delta * f64::from(t.scale))?.to_device(&Device::Cpu)?)?)
    }
}
