//! Memory that a run will take: derived from how the ops keep things, before anything is loaded.
//!
//! [`estimate`] adds up what is held all the time (weights, adapter, optimizer, what the process has anyway) and the
//! most that a step holds on top of it (`activations.rs`). [`advice`] looks for settings that stay below a limit,
//! [`guard`] watches that a run does.

mod activations;
pub mod advice;
pub mod guard;
mod limit;
pub mod resident;

pub use activations::{Step, StepSizes};
pub use limit::MemoryLimit;

use crate::optimizer::moments_bytes;
use crate::plan::Plan;
use engobe_adapters::AdapterSizes;
use engobe_models::{DecoderSizes, TensorUse};

/// What the process holds before a model is there: code, thread stacks, tables. Measured: 12 MB on Linux.
const PROCESS: usize = 12_000_000;
/// Bytes of a tokenizer for each token of its vocabulary: text, maps both ways, merges. Measured on 49152 tokens.
const TOKENIZER_PER_TOKEN: usize = 550;
/// The heap of large blocks ends this much above what is in use (`allocator.rs` of the binary): holes between blocks.
const HOLES: f64 = 0.02;

/// What is known of a run before it starts.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// the model's blocks
    pub sizes: DecoderSizes,
    /// the model's tensors as they will be kept
    pub tensors: &'a [TensorUse],
    /// what is trained
    pub adapter: &'a AdapterSizes,
    /// how it is trained
    pub plan: &'a Plan,
    /// tokens of the tokenizer that will be loaded; 0: none
    pub tokenizer: usize,
    /// tokens of the longest batch that is evaluated; 0: none
    pub eval_tokens: usize,
    /// threads that compute
    pub threads: usize,
}

/// Bytes, by what they are for: the most of each. Gradients, activations and head are not all there at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// the base model: mapped from its files, or our own copies
    pub weights: usize,
    /// the adapter's parameters
    pub adapter: usize,
    /// the optimizer's moments in memory
    pub optimizer: usize,
    /// the optimizer's moments in a file, which do not count
    pub optimizer_file: usize,
    /// gradients of the adapter
    pub gradients: usize,
    /// what the forward keeps for the backward, and the block at hand
    pub activations: usize,
    /// the output head and its loss
    pub head: usize,
    /// the process itself, tokenizer, scratch of the kernels, holes in the heap
    pub other: usize,
    /// most of it at once
    pub peak: usize,
}

/// What a step may add in one op, for each token of its micro-batch.
pub fn margin_per_token(run: &Run<'_>) -> f64 {
    StepSizes::new(run).largest_op()
}

/// What a run will take. Rows are taken to fill `max_seq_len`, with a label at every position.
pub fn estimate(run: &Run<'_>) -> Estimate {
    let plan = run.plan;
    let owned: usize = run.tensors.iter().map(|t| t.owned).sum();
    let mapped: usize = run.tensors.iter().map(|t| t.mapped).sum();
    // files of which nothing is used as it lies are closed after loading
    let stay = run.tensors.iter().any(|t| t.stays_mapped);
    let held = owned + if stay { mapped } else { 0 };
    // tensors are loaded in parallel, one by each thread
    let mut transient: Vec<usize> = run.tensors.iter().map(|t| t.transient).collect();
    transient.sort_unstable_by(|a, b| b.cmp(a));
    let loading: usize = transient.iter().take(run.threads).sum();
    let adapter = 4 * run.adapter.num_parameters();
    let kind = plan.optimization.optimizer;
    let moments = moments_bytes(kind, run.adapter.params());
    let (optimizer, optimizer_file) = match kind.is_paged() {
        // those of the parameter at hand
        true => (run.adapter.params().map(|n| moments_bytes(kind, [n])).max().unwrap_or(0), moments),
        false => (moments, 0),
    };
    let step = activations::step(&StepSizes::new(run));
    let tokenizer = run.tokenizer * TOKENIZER_PER_TOKEN;
    let fixed = held + adapter + optimizer;
    let holes = (HOLES * (step.peak + adapter + optimizer) as f64) as usize;
    let other = PROCESS + tokenizer + step.scratch + holes;
    Estimate {
        weights: held,
        adapter,
        optimizer,
        optimizer_file,
        gradients: step.gradients,
        activations: step.activations,
        head: step.head,
        other,
        peak: (fixed + other + step.peak).max(owned + mapped + loading + PROCESS + tokenizer),
    }
}
