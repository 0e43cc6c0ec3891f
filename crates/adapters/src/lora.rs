//! LoRA (Hu et al. 2021): `y = W·x + s·B·A·x`, A `[r, in]`, B `[out, r]`, s = alpha/r, or alpha/√r with
//! rank-stabilised scaling (Kalajdzievski 2023).

pub(crate) mod method;

use crate::random::{gaussian, generator, uniform};
use candle_core::{Device, Tensor};
use engobe_autograd::ops::{LinearSpec, LowRank};
use engobe_autograd::{Param, Result, Tape, tensor_of};
use engobe_formats::peft::InitLoraWeights;
use engobe_nn::LinearAdapter;

/// The two factors beside one linear layer.
#[derive(Debug, Clone)]
pub struct LoraLayer {
    path: String,
    a: Param,
    b: Param,
    scale: f32,
    dropout: f32,
}

impl LoraLayer {
    /// New factors for the layer at `path`, initialised by PEFT's rules.
    ///
    /// The random numbers depend on `seed` and the path alone, so that choosing other targets does not
    /// change this layer's start.
    pub(crate) fn new(
        path: &str,
        (out, width): (usize, usize),
        r: usize,
        scale: f64,
        dropout: f64,
        init: InitLoraWeights,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let mut rng = generator(seed, path);
        let a = match init {
            // nn.init.kaiming_uniform_(a = √5): a bound of 1/√in
            InitLoraWeights::Kaiming | InitLoraWeights::Random => uniform(&mut rng, r * width, width),
            InitLoraWeights::Gaussian => gaussian(&mut rng, r * width, 1.0 / r as f32),
        };
        let b = match init {
            // PEFT's `false` leaves B as nn.Linear starts it, for tests
            InitLoraWeights::Random => uniform(&mut rng, out * r, r),
            _ => vec![0f32; out * r],
        };
        let param = |kind: &str, data: Vec<f32>, shape: (usize, usize)| -> Result<Param> {
            let name = format!("base_model.model.{path}.{kind}.weight");
            Param::new(name, &tensor_of(data, shape)?.to_device(device)?)
        };
        Ok(Self {
            path: path.to_string(),
            a: param("lora_A", a, (r, width))?,
            b: param("lora_B", b, (out, r))?,
            scale: scale as f32,
            dropout: dropout as f32,
        })
    }

    /// Path of the layer that it sits beside.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A `[r, in]` and B `[out, r]`.
    pub fn params(&self) -> [&Param; 2] {
        [&self.a, &self.b]
    }

    /// Rank.
    pub fn rank(&self) -> usize {
        self.a.tensor().dims()[0]
    }

    /// Factor on B·A.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// `s·B·A`, the change of the layer's weight: `[out, in]`. For merging.
    pub fn delta(&self) -> Result<Tensor> {
        Ok((self.b.tensor().matmul(self.a.tensor())? * f64::from(self.scale))?)
    }
}

impl LinearAdapter for LoraLayer {
    fn extend(&self, tape: &mut Tape<'_>, spec: &mut LinearSpec) -> Result<()> {
        spec.low_rank.push(LowRank {
            a: tape.param(&self.a),
            b: tape.param(&self.b),
            b_bias: None,
            scale: self.scale,
            dropout: self.dropout,
        });
        Ok(())
    }
}
