//! Heads of task models as transformers builds them (`…ForSequenceClassification`, `…ForTokenClassification`), by family.
//!
//! A layer that the checkpoint has, in the shape that is needed, is taken from it. One that it lacks begins as
//! transformers begins it: weights normal with the configuration's `initializer_range`, biases zero.

use crate::encoders::{EncoderArchitecture, activation, bad};
use crate::family::Architecture;
use crate::outline::headers;
use crate::registry::{Described, check_quantization};
use crate::scope::Naming;
use crate::{Error, LoadOptions, Result, Weights, encoder_architecture};
use candle_core::{Device, Shape, Tensor};
use engobe_autograd::tensor_of;
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::hf_config::HfConfig;
use engobe_kernels::activation::Activation;
use engobe_kernels::random;
use engobe_nn::{
    Encoder, FrozenWeight, HeadLayer, HeadlessDecoder, LayerNorm, Linear, Norm, Pooling, TaskHead, TaskModel,
};
use serde_json::Value;
use std::path::Path;

/// What a head is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadKind {
    /// logits of a text
    Sequence,
    /// logits of tokens
    Token,
}

impl HeadKind {
    /// What it reads.
    fn reads(self) -> &'static str {
        match self {
            Self::Sequence => "a text",
            Self::Token => "every token",
        }
    }

    /// How transformers' classes with such a head end.
    fn class_end(self) -> &'static str {
        match self {
            Self::Sequence => "ForSequenceClassification",
            Self::Token => "ForTokenClassification",
        }
    }
}

/// The configuration of a model: in a Hugging Face directory, a GGUF file, or a `config.json` by itself.
pub fn config_of(path: &Path) -> Result<HfConfig> {
    let (file, checkpoint) = headers(path)?;
    described_config(&file, checkpoint.as_ref())
}

/// The configuration in `file`: a `config.json`, or the GGUF file that `checkpoint` is.
pub(crate) fn described_config(file: &Path, checkpoint: Option<&Checkpoint>) -> Result<HfConfig> {
    match checkpoint.and_then(Checkpoint::gguf) {
        None => Ok(HfConfig::read(file)?),
        Some(gguf) => match crate::hf_config_of(gguf)? {
            Value::Object(raw) => Ok(HfConfig::made(file, raw)),
            _ => Ok(HfConfig::made(file, Default::default())),
        },
    }
}

/// The class that transformers loads a model of this configuration with a head with.
///
/// # Errors
/// It is no model that can have a head.
pub fn task_class(config: &HfConfig, kind: HeadKind) -> Result<String> {
    let stem = match TaskBase::of(config, None)? {
        TaskBase::Encoder(architecture) => {
            let found = config.model_type()?;
            let named = architecture.names().find(|(name, _)| *name == found);
            named.map_or(architecture.class, |(_, class)| class)
        }
        TaskBase::Decoder(described) => described.architecture.stem,
    };
    Ok(format!("{stem}{}", kind.class_end()))
}

/// What a head stands on.
pub(crate) enum TaskBase {
    Encoder(&'static EncoderArchitecture),
    Decoder(Described),
}

impl TaskBase {
    /// The architecture of a configuration, or of the GGUF file that `checkpoint` is.
    pub(crate) fn of(config: &HfConfig, checkpoint: Option<&Checkpoint>) -> Result<Self> {
        check_quantization(config)?;
        if let Ok(architecture) = encoder_architecture(config) {
            return Ok(Self::Encoder(architecture));
        }
        Ok(Self::Decoder(match checkpoint.and_then(Checkpoint::gguf) {
            Some(gguf) => Described::from_gguf(gguf)?,
            None => Described::from_hf(config)?,
        }))
    }

    /// What is known of a decoder, by which its weights are read.
    pub(crate) fn described(&self) -> Option<&Described> {
        match self {
            Self::Encoder(_) => None,
            Self::Decoder(described) => Some(described),
        }
    }

    /// The model over `weights` with a head of `labels` logits; `seed` decides how layers that `weights` lacks begin.
    pub(crate) fn build(
        &self,
        config: &HfConfig,
        weights: Weights<'_>,
        kind: HeadKind,
        labels: usize,
        seed: u64,
    ) -> Result<TaskModel> {
        let weights = match self {
            Self::Encoder(_) => weights,
            Self::Decoder(_) => weights.headless(),
        };
        let base: Box<dyn Encoder> = match self {
            Self::Encoder(architecture) => (architecture.build)(config, &weights, Naming::UnderTask)?,
            Self::Decoder(described) => Box::new(HeadlessDecoder::new(described.family.build(&weights)?)),
        };
        let d = match self {
            Self::Encoder(_) => None,
            Self::Decoder(_) => config.opt_usize("word_embed_proj_dim")?,
        };
        let d = d.unwrap_or(base.info().hidden_size);
        let mut builder = HeadBuilder { config, weights: &weights, d, labels, seed, fresh: Vec::new() };
        let parts = match self {
            Self::Encoder(architecture) => builder.encoder(kind, architecture)?,
            Self::Decoder(described) => builder.decoder(kind, described.architecture)?,
        };
        Ok(builder.finish(base, parts))
    }
}

/// Loads an encoder, or a decoder without its output head, with a head of `labels` logits; `seed` decides how new layers
/// begin.
///
/// # Errors
/// An architecture without such a head.
pub fn load_task_model(
    path: &Path,
    options: &LoadOptions,
    kind: HeadKind,
    labels: usize,
    seed: u64,
) -> Result<TaskModel> {
    let checkpoint = Checkpoint::open(path)?;
    let config = config_of(path)?;
    let base = TaskBase::of(&config, Some(&checkpoint))?;
    let weights = match base.described() {
        None => Weights::hugging_face(&checkpoint, options)?,
        Some(described) => Weights::of(described, &checkpoint, options)?,
    };
    base.build(&config, weights, kind, labels, seed)
}

/// transformers has no such class, so nobody could read what was trained.
fn none_of(config: &HfConfig, found: &str, reads: &str) -> Error {
    let expected = format!("an architecture for which transformers has a head that reads {reads}");
    bad(config, "model_type", found, &expected)
}

struct HeadBuilder<'a> {
    config: &'a HfConfig,
    weights: &'a Weights<'a>,
    d: usize,
    labels: usize,
    seed: u64,
    fresh: Vec<String>,
}

type Parts = (Option<Pooling>, Vec<HeadLayer>);

impl HeadBuilder<'_> {
    fn finish(self, base: Box<dyn Encoder>, (pooling, layers): Parts) -> TaskModel {
        // PEFT trains what ends in "classifier" or "score"; whatever else begins at random must be kept as well
        let last = layers.last().map_or("classifier", |layer| layer.linear.path());
        let head = last.split('.').next().unwrap_or(last).to_string();
        let mut saved = vec![head.clone()];
        for path in &self.fresh {
            if !path.split('.').any(|part| part.ends_with(&head)) {
                saved.push(path.clone());
            }
        }
        TaskModel::new(base, TaskHead { pooling, layers, saved, fresh: self.fresh })
    }

    fn encoder(&mut self, kind: HeadKind, architecture: &EncoderArchitecture) -> Result<Parts> {
        match (kind, architecture.model_type) {
            (HeadKind::Sequence, "bert") => self.bert(architecture.prefix),
            (HeadKind::Sequence, "roberta") => self.first_token(Activation::Tanh),
            (HeadKind::Sequence, "electra") => self.first_token(Activation::Gelu),
            (HeadKind::Sequence, "distilbert") => self.distilbert(),
            (HeadKind::Sequence, "deberta-v2") => self.deberta(),
            (kind, "modernbert") => self.modernbert(kind),
            (HeadKind::Token, _) => self.tokens(),
            (HeadKind::Sequence, other) => Err(none_of(self.config, other, "a text")),
        }
    }

    /// `score` without a bias over the last token; over every token `score`, or `classifier` in older families.
    fn decoder(&mut self, kind: HeadKind, architecture: &Architecture) -> Result<Parts> {
        let model_type = architecture.model_type;
        if !architecture.heads.contains(&kind) {
            return Err(none_of(self.config, model_type, kind.reads()));
        }
        let linear = |path: &'static str, bias: bool, builder: &mut Self| {
            builder.linear(path, builder.labels, builder.d, bias)
        };
        let (pooling, dropout, linear) = match (kind, model_type) {
            (HeadKind::Sequence, _) => (Some(Pooling::Last), 0.0, linear("score", false, self)?),
            (HeadKind::Token, "gpt_neox") => {
                (None, self.probability("classifier_dropout", 0.1)?, linear("classifier", true, self)?)
            }
            (HeadKind::Token, other) => {
                let key = ["classifier_dropout", "hidden_dropout"]
                    .into_iter()
                    .find(|k| self.config.get(k).is_some());
                let dropout = self.probability(key.unwrap_or("classifier_dropout"), 0.1)?;
                let path = if other == "gpt2" { "classifier" } else { "score" };
                let bias = self.config.bool_or("token_classification_bias", true)?;
                (None, dropout, linear(path, bias, self)?)
            }
        };
        Ok((pooling, vec![HeadLayer { dropout, linear, activation: None, norm: None }]))
    }

    /// The pooler's output, dropout, `classifier`. Checkpoints of masked language models have no pooler: it begins at random
    /// there, as in transformers.
    fn bert(&mut self, prefix: &str) -> Result<Parts> {
        let (dropout, pooler) = (self.dropout()?, format!("{prefix}.pooler.dense"));
        let there = ["pooler.dense", &pooler].iter().any(|p| self.weights.contains(&format!("{p}.weight")));
        let pooler = match there {
            true => None,
            false => Some(self.layer(&pooler, self.d, 0.0, Some(Activation::Tanh))?),
        };
        let pooling = if there { Pooling::Pooler } else { Pooling::First };
        let classifier = self.layer("classifier", self.labels, dropout, None)?;
        Ok((Some(pooling), pooler.into_iter().chain([classifier]).collect()))
    }

    /// `classifier.dense` over the first token, `between`, `classifier.out_proj`.
    fn first_token(&mut self, between: Activation) -> Result<Parts> {
        let dropout = self.dropout()?;
        let dense = self.layer("classifier.dense", self.d, dropout, Some(between))?;
        Ok((
            Some(Pooling::First),
            vec![dense, self.layer("classifier.out_proj", self.labels, dropout, None)?],
        ))
    }

    fn distilbert(&mut self) -> Result<Parts> {
        let dropout = self.probability("seq_classif_dropout", 0.2)?;
        let before = self.layer("pre_classifier", self.d, 0.0, Some(Activation::Relu))?;
        Ok((Some(Pooling::First), vec![before, self.layer("classifier", self.labels, dropout, None)?]))
    }

    /// The pooler belongs to the head: checkpoints of the bare model have none.
    fn deberta(&mut self) -> Result<Parts> {
        let act = activation(self.config, "pooler_hidden_act", "gelu")?;
        let pooler_dropout = self.probability("pooler_dropout", 0.0)?;
        let dropout = self.probability(self.first_of(&["cls_dropout", "hidden_dropout_prob"]), 0.1)?;
        let dense = self.layer("pooler.dense", self.d, pooler_dropout, Some(act))?;
        Ok((Some(Pooling::First), vec![dense, self.layer("classifier", self.labels, dropout, None)?]))
    }

    fn modernbert(&mut self, kind: HeadKind) -> Result<Parts> {
        let act = activation(self.config, "classifier_activation", "gelu")?;
        let eps = self.config.opt_f64("norm_eps")?.unwrap_or(1e-5) as f32;
        let (bias, norm_bias) =
            (self.config.bool_or("classifier_bias", false)?, self.config.bool_or("norm_bias", false)?);
        let dropout = self.probability("classifier_dropout", 0.0)?;
        let d = self.d;
        let linear = self.linear("head.dense", d, d, bias)?;
        let vector = |name: &str, start: f32| -> Result<Tensor> {
            match self.weights.contains(name) {
                true => self.weights.vector(name, d),
                false => Ok(on(self.weights.device(), vec![start; d], d)?),
            }
        };
        let norm_bias = norm_bias.then(|| vector("head.norm.bias", 0.0)).transpose()?;
        let norm = Norm::Layer(LayerNorm::new("head.norm", vector("head.norm.weight", 1.0)?, norm_bias, eps));
        let head = HeadLayer { dropout: 0.0, linear, activation: Some(act), norm: Some(norm) };
        let pooling = match (kind, self.config.opt_str("classifier_pooling")?.unwrap_or("cls")) {
            (HeadKind::Token, _) => None,
            (HeadKind::Sequence, "cls") => Some(Pooling::First),
            (HeadKind::Sequence, "mean") => Some(Pooling::Mean),
            (_, other) => return Err(bad(self.config, "classifier_pooling", other, "\"cls\" or \"mean\"")),
        };
        Ok((pooling, vec![head, self.layer("classifier", self.labels, dropout, None)?]))
    }

    fn tokens(&mut self) -> Result<Parts> {
        // DistilBERT's name for it
        let own = self.config.get("hidden_dropout_prob").is_none() && self.config.get("dropout").is_some();
        let dropout = if own { self.probability("dropout", 0.1)? } else { self.dropout()? };
        Ok((None, vec![self.layer("classifier", self.labels, dropout, None)?]))
    }

    /// `classifier_dropout`, else the model's own.
    fn dropout(&self) -> Result<f32> {
        self.probability(self.first_of(&["classifier_dropout", "hidden_dropout_prob"]), 0.1)
    }

    /// The first key that has a value; the last if none has.
    fn first_of(&self, keys: &[&'static str]) -> &'static str {
        let has = |key: &&&str| self.config.get(key).is_some_and(|value| !value.is_null());
        keys.iter().find(has).or(keys.last()).copied().unwrap_or_default()
    }

    fn probability(&self, key: &str, default: f64) -> Result<f32> {
        let p = self.config.opt_f64(key)?.unwrap_or(default);
        match (0.0..1.0).contains(&p) {
            true => Ok(p as f32),
            false => Err(bad(self.config, key, p, "a number from 0 on and below 1")),
        }
    }

    fn layer(
        &mut self,
        path: &str,
        out: usize,
        dropout: f32,
        activation: Option<Activation>,
    ) -> Result<HeadLayer> {
        let linear = self.linear(path, out, self.d, true)?;
        Ok(HeadLayer { dropout, linear, activation, norm: None })
    }

    fn linear(&mut self, path: &str, out: usize, width: usize, bias: bool) -> Result<Linear> {
        let [weight, bias_name] = ["weight", "bias"].map(|kind| format!("{path}.{kind}"));
        let there = self.weights.shape(&weight).is_some_and(|shape| shape == [out, width])
            && (!bias || self.weights.contains(&bias_name));
        if there {
            let bias = bias.then(|| self.weights.vector(&bias_name, out)).transpose()?;
            return Ok(Linear::new(path, self.weights.matrix(&weight, out, width)?, bias));
        }
        self.fresh.push(path.to_string());
        let device = self.weights.device();
        let deviation = self.config.opt_f64("initializer_range")?.unwrap_or(0.02);
        let values = random::normal(random::seed_of(self.seed, path), out * width, deviation);
        let weight = FrozenWeight::from_tensor(&on(device, values, (out, width))?)?;
        let bias = bias.then(|| on(device, vec![0.0; out], out)).transpose()?;
        Ok(Linear::new(path, weight, bias))
    }
}

/// A tensor on `device`.
fn on(device: &Device, values: Vec<f32>, shape: impl Into<Shape>) -> engobe_autograd::Result<Tensor> {
    Ok(tensor_of(values, shape)?.to_device(device)?)
}
