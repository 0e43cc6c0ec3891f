//! LoRA as a method: which layers it adapts, its settings, its files, its merge.

use super::{LoraEmbedding, LoraLayer};
use crate::method::{Attached, Attaching, Card, Decides, Kind, Method, Setting, StartText, by_name, setting};
use crate::modules::{self, nothing};
use crate::saved;
use crate::target::{Targets, ends_with_module};
use crate::tokens::TokenRows;
use crate::{AdapterSizes, Error, LayerSizes, Result};
use candle_core::{Device, Tensor};
use engobe_autograd::Param;
use engobe_formats::peft::{BiasMode, InitLoraWeights, LoraConfig, PeftConfig, TargetModules, TokenIndices};
use engobe_nn::{Embedding, Linear, ModuleMut, ModuleTree, Weight};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// LoRA.
#[derive(Debug)]
pub(crate) struct Lora;

/// An adapter of LoRA on a model.
#[derive(Debug)]
struct LoraAdapter {
    config: LoraConfig,
    layers: Vec<Arc<LoraLayer>>,
    embeddings: Vec<Arc<LoraEmbedding>>,
    tokens: Vec<Arc<TokenRows>>,
    /// biases and modules trained in full
    others: Vec<Param>,
    /// entries of target_modules that no module answers to
    unmatched: Vec<String>,
    /// trained elements that are the base's own (biases)
    base_elements: usize,
    /// what `all-linear` stands for in this model
    linear_names: BTreeSet<String>,
}

const SETTINGS: [Setting; 18] = [
    setting("r", Kind::Whole, modules::RANK_HELP),
    setting("lora_alpha", Kind::Number, modules::ALPHA_HELP),
    Setting { decides: Decides::Training, ..setting("lora_dropout", Kind::Number, modules::DROPOUT_HELP) },
    setting("use_rslora", Kind::Flag, "scale by lora_alpha / sqrt(r) instead"),
    setting("target_modules", Kind::Names, modules::TARGETS_HELP),
    setting("exclude_modules", Kind::Names, modules::EXCLUDE_HELP),
    setting("layers_to_transform", Kind::Wholes, modules::LAYERS_HELP),
    setting("layers_pattern", Kind::Names, modules::PATTERN_HELP),
    setting("rank_pattern", Kind::Table, modules::RANKS_HELP),
    setting("alpha_pattern", Kind::Table, "alphas by module pattern"),
    setting("bias", Kind::Text, "biases to train: none, all, lora_only [none]"),
    setting("modules_to_save", Kind::Names, modules::SAVED_HELP),
    Setting {
        decides: Decides::Start,
        ..setting(
            "init_lora_weights",
            Kind::FlagOrText,
            "true (Kaiming A, zero B), gaussian, pissa, pissa_niter_N, olora, loftq, false [true]",
        )
    },
    setting("use_dora", Kind::Flag, "train a magnitude for each output beside the direction (DoRA)"),
    setting("lora_bias", Kind::Flag, "a bias behind B"),
    Setting {
        decides: Decides::Start,
        ..setting("loftq_config", Kind::Table, "of init loftq: { loftq_bits = 4, loftq_iter = 1 }")
    },
    setting("trainable_token_indices", Kind::Wholes, "ids of tokens whose embeddings are trained"),
    setting("ensure_weight_tying", Kind::Flag, "a tied head has the trained tokens too (it always does)"),
];

const CARD: Card = Card {
    name: "lora",
    about: "low-rank factors beside linear layers",
    peft_type: "LORA",
    settings: &SETTINGS,
    learning_rate: None,
    head_learning_rate: Some(2e-3),
};

impl Method for Lora {
    fn card(&self) -> &'static Card {
        &CARD
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
        let size = |path: &str, [a, b]: [&Param; 2]| LayerSizes {
            path: path.to_string(),
            rank: targets.rank(path, config.r),
            in_features: a.len(),
            out_features: b.len(),
        };
        let layers = adapter.layers.iter().map(|l| size(l.path(), l.factors()));
        let embeddings = adapter.embeddings.iter().flat_map(|e| {
            let rank = targets.rank(e.path(), config.r);
            e.factors().map(|p| rank * p.len())
        });
        let tokens = adapter.tokens.iter().map(|t| t.param().len());
        Ok(AdapterSizes {
            layers: layers.collect(),
            kept: adapter
                .layers
                .iter()
                .filter(|l| l.scales_output())
                .map(|l| (l.path().to_string(), l.factors()[1].len()))
                .collect(),
            vectors: adapter.layers.iter().flat_map(|l| l.vectors()).map(Param::len).collect(),
            other: embeddings.chain(tokens).collect(),
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
            embeddings: vec![],
            tokens: vec![],
            inputs: vec![],
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
        let Attach {
            layers, embeddings, tokens, others, base_elements, linear_names, fan_in_fan_out, ..
        } = attached;
        if layers.is_empty() && embeddings.is_empty() {
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
        if let Some(name) = unanswered(config, &tokens) {
            return Err(nothing("trainable_token_indices", name, &paths));
        }
        let unmatched = unmatched.into_iter().map(str::to_string).collect();
        let mut config = LoraConfig { fan_in_fan_out, ..config.clone() };
        if config.target_modules == Some(TargetModules::AllLinear) {
            // files name the layers, as PEFT's do: other readers need not know the shorthand
            config.target_modules = Some(TargetModules::List(linear_names.iter().cloned().collect()));
        }
        Ok(Self { config, layers, embeddings, tokens, others, unmatched, base_elements, linear_names })
    }
}

impl Attached for LoraAdapter {
    fn config(&self) -> PeftConfig {
        PeftConfig::from(&self.config)
    }

    fn params(&self) -> Vec<&Param> {
        let layers = self.layers.iter().flat_map(|l| l.factors().into_iter().chain(l.vectors()));
        let embeddings = self.embeddings.iter().flat_map(|e| e.factors());
        layers.chain(embeddings).chain(self.tokens.iter().map(|t| t.param())).chain(&self.others).collect()
    }

    /// What was taken out of the base is given back as a second half of the factors (`[A; A₀]`, `[B, -B₀]`), as PEFT
    /// converts PiSSA and OLoRA: the file is plain LoRA of twice the rank, over the base as it was.
    fn export(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = by_name(&self.params())?;
        for layer in &self.layers {
            let Some(taken) = layer.taken_out() else { continue };
            let [a, b] = layer.factors().map(Param::name);
            for (name, taken, dim) in [(a, taken.a.clone(), 0), (b, taken.b.neg()?, 1)] {
                let taken = taken.to_device(&Device::Cpu)?;
                if let Some(value) = tensors.get_mut(name) {
                    *value = Tensor::cat(&[&*value, &taken], dim)?.contiguous()?;
                }
            }
        }
        Ok(tensors)
    }

    fn file_config(&self) -> PeftConfig {
        if self.file_is_whole() {
            return self.config();
        }
        let c = &self.config;
        // the scale stays: alpha/r, or alpha/√r
        let more = if c.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        PeftConfig::from(&LoraConfig {
            r: 2 * c.r,
            lora_alpha: more * c.lora_alpha,
            rank_pattern: c.rank_pattern.iter().map(|(p, r)| (p.clone(), 2 * r)).collect(),
            alpha_pattern: c.alpha_pattern.iter().map(|(p, a)| (p.clone(), more * a)).collect(),
            init_lora_weights: InitLoraWeights::Kaiming,
            ..c.clone()
        })
    }

    fn file_is_whole(&self) -> bool {
        self.layers.iter().all(|l| l.taken_out().is_none())
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
            weight = layer.merged(weight)?;
        }
        for embedding in self.embeddings.iter().filter(|e| e.path() == path) {
            weight = embedding.merged(weight)?;
        }
        for tokens in self.tokens.iter().filter(|t| t.covers(path)) {
            weight = tokens.merged(weight)?;
        }
        Ok(weight)
    }

    fn merged_bias(&self, path: &str, mut bias: Tensor) -> Result<Tensor> {
        for layer in self.layers.iter().filter(|l| l.path() == path) {
            bias = layer.merged_bias(bias)?;
        }
        Ok(bias)
    }

    fn merge_refusal(&self) -> Option<&'static str> {
        let homeless = self.layers.iter().any(|l| l.has_bias() && !l.base_has_bias());
        homeless.then_some("lora_bias gave a bias to layers that have none in the base model")
    }
}

/// Rank and scale of the module at `path`.
pub(crate) fn rank_of(targets: &Targets, config: &LoraConfig, path: &str) -> (usize, f64) {
    let r = targets.rank(path, config.r);
    let alpha = targets.alpha(path, config.lora_alpha);
    (r, if config.use_rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 })
}

/// A module of trainable_token_indices that no embedding answers to.
fn unanswered(config: &LoraConfig, tokens: &[Arc<TokenRows>]) -> Option<String> {
    match &config.trainable_token_indices {
        None => None,
        Some(TokenIndices::Input(_)) => tokens.is_empty().then(|| "the input embedding".to_string()),
        Some(TokenIndices::Modules(modules)) => {
            let answers = |name: &str| tokens.iter().any(|t| t.covers_name(name));
            modules.iter().map(|(name, _)| name).find(|name| !answers(name)).cloned()
        }
    }
}

/// The walk over a model's modules that attaches the adapter.
struct Attach<'a> {
    config: &'a LoraConfig,
    targets: &'a Targets,
    at: &'a Attaching<'a>,
    layers: Vec<Arc<LoraLayer>>,
    embeddings: Vec<Arc<LoraEmbedding>>,
    tokens: Vec<Arc<TokenRows>>,
    /// matrices of embeddings with trained tokens, to find the heads that are tied to them
    inputs: Vec<(Weight, usize)>,
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
                self.tied_tokens(linear);
                return self.bias(linear, adapted);
            }
            ModuleMut::Embedding(embedding) => {
                self.tokens(embedding)?;
                if self.targets.adapts(embedding.path(), false) {
                    self.embedding(embedding)?;
                }
                return Ok(());
            }
            ModuleMut::LayerNorm(norm) => {
                if self.config.bias == BiasMode::All {
                    let bias = saved::train_norm_bias(norm)?;
                    self.base_elements += bias.as_ref().map_or(0, Param::len);
                    self.others.extend(bias);
                }
                "a norm"
            }
            ModuleMut::RmsNorm(_) => "a norm",
        };
        match self.targets.adapts(module.path(), false) {
            true => Err(Error::Unsupported { path: module.path().to_string(), kind }),
            false => Ok(()),
        }
    }

    fn linear(&mut self, linear: &mut Linear) -> Result<()> {
        let (r, scale) = rank_of(self.targets, self.config, linear.path());
        let layer = Arc::new(LoraLayer::new(linear, r, scale, self.config, self.at)?);
        linear.attach(layer.clone());
        self.fan_in_fan_out |= linear.is_transposed_in_files();
        self.layers.push(layer);
        Ok(())
    }

    fn embedding(&mut self, embedding: &mut Embedding) -> Result<()> {
        let path = embedding.path().to_string();
        let c = self.config;
        let simple = !c.use_dora && !c.lora_bias && !c.ensure_weight_tying;
        let init = matches!(
            c.init_lora_weights,
            InitLoraWeights::Kaiming | InitLoraWeights::Gaussian | InitLoraWeights::Random
        );
        if !simple || !init {
            let reason = format!(
                "names {path}, an embedding: it takes no use_dora, lora_bias, ensure_weight_tying, or start made of the base's weight"
            );
            return Err(Error::Conflict { keys: "target_modules", reason: reason.into() });
        }
        if self.tokens.iter().any(|t| t.path() == path) {
            let reason = format!("and trainable_token_indices both name {path}");
            return Err(Error::Conflict { keys: "target_modules", reason: reason.into() });
        }
        let (r, scale) = rank_of(self.targets, self.config, &path);
        let layer = Arc::new(LoraEmbedding::new(embedding, r, scale, self.at)?);
        embedding.attach(layer.clone());
        self.embeddings.push(layer);
        Ok(())
    }

    /// Trained tokens of an embedding. The first embedding of a model is its input.
    fn tokens(&mut self, embedding: &mut Embedding) -> Result<()> {
        let path = embedding.path();
        let ends = |name: &str| ends_with_module(path, name);
        let ids = match &self.config.trainable_token_indices {
            Some(TokenIndices::Input(ids)) if self.tokens.is_empty() => ids,
            Some(TokenIndices::Modules(modules)) => match modules.iter().find(|(name, _)| ends(name)) {
                Some((_, ids)) => ids,
                None => return Ok(()),
            },
            _ => return Ok(()),
        };
        let rows = Arc::new(TokenRows::new(embedding, ids, "token_adapter.", self.at)?);
        self.inputs.push((embedding.weight().clone(), self.tokens.len()));
        embedding.attach(rows.clone());
        self.tokens.push(rows);
        Ok(())
    }

    /// A head that is the embedding's matrix has its trained tokens.
    fn tied_tokens(&mut self, linear: &mut Linear) {
        let tied = self.inputs.iter().find(|(weight, _)| weight.is_same(linear.weight()));
        if let Some(rows) = tied.and_then(|(_, i)| self.tokens.get(*i)) {
            rows.tie(linear.path());
            linear.attach(rows.clone());
        }
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
