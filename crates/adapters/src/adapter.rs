//! An adapter on a model: attached, with its parameters, from a configuration or from files.

use crate::base_copies;
use crate::lora::LoraLayer;
use crate::saved;
use crate::target::Targets;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use engobe_autograd::{Param, host, tensor_of};
use engobe_formats::peft::{BiasMode, LoraConfig, PeftAdapter, TargetModules};
use engobe_formats::tensor::TensorView;
use engobe_kernels::codec;
use engobe_nn::{Linear, ModuleMut, ModuleTree};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

/// Sizes of what an adapter trains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterSizes {
    /// the LoRA layers, in the model's order
    pub layers: Vec<LayerSizes>,
    /// elements of each bias and module that is trained in full
    pub full: Vec<usize>,
    /// trained elements that are the base's own (biases)
    pub base_elements: usize,
}

/// Sizes of one LoRA layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSizes {
    /// module path
    pub path: String,
    /// rank
    pub rank: usize,
    /// columns of A
    pub in_features: usize,
    /// rows of B
    pub out_features: usize,
}

impl AdapterSizes {
    /// Elements of every parameter.
    pub fn params(&self) -> impl Iterator<Item = usize> {
        let factors = |l: &LayerSizes| [l.rank * l.in_features, l.rank * l.out_features];
        self.layers.iter().flat_map(factors).chain(self.full.iter().copied())
    }

    /// Number of trained elements.
    pub fn num_parameters(&self) -> usize {
        self.params().sum()
    }

    /// Number of elements that the adapter adds to the base.
    pub fn num_added(&self) -> usize {
        self.num_parameters() - self.base_elements
    }
}

/// What a new adapter starts from.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// seed of the initial values
    pub seed: u64,
}

/// A LoRA adapter attached to a model.
#[derive(Debug)]
pub struct Adapter {
    config: LoraConfig,
    layers: Vec<Arc<LoraLayer>>,
    /// biases and modules trained in full
    others: Vec<Param>,
    /// entries of target_modules that no module answers to
    unmatched: Vec<String>,
    /// trained elements that are the base's own (biases)
    base_elements: usize,
    /// what `all-linear` stands for in this model
    linear_names: BTreeSet<String>,
}

impl Adapter {
    /// Attaches a new adapter to `model`.
    ///
    /// # Errors
    /// Nothing matches, a target is no linear layer, settings contradict each other.
    pub fn attach(
        model: &mut dyn ModuleTree,
        config: &LoraConfig,
        start: Start,
        device: &Device,
    ) -> Result<Self> {
        let targets = Targets::new(config)?;
        let heads = model.output_heads();
        let mut paths = Vec::new();
        model.visit_modules(&mut |m| paths.push(m.path().to_string()));
        let mut attached = Attach {
            config,
            targets: &targets,
            start,
            device,
            layers: vec![],
            others: vec![],
            base_elements: 0,
            linear_names: BTreeSet::new(),
        };
        let mut result = Ok(());
        model.visit_modules(&mut |mut module| {
            if result.is_ok() {
                result = attached.module(&mut module, &heads);
            }
        });
        result?;
        let Attach { layers, others, base_elements, linear_names, .. } = attached;
        if layers.is_empty() {
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
        let unmatched = unmatched.into_iter().map(str::to_string).collect();
        let mut config = config.clone();
        if config.target_modules == Some(TargetModules::AllLinear) {
            // files name the layers, as PEFT's do: other readers need not know the shorthand
            config.target_modules = Some(TargetModules::List(linear_names.iter().cloned().collect()));
        }
        Ok(Self { config, layers, others, unmatched, base_elements, linear_names })
    }

    /// What an adapter of this configuration would train. It is attached with factors of rank 1, so that hardly any
    /// memory is taken whatever the ranks; `model` is of no use for anything else afterwards.
    ///
    /// # Errors
    /// Those of [`Adapter::attach`].
    pub fn sizes(model: &mut dyn ModuleTree, config: &LoraConfig) -> Result<AdapterSizes> {
        let targets = Targets::new(config)?;
        let mut thin = LoraConfig { r: 1, ..config.clone() };
        thin.rank_pattern.iter_mut().for_each(|(_, r)| *r = 1);
        let adapter = Self::attach(model, &thin, Start { seed: 0 }, &Device::Cpu)?;
        let layers = adapter.layers.iter().map(|l| {
            let [a, b] = l.params().map(Param::len);
            let rank = targets.rank(l.path(), config.r);
            LayerSizes { path: l.path().to_string(), rank, in_features: a, out_features: b }
        });
        Ok(AdapterSizes {
            layers: layers.collect(),
            full: adapter.others.iter().map(Param::len).collect(),
            base_elements: adapter.base_elements,
        })
    }

    /// Attaches the adapter of a PEFT directory.
    ///
    /// # Errors
    /// A tensor that finds no module, a module that finds no tensor, another shape: all are listed.
    pub fn load(model: &mut dyn ModuleTree, dir: &Path, device: &Device) -> Result<Self> {
        Self::load_to_train(model, dir, None, device)
    }

    /// As [`Adapter::load`], for a run that goes on from there; `dropout` takes the place of the file's.
    pub fn load_to_train(
        model: &mut dyn ModuleTree,
        dir: &Path,
        dropout: Option<f64>,
        device: &Device,
    ) -> Result<Self> {
        let mut file = PeftAdapter::load(dir)?;
        file.config.lora_dropout = dropout.unwrap_or(file.config.lora_dropout);
        let adapter = Self::attach(model, &file.config, Start { seed: 0 }, device)?;
        let trained = adapter.params().into_iter().map(Param::name).collect();
        base_copies::take(model, &mut file.tensors, &trained, dir)?;
        adapter.fill(dir, &file.tensors)?;
        Ok(adapter)
    }

    /// Sets every parameter from a file's tensors; nothing is set unless everything fits.
    pub fn fill(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        let params: BTreeMap<&str, &Param> = self.params().into_iter().map(|p| (p.name(), p)).collect();
        let mut problems = Vec::new();
        let mut values = Vec::new();
        for (name, view) in tensors {
            match params.get(name.as_str()) {
                None => problems.push(format!("{name} matches no module")),
                Some(p) if p.tensor().dims() != view.shape => {
                    problems.push(format!(
                        "{name} is {:?}, the model needs {:?}",
                        view.shape,
                        p.tensor().dims()
                    ));
                }
                Some(p) => values.push((*p, view)),
            }
        }
        problems.extend(
            params
                .keys()
                .filter(|n| !tensors.contains_key(**n))
                .map(|n| format!("{n} is missing from the file")),
        );
        if !problems.is_empty() {
            return Err(Error::DoesNotFit { path: path.to_path_buf(), problems: shorten(problems) });
        }
        for (param, view) in values {
            let mut data = vec![0f32; param.len()];
            codec::decode(view.storage()?, view.bytes(), &mut data);
            if data.iter().any(|v| !v.is_finite()) {
                return Err(Error::NotFinite { path: path.to_path_buf(), tensor: view.name.clone() });
            }
            let value = tensor_of(data, view.shape.as_slice())?.to_device(param.tensor().device())?;
            param.set(&value)?;
        }
        Ok(())
    }

    /// The configuration.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The LoRA layers, in the model's order.
    pub fn layers(&self) -> &[Arc<LoraLayer>] {
        &self.layers
    }

    /// Entries of `target_modules` that no module answers to.
    pub fn unmatched_targets(&self) -> &[String] {
        &self.unmatched
    }

    /// What `all-linear` stands for in this model: last names of its linear layers without the heads.
    pub fn linear_names(&self) -> &BTreeSet<String> {
        &self.linear_names
    }

    /// Everything that is trained, in a fixed order.
    pub fn params(&self) -> Vec<&Param> {
        self.layers.iter().flat_map(|l| l.params()).chain(&self.others).collect()
    }

    /// Parameters that are not LoRA factors: biases and modules trained in full.
    pub fn full_params(&self) -> &[Param] {
        &self.others
    }

    /// Number of trained elements.
    pub fn num_parameters(&self) -> usize {
        self.params().iter().map(|p| p.len()).sum()
    }

    /// Number of elements that the adapter adds to the base: LoRA factors and the copies of modules trained in
    /// full. Biases that `bias` trains are the base's own.
    pub fn num_added(&self) -> usize {
        self.num_parameters() - self.base_elements
    }

    /// Current values by PEFT's tensor names, on the CPU.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.params()
            .into_iter()
            .map(|p| Ok((p.name().to_string(), p.tensor().to_device(&Device::Cpu)?)))
            .collect()
    }

    /// Writes a PEFT directory.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let state = self.state()?;
        let mut tensors = Vec::new();
        for (name, tensor) in &state {
            tensors.push((name.clone(), tensor.dims().to_vec(), host(tensor)?));
        }
        Ok(PeftAdapter::save(dir, &self.config, &tensors)?)
    }
}

/// The walk over a model's modules that attaches the adapter.
struct Attach<'a> {
    config: &'a LoraConfig,
    targets: &'a Targets,
    start: Start,
    device: &'a Device,
    layers: Vec<Arc<LoraLayer>>,
    others: Vec<Param>,
    base_elements: usize,
    linear_names: BTreeSet<String>,
}

impl Attach<'_> {
    fn module(&mut self, module: &mut ModuleMut<'_>, heads: &[String]) -> Result<()> {
        if self.targets.saves(module.path()) {
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
                return self.bias(linear, adapted);
            }
            ModuleMut::Embedding(_) => "an embedding",
            ModuleMut::RmsNorm(_) | ModuleMut::LayerNorm(_) => "a norm",
        };
        match self.targets.adapts(module.path(), false) {
            true => Err(Error::Unsupported { path: module.path().to_string(), kind }),
            false => Ok(()),
        }
    }

    fn linear(&mut self, linear: &mut Linear) -> Result<()> {
        let path = linear.path().to_string();
        let r = self.targets.rank(&path, self.config.r);
        let alpha = self.targets.alpha(&path, self.config.lora_alpha);
        let scale = if self.config.use_rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 };
        let layer = LoraLayer::new(
            &path,
            (linear.out_features(), linear.in_features()),
            r,
            scale,
            self.config.lora_dropout,
            self.config.init_lora_weights,
            self.start.seed,
            self.device,
        )?;
        let layer = Arc::new(layer);
        linear.attach(layer.clone());
        self.layers.push(layer);
        Ok(())
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

/// The last parts of module paths, each once: what a user may put into `target_modules`.
fn nothing(key: &'static str, given: String, paths: &[String]) -> Error {
    let mut kinds: Vec<&str> = paths.iter().filter_map(|p| p.rsplit('.').next()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    Error::NothingMatches { key, given, available: kinds.join(", ") }
}

/// The first few of a long list, and how many more there are.
fn shorten(mut problems: Vec<String>) -> Vec<String> {
    const SHOWN: usize = 8;
    let more = problems.len().saturating_sub(SHOWN);
    problems.truncate(SHOWN);
    if more > 0 {
        problems.push(format!("and {more} more"));
    }
    problems
}
