//! VeRA (Kopiczko et al. 2024): one pair of frozen random matrices for all layers, and two trained vectors a layer.
//!
//! ```text
//! y = W·x + Λ_b·B·Λ_d·A·x        A [r, in] and B [out, r]: the first columns, or rows, of the shared ones
//! ```
//!
//! PEFT draws A and B with torch's generator from `projection_prng_key`, which cannot be done again elsewhere; our
//! files always hold them (`save_projection`), and PEFT's are read if they do.

use crate::method::{Attached, Attaching, Card, Decides, Kind, Method, Purpose, Setting, by_name, setting};
use crate::modules::{self, Selection};
use crate::random::{generator, uniform};
use crate::{AdapterSizes, Error, Result, fill};
use candle_core::{DType, Device, Tensor};
use engobe_autograd::ops::{self, LinearSpec, LowRank};
use engobe_autograd::{Param, Result as OpResult, Tape, Var, tensor_of};
use engobe_formats::peft::{LoraConfig, PeftConfig};
use engobe_formats::tensor::TensorView;
use engobe_nn::{Linear, LinearAdapter, ModuleMut, ModuleTree};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// VeRA.
#[derive(Debug)]
pub(crate) struct Vera;

const SETTINGS: [Setting; 9] = [
    setting("r", Kind::Whole, modules::RANK_HELP),
    setting("target_modules", Kind::Names, modules::TARGETS_HELP),
    setting("exclude_modules", Kind::Names, modules::EXCLUDE_HELP),
    setting("layers_to_transform", Kind::Wholes, modules::LAYERS_HELP),
    setting("layers_pattern", Kind::Names, modules::PATTERN_HELP),
    setting("modules_to_save", Kind::Names, modules::SAVED_HELP),
    Setting {
        decides: Decides::Training,
        ..setting("vera_dropout", Kind::Number, "vera: dropout on the adapter's input [0]")
    },
    Setting {
        decides: Decides::Start,
        ..setting("d_initial", Kind::Number, "vera: what the inner vector starts from [0.1]")
    },
    Setting {
        decides: Decides::Start,
        ..setting("projection_prng_key", Kind::Whole, "vera: seed of the shared random matrices [0]")
    },
];
const A: &str = "base_model.vera_A";
const B: &str = "base_model.vera_B";

const CARD: Card = Card {
    name: "vera",
    about: "vectors around shared random matrices",
    peft_type: "VERA",
    settings: &SETTINGS,
    learning_rate: Some(4e-3),
    head_learning_rate: None,
};

impl Method for Vera {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn defaults(&self) -> Vec<(&'static str, Value)> {
        vec![("r", json!(256)), ("target_modules", json!("all-linear"))]
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        CARD.check_keys(config, &["save_projection", "init_weights", "bias"], &["fan_in_fan_out"], &[])?;
        config.choice("bias", &[("none", ())], ())?;
        let mut out = config.clone();
        out.set("r", config.count("r")?.unwrap_or(256));
        out.set("vera_dropout", config.dropout("vera_dropout")?);
        out.set("d_initial", config.number("d_initial")?.unwrap_or(0.1));
        out.set("projection_prng_key", config.whole("projection_prng_key")?.unwrap_or(0));
        modules::write_rules(&modules::rules(config)?, &mut out);
        for (key, value) in
            [("bias", json!("none")), ("fan_in_fan_out", json!(false)), ("init_weights", json!(true))]
        {
            out.set(key, value);
        }
        // whether a file that is read holds the matrices is seen there; ours do
        out.set("save_projection", true);
        Ok(out)
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        let r = config.whole("r")?.unwrap_or(256);
        let rules = modules::rules(config)?;
        let layers = targeted(model, &rules)?;
        let width = layers.iter().map(|(_, width, _)| *width).max().unwrap_or(1);
        let out = layers.iter().map(|(_, _, out)| *out).max().unwrap_or(1);
        let key = config.whole("projection_prng_key")?.unwrap_or(0) as u64;
        let matrix = |name: &str, shape: (usize, usize)| -> Result<Param> {
            let start = match at.purpose {
                Purpose::Start => {
                    // torch's kaiming_uniform_ with a = 0: a bound of √(6/fan_in), √6 times our `uniform`
                    let numbers = uniform(&mut generator(key, name), shape.0 * shape.1, shape.1);
                    (tensor_of(numbers, shape)? * f64::from(6f32.sqrt()))?
                }
                _ => Tensor::zeros(shape, DType::F32, &Device::Cpu)?,
            };
            Ok(Param::new(name, &start.to_device(at.device)?)?)
        };
        let shared = Arc::new(Shared {
            matrices: [matrix(A, (r, width))?, matrix(B, (out, r))?],
            parts: Mutex::default(),
        });
        let dropout = config.dropout("vera_dropout")? as f32;
        let d_initial = config.number("d_initial")?.unwrap_or(0.1);
        let mut layers = Vec::new();
        let selection = Selection::attach(model, &rules, "vera", &mut |linear: &mut Linear| {
            let layer = Arc::new(Vectors::new(linear, &shared, (r, d_initial, dropout), at.device)?);
            linear.attach(layer.clone());
            layers.push(layer);
            Ok(())
        })?;
        let mut config = config.clone();
        selection.name_targets(&mut config);
        Ok(Box::new(Attachment { config, shared, layers, selection }))
    }

    fn sizes(&self, model: &mut dyn ModuleTree, config: &PeftConfig) -> Result<AdapterSizes> {
        let (r, mut thin) = (config.whole("r")?.unwrap_or(256), config.clone());
        thin.set("r", 1);
        let layers = targeted(model, &modules::rules(config)?)?;
        let attached = self.attach(model, &thin, &Attaching::to_count(&Default::default()))?;
        let inner = |p: &&Param| p.name().ends_with("vera_lambda_d");
        let params = attached.params();
        Ok(AdapterSizes {
            other: params.iter().map(|p| if inner(p) { r } else { p.len() }).collect(),
            kept: params.iter().filter(|p| inner(p)).map(|p| (p.name().to_string(), r)).collect(),
            // each layer's scaled matrices
            fixed: layers.into_iter().map(|(path, width, out)| (path, r * (width + out))).collect(),
            dropout: config.dropout("vera_dropout")? > 0.0,
            ..AdapterSizes::default()
        })
    }
}

/// Path, input and output features of each target.
fn targeted(model: &mut dyn ModuleTree, rules: &LoraConfig) -> Result<Vec<(String, usize, usize)>> {
    let targets = crate::target::Targets::new(rules)?;
    let heads = model.output_heads();
    let mut layers = Vec::new();
    model.visit_modules(&mut |module| {
        if let ModuleMut::Linear(m) = module
            && targets.adapts(m.path(), !heads.iter().any(|h| h == m.path()))
        {
            layers.push((m.path().to_string(), m.in_features(), m.out_features()));
        }
    });
    Ok(layers)
}

/// A and B, and their parts that layers of one size have in common.
#[derive(Debug)]
struct Shared {
    matrices: [Param; 2],
    /// columns of A, or rows of B (true), by their number
    parts: Mutex<BTreeMap<(bool, usize), Tensor>>,
}

impl Shared {
    /// The first `len` columns of A, or rows of B: one copy for all layers.
    fn part(&self, of_b: bool, len: usize) -> candle_core::Result<Tensor> {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(part) = parts.get(&(of_b, len)) {
            return Ok(part.clone());
        }
        let whole = self.matrices[usize::from(of_b)].tensor();
        let part = whole.narrow(usize::from(!of_b), 0, len)?.contiguous()?;
        parts.insert((of_b, len), part.clone());
        Ok(part)
    }

    /// Forgets the copies: the matrices have other values now.
    fn changed(&self) {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// The two vectors of one layer.
#[derive(Debug)]
struct Vectors {
    path: String,
    shared: Arc<Shared>,
    /// `[out]`
    b: Param,
    /// `[r]`
    d: Param,
    width: usize,
    dropout: f32,
}

impl Vectors {
    fn new(
        linear: &Linear,
        shared: &Arc<Shared>,
        (r, d_initial, dropout): (usize, f64, f32),
        device: &Device,
    ) -> Result<Self> {
        let path = linear.path().to_string();
        let name = |kind: &str| format!("base_model.model.{path}.vera_lambda_{kind}");
        let zeros = Tensor::zeros(linear.out_features(), DType::F32, device)?;
        let initial = (Tensor::ones(r, DType::F32, device)? * d_initial)?;
        let (b, d) = (Param::new(name("b"), &zeros)?, Param::new(name("d"), &initial)?);
        Ok(Self { shared: shared.clone(), b, d, width: linear.in_features(), dropout, path })
    }

    /// This layer's part of the shared matrices.
    fn matrices(&self) -> candle_core::Result<(Tensor, Tensor)> {
        Ok((self.shared.part(false, self.width)?, self.shared.part(true, self.b.len())?))
    }
}

impl LinearAdapter for Vectors {
    fn extend(&self, tape: &mut Tape<'_>, spec: &mut LinearSpec) -> OpResult<()> {
        let (a, b) = self.matrices()?;
        let (lambda_d, lambda_b) = (tape.param(&self.d), tape.param(&self.b));
        let a = ops::scale_rows(tape, &Var::constant(a), &lambda_d)?;
        let b = ops::scale_rows(tape, &Var::constant(b), &lambda_b)?;
        spec.low_rank.push(LowRank { a, b, b_bias: None, scale: 1.0, dropout: self.dropout });
        Ok(())
    }
}

#[derive(Debug)]
struct Attachment {
    config: PeftConfig,
    shared: Arc<Shared>,
    layers: Vec<Arc<Vectors>>,
    selection: Selection,
}

impl Attached for Attachment {
    fn config(&self) -> PeftConfig {
        self.config.clone()
    }

    fn params(&self) -> Vec<&Param> {
        self.layers.iter().flat_map(|l| [&l.b, &l.d]).chain(&self.selection.saved).collect()
    }

    fn export(&self) -> Result<BTreeMap<String, Tensor>> {
        let [a, b] = &self.shared.matrices;
        by_name(&self.params().into_iter().chain([a, b]).collect::<Vec<_>>())
    }

    fn fill(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        if !tensors.contains_key(A) || !tensors.contains_key(B) {
            let problem = "vera_A and vera_B are missing: it was saved with save_projection=False, and what torch's \
                           generator drew cannot be drawn again; save it with save_projection=True";
            return Err(Error::DoesNotFit { path: path.to_path_buf(), problems: vec![problem.to_string()] });
        }
        let [a, b] = &self.shared.matrices;
        fill::by_name(&self.params().into_iter().chain([a, b]).collect::<Vec<_>>(), path, tensors)?;
        self.shared.changed();
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
        let (a, b) = layer.matrices()?;
        let a = a.broadcast_mul(&layer.d.tensor().unsqueeze(1)?)?;
        let b = b.broadcast_mul(&layer.b.tensor().unsqueeze(1)?)?;
        Ok((weight + b.matmul(&a)?.to_device(&Device::Cpu)?)?)
    }
}
