//! LoRA (Hu et al. 2021): `y = W·x + s·B·A·x`, A `[r, in]`, B `[out, r]`, s = alpha/r, or alpha/√r with
//! rank-stabilised scaling (Kalajdzievski 2023); with a magnitude for each row ([`dora`]), and starts that are made of
//! the base's weight ([`initial`]).

pub(crate) mod dora;
mod embedding;
mod initial;
pub(crate) mod method;

pub(crate) use embedding::LoraEmbedding;
pub(crate) use initial::{Factors, decomposed_change};
pub(crate) use method::rank_of;

use crate::method::{Attaching, Purpose};
use crate::random::{gaussian, generator, uniform};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use dora::{Delta, Magnitude};
use engobe_autograd::ops::{LinearSpec, LowRank, OutputScale};
use engobe_autograd::{FrozenWeight, Param, Result as OpResult, Tape, Var, tensor_of};
use engobe_formats::peft::{InitLoraWeights, LoraConfig};
use engobe_nn::{Linear, LinearAdapter, Weight};
use rand_chacha::ChaCha8Rng;

/// The two factors beside one linear layer, and what else belongs to them.
#[derive(Debug)]
pub(crate) struct LoraLayer {
    path: String,
    a: Param,
    b: Param,
    /// behind B
    b_bias: Option<Param>,
    /// DoRA's
    magnitude: Option<Magnitude>,
    /// what was taken out of the base: the layer has `- s·B₀·A₀` beside its weight
    taken_out: Option<Factors>,
    base_has_bias: bool,
    scale: f32,
    dropout: f32,
}

impl LoraLayer {
    /// New factors of rank `r` beside `linear`, initialised by PEFT's rules. LoftQ puts a quantized weight into
    /// `linear`.
    ///
    /// The random numbers depend on the seed and the path alone, so that choosing other targets does not change this
    /// layer's start.
    pub fn new(
        linear: &mut Linear,
        r: usize,
        scale: f64,
        config: &LoraConfig,
        at: &Attaching<'_>,
    ) -> Result<Self> {
        let path = linear.path().to_string();
        let (out, width, scale) = (linear.out_features(), linear.in_features(), scale as f32);
        let counting = at.purpose == Purpose::Count;
        let init = if counting { InitLoraWeights::Kaiming } else { config.init_lora_weights };
        let mut rng = generator(at.start.seed, &path);
        let mut taken_out = None;
        let factors = match init {
            InitLoraWeights::Pissa(_) | InitLoraWeights::Olora => {
                let factors = initial::taken_out(&path, frozen(linear)?, init, r, scale, at.start.seed)?;
                let on = |t: &Tensor| t.to_device(at.device);
                taken_out = Some(Factors { a: on(&factors.a)?, b: on(&factors.b)? });
                factors
            }
            InitLoraWeights::Loftq => match quantize(linear, &path, r, config, at)? {
                Some(factors) => factors,
                None => random(&mut rng, init, (out, width), r)?,
            },
            _ => random(&mut rng, init, (out, width), r)?,
        };
        let param = |kind: &str, value: &Tensor| -> Result<Param> {
            let name = format!("base_model.model.{path}.{kind}");
            Ok(Param::new(name, &value.to_device(at.device)?)?)
        };
        let bias = || -> Result<Param> {
            let start = match config.init_lora_weights {
                InitLoraWeights::Random => {
                    uniform(&mut generator(at.start.seed, &format!("{path}.bias")), out, r)
                }
                _ => vec![0f32; out],
            };
            param("lora_B.bias", &tensor_of(start, out)?)
        };
        let mut layer = Self {
            a: param("lora_A.weight", &factors.a)?,
            b: param("lora_B.weight", &factors.b)?,
            b_bias: config.lora_bias.then(bias).transpose()?,
            magnitude: None,
            taken_out,
            base_has_bias: linear.bias().is_some(),
            scale,
            dropout: config.lora_dropout as f32,
            path,
        };
        if config.use_dora {
            let weight = match counting {
                true => None,
                false => Some(frozen(linear)?),
            };
            layer.magnitude = Some(Magnitude::new(&layer.path, out, weight, &layer.deltas(), at.device)?);
        }
        Ok(layer)
    }

    /// Path of the layer that it sits beside.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A `[r, in]` and B `[out, r]`.
    pub fn factors(&self) -> [&Param; 2] {
        [&self.a, &self.b]
    }

    /// What is trained beside A and B.
    pub fn vectors(&self) -> impl Iterator<Item = &Param> {
        self.b_bias.iter().chain(self.magnitude.as_ref().map(Magnitude::param))
    }

    /// What was taken out of the base.
    pub fn taken_out(&self) -> Option<&Factors> {
        self.taken_out.as_ref()
    }

    /// The output gets factors, and is kept for their gradient.
    pub fn scales_output(&self) -> bool {
        self.magnitude.is_some()
    }

    /// There is a bias behind B.
    pub fn has_bias(&self) -> bool {
        self.b_bias.is_some()
    }

    /// The base's layer has a bias.
    pub fn base_has_bias(&self) -> bool {
        self.base_has_bias
    }

    fn deltas(&self) -> Vec<Delta<'_>> {
        let trained = Delta { a: self.a.tensor(), b: self.b.tensor(), scale: self.scale };
        let taken = self.taken_out.as_ref().map(|f| Delta { a: &f.a, b: &f.b, scale: -self.scale });
        [trained].into_iter().chain(taken).collect()
    }

    /// The layer's weight `[out, in]` with all of this in it; on the CPU.
    pub fn merged(&self, mut weight: Tensor) -> Result<Tensor> {
        for d in self.deltas() {
            let delta = (d.b.matmul(d.a)? * f64::from(d.scale))?;
            weight = (weight + delta.to_device(&Device::Cpu)?)?;
        }
        match &self.magnitude {
            Some(magnitude) => magnitude.applied(&weight),
            None => Ok(weight),
        }
    }

    /// The layer's bias with what is behind B.
    pub fn merged_bias(&self, bias: Tensor) -> Result<Tensor> {
        match &self.b_bias {
            Some(b) => Ok((bias + (b.tensor().to_device(&Device::Cpu)? * f64::from(self.scale))?)?),
            None => Ok(bias),
        }
    }
}

impl LinearAdapter for LoraLayer {
    fn changes_bias(&self) -> bool {
        self.has_bias()
    }

    fn extend(&self, tape: &mut Tape<'_>, spec: &mut LinearSpec) -> OpResult<()> {
        if let Some(magnitude) = &self.magnitude {
            let versions = vec![self.a.version(), self.b.version()];
            let gain = magnitude.gain(tape, &spec.weight, &self.deltas(), versions)?;
            spec.output_scale = Some(OutputScale { gain, covers_bias: false });
        }
        spec.low_rank.push(LowRank {
            a: tape.param(&self.a),
            b: tape.param(&self.b),
            b_bias: self.b_bias.as_ref().map(|p| tape.param(p)),
            scale: self.scale,
            dropout: self.dropout,
        });
        if let Some(taken) = &self.taken_out {
            spec.low_rank.push(LowRank {
                a: Var::constant(taken.a.clone()),
                b: Var::constant(taken.b.clone()),
                b_bias: None,
                scale: -self.scale,
                dropout: 0.0,
            });
        }
        Ok(())
    }
}

/// Starts that know nothing of the weight.
fn random(
    rng: &mut ChaCha8Rng,
    init: InitLoraWeights,
    (out, width): (usize, usize),
    r: usize,
) -> Result<Factors> {
    let a = match init {
        InitLoraWeights::Gaussian => gaussian(rng, r * width, 1.0 / r as f32),
        // nn.init.kaiming_uniform_(a = √5): a bound of 1/√in
        _ => uniform(rng, r * width, width),
    };
    let b = match init {
        // PEFT's `false` leaves B as nn.Linear starts it, for tests
        InitLoraWeights::Random => uniform(rng, out * r, r),
        _ => vec![0f32; out * r],
    };
    Ok(Factors { a: tensor_of(a, (r, width))?, b: tensor_of(b, (out, r))? })
}

/// LoftQ, unless the base of a saved adapter is quantized already.
fn quantize(
    linear: &mut Linear,
    path: &str,
    r: usize,
    config: &LoraConfig,
    at: &Attaching<'_>,
) -> Result<Option<Factors>> {
    let weight = frozen(linear)?;
    let whole = ["F32", "BF16", "F16"].contains(&weight.storage_name().to_ascii_uppercase().as_str());
    match (whole && at.device.is_cpu(), at.purpose) {
        (true, _) => {
            let (quantized, factors) =
                initial::loftq(path, weight, r, config.loftq_config.unwrap_or_default())?;
            linear.set_weight(quantized);
            Ok(Some(factors))
        }
        (false, Purpose::Load) => Ok(None),
        (false, _) => {
            let reason = format!(
                "\"loftq\" quantizes the base itself: {path} is {}, and must be f32, bf16 or f16 in the CPU's memory",
                weight.storage_name()
            );
            Err(Error::Conflict { keys: "init_lora_weights", reason: reason.into() })
        }
    }
}

/// The base's weight.
fn frozen(linear: &Linear) -> Result<&FrozenWeight> {
    match linear.weight() {
        Weight::Frozen(weight) => Ok(weight),
        Weight::Trained(_) => {
            let reason = format!("names {}, whose weight is itself trained", linear.path());
            Err(Error::Conflict { keys: "target_modules", reason: reason.into() })
        }
    }
}
