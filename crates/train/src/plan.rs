//! What a training run will do, validated: the only description of a run that the trainer sees.
//!
//! The command line turns what was typed into a [`Plan`]; the trainer writes it out as `run.toml`. Field
//! names are the ones that users of PEFT and transformers know, and are the keys of `--config` and `--set`.

use crate::memory::MemoryLimit;
use engobe_autograd::Half;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How often, and how long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Schedule {
    /// Passes over the data; ignored when `max_steps` is given.
    pub epochs: f64,
    /// Optimizer steps; wins over `epochs`.
    pub max_steps: Option<usize>,
    /// Rows (or, packed, bins of `max_seq_len` tokens) in one micro-batch.
    pub batch_size: usize,
    /// Micro-batches in one optimizer step.
    pub gradient_accumulation: usize,
    /// Tokens after which a row is cut.
    pub max_seq_len: usize,
    /// Fill bins of `max_seq_len` tokens with several rows, which never attend to each other.
    pub packing: bool,
    /// Shuffle the rows in each epoch.
    pub shuffle: bool,
    /// Seed of everything random: initial adapter, order of rows, dropout.
    pub seed: u64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            epochs: 3.0,
            max_steps: None,
            batch_size: 1,
            gradient_accumulation: 1,
            max_seq_len: 512,
            packing: true,
            shuffle: true,
            seed: 42,
        }
    }
}

/// Which rule moves the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW (Loshchilov & Hutter 2019) with PyTorch's defaults.
    AdamW,
    /// AdamW whose moments take 8 bits (Dettmers et al. 2022), as bitsandbytes' `AdamW8bit`.
    #[serde(rename = "adamw_8bit", alias = "adamw_bnb_8bit")]
    AdamW8bit,
    /// AdamW whose moments lie in a memory-mapped file.
    #[serde(rename = "paged_adamw", alias = "paged_adamw_32bit")]
    PagedAdamW,
    /// Both.
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamW8bit,
    /// Stochastic gradient descent with momentum, as `torch.optim.SGD`.
    Sgd,
}

impl OptimizerKind {
    /// Name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::AdamW8bit => "adamw_8bit",
            Self::PagedAdamW => "paged_adamw",
            Self::PagedAdamW8bit => "paged_adamw_8bit",
            Self::Sgd => "sgd",
        }
    }

    /// Moments take 8 bits.
    pub fn is_8bit(self) -> bool {
        matches!(self, Self::AdamW8bit | Self::PagedAdamW8bit)
    }

    /// Moments lie in a file.
    pub fn is_paged(self) -> bool {
        matches!(self, Self::PagedAdamW | Self::PagedAdamW8bit)
    }

    /// Moments that it keeps for each parameter.
    pub fn moments(self) -> usize {
        if self == Self::Sgd { 1 } else { 2 }
    }

    /// The same arithmetic with the moments in memory.
    pub fn unpaged(self) -> Self {
        match self {
            Self::PagedAdamW => Self::AdamW,
            Self::PagedAdamW8bit => Self::AdamW8bit,
            other => other,
        }
    }
}

/// How the learning rate goes after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduler {
    /// falls in a straight line to zero at the last step
    Linear,
    /// falls along half a cosine to zero at the last step
    Cosine,
    /// stays
    Constant,
}

/// The optimizer and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Optimization {
    /// which optimizer
    pub optimizer: OptimizerKind,
    /// peak learning rate
    pub learning_rate: f64,
    /// shape of the schedule
    pub lr_scheduler: LrScheduler,
    /// steps of linear warm-up from zero
    pub warmup_steps: usize,
    /// decoupled weight decay (AdamW) or L2 (SGD)
    pub weight_decay: f64,
    /// global gradient norm above which gradients are scaled down; 0 turns clipping off
    pub max_grad_norm: f64,
    /// AdamW's first decay rate
    pub adam_beta1: f64,
    /// AdamW's second decay rate
    pub adam_beta2: f64,
    /// AdamW's epsilon
    pub adam_epsilon: f64,
    /// SGD's momentum
    pub momentum: f64,
    /// the file of a paged optimizer's moments; without, one in the run's directory
    pub state_file: Option<PathBuf>,
    /// LoRA+ (Hayou et al. 2024): learning rate of B over that of A
    pub loraplus_lr_ratio: Option<f64>,
    /// LoRA+: peak learning rate of factors beside embeddings
    pub loraplus_lr_embedding: f64,
}

impl Default for Optimization {
    fn default() -> Self {
        Self {
            optimizer: OptimizerKind::AdamW,
            learning_rate: 2e-4,
            lr_scheduler: LrScheduler::Linear,
            warmup_steps: 0,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            momentum: 0.0,
            state_file: None,
            loraplus_lr_ratio: None,
            loraplus_lr_embedding: 1e-6,
        }
    }
}

/// When to look at the validation set, and when to save.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Upkeep {
    /// evaluate every so many steps; 0 = only at the end
    pub eval_steps: usize,
    /// write a checkpoint every so many steps; 0 = only at the end and on Ctrl-C
    pub save_steps: usize,
    /// checkpoints kept, newest first
    pub save_total_limit: usize,
    /// the score that tells which evaluation is best; without, the loss
    pub metric_for_best_model: Option<String>,
    /// stop after so many evaluations that are not better; 0 = never
    pub early_stopping_patience: usize,
    /// the loss must fall, or the score rise, by more than this to count as better
    pub early_stopping_threshold: f64,
    /// end with the adapter of the best evaluation rather than the last step's
    pub load_best: bool,
}

impl Default for Upkeep {
    fn default() -> Self {
        Self {
            eval_steps: 0,
            save_steps: 0,
            save_total_limit: 2,
            metric_for_best_model: None,
            early_stopping_patience: 0,
            early_stopping_threshold: 0.0,
            load_best: false,
        }
    }
}

/// How a step keeps its activations. Arithmetic is in f32 whatever this says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// as they were computed
    #[default]
    #[serde(alias = "float32")]
    F32,
    /// in 16 bits with the range of f32
    #[serde(alias = "bfloat16")]
    BF16,
    /// in 16 bits, finer than bf16, up to 65504
    #[serde(alias = "float16")]
    F16,
}

impl ComputeDtype {
    /// Name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// The 16-bit type, for [`engobe_autograd::Tape::half`].
    pub fn half(self) -> Option<Half> {
        match self {
            Self::F32 => None,
            Self::BF16 => Some(Half::BF16),
            Self::F16 => Some(Half::F16),
        }
    }
}

/// How the arithmetic is done.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Compute {
    /// keep each block's input alone and run its forward again in the backward
    pub activation_checkpointing: bool,
    /// how the values that the backward needs are kept, and what adapters' factors are rounded to in the forward
    pub compute_dtype: ComputeDtype,
    /// memory that the process may hold; a run that would take more is stopped
    pub memory_limit: Option<MemoryLimit>,
}

/// Everything that one run does with a model, an adapter and rows that are already there.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Plan {
    /// how long and in what order
    pub schedule: Schedule,
    /// optimizer
    pub optimization: Optimization,
    /// evaluation and checkpoints
    pub upkeep: Upkeep,
    /// arithmetic
    pub compute: Compute,
}

/// A setting that cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{key} = {value}: {reason}")]
pub struct PlanError {
    /// the setting
    pub key: &'static str,
    /// what it was set to
    pub value: String,
    /// what would be right
    pub reason: &'static str,
}

impl Plan {
    /// Refuses settings that cannot be meant.
    pub fn validate(&self) -> Result<(), PlanError> {
        let no = |key, value: String, reason| Err(PlanError { key, value, reason });
        let s = &self.schedule;
        let o = &self.optimization;
        for (key, value) in [
            ("batch_size", s.batch_size),
            ("gradient_accumulation", s.gradient_accumulation),
            ("max_seq_len", s.max_seq_len.saturating_sub(1)),
            ("max_steps", s.max_steps.unwrap_or(1)),
            ("save_total_limit", self.upkeep.save_total_limit),
        ] {
            if value == 0 {
                let shown = if key == "max_seq_len" { s.max_seq_len } else { 0 };
                return no(key, shown.to_string(), "must be at least 1 (max_seq_len: 2)");
            }
        }
        if !(s.epochs.is_finite() && s.epochs > 0.0) {
            return no("epochs", s.epochs.to_string(), "must be a number above 0");
        }
        for (key, value) in [
            ("learning_rate", o.learning_rate),
            ("weight_decay", o.weight_decay),
            ("max_grad_norm", o.max_grad_norm),
            ("loraplus_lr_ratio", o.loraplus_lr_ratio.unwrap_or(1.0)),
            ("loraplus_lr_embedding", o.loraplus_lr_embedding),
            ("early_stopping_threshold", self.upkeep.early_stopping_threshold),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return no(key, value.to_string(), "must be a finite number, 0 or above");
            }
        }
        for (key, value) in
            [("adam_beta1", o.adam_beta1), ("adam_beta2", o.adam_beta2), ("momentum", o.momentum)]
        {
            if !(0.0..1.0).contains(&value) {
                return no(key, value.to_string(), "must lie in [0, 1)");
            }
        }
        if let (Some(file), false) = (&o.state_file, o.optimizer.is_paged()) {
            let reason = "only a paged optimizer has one: --optimizer paged_adamw or paged_adamw_8bit";
            return no("state_file", file.display().to_string(), reason);
        }
        if !(o.adam_epsilon.is_finite() && o.adam_epsilon > 0.0) {
            return no("adam_epsilon", o.adam_epsilon.to_string(), "must be a number above 0");
        }
        Ok(())
    }
}
