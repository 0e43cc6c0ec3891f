//! What a run will take, worked out before anything is loaded: what `plan` prints and `--memory-limit` acts on.

use crate::memory::bytes_text;
use crate::settings::Given;
use crate::terminal::Note;
use crate::{tasks, workbench};
use anyhow::{Result, bail};
use engobe_adapters::{Adapter, AdapterSizes};
use engobe_formats::peft::PeftAdapter;
use engobe_kernels::codec::FourBit;
use engobe_kernels::quantize::Scheme;
use engobe_models::{DecoderSizes, HeadKind, LoadOptions, Outline, TaskOutline, TensorUse};
use engobe_nn::ModuleTree;
use engobe_train::Plan;
use engobe_train::memory::advice::{self, Storage, Suggestion};
use engobe_train::memory::guard::Guard;
use engobe_train::memory::{self, Estimate, MemoryLimit, Run};
use std::path::{Path, PathBuf};

/// The head of a task.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// what it reads
    pub kind: HeadKind,
    /// its logits
    pub labels: usize,
}

/// What headers say of a model.
pub struct Headers {
    /// sizes of its blocks; the vocabulary is that of its head
    pub sizes: DecoderSizes,
    /// tokens that are embedded
    pub vocab: usize,
    /// its tensors
    pub tensors: Vec<TensorUse>,
    /// the weights are there, not only a configuration
    pub has_weights: bool,
    /// modules of a task's head that are trained in full; of a decoder there is none
    pub saved: Option<Vec<String>>,
}

impl Headers {
    /// The modules of the model at `path`, what is known of it, and the elements of the base.
    fn read(
        path: &Path,
        options: &LoadOptions,
        head: Option<Head>,
    ) -> Result<(Box<dyn ModuleTree>, Self, usize)> {
        let Some(head) = head else {
            let mut outline = Outline::read(path, options)?;
            let elements = workbench::base_parameters(outline.model.as_mut(), outline.sizes.tied_head);
            let Outline { model, sizes, tensors, has_weights, .. } = outline;
            let headers = Self { sizes, vocab: sizes.vocab, tensors, has_weights, saved: None };
            return Ok((model, headers, elements));
        };
        let TaskOutline { mut model, sizes, vocab, tensors, has_weights } =
            TaskOutline::read(path, options, head.kind, head.labels)?;
        let elements = workbench::elements(&mut model);
        let saved = Some(model.head().saved.clone());
        Ok((Box::new(model), Self { sizes, vocab, tensors, has_weights, saved }, elements))
    }
}

/// A run that has not begun.
pub struct Forecast {
    path: PathBuf,
    options: LoadOptions,
    head: Option<Head>,
    /// the model without its weights
    pub outline: Headers,
    /// what is trained
    pub adapter: AdapterSizes,
    /// elements of the base model
    pub base_parameters: usize,
    /// how it is trained
    pub plan: Plan,
    tokenizer: usize,
    eval_tokens: usize,
    threads: usize,
}

impl Forecast {
    /// Looks at the headers of the model at `path`: of a decoder, or of an encoder with a head.
    pub fn new(
        given: &Given,
        plan: &Plan,
        path: &Path,
        options: &LoadOptions,
        head: Option<Head>,
    ) -> Result<Self> {
        let (mut tree, outline, base_parameters) = Headers::read(path, options, head)?;
        let asked = match &outline.saved {
            None => given.adapter("")?,
            Some(saved) => tasks::with_head(given, "", saved)?,
        };
        let config = match given.path("init_adapter") {
            Some(dir) => {
                let mut config = PeftAdapter::load(&dir)?.config;
                given.training_changes(&asked).into_iter().for_each(|(name, value)| config.set(name, value));
                config
            }
            None => asked,
        };
        let adapter = Adapter::sizes(tree.as_mut(), &config)?;
        // rows that are validated on come in bins of 512 tokens or their own length
        let validates = !given.paths("val_data").is_empty() || given.number("val_split").unwrap_or(0.0) > 0.0;
        let eval_tokens = if validates { plan.schedule.max_seq_len.max(512) } else { 0 };
        Ok(Self {
            path: path.to_path_buf(),
            options: options.clone(),
            head,
            tokenizer: match !path.is_dir() || path.join("tokenizer.json").exists() {
                true => outline.vocab,
                false => 0,
            },
            outline,
            adapter,
            base_parameters,
            plan: plan.clone(),
            eval_tokens,
            threads: rayon::current_num_threads(),
        })
    }

    fn run(&self) -> Run<'_> {
        Run {
            sizes: self.outline.sizes,
            tensors: &self.outline.tensors,
            adapter: &self.adapter,
            plan: &self.plan,
            tokenizer: self.tokenizer,
            eval_tokens: self.eval_tokens,
            threads: self.threads,
        }
    }

    /// What the run takes as it is.
    pub fn estimate(&self) -> Estimate {
        memory::estimate(&self.run())
    }

    /// Settings that stay below a limit.
    pub fn suggestions(&self, limit: MemoryLimit) -> Vec<Suggestion> {
        const MOST: usize = 4;
        let nf4 = Scheme::FourBit { kind: FourBit::Nf4, block: 64, double: true };
        let options = LoadOptions { quantize: Some(nf4), dtype: Default::default(), ..self.options.clone() };
        let plain = self.outline.tensors.iter().all(|t| matches!(t.storage.as_str(), "F32" | "F16" | "BF16"));
        let quantized = match self.options.quantize.is_none() && plain {
            // a model that can't be quantized has no such suggestion
            true => Headers::read(&self.path, &options, self.head).ok(),
            false => None,
        };
        let storages: Vec<Storage> = quantized
            .into_iter()
            .map(|(_, outline, _)| Storage {
                settings: vec![
                    ("quantize".to_string(), "nf4".to_string()),
                    ("double_quant".to_string(), "true".to_string()),
                ],
                tensors: outline.tensors,
            })
            .collect();
        advice::suggestions(&self.run(), &storages, limit.0, MOST)
    }

    /// The plan that stays below the limit, or an error that says what would.
    pub fn fit(&self, limit: MemoryLimit, note: &mut Note) -> Result<Plan> {
        let Some((plan, estimate)) = advice::choose(&self.run(), limit.0) else {
            let least = self.least();
            let mut takes =
                format!("takes {} even with {}", bytes_text(least.1.peak as u64), flags(&least.0));
            if least.1.weights as u64 > limit.0 {
                takes += &format!(", its weights alone {}", bytes_text(least.1.weights as u64));
            }
            let fits = match self.suggestions(limit).as_slice() {
                [] => "no setting of the run makes it fit: take a smaller model".to_string(),
                some => {
                    let each: Vec<String> = some
                        .iter()
                        .map(|s| format!("{} ({})", flags(&s.settings), bytes_text(s.estimate.peak as u64)))
                        .collect();
                    format!("what would fit: {}", each.join("; or "))
                }
            };
            bail!("memory_limit {limit}: this run {takes}; {fits}");
        };
        let mut line = format!("memory: about {} of {limit}", bytes_text(estimate.peak as u64));
        let (asked, chosen) = (&self.plan, &plan);
        if chosen.compute.activation_checkpointing && !asked.compute.activation_checkpointing {
            line += " · activation checkpointing turned on";
        }
        if chosen.schedule.batch_size != asked.schedule.batch_size {
            line += &format!(
                " · micro-batches of {} instead of {}, {} in a step",
                chosen.schedule.batch_size, asked.schedule.batch_size, chosen.schedule.gradient_accumulation
            );
        }
        note.line(&line);
        Ok(plan)
    }

    /// The settings that `choose` may change, at their least, and what the run takes then.
    fn least(&self) -> (Vec<(String, String)>, Estimate) {
        let mut plan = self.plan.clone();
        plan.schedule.batch_size = 1;
        plan.compute.activation_checkpointing = true;
        let estimate = memory::estimate(&Run { plan: &plan, ..self.run() });
        let settings = [("activation_checkpointing", "true"), ("batch_size", "1")];
        (settings.map(|(n, v)| (n.to_string(), v.to_string())).to_vec(), estimate)
    }

    /// What keeps a run with `plan` below the limit, whatever was estimated.
    pub fn guard(&self, plan: &Plan, limit: MemoryLimit) -> Guard {
        Guard::new(limit.0, memory::margin_per_token(&Run { plan, ..self.run() }))
    }
}

/// Settings as flags.
pub fn flags(settings: &[(String, String)]) -> String {
    let flag = |(name, value): &(String, String)| match value.as_str() {
        "true" => format!("--{}", name.replace('_', "-")),
        _ => format!("--{} {value}", name.replace('_', "-")),
    };
    settings.iter().map(flag).collect::<Vec<_>>().join(" ")
}
