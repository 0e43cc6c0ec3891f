//! MiSS (Kang and Yin 2024, "MiSS: Revisiting the trade-off in LoRA with an efficient shard-sharing structure"): one
//! trained matrix a layer, shared by all shards of its input.
//!
//! ```text
//! y = W·x + D·s        s_i = Σ_j x_{i + j·r} [r], the shards of x summed; D [out, r], zero at first
//! ```
//!
//! Summing shards is a product with a fixed A of zeros and ones, so that a layer is a low-rank delta of which only B is
//! trained. Files hold Dᵀ (`miss_block`, `[r, out]`). PEFT's variants `bat` (the change depends on W) and `mini` (D's
//! rows repeat) are refused.

use crate::method::{Attached, Attaching, Card, Decides, Kind, Method, Setting, by_name, setting};
use crate::modules::{self, Selection};
use crate::{AdapterSizes, Result, fill};
use candle_core::{DType, Device, Tensor};
use engobe_autograd::ops::{LinearSpec, LowRank};
use engobe_autograd::{Param, Result as OpResult, Tape, Var, tensor_of};
use engobe_formats::peft::PeftConfig;
use engobe_formats::tensor::TensorView;
use engobe_nn::{Linear, LinearAdapter, ModuleTree};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// MiSS.
#[derive(Debug)]
pub(crate) struct Miss;

const RANK: usize = 64;
const SETTINGS: [Setting; 7] = [
    setting("r", Kind::Whole, modules::RANK_HELP),
    setting("target_modules", Kind::Names, modules::TARGETS_HELP),
    setting("exclude_modules", Kind::Names, modules::EXCLUDE_HELP),
    setting("layers_to_transform", Kind::Wholes, modules::LAYERS_HELP),
    setting("layers_pattern", Kind::Names, modules::PATTERN_HELP),
    setting("modules_to_save", Kind::Names, modules::SAVED_HELP),
    Setting {
        decides: Decides::Training,
        ..setting("miss_dropout", Kind::Number, "miss: dropout on the adapter's input [0]")
    },
];

const CARD: Card = Card {
    name: "miss",
    about: "one matrix a layer, shared by the shards of its input",
    peft_type: "MISS",
    settings: &SETTINGS,
    learning_rate: Some(1e-3),
    head_learning_rate: None,
};

impl Method for Miss {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn defaults(&self) -> Vec<(&'static str, Value)> {
        vec![("r", json!(RANK)), ("target_modules", json!("all-linear"))]
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        CARD.check_keys(config, &["bias", "init_weights"], &["mini_r"], &[])?;
        config.choice("bias", &[("none", ())], ())?;
        if let Some(found) = config.get("init_weights").filter(|v| !v.is_boolean()) {
            return Err(config
                .bad("init_weights", &found.to_string(), "true (bat and mini are not there)")
                .into());
        }
        let mut out = config.clone();
        out.set("r", config.count("r")?.unwrap_or(RANK));
        out.set("miss_dropout", config.dropout("miss_dropout")?);
        modules::write_rules(&modules::rules(config)?, &mut out);
        out.set("bias", "none");
        out.set("init_weights", true);
        Ok(out)
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        let r = config.whole("r")?.unwrap_or(RANK);
        let dropout = config.dropout("miss_dropout")? as f32;
        let (mut layers, mut sums) = (Vec::new(), BTreeMap::new());
        let selection =
            Selection::attach(model, &modules::rules(config)?, "miss", &mut |linear: &mut Linear| {
                let width = linear.in_features();
                if r > width {
                    let found = format!("{r}, and {} reads {width} features", linear.path());
                    return Err(config.bad("r", &found, "at most as many").into());
                }
                let sum = match sums.get(&width) {
                    Some(sum) => Tensor::clone(sum),
                    None => sums.entry(width).or_insert(shard_sum(r, width, at.device)?).clone(),
                };
                let layer = Arc::new(Layer::new(linear, sum, r, dropout, at.device)?);
                linear.attach(layer.clone());
                layers.push(layer);
                Ok(())
            })?;
        let mut config = config.clone();
        selection.name_targets(&mut config);
        Ok(Box::new(Attachment { config, layers, selection }))
    }

    /// It is attached with a rank of 1, so that hardly any memory is taken.
    fn sizes(&self, model: &mut dyn ModuleTree, config: &PeftConfig) -> Result<AdapterSizes> {
        let (r, mut thin) = (config.whole("r")?.unwrap_or(RANK), config.clone());
        thin.set("r", 1);
        let attached = self.attach(model, &thin, &Attaching::to_count(&Default::default()))?;
        let (blocks, saved): (Vec<&Param>, Vec<&Param>) =
            attached.params().into_iter().partition(|p| p.name().ends_with(BLOCK));
        Ok(AdapterSizes {
            vectors: blocks.iter().map(|p| r * p.len()).collect(),
            full: saved.iter().map(|p| p.len()).collect(),
            kept: blocks.iter().map(|p| (p.name().to_string(), r)).collect(),
            dropout: config.dropout("miss_dropout")? > 0.0,
            ..AdapterSizes::default()
        })
    }
}

const BLOCK: &str = ".miss_block";

/// A `[r, width]` that sums shards: one where the column's number leaves the row's when divided by r.
fn shard_sum(r: usize, width: usize, device: &Device) -> Result<Tensor> {
    let one = |i: usize| if (i % width) % r == i / width { 1f32 } else { 0.0 };
    Ok(tensor_of((0..r * width).map(one).collect(), (r, width))?.to_device(device)?)
}

/// One adapted layer.
#[derive(Debug)]
struct Layer {
    path: String,
    /// A `[r, in]`, of all layers of one width
    sum: Tensor,
    /// D `[out, r]`
    block: Param,
    dropout: f32,
}

impl Layer {
    fn new(linear: &Linear, sum: Tensor, r: usize, dropout: f32, device: &Device) -> Result<Self> {
        let path = linear.path().to_string();
        let zeros = Tensor::zeros((linear.out_features(), r), DType::F32, device)?;
        let block = Param::new(format!("base_model.model.{path}{BLOCK}"), &zeros)?;
        Ok(Self { path, sum, block, dropout })
    }

    /// Dᵀ under its name, as files have it.
    fn in_file(&self) -> Result<Param> {
        Ok(Param::new(self.block.name(), &self.block.tensor().t()?.contiguous()?.to_device(&Device::Cpu)?)?)
    }
}

impl LinearAdapter for Layer {
    fn extend(&self, tape: &mut Tape<'_>, spec: &mut LinearSpec) -> OpResult<()> {
        let (a, b) = (Var::constant(self.sum.clone()), tape.param(&self.block));
        spec.low_rank.push(LowRank { a, b, b_bias: None, scale: 1.0, dropout: self.dropout });
        Ok(())
    }
}

#[derive(Debug)]
struct Attachment {
    config: PeftConfig,
    layers: Vec<Arc<Layer>>,
    selection: Selection,
}

impl Attachment {
    fn in_file(&self) -> Result<Vec<Param>> {
        self.layers.iter().map(|layer| layer.in_file()).collect()
    }
}

impl Attached for Attachment {
    fn config(&self) -> PeftConfig {
        self.config.clone()
    }

    fn params(&self) -> Vec<&Param> {
        self.layers.iter().map(|l| &l.block).chain(&self.selection.saved).collect()
    }

    fn export(&self) -> Result<BTreeMap<String, Tensor>> {
        by_name(&self.in_file()?.iter().chain(&self.selection.saved).collect::<Vec<_>>())
    }

    fn fill(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        let blocks = self.in_file()?;
        fill::by_name(&blocks.iter().chain(&self.selection.saved).collect::<Vec<_>>(), path, tensors)?;
        for (layer, found) in self.layers.iter().zip(&blocks) {
            let block = found.tensor().t()?.contiguous()?;
            layer.block.set(&block.to_device(layer.block.tensor().device())?)?;
        }
        Ok(())
    }

    fn unmatched_targets(&self) -> &[String] {
        &self.selection.unmatched
    }

    fn expand(&self, config: &mut PeftConfig) {
        self.selection.name_targets(config);
    }

    fn merged_weight(&self, path: &str, weight: Tensor) -> Result<Tensor> {
        let Some(layer) = self.layers.iter().find(|l| l.path == path) else { return Ok(weight) };
        let delta = layer.block.tensor().matmul(&layer.sum)?;
        Ok((weight + delta.to_device(&Device::Cpu)?)?)
    }
}
