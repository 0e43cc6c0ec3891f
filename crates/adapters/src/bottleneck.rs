//! Bottleneck adapters: down to a few features, an activation, up again, at the end of attention or feed-forward.
//!
//! After both of them (Houlsby et al. 2019), after the feed-forward alone (Pfeiffer et al. 2020), or beside it (He et al.
//! 2022). With h what a sub-layer computed, x its residual, and A(z) = s·(W_up·f(W_down·z + b) + c):
//!
//! ```text
//! sequential   z = x + h (original_ln_before; post-norm models norm it) or h
//!              y = A(z) + r, r = h (residual_before_ln) or z;  then y + x (original_ln_after; normed likewise)
//! parallel     y = A(x) + h;  then y + x, normed likewise
//! ```
//!
//! Names and rules are those of AdapterHub's `adapters` package, whose files are read and written.

mod settings;

use self::settings::{Init, Numbers, SETTINGS, Scaling, Settings, architecture};
use crate::fill;
use crate::method::{Attached, Attaching, Card, Method};
use crate::random::{gaussian, generator, uniform};
use crate::saved;
use crate::{AdapterSizes, Error, Result};
use engobe_autograd::ops::{self, LinearSpec, Matrix};
use engobe_autograd::{Param, Tape, Var, tensor_of};
use engobe_formats::adapter_hub::{BOTTLENECK, NAME};
use engobe_formats::peft::PeftConfig;
use engobe_formats::tensor::TensorView;
use engobe_nn::{Closing, ModuleTree, SiteMut, SubLayerAdapter, SubLayerKind};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Bottleneck adapters.
#[derive(Debug)]
pub(crate) struct Bottleneck;

/// What a model must offer.
const NEEDS: &str =
    "a sub-layer to stand behind (mh_adapter, cross_adapter, output_adapter and leave_out say which)";

const CARD: Card = Card {
    name: "bottleneck",
    about: "small layers behind or beside sub-layers",
    peft_type: BOTTLENECK,
    settings: &SETTINGS,
    learning_rate: None,
    head_learning_rate: Some(2e-3),
};

impl Method for Bottleneck {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn defaults(&self) -> Vec<(&'static str, Value)> {
        // the package starts from small normal numbers; from zero, an adapter that is not trained changes nothing
        vec![("architecture", json!("pfeiffer")), ("init_weights", json!("mam_adapter"))]
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        let mut config = config.clone();
        if config.get("architecture").is_some() {
            for (key, value) in architecture(&config)? {
                if config.get(key).is_none() {
                    config.set(key, value);
                }
            }
        }
        let settings = Settings::read(&config)?;
        settings.write(&mut config);
        Ok(config)
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        let settings = Settings::read(config)?;
        let name = config.text(NAME).unwrap_or("engobe");
        let (mut layers, mut numbers) = (Vec::new(), Numbers::default());
        let mut result = Ok(());
        model.visit_sites(&mut |site| {
            let SiteMut::SubLayer(end) = site else { return };
            let number = numbers.of(end.path());
            if result.is_err() || !settings.adapts(end, number) {
                return;
            }
            match Layer::new(end.path(), end.kind(), number, end.width(), &settings, name, config, at) {
                Ok(layer) => {
                    let layer = Arc::new(layer);
                    end.attach(layer.clone());
                    layers.push(layer);
                }
                Err(error) => result = Err(error),
            }
        });
        result?;
        if layers.is_empty() {
            return Err(Error::NoSite { method: self.name(), needs: NEEDS });
        }
        // the package keeps heads under their own paths
        let saved = saved::train_named(model, config, "")?;
        Ok(Box::new(Attachment { config: config.clone(), layers, saved }))
    }

    /// Counted, not attached: bottlenecks of a large model are large.
    fn sizes(&self, model: &mut dyn ModuleTree, config: &PeftConfig) -> Result<AdapterSizes> {
        let settings = Settings::read(config)?;
        let (mut vectors, mut kept, mut numbers) = (Vec::new(), Vec::new(), Numbers::default());
        model.visit_sites(&mut |site| {
            let SiteMut::SubLayer(end) = site else { return };
            let number = numbers.of(end.path());
            if settings.adapts(end, number)
                && let Some(m) = settings.width(number.unwrap_or(0), end.width())
            {
                let d = end.width();
                vectors.extend([m * d, m, d * m, d]);
                match settings.scaling {
                    Scaling::Fixed(_) => {}
                    Scaling::Learned => vectors.push(1),
                    Scaling::Channel => vectors.push(d),
                }
                vectors.extend(if settings.norms { vec![d, d] } else { Vec::new() });
                kept.push((end.path().to_string(), settings.kept(m, d)));
            }
        });
        match vectors.is_empty() {
            true => Err(Error::NoSite { method: self.name(), needs: NEEDS }),
            false => {
                let full = saved::count_named(model, config)?;
                Ok(AdapterSizes { vectors, kept, full, ..AdapterSizes::default() })
            }
        }
    }
}

/// One bottleneck.
#[derive(Debug)]
struct Layer {
    down: [Param; 2],
    up: [Param; 2],
    /// the trained factor, `[1]` or `[d]`
    scaling: Option<Param>,
    /// weight and bias of the new norm, `[d]` each
    norm: Option<[Param; 2]>,
    settings: Settings,
}

impl Layer {
    #[allow(clippy::too_many_arguments)] // what it is, and what says how it starts
    fn new(
        path: &str,
        kind: SubLayerKind,
        number: Option<usize>,
        d: usize,
        settings: &Settings,
        name: &str,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Self> {
        let m = settings.width(number.unwrap_or(0), d).ok_or_else(|| {
            let found = format!("without a value for layer {}", number.unwrap_or(0));
            config.bad("reduction_factor", &found, "\"default\" or a value for each layer")
        })?;
        let place = place(path, kind);
        let name = |part: &str| format!("{place}.adapters.{name}.{part}");
        let mut rng = generator(at.start.seed, &place);
        let mut normal = |len: usize| -> Vec<f32> {
            match settings.init {
                Init::Houlsby => {
                    gaussian(&mut rng, len, 0.01).into_iter().map(|v| v.clamp(-0.02, 0.02)).collect()
                }
                _ => gaussian(&mut rng, len, 0.02),
            }
        };
        let (down, up) = match settings.init {
            Init::Zero => (uniform(&mut rng, m * d, d), vec![0f32; d * m]),
            _ => (normal(m * d), normal(d * m)),
        };
        let param = |part: &str, data: Vec<f32>, shape: &[usize]| -> Result<Param> {
            Ok(Param::new(name(part), &tensor_of(data, shape)?.to_device(at.device)?)?)
        };
        Ok(Self {
            down: [
                param("adapter_down.0.weight", down, &[m, d])?,
                param("adapter_down.0.bias", vec![0.0; m], &[m])?,
            ],
            up: [param("adapter_up.weight", up, &[d, m])?, param("adapter_up.bias", vec![0.0; d], &[d])?],
            scaling: match settings.scaling {
                Scaling::Fixed(_) => None,
                Scaling::Learned => Some(param("scaling", vec![1.0], &[1])?),
                Scaling::Channel => Some(param("scaling", vec![1.0; d], &[d])?),
            },
            norm: match settings.norms {
                true => Some([
                    param("adapter_norm_after.weight", vec![1.0; d], &[d])?,
                    param("adapter_norm_after.bias", vec![0.0; d], &[d])?,
                ]),
                false => None,
            },
            settings: settings.clone(),
        })
    }

    /// A(z) + `residual`; without a residual inside the norm if `beside` (a parallel bottleneck has none there).
    fn add_to<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        z: &Var,
        residual: &Var,
        beside: bool,
    ) -> engobe_autograd::Result<Var> {
        let down = affine(tape, &self.down);
        let inner = ops::linear(tape, z, down)?;
        let inner = ops::activate(tape, self.settings.activation, &inner)?;
        let up = affine(tape, &self.up);
        if self.settings.scaling == Scaling::Fixed(1.0) && self.norm.is_none() {
            return ops::linear_residual(tape, &inner, up, residual);
        }
        let out = ops::linear(tape, &inner, up)?;
        let mut out = self.scale(tape, &out)?;
        let Some([weight, bias]) = &self.norm else { return ops::add(tape, residual, &out) };
        let inside = self.settings.norms_residual && !beside;
        if inside {
            out = ops::add(tape, residual, &out)?;
        }
        let (weight, bias) = (tape.param(weight), tape.param(bias));
        let normed = ops::layer_norm(tape, &out, &weight, Some(&bias), NORM_EPS)?;
        if inside { Ok(normed) } else { ops::add(tape, residual, &normed) }
    }

    fn scale<'m>(&'m self, tape: &mut Tape<'m>, out: &Var) -> engobe_autograd::Result<Var> {
        let (n, d) = out.tensor().dims2()?;
        match (&self.scaling, self.settings.scaling) {
            (None, Scaling::Fixed(factor)) => ops::scale(tape, out, factor),
            (Some(gain), Scaling::Learned) => {
                // one factor for all: a single column
                let gain = tape.param(gain);
                let column = ops::reshape(tape, out, (n * d, 1))?;
                let scaled = ops::scale_columns(tape, &column, &gain, None, None)?;
                ops::reshape(tape, &scaled, (n, d))
            }
            (Some(gain), _) => {
                let gain = tape.param(gain);
                ops::scale_columns(tape, out, &gain, None, None)
            }
            (None, _) => Ok(out.clone()),
        }
    }

    /// In the order of its forward pass.
    fn params(&self) -> impl Iterator<Item = &Param> {
        self.down.iter().chain(&self.up).chain(&self.scaling).chain(self.norm.iter().flatten())
    }
}

/// The module that holds the bottlenecks of the sub-layer at `path`, as the package names it: in BERT's kin the one that
/// closes the sub-layer, in T5 the sub-layer, elsewhere one of the block's own.
fn place(path: &str, kind: SubLayerKind) -> String {
    let (block, last) = match path.rsplit_once('.') {
        // a feed-forward of layers that are the block's own (OPT)
        Some((_, number)) if number.parse::<usize>().is_ok() => (path, ""),
        Some(split) => split,
        None => (path, ""),
    };
    match (last, kind) {
        ("output", _) => path.to_string(),
        ("SelfAttention" | "EncDecAttention" | "DenseReluDense", _) => block.to_string(),
        (_, SubLayerKind::FeedForward) => format!("{block}.output_adapters"),
        _ => format!("{block}.attention_adapters"),
    }
}

/// Epsilon of `nn.LayerNorm`.
const NORM_EPS: f32 = 1e-5;

/// `x·Wᵀ + b` of trained W and b.
fn affine(tape: &mut Tape<'_>, [weight, bias]: &[Param; 2]) -> LinearSpec {
    LinearSpec { bias: Some(tape.param(bias)), ..LinearSpec::plain(Matrix::Trained(tape.param(weight))) }
}

impl SubLayerAdapter for Layer {
    fn close<'m>(&'m self, tape: &mut Tape<'m>, closing: Closing<'_, 'm>) -> engobe_autograd::Result<Var> {
        let s = &self.settings;
        let h = &closing.output;
        let out = match (s.parallel, s.ln_before) {
            (true, _) => self.add_to(tape, closing.residual, h, true)?,
            (false, true) => {
                let z = closing.close(tape, h)?;
                let around = if s.residual_before_ln { h } else { &z };
                self.add_to(tape, &z, around, false)?
            }
            (false, false) => self.add_to(tape, h, h, false)?,
        };
        match s.ln_after {
            true => closing.close(tape, &out),
            false => Ok(out),
        }
    }
}

#[derive(Debug)]
struct Attachment {
    config: PeftConfig,
    layers: Vec<Arc<Layer>>,
    saved: Vec<Param>,
}

impl Attached for Attachment {
    fn config(&self) -> PeftConfig {
        self.config.clone()
    }

    fn params(&self) -> Vec<&Param> {
        self.layers.iter().flat_map(|l| l.params()).chain(&self.saved).collect()
    }

    /// Names may lack the prefix of the model that the package saved from (`model.`).
    fn fill(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        let params = self.params();
        let whole = |name: &str| -> String {
            let end = format!(".{name}");
            let found = params.iter().find(|p| p.name() == name || p.name().ends_with(&end));
            found.map_or_else(|| name.to_string(), |p| p.name().to_string())
        };
        let renamed = tensors.iter().map(|(name, view)| (whole(name), view.clone())).collect();
        fill::by_name(&params, path, &renamed)
    }

    fn merge_refusal(&self) -> Option<&'static str> {
        Some("there is an activation between its two layers, which no weight of the base can hold")
    }
}
