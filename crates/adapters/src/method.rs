//! What a method is to the rest of engobe, and the table of all methods.
//!
//! To add one: a file with a type that implements [`Method`] (its configuration, its settings, how it attaches) and
//! one that implements [`Attached`] (what it trained, saves and merges), and a line in [`METHODS`]. Flags, `run.toml`,
//! `plan`, resuming and `inspect` follow from the method's own table of settings.

use crate::adalora::AdaLora;
use crate::bottleneck::Bottleneck;
use crate::fill;
use crate::ia3::Ia3;
use crate::lora::method::Lora;
use crate::miss::Miss;
use crate::own::{BITFIT, FULL, LN_TUNING};
use crate::p_tuning::PTuning;
use crate::prefix_tuning::PrefixTuning;
use crate::prompt_tuning::PromptTuning;
use crate::trainable_tokens::TrainableTokens;
use crate::vera::Vera;
use crate::{AdapterSizes, Error, Result, Start};
use candle_core::{Device, Tensor};
use engobe_autograd::{Gradients, Param};
use engobe_formats::peft::{KnownKeys, PeftConfig};
use engobe_formats::tensor::TensorView;
use engobe_nn::ModuleTree;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

/// All methods.
pub static METHODS: [&dyn Method; 13] = [
    &Lora,
    &PromptTuning,
    &PTuning,
    &PrefixTuning,
    &Bottleneck,
    &AdaLora,
    &Ia3,
    &Vera,
    &Miss,
    &LN_TUNING,
    &BITFIT,
    &FULL,
    &TrainableTokens,
];

/// What a setting's value must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// whole number, 0 or above
    Whole,
    /// number
    Number,
    /// true or false
    Flag,
    /// text
    Text,
    /// text, or a list of texts
    Names,
    /// a list of whole numbers
    Wholes,
    /// patterns and numbers
    Table,
    /// true, false or a name
    FlagOrText,
    /// a number, or numbers by name
    NumberOrTable,
    /// a number or a name
    NumberOrText,
}

/// What a setting decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decides {
    /// what the adapter is: one that is loaded must have the same
    Adapter,
    /// how it is trained: one that is loaded may be trained otherwise
    Training,
    /// how a new one starts
    Start,
}

/// A setting of a method. Methods may share one: it then has one meaning and one line of help.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// PEFT's key
    pub name: &'static str,
    /// what it takes
    pub kind: Kind,
    /// what it decides
    pub decides: Decides,
    /// one line of help, with the default
    pub help: &'static str,
}

/// A setting of what the adapter is.
pub(crate) const fn setting(name: &'static str, kind: Kind, help: &'static str) -> Setting {
    Setting { name, kind, decides: Decides::Adapter, help }
}

/// What a text is to a model, for methods that start from one.
#[derive(Clone, Debug, Default)]
pub struct StartText {
    /// its token ids
    pub ids: Vec<u32>,
    /// its keys and values in each attention module, `[ids, kv_width]`, from the first to the last block
    pub key_values: Vec<[Tensor; 2]>,
}

/// What a method may need of a text before it attaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeedsText {
    /// the text
    pub text: String,
    /// its keys and values are needed, not only its ids
    pub key_values: bool,
}

/// What an adapter is attached for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// to train a new one
    Start,
    /// to take the values of a file, which hold the outcome of what only trains (encoders of prompts)
    Load,
    /// to count what would be trained
    Count,
}

/// Where and from what a method starts.
pub struct Attaching<'a> {
    /// what for
    pub purpose: Purpose,
    /// where new values come from
    pub start: Start,
    /// the text that was asked for
    pub text: &'a StartText,
    /// where parameters live
    pub device: &'a Device,
}

impl<'a> Attaching<'a> {
    /// Counting, with no text to start from.
    pub(crate) fn to_count(text: &'a StartText) -> Self {
        Self { purpose: Purpose::Count, start: Start { seed: 0 }, text, device: &Device::Cpu }
    }
}

/// What a method is called, and what may be set.
#[derive(Debug)]
pub struct Card {
    /// its name, as users type it
    pub name: &'static str,
    /// what it does, in a few words
    pub about: &'static str,
    /// PEFT's name
    pub peft_type: &'static str,
    /// its settings
    pub settings: &'static [Setting],
    /// peak learning rate where none was given, if the usual one does not suit it
    pub learning_rate: Option<f64>,
    /// the same beside a new task head: what did best on SST-2's validation rows (docs/tasks.md)
    pub head_learning_rate: Option<f64>,
}

impl Card {
    /// Refuses keys that are neither settings nor `more`, nor `notes`, which change nothing; those of `not_yet` may
    /// only be off.
    pub(crate) fn check_keys(
        &self,
        config: &PeftConfig,
        more: &[&str],
        notes: &[&str],
        not_yet: &[&str],
    ) -> Result<()> {
        let settings: Vec<&str> = self.settings.iter().map(|s| s.name).chain(more.iter().copied()).collect();
        Ok(config.check_keys(KnownKeys { settings: &settings, notes, not_yet })?)
    }
}

/// A method of parameter-efficient fine-tuning.
pub trait Method: Debug + Sync {
    /// What it is called, and what may be set.
    fn card(&self) -> &'static Card;

    /// Its name, as users type it.
    fn name(&self) -> &'static str {
        self.card().name
    }

    /// PEFT's name (`peft_type`).
    fn peft_type(&self) -> &'static str {
        self.card().peft_type
    }

    /// Its settings.
    fn settings(&self) -> &'static [Setting] {
        self.card().settings
    }

    /// Values where engobe's defaults are not those of [`Method::normalize`].
    fn defaults(&self) -> Vec<(&'static str, Value)> {
        Vec::new()
    }

    /// The configuration read whole and written again, with defaults in place.
    ///
    /// # Errors
    /// An unknown key, or a value that cannot be.
    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig>;

    /// The text that a new adapter of this configuration starts from, if it does.
    fn needs_text(&self, _config: &PeftConfig) -> Option<NeedsText> {
        None
    }

    /// Attaches a new adapter.
    ///
    /// # Errors
    /// The model lacks what the method needs, or settings contradict each other.
    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>>;

    /// What an adapter of this configuration would train. The model is an outline whose weights must not be relied
    /// on, and is of no use afterwards.
    fn sizes(&self, model: &mut dyn ModuleTree, config: &PeftConfig) -> Result<AdapterSizes> {
        let attached = self.attach(model, config, &Attaching::to_count(&StartText::default()))?;
        Ok(AdapterSizes {
            other: attached.params().into_iter().map(Param::len).collect(),
            base_elements: attached.base_elements(),
            lead: attached.lead(),
            ..AdapterSizes::default()
        })
    }
}

/// A step of training that was taken.
pub struct StepTaken<'a> {
    /// its number, from 0
    pub step: usize,
    /// steps of the run
    pub total: usize,
    /// the gradients
    pub grads: &'a Gradients,
    /// what the optimizer multiplied them with (clipping)
    pub grad_scale: f32,
}

/// A method's adapter on a model.
pub trait Attached: Debug + Send + Sync {
    /// Its configuration as files have it.
    fn config(&self) -> PeftConfig;

    /// Everything that is trained, in a fixed order; names are those of checkpoints.
    fn params(&self) -> Vec<&Param>;

    /// State beside what is trained, which checkpoints hold as well.
    fn buffers(&self) -> Vec<&Param> {
        Vec::new()
    }

    /// Says how many steps a run will take, before the first.
    ///
    /// # Errors
    /// The method's own schedule does not fit into them.
    fn begin(&self, _total_steps: usize) -> Result<()> {
        Ok(())
    }

    /// What the method adds to a step's loss, with its gradient added to `grads`.
    fn penalty(&self, _grads: &mut Gradients) -> Result<f64> {
        Ok(0.0)
    }

    /// Looks at a step that was taken.
    fn after_step(&self, _step: &StepTaken<'_>) -> Result<()> {
        Ok(())
    }

    /// What the adapter's file holds, by PEFT's names, on the CPU.
    fn export(&self) -> Result<BTreeMap<String, Tensor>> {
        by_name(&self.params())
    }

    /// The configuration of the file that [`Attached::export`] fills.
    fn file_config(&self) -> PeftConfig {
        self.config()
    }

    /// Sets every parameter from a file's tensors; nothing is set unless everything fits.
    fn fill(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        fill::by_name(&self.params(), path, tensors)
    }

    /// True if [`Attached::fill`] from what [`Attached::export`] gave restores all that is trained; false if a file
    /// holds only the outcome (a prompt without its encoder).
    fn file_is_whole(&self) -> bool {
        true
    }

    /// Trained elements that are the base's own, such as biases.
    fn base_elements(&self) -> usize {
        0
    }

    /// Rows that come before the tokens of each sequence.
    fn lead(&self) -> usize {
        0
    }

    /// Entries of `target_modules` that no module answers to.
    fn unmatched_targets(&self) -> &[String] {
        &[]
    }

    /// Puts what a shorthand (`all-linear`) stands for in this model in its place.
    fn expand(&self, _config: &mut PeftConfig) {}

    /// Why it can't be merged into the base; `None` if it can.
    fn merge_refusal(&self) -> Option<&'static str> {
        None
    }

    /// The weight of the linear layer or embedding at a path with the adapter in it; both on the CPU in f32.
    fn merged_weight(&self, _path: &str, weight: Tensor) -> Result<Tensor> {
        Ok(weight)
    }

    /// The same of a linear layer's bias.
    fn merged_bias(&self, _path: &str, bias: Tensor) -> Result<Tensor> {
        Ok(bias)
    }
}

/// Values of parameters by name, on the CPU.
pub(crate) fn by_name(params: &[&Param]) -> Result<BTreeMap<String, Tensor>> {
    params.iter().map(|p| Ok((p.name().to_string(), p.tensor().to_device(&Device::Cpu)?))).collect()
}

/// The method that users call `name`.
pub fn find(name: &str) -> Option<&'static dyn Method> {
    METHODS.into_iter().find(|m| m.name() == name)
}

/// The method of a configuration.
///
/// # Errors
/// A `peft_type` that no method has.
pub fn of(config: &PeftConfig) -> Result<&'static dyn Method> {
    let found = config.peft_type();
    METHODS.into_iter().find(|m| m.peft_type() == found).ok_or_else(|| {
        let known: Vec<&str> = METHODS.iter().map(|m| m.peft_type()).collect();
        Error::Format(config.bad("peft_type", &format!("{found:?}"), &format!("one of {}", known.join(", "))))
    })
}
