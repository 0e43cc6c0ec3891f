//! Prefix tuning (Li & Liang 2021): trained keys and values before those of each sequence, in every attention module.
//!
//! In an encoder-decoder they stand before the decoder's own keys and values, as PEFT has it: the encoder and the attention
//! between them have none. PEFT lays out keys and values of both attentions of a decoder's block and then leaves those between
//! encoder and decoder away, so of a file's L pairs the i-th block takes the one numbered 2i mod L: with an even L two blocks
//! share every second pair, and the others are not used. Files are exchanged with PEFT, so it is the same here.
//!
//! A file holds one matrix `[count, layers · 2 · kv_width]`: for each row the first block's key and value, then the
//! second's, and so on. With `prefix_projection` these are `tanh(E·W₁ᵀ + b₁)·W₂ᵀ + b₂` of an embedding E `[count,
//! kv_width]` while it is trained, and only the outcome is saved. W₂ is kept in pieces, one for the keys and one for
//! the values of each block, so that a block computes its own rows and no others.

use crate::method::{
    Attached, Attaching, Card, Decides, Kind, Method, NeedsText, Purpose, Setting, by_name, setting,
};
use crate::random::{gaussian, generator, uniform};
use crate::saved;
use crate::virtual_tokens::{self, COUNT, DEFAULT_COUNT, SAVED, Sites, TENSOR};
use crate::{AdapterSizes, Error, Result, fill};
use candle_core::{D, Device, Tensor};
use engobe_autograd::ops::{self, LinearSpec, Matrix};
use engobe_autograd::{Param, Tape, Var, tensor_of};
use engobe_formats::peft::PeftConfig;
use engobe_formats::tensor::TensorView;
use engobe_kernels::activation::Activation;
use engobe_nn::{KeyValueRows, ModuleTree, SiteMut};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Prefix tuning.
#[derive(Debug)]
pub(crate) struct PrefixTuning;

const PROJECTION: &str = "prefix_projection";
const HIDDEN: &str = "encoder_hidden_size";
const ZERO: &str = "init_weights";
const INIT_TEXT: &str = "prefix_init_text";

const SETTINGS: [Setting; 6] = [
    COUNT,
    SAVED,
    setting(PROJECTION, Kind::Flag, "train the prefix through a two-layer MLP"),
    Setting {
        decides: Decides::Training,
        ..setting(HIDDEN, Kind::Whole, "width of the encoder's hidden layer [width of a virtual token]")
    },
    Setting {
        decides: Decides::Start,
        ..setting(ZERO, Kind::Text, "zero: a prefix starts with keys and values of zero [random]")
    },
    Setting {
        decides: Decides::Start,
        ..setting(INIT_TEXT, Kind::Text, "start from the keys and values of this text")
    },
];

impl PrefixTuning {
    /// The sites of a model, and the heads and width of its keys.
    fn sites(&self, model: &mut dyn ModuleTree) -> Result<(Sites, usize, usize)> {
        let sites = Sites::find(model, self.name())?;
        let Some((heads, width)) = sites.key_values.first().copied() else {
            let needs = "a place for keys and values in its attention";
            return Err(Error::NoSite { method: self.name(), needs });
        };
        if sites.key_values.iter().any(|other| *other != (heads, width)) {
            let needs = "attention modules with keys of one width";
            return Err(Error::NoSite { method: self.name(), needs });
        }
        Ok((sites, heads, width))
    }
}

const CARD: Card = Card {
    name: "prefix-tuning",
    about: "trained keys and values before those of a sequence",
    peft_type: "PREFIX_TUNING",
    settings: &SETTINGS,
    learning_rate: Some(0.03),
    head_learning_rate: None,
};

impl Method for PrefixTuning {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn defaults(&self) -> Vec<(&'static str, Value)> {
        vec![(COUNT.name, json!(DEFAULT_COUNT))]
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        let count = virtual_tokens::read(config, &[PROJECTION, HIDDEN, ZERO, INIT_TEXT], &[])?;
        config.choice(ZERO, &[("zero", ())], ())?;
        config.count(HIDDEN)?;
        if config.text(INIT_TEXT).is_some() && (config.flag(PROJECTION)? || config.get(ZERO).is_some()) {
            let right = "neither prefix_projection nor init_weights beside it";
            return Err(config.bad(INIT_TEXT, "set", right).into());
        }
        let mut config = config.clone();
        config.set(COUNT.name, count);
        config.set(PROJECTION, config.flag(PROJECTION)?);
        Ok(config)
    }

    fn needs_text(&self, config: &PeftConfig) -> Option<NeedsText> {
        Some(NeedsText { text: config.text(INIT_TEXT)?.to_string(), key_values: true })
    }

    fn sizes(&self, model: &mut dyn ModuleTree, config: &PeftConfig) -> Result<AdapterSizes> {
        let (sites, _, width) = self.sites(model)?;
        Ok(AdapterSizes {
            other: counts(config, sites.key_values.len(), width)?,
            full: saved::count_named(model, config)?,
            key_value_lead: config.whole(COUNT.name)?.unwrap_or(DEFAULT_COUNT),
            ..AdapterSizes::default()
        })
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        let (sites, heads, width) = self.sites(model)?;
        let prefix = Prefix::new(config, sites.key_values.len(), width, at)?;
        let mut blocks = 0usize..;
        let pair = |block: usize| match sites.encoder_decoder {
            true => 2 * block % prefix.layers.len(),
            false => block,
        };
        model.visit_sites(&mut |site| match site {
            SiteMut::Entry(entry) => entry.attach_key_values(prefix.count),
            SiteMut::KvPrefix(site) => {
                if let Some(layer) = blocks.next().and_then(|block| prefix.layers.get(pair(block))) {
                    site.attach(layer.clone());
                }
            }
            SiteMut::SubLayer(_) => {}
        });
        let mut config = config.clone();
        virtual_tokens::write_model(&mut config, width, heads, sites.key_values.len());
        if sites.encoder_decoder {
            virtual_tokens::write_encoder_decoder(&mut config);
        }
        let hidden = config.whole(HIDDEN)?.unwrap_or(width);
        config.set(HIDDEN, hidden);
        // what it started from is none of a file's business: PEFT would not know the key
        config.set(INIT_TEXT, Value::Null);
        let saved = saved::train_named(model, &config, saved::PROMPT_ROOT)?;
        Ok(Box::new(Attachment { config, prefix, saved }))
    }
}

/// Elements of each parameter of a prefix over `layers` layers of width `w`.
fn counts(config: &PeftConfig, layers: usize, w: usize) -> Result<Vec<usize>> {
    let count = config.whole(COUNT.name)?.unwrap_or(DEFAULT_COUNT);
    if !config.flag(PROJECTION)? {
        return Ok(vec![count * w; 2 * layers]);
    }
    let hidden = config.whole(HIDDEN)?.unwrap_or(w);
    let mut all = vec![count * w, hidden * w, hidden];
    all.extend([w * hidden, w].repeat(2 * layers));
    Ok(all)
}

/// What is trained.
#[derive(Debug)]
struct Prefix {
    count: usize,
    width: usize,
    encoder: Option<Arc<Encoder>>,
    layers: Vec<Arc<Layer>>,
}

/// What all blocks share of the projection.
#[derive(Debug)]
struct Encoder {
    /// E `[count, kv_width]`
    embedding: Param,
    /// W₁ `[hidden, kv_width]`
    weight: Param,
    /// b₁ `[hidden]`
    bias: Param,
}

/// Keys and values of one attention module.
#[derive(Debug)]
struct Layer {
    count: usize,
    rows: Rows,
}

#[derive(Debug)]
enum Rows {
    /// key and value, `[count, kv_width]` each
    Trained([Param; 2]),
    /// of key and value: the piece of W₂ `[kv_width, hidden]` and of b₂ `[kv_width]`
    Projected(Arc<Encoder>, [[Param; 2]; 2]),
}

const HALVES: [&str; 2] = ["key", "value"];

impl Prefix {
    fn new(config: &PeftConfig, layers: usize, width: usize, at: &Attaching<'_>) -> Result<Self> {
        let count = config.whole(COUNT.name)?.unwrap_or(DEFAULT_COUNT);
        let zero = config.get(ZERO).is_some();
        let param = |name: String, data: Vec<f32>, shape: &[usize]| -> Result<Param> {
            Ok(Param::new(name, &tensor_of(data, shape)?.to_device(at.device)?)?)
        };
        let hidden = config.whole(HIDDEN)?.unwrap_or(width);
        // a file holds rows alone, and they go on being trained as such
        let projects = config.flag(PROJECTION)? && at.purpose != Purpose::Load;
        let encoder = match projects {
            true => {
                let mut rng = generator(at.start.seed, "prefix encoder");
                Some(Arc::new(Encoder {
                    embedding: param(
                        "encoder.embedding.weight".to_string(),
                        gaussian(&mut rng, count * width, 1.0),
                        &[count, width],
                    )?,
                    weight: param(
                        "encoder.transform.0.weight".to_string(),
                        uniform(&mut rng, hidden * width, width),
                        &[hidden, width],
                    )?,
                    bias: param(
                        "encoder.transform.0.bias".to_string(),
                        uniform(&mut rng, hidden, width),
                        &[hidden],
                    )?,
                }))
            }
            false => None,
        };
        let of_text = |layer: usize, half: usize| -> Option<&Tensor> {
            at.text.key_values.get(layer).map(|both| &both[half]).filter(|_| at.purpose == Purpose::Start)
        };
        let layer = |layer: usize| -> Result<Arc<Layer>> {
            let mut rng = generator(at.start.seed, &format!("prefix {layer}"));
            let mut trained = |half: usize| -> Result<Param> {
                let name = format!("{TENSOR}.{layer}.{}", HALVES[half]);
                if let Some(rows) = of_text(layer, half) {
                    return Ok(Param::new(name, &repeated_rows(rows, count)?.to_device(at.device)?)?);
                }
                let data = match zero {
                    true => vec![0f32; count * width],
                    false => gaussian(&mut rng, count * width, 1.0),
                };
                param(name, data, &[count, width])
            };
            let rows = match &encoder {
                None => Rows::Trained([trained(0)?, trained(1)?]),
                Some(encoder) => {
                    let mut piece = |half: usize| -> Result<[Param; 2]> {
                        let name =
                            |kind: &str| format!("encoder.transform.2.{kind}.{layer}.{}", HALVES[half]);
                        let (weight, bias) = match zero {
                            true => (vec![0f32; width * hidden], vec![0f32; width]),
                            false => {
                                (uniform(&mut rng, width * hidden, hidden), uniform(&mut rng, width, hidden))
                            }
                        };
                        let weight = param(name("weight"), weight, &[width, hidden])?;
                        Ok([weight, param(name("bias"), bias, &[width])?])
                    };
                    Rows::Projected(encoder.clone(), [piece(0)?, piece(1)?])
                }
            };
            Ok(Arc::new(Layer { count, rows }))
        };
        let layers = (0..layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { count, width, encoder, layers })
    }
}

/// `count` rows of `t`, from the first again after the last.
fn repeated_rows(t: &Tensor, count: usize) -> Result<Tensor> {
    let n = t.dim(0)?.max(1);
    let index: Vec<u32> = (0..count).map(|i| (i % n) as u32).collect();
    Ok(t.index_select(&Tensor::from_vec(index, count, t.device())?, 0)?)
}

impl KeyValueRows for Layer {
    fn count(&self) -> usize {
        self.count
    }

    fn rows(&self, tape: &mut Tape<'_>) -> engobe_autograd::Result<[Var; 2]> {
        match &self.rows {
            Rows::Trained([key, value]) => Ok([tape.param(key), tape.param(value)]),
            Rows::Projected(encoder, [key, value]) => {
                let embedding = tape.param(&encoder.embedding);
                let first = affine(tape, &encoder.weight, &encoder.bias);
                let hidden = ops::linear(tape, &embedding, first)?;
                let hidden = ops::activate(tape, Activation::Tanh, &hidden)?;
                let specs = [key, value].map(|[weight, bias]| affine(tape, weight, bias));
                let outs = ops::linear_group(tape, &hidden, specs.into())?;
                outs.try_into().map_err(|_| engobe_autograd::Error::shape("prefix", "one output a half"))
            }
        }
    }
}

/// `x·Wᵀ + b` of trained W and b.
fn affine(tape: &mut Tape<'_>, weight: &Param, bias: &Param) -> LinearSpec {
    LinearSpec { bias: Some(tape.param(bias)), ..LinearSpec::plain(Matrix::Trained(tape.param(weight))) }
}

#[derive(Debug)]
struct Attachment {
    config: PeftConfig,
    prefix: Prefix,
    saved: Vec<Param>,
}

impl Attached for Attachment {
    fn config(&self) -> PeftConfig {
        self.config.clone()
    }

    fn params(&self) -> Vec<&Param> {
        let shared = self.prefix.encoder.iter().flat_map(|e| [&e.embedding, &e.weight, &e.bias]);
        let own = self.prefix.layers.iter().flat_map(|layer| match &layer.rows {
            Rows::Trained(both) => both.iter().collect::<Vec<_>>(),
            Rows::Projected(_, both) => both.iter().flatten().collect(),
        });
        shared.chain(own).chain(&self.saved).collect()
    }

    fn export(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut columns = Vec::new();
        for layer in &self.prefix.layers {
            for rows in layer.rows(&mut Tape::inference())? {
                columns.push(rows.tensor().to_device(&Device::Cpu)?);
            }
        }
        let mut tensors = by_name(&self.saved.iter().collect::<Vec<_>>())?;
        tensors.insert(TENSOR.to_string(), Tensor::cat(&columns, D::Minus1)?.contiguous()?);
        Ok(tensors)
    }

    fn fill(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        let (count, width) = (self.prefix.count, self.prefix.width);
        let whole = Param::new(
            TENSOR,
            &Tensor::zeros(
                (count, self.prefix.layers.len() * 2 * width),
                candle_core::DType::F32,
                &Device::Cpu,
            )?,
        )?;
        let params: Vec<&Param> = [&whole].into_iter().chain(&self.saved).collect();
        fill::by_name(&params, path, tensors)?;
        let rows = self.prefix.layers.iter().filter_map(|layer| match &layer.rows {
            Rows::Trained(both) => Some(both),
            Rows::Projected(..) => None,
        });
        for (i, param) in rows.flatten().enumerate() {
            let columns = whole.tensor().narrow(1, i * width, width)?.contiguous()?;
            param.set(&columns.to_device(param.tensor().device())?)?;
        }
        Ok(())
    }

    fn file_is_whole(&self) -> bool {
        self.prefix.encoder.is_none()
    }

    fn merge_refusal(&self) -> Option<&'static str> {
        Some("a prefix is state of the attention, and no change of weights")
    }
}
