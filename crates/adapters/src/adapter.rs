//! An adapter on a model: attached, with its parameters, from a configuration or from files.

use crate::base_copies;
use crate::fill;
use crate::method::{self, Attached, Attaching, Method, Purpose, StartText, StepTaken};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use engobe_autograd::{Gradients, Param, host};
use engobe_formats::peft::{PeftAdapter, PeftConfig};
use engobe_formats::tensor::TensorView;
use engobe_nn::ModuleTree;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Sizes of what an adapter trains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterSizes {
    /// low-rank layers, in the model's order
    pub layers: Vec<LayerSizes>,
    /// elements of each other parameter in a block that `layers` or `kept` names (magnitudes, biases behind B,
    /// bottlenecks)
    pub vectors: Vec<usize>,
    /// elements of each bias and module that is trained in full
    pub full: Vec<usize>,
    /// elements of each parameter that is neither
    pub other: Vec<usize>,
    /// floats that are kept of each token for the backward beside u = A·x of the layers above, by module path
    pub kept: Vec<(String, usize)>,
    /// floats that are kept for the backward whatever the number of tokens, by module path
    pub fixed: Vec<(String, usize)>,
    /// trained elements that are the base's own (biases)
    pub base_elements: usize,
    /// rows that come before each sequence
    pub lead: usize,
    /// rows that come before the keys and values of each sequence alone
    pub key_value_lead: usize,
    /// inputs of low-rank layers are dropped at random
    pub dropout: bool,
}

/// Sizes of one low-rank layer.
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
        let rest = self.vectors.iter().chain(&self.full).chain(&self.other);
        self.layers.iter().flat_map(factors).chain(rest.copied())
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

/// An adapter attached to a model.
#[derive(Debug)]
pub struct Adapter {
    method: &'static dyn Method,
    attached: Box<dyn Attached>,
}

impl Adapter {
    /// Attaches a new adapter to `model`; the configuration says of which method.
    ///
    /// # Errors
    /// Nothing matches, a target is of a kind that the method does not know, settings contradict each other.
    pub fn attach(
        model: &mut dyn ModuleTree,
        config: impl Into<PeftConfig>,
        start: Start,
        device: &Device,
    ) -> Result<Self> {
        Self::attach_with(model, config, start, &StartText::default(), device)
    }

    /// [`Adapter::attach`] for a method that starts from a text ([`Method::needs_text`]).
    pub fn attach_with(
        model: &mut dyn ModuleTree,
        config: impl Into<PeftConfig>,
        start: Start,
        text: &StartText,
        device: &Device,
    ) -> Result<Self> {
        let config = config.into();
        let method = method::of(&config)?;
        let config = method.normalize(&config)?;
        let attached =
            method.attach(model, &config, &Attaching { purpose: Purpose::Start, start, text, device })?;
        Ok(Self { method, attached })
    }

    /// What an adapter of this configuration would train; `model` is an outline, and of no use for anything else
    /// afterwards.
    ///
    /// # Errors
    /// Those of [`Adapter::attach`].
    pub fn sizes(model: &mut dyn ModuleTree, config: impl Into<PeftConfig>) -> Result<AdapterSizes> {
        let config = config.into();
        let method = method::of(&config)?;
        method.sizes(model, &method.normalize(&config)?)
    }

    /// Attaches the adapter of a PEFT directory.
    ///
    /// # Errors
    /// A tensor that finds no module, a module that finds no tensor, another shape: all are listed.
    pub fn load(model: &mut dyn ModuleTree, dir: &Path, device: &Device) -> Result<Self> {
        Self::load_to_train(model, dir, &[], device)
    }

    /// As [`Adapter::load`], for a run that goes on from there; `changes` take the place of the file's settings.
    pub fn load_to_train(
        model: &mut dyn ModuleTree,
        dir: &Path,
        changes: &[(&str, Value)],
        device: &Device,
    ) -> Result<Self> {
        let mut file = PeftAdapter::load(dir)?;
        let method = method::of(&file.config)?;
        for (name, value) in changes {
            file.config.set(name, value.clone());
        }
        let config = method.normalize(&file.config)?;
        let (purpose, text) = (Purpose::Load, StartText::default());
        let at = Attaching { purpose, start: Start { seed: 0 }, text: &text, device };
        let adapter = Self { method, attached: method.attach(model, &config, &at)? };
        let trained = adapter.params().into_iter().map(Param::name).collect();
        base_copies::take(model, &mut file.tensors, &trained, dir)?;
        adapter.fill(dir, &file.tensors)?;
        Ok(adapter)
    }

    /// Sets every parameter from a file's tensors; nothing is set unless everything fits.
    pub fn fill(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        self.attached.fill(path, tensors)
    }

    /// Sets every parameter from what [`Adapter::state`] gave; nothing is set unless everything fits.
    pub fn restore(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        fill::by_name(&self.stateful(), path, tensors)
    }

    /// True if the adapter's file holds all that is trained, and not only its outcome.
    pub fn file_is_whole(&self) -> bool {
        self.attached.file_is_whole()
    }

    /// The method.
    pub fn method(&self) -> &'static dyn Method {
        self.method
    }

    /// Rows that come before the tokens of each sequence.
    pub fn lead(&self) -> usize {
        self.attached.lead()
    }

    /// The configuration as files have it.
    pub fn config(&self) -> PeftConfig {
        self.attached.config()
    }

    /// Entries of `target_modules` that no module answers to.
    pub fn unmatched_targets(&self) -> &[String] {
        self.attached.unmatched_targets()
    }

    /// Puts what a shorthand (`all-linear`) stands for in this model in its place.
    pub fn expand(&self, config: &mut PeftConfig) {
        self.attached.expand(config);
    }

    /// Everything that is trained, in a fixed order.
    pub fn params(&self) -> Vec<&Param> {
        self.attached.params()
    }

    /// What checkpoints hold: everything that is trained, and the method's state beside it.
    pub fn stateful(&self) -> Vec<&Param> {
        self.params().into_iter().chain(self.attached.buffers()).collect()
    }

    /// Says how many steps a run will take, before the first.
    ///
    /// # Errors
    /// The method's own schedule does not fit into them.
    pub fn begin(&self, total_steps: usize) -> Result<()> {
        self.attached.begin(total_steps)
    }

    /// What the method adds to a step's loss, with its gradient added to `grads`.
    pub fn penalty(&self, grads: &mut Gradients) -> Result<f64> {
        self.attached.penalty(grads)
    }

    /// Lets the method look at a step that was taken.
    pub fn after_step(&self, step: &StepTaken<'_>) -> Result<()> {
        self.attached.after_step(step)
    }

    /// Number of trained elements.
    pub fn num_parameters(&self) -> usize {
        self.params().iter().map(|p| p.len()).sum()
    }

    /// Number of elements that the adapter adds to the base: new parameters and copies of modules trained in full.
    /// Biases that are trained are the base's own.
    pub fn num_added(&self) -> usize {
        self.num_parameters() - self.attached.base_elements()
    }

    /// Current values of what is trained by name, on the CPU: what a checkpoint holds.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        method::by_name(&self.stateful())
    }

    /// What the adapter's file holds, by PEFT's tensor names, on the CPU.
    pub fn export(&self) -> Result<BTreeMap<String, Tensor>> {
        self.attached.export()
    }

    /// The bias of the linear layer at `path` with the adapter in it.
    pub(crate) fn merged_bias(&self, path: &str, bias: Tensor) -> Result<Tensor> {
        self.attached.merged_bias(path, bias)
    }

    /// The weight of the linear layer or embedding at `path` with the adapter in it.
    pub(crate) fn merged_weight(&self, path: &str, weight: Tensor) -> Result<Tensor> {
        self.attached.merged_weight(path, weight)
    }

    /// # Errors
    /// The method can't be merged; the error says why.
    pub fn check_mergeable(&self) -> Result<()> {
        match self.attached.merge_refusal() {
            None => Ok(()),
            Some(reason) => Err(Error::CannotMerge { method: self.method.name(), reason }),
        }
    }

    /// Writes a PEFT directory.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let state = self.export()?;
        let mut tensors = Vec::new();
        for (name, tensor) in &state {
            tensors.push((name.clone(), tensor.dims().to_vec(), host(tensor)?));
        }
        Ok(PeftAdapter::save(dir, self.attached.file_config(), &tensors)?)
    }
}
