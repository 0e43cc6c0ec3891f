//! P-tuning (Liu et al. 2021): a soft prompt that is trained through an encoder, an MLP or a bidirectional LSTM.
//!
//! The encoder's outcome is all that a file holds; an adapter that is loaded goes on as a plain prompt.

use crate::method::{Attached, Attaching, Card, Decides, Kind, Method, Purpose, Setting, by_name, setting};
use crate::random::{gaussian, generator, uniform};
use crate::saved;
use crate::virtual_tokens::{self, COUNT, DEFAULT_COUNT, SAVED, Sites, TENSOR};
use crate::{AdapterSizes, Result, fill};
use candle_core::{Device, Tensor};
use engobe_autograd::ops::{self, LinearSpec, Matrix};
use engobe_autograd::{Param, Tape, Var, tensor_of};
use engobe_formats::peft::PeftConfig;
use engobe_formats::tensor::TensorView;
use engobe_kernels::activation::Activation;
use engobe_nn::{InputRows, ModuleTree};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// P-tuning.
#[derive(Debug)]
pub(crate) struct PTuning;

const KIND: &str = "encoder_reparameterization_type";
const HIDDEN: &str = "encoder_hidden_size";
const LAYERS: &str = "encoder_num_layers";
const DROPOUT: &str = "encoder_dropout";

/// How the prompt is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoder {
    Mlp,
    Lstm,
}

const NAMES: [(&str, Encoder); 2] = [("MLP", Encoder::Mlp), ("LSTM", Encoder::Lstm)];

const SETTINGS: [Setting; 6] = [
    COUNT,
    SAVED,
    training(KIND, Kind::Text, "encoder of a prompt: mlp or lstm [mlp]"),
    training(HIDDEN, Kind::Whole, "width of the encoder's hidden layer [width of a virtual token]"),
    training(LAYERS, Kind::Whole, "layers of an LSTM encoder [2]"),
    training(DROPOUT, Kind::Number, "dropout between the layers of an LSTM encoder [0]"),
];

const fn training(name: &'static str, kind: Kind, help: &'static str) -> Setting {
    Setting { decides: Decides::Training, ..setting(name, kind, help) }
}

const CARD: Card = Card {
    name: "p-tuning",
    about: "a prompt trained through an encoder",
    peft_type: "P_TUNING",
    settings: &SETTINGS,
    learning_rate: Some(0.003),
    head_learning_rate: None,
};

impl Method for PTuning {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn defaults(&self) -> Vec<(&'static str, Value)> {
        vec![(COUNT.name, json!(DEFAULT_COUNT))]
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        let count = virtual_tokens::read(config, &[KIND, HIDDEN, LAYERS, DROPOUT], &[])?;
        let encoder = config.choice(KIND, &NAMES, Encoder::Mlp)?;
        for key in [HIDDEN, LAYERS] {
            config.count(key)?;
        }
        let dropout = config.dropout(DROPOUT)?;
        let mut config = config.clone();
        config.set(COUNT.name, count);
        config.set(KIND, NAMES.iter().find(|(_, e)| *e == encoder).map_or("MLP", |(name, _)| name));
        config.set(LAYERS, config.whole(LAYERS)?.unwrap_or(2));
        config.set(DROPOUT, dropout);
        Ok(config)
    }

    fn sizes(&self, model: &mut dyn ModuleTree, config: &PeftConfig) -> Result<AdapterSizes> {
        let d = Sites::find(model, self.name())?.width;
        let h = config.whole(HIDDEN)?.unwrap_or(d);
        let count = config.whole(COUNT.name)?.unwrap_or(DEFAULT_COUNT);
        let mut other = vec![count * d];
        match config.choice(KIND, &NAMES, Encoder::Mlp)? {
            Encoder::Mlp => other.extend([h * d, h, h * h, h, d * h, d]),
            Encoder::Lstm => {
                for layer in 0..config.whole(LAYERS)?.unwrap_or(2) {
                    let input = if layer == 0 { d } else { 2 * h };
                    other.extend([4 * h * input, 4 * h, 4 * h * h, 4 * h].repeat(2));
                }
                other.extend([4 * h * h, 2 * h, d * 2 * h, d]);
            }
        }
        let full = saved::count_named(model, config)?;
        Ok(AdapterSizes { other, full, lead: count, ..AdapterSizes::default() })
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        let sites = Sites::find(model, self.name())?;
        let in_file = virtual_tokens::prompts_in_file(config)?;
        let mut config = config.clone();
        let hidden = config.whole(HIDDEN)?.unwrap_or(sites.width);
        config.set(HIDDEN, hidden);
        let rows = Arc::new(Prompt::new(&config, sites.width, hidden, at)?);
        sites.attach_rows(model, &rows, &mut config);
        let saved = saved::train_named(model, &config, saved::PROMPT_ROOT)?;
        Ok(Box::new(Attachment { config, rows, saved, in_file }))
    }
}

/// A linear layer of the encoder: `[out, in]` and `[out]`.
#[derive(Debug)]
struct Affine {
    weight: Param,
    bias: Param,
}

/// One direction of an LSTM layer: `[4h, in]`, `[4h, h]` and both biases `[4h]`.
#[derive(Debug)]
struct Direction {
    input: Affine,
    recurrent: Affine,
}

/// The prompt's embedding `[count, d]` and what encodes it; nothing does in one that was loaded.
#[derive(Debug)]
struct Prompt {
    embedding: Param,
    lstm: Vec<[Direction; 2]>,
    head: Vec<Affine>,
    dropout: f32,
}

/// Makes the encoder's parameters, as `nn.Linear` and `nn.LSTM` start them.
struct Maker<'a> {
    rng: ChaCha8Rng,
    device: &'a Device,
}

impl Maker<'_> {
    fn param(&self, name: String, data: Vec<f32>, shape: &[usize]) -> Result<Param> {
        Ok(Param::new(name, &tensor_of(data, shape)?.to_device(self.device)?)?)
    }

    fn affine(&mut self, names: [String; 2], out: usize, width: usize, fan: usize) -> Result<Affine> {
        let [weight, bias] = names;
        let data = uniform(&mut self.rng, out * width, fan);
        let weight = self.param(weight, data, &[out, width])?;
        let data = uniform(&mut self.rng, out, fan);
        Ok(Affine { weight, bias: self.param(bias, data, &[out])? })
    }

    fn linear(&mut self, index: usize, out: usize, width: usize) -> Result<Affine> {
        let names = ["weight", "bias"].map(|kind| format!("encoder.mlp_head.{index}.{kind}"));
        self.affine(names, out, width, width)
    }

    fn direction(&mut self, layer: usize, suffix: &str, h: usize, width: usize) -> Result<Direction> {
        let names = |half: &str| {
            ["weight", "bias"].map(|kind| format!("encoder.lstm_head.{kind}_{half}_l{layer}{suffix}"))
        };
        let input = self.affine(names("ih"), 4 * h, width, h)?;
        Ok(Direction { input, recurrent: self.affine(names("hh"), 4 * h, h, h)? })
    }
}

impl Prompt {
    fn new(config: &PeftConfig, width: usize, hidden: usize, at: &Attaching<'_>) -> Result<Self> {
        let count = config.whole(COUNT.name)?.unwrap_or(DEFAULT_COUNT);
        let mut make = Maker { rng: generator(at.start.seed, "p-tuning encoder"), device: at.device };
        let encodes = at.purpose != Purpose::Load;
        let name = if encodes { "encoder.embedding.weight" } else { TENSOR };
        let data = gaussian(&mut make.rng, count * width, 1.0);
        let embedding = make.param(name.to_string(), data, &[count, width])?;
        let (mut lstm, mut head) = (Vec::new(), Vec::new());
        match config.choice(KIND, &NAMES, Encoder::Mlp)? {
            _ if !encodes => {}
            Encoder::Mlp => {
                head.push(make.linear(0, hidden, width)?);
                head.push(make.linear(2, hidden, hidden)?);
                head.push(make.linear(4, width, hidden)?);
            }
            Encoder::Lstm => {
                for layer in 0..config.whole(LAYERS)?.unwrap_or(2) {
                    let input = if layer == 0 { width } else { 2 * hidden };
                    let forwards = make.direction(layer, "", hidden, input)?;
                    lstm.push([forwards, make.direction(layer, "_reverse", hidden, input)?]);
                }
                head.push(make.linear(0, 2 * hidden, 2 * hidden)?);
                head.push(make.linear(2, width, 2 * hidden)?);
            }
        }
        let dropout = config.dropout(DROPOUT)? as f32;
        Ok(Self { embedding, lstm, head, dropout })
    }

    fn params(&self) -> Vec<&Param> {
        let directions = self.lstm.iter().flatten().flat_map(|d| [&d.input, &d.recurrent]);
        let affine = directions.chain(&self.head).flat_map(|a| [&a.weight, &a.bias]);
        [&self.embedding].into_iter().chain(affine).collect()
    }
}

impl Affine {
    fn forward(&self, tape: &mut Tape<'_>, x: &Var) -> engobe_autograd::Result<Var> {
        let bias = Some(tape.param(&self.bias));
        let spec = LinearSpec { bias, ..LinearSpec::plain(Matrix::Trained(tape.param(&self.weight))) };
        ops::linear(tape, x, spec)
    }
}

impl Direction {
    /// The input's part of the gates, and the recurrent matrix.
    fn gates(&self, tape: &mut Tape<'_>, x: &Var) -> engobe_autograd::Result<[Var; 2]> {
        let biases = [&self.input.bias, &self.recurrent.bias].map(|b| tape.param(b));
        let bias = Some(ops::add(tape, &biases[0], &biases[1])?);
        let weight = Matrix::Trained(tape.param(&self.input.weight));
        let gates = ops::linear(tape, x, LinearSpec { bias, ..LinearSpec::plain(weight) })?;
        Ok([gates, tape.param(&self.recurrent.weight)])
    }
}

impl InputRows for Prompt {
    fn count(&self) -> usize {
        self.embedding.tensor().dims()[0]
    }

    fn rows(&self, tape: &mut Tape<'_>) -> engobe_autograd::Result<Var> {
        let mut x = tape.param(&self.embedding);
        for (i, [forwards, backwards]) in self.lstm.iter().enumerate() {
            if i > 0 {
                x = ops::drop_out(tape, &x, self.dropout)?;
            }
            let [a, u] = forwards.gates(tape, &x)?;
            let [b, v] = backwards.gates(tape, &x)?;
            x = ops::lstm(tape, [&a, &b], [&u, &v])?;
        }
        for (i, layer) in self.head.iter().enumerate() {
            if i > 0 {
                x = ops::activate(tape, Activation::Relu, &x)?;
            }
            x = layer.forward(tape, &x)?;
        }
        Ok(x)
    }
}

#[derive(Debug)]
struct Attachment {
    config: PeftConfig,
    rows: Arc<Prompt>,
    saved: Vec<Param>,
    /// prompts in the file that it came from
    in_file: usize,
}

impl Attached for Attachment {
    fn config(&self) -> PeftConfig {
        self.config.clone()
    }

    fn params(&self) -> Vec<&Param> {
        self.rows.params().into_iter().chain(&self.saved).collect()
    }

    fn export(&self) -> Result<BTreeMap<String, Tensor>> {
        let rows = self.rows.rows(&mut Tape::inference())?;
        let mut tensors = by_name(&self.saved.iter().collect::<Vec<_>>())?;
        tensors.insert(TENSOR.to_string(), rows.tensor().to_device(&Device::Cpu)?);
        Ok(tensors)
    }

    fn fill(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        match self.file_is_whole() {
            true => {
                virtual_tokens::fill_first(&self.rows.embedding, self.in_file, &self.saved, path, tensors)
            }
            false => fill::by_name(&self.params(), path, tensors),
        }
    }

    fn file_is_whole(&self) -> bool {
        self.rows.head.is_empty()
    }

    fn lead(&self) -> usize {
        self.rows.count()
    }

    fn merge_refusal(&self) -> Option<&'static str> {
        Some("a prompt is input, and no change of weights")
    }
}
