//! A model with its adapter, whatever the adapter was trained for: what is merged and looked at.

use crate::tasks::{self, Kind, TaskBench};
use crate::workbench::{self, Bench};
use anyhow::{Context, Result, bail};
use engobe_adapters::{Adapter, merge};
use engobe_data::{LabelSet, Problem, Task, TextTokenizer};
use engobe_models::{HeadKind, LoadOptions, config_of, task_class};
use engobe_nn::ModuleTree;
use serde_json::{Map, Value, json};
use std::path::Path;

/// A model and its adapter.
pub enum AnyModel {
    /// a decoder with its output head
    NextTokens(Bench),
    /// a model with a task's head, or an encoder-decoder
    Task(TaskBench),
}

impl AnyModel {
    /// Loads the model at `path` with the adapter in `dir`, for the task that the adapter was trained for.
    pub fn load(path: &Path, dir: &Path) -> Result<Self> {
        let options = LoadOptions::default();
        Ok(match tasks::of_adapter(path, dir)? {
            Task::CausalLm => Self::NextTokens(Bench::load(path, Some(dir), &options)?),
            task => Self::Task(TaskBench::with_adapter(path, task, dir, &[], &options)?),
        })
    }

    /// The model as adapters see it, and its adapter.
    pub fn parts(&mut self) -> Result<(&mut dyn ModuleTree, &Adapter)> {
        let (tree, adapter): (&mut dyn ModuleTree, _) = match self {
            Self::NextTokens(bench) => (bench.model.as_mut(), &bench.adapter),
            Self::Task(bench) => (bench.kind.tree(), &bench.adapter),
        };
        Ok((tree, adapter.as_ref().context("no adapter")?))
    }

    /// True if an output head is the embedding's matrix.
    pub fn tied_head(&self) -> bool {
        match self {
            Self::NextTokens(bench) => bench.model.info().tied_head,
            Self::Task(bench) => bench.tied_head(),
        }
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&TextTokenizer> {
        match self {
            Self::NextTokens(bench) => bench.tokenizer.as_ref(),
            Self::Task(bench) => bench.tokenizer.as_ref(),
        }
    }

    /// Elements of the base.
    pub fn base_parameters(&mut self) -> Result<usize> {
        let tied = self.tied_head();
        Ok(workbench::base_parameters(self.parts()?.0, tied))
    }

    /// Refuses to merge what no configuration of the base at `path` could describe.
    ///
    /// # Errors
    /// The head no longer is the embedding's matrix where what it reads is scaled because it is (T5 v1.0: transformers 4 has
    /// one key for both).
    pub fn check_mergeable(&mut self, path: &Path) -> Result<()> {
        let tied = self.tied_head();
        let scaled = matches!(self, Self::Task(TaskBench { kind: Kind::Texts(model), .. }) if model.scales_head_input());
        if scaled && merge::plan(self.parts()?.0, tied).tied_head != tied {
            bail!(
                "{}: its head is the embedding's matrix and the adapter changes one of both: config.json cannot say that of an encoder-decoder that scales what the head reads; keep the adapter as it is",
                path.display()
            );
        }
        Ok(())
    }

    /// Makes the configuration of the base at `path` that of the merged model. `tied_head` says whether its head still is
    /// the embedding's matrix, if it was.
    pub fn describe(&self, path: &Path, tied_head: bool, config: &mut Value) -> Result<()> {
        match self {
            Self::NextTokens(_) => config["tie_word_embeddings"] = json!(tied_head),
            Self::Task(bench) => match &bench.kind {
                Kind::Labels(_, labels) => describe_labels(path, labels, config)?,
                Kind::Texts(_) if bench.tied_head() == tied_head => {}
                Kind::Texts(_) => config["tie_word_embeddings"] = json!(tied_head),
            },
        }
        Ok(())
    }
}

/// The keys by which transformers finds a head and the names of its classes.
fn describe_labels(path: &Path, labels: &LabelSet, config: &mut Value) -> Result<()> {
    let kind = if labels.task == Task::TokenCls { HeadKind::Token } else { HeadKind::Sequence };
    config["architectures"] = json!([task_class(&config_of(path)?, kind)?]);
    let ids = || labels.names().iter().enumerate();
    let id2label: Map<String, Value> = ids().map(|(id, name)| (id.to_string(), json!(name))).collect();
    let label2id: Map<String, Value> = ids().map(|(id, name)| (name.clone(), json!(id))).collect();
    (config["id2label"], config["label2id"]) = (Value::Object(id2label), Value::Object(label2id));
    if config.get("num_labels").is_some() {
        config["num_labels"] = json!(labels.len());
    }
    // one class of several is what transformers takes a head for that says nothing
    if labels.problem != Problem::SingleLabel || config.get("problem_type").is_some_and(|p| !p.is_null()) {
        config["problem_type"] = json!(labels.problem.name());
    }
    Ok(())
}
