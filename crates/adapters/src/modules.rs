//! What methods that adapt linear layers share: choosing them by PEFT's rules, and modules trained in full beside them.

use crate::saved;
use crate::target::Targets;
use crate::{Error, Result};
use engobe_autograd::Param;
use engobe_formats::peft::{LoraConfig, PeftConfig, modules_json};
use engobe_nn::{Linear, ModuleMut, ModuleTree};
use serde_json::{Value, json};
use std::collections::BTreeSet;

pub(crate) const TARGETS_HELP: &str = "names, a regex, or all-linear [all-linear]";
pub(crate) const EXCLUDE_HELP: &str = "names or a regex to leave out";
pub(crate) const SAVED_HELP: &str = "modules to train in full";
pub(crate) const ALPHA_HELP: &str = "scale is lora_alpha / r [32]";
pub(crate) const DROPOUT_HELP: &str = "dropout on the adapter's input [0]";
pub(crate) const RANKS_HELP: &str = "ranks by module pattern";
pub(crate) const RANK_HELP: &str = "rank [16; vera: 256, miss: 64]";
pub(crate) const LAYERS_HELP: &str = "layers to adapt [all]";
pub(crate) const PATTERN_HELP: &str = "name of the list that the layers count in";

/// What a walk over a model's modules found.
#[derive(Debug)]
pub(crate) struct Selection {
    /// tensors of modules trained in full
    pub saved: Vec<Param>,
    /// entries of target_modules that no module answers to
    pub unmatched: Vec<String>,
    /// what `all-linear` stands for
    linear_names: BTreeSet<String>,
}

impl Selection {
    /// Calls `attach` on every linear layer that `rules` (of which only those about modules count) name, and trains
    /// the modules to save.
    pub fn attach(
        model: &mut dyn ModuleTree,
        rules: &LoraConfig,
        method: &'static str,
        attach: &mut dyn FnMut(&mut Linear) -> Result<()>,
    ) -> Result<Self> {
        let targets = Targets::new(rules)?;
        let heads = model.output_heads();
        let (mut paths, mut saved, mut linear_names, mut count) =
            (Vec::new(), Vec::new(), BTreeSet::new(), 0);
        let mut result = Ok(());
        model.visit_modules(&mut |mut module| {
            paths.push(module.path().to_string());
            if result.is_err() {
                return;
            }
            if targets.saves(module.path()) {
                result =
                    saved::train_module(&mut module).map(|params| saved.extend(params)).map_err(Error::from);
                return;
            }
            let plain = matches!(module, ModuleMut::Linear(_)) && !heads.iter().any(|h| h == module.path());
            let adapted = targets.adapts(module.path(), plain);
            match module {
                ModuleMut::Linear(linear) => {
                    if plain {
                        linear_names.insert(linear.path().rsplit('.').next().unwrap_or_default().to_string());
                    }
                    if adapted {
                        count += 1;
                        result = attach(linear);
                    }
                }
                other if adapted => {
                    let reason = format!(
                        "names {}, which is no linear layer; {method} attaches to those",
                        other.path()
                    );
                    result = Err(Error::Conflict { keys: "target_modules", reason: reason.into() });
                }
                _ => {}
            }
        });
        result?;
        if count == 0 {
            return Err(nothing("target_modules", format!("{:?}", rules.target_modules), &paths));
        }
        let (unmatched, unsaved) = targets.unmatched(&paths);
        if let Some(name) = unsaved.first() {
            return Err(nothing("modules_to_save", (*name).to_string(), &paths));
        }
        let unmatched = unmatched.into_iter().map(str::to_string).collect();
        Ok(Self { saved, unmatched, linear_names })
    }

    /// Puts what `all-linear` stands for in its place.
    pub fn name_targets(&self, config: &mut PeftConfig) {
        if config.text("target_modules").is_some_and(|t| t.eq_ignore_ascii_case("all-linear")) {
            config.set("target_modules", json!(self.linear_names));
        }
    }
}

/// The rules of a configuration that name modules.
pub(crate) fn rules(config: &PeftConfig) -> Result<LoraConfig> {
    Ok(LoraConfig {
        target_modules: config.modules("target_modules")?,
        exclude_modules: config.modules("exclude_modules")?,
        layers_to_transform: config.layers("layers_to_transform")?,
        layers_pattern: config.names("layers_pattern")?,
        modules_to_save: config.names("modules_to_save")?,
        ..LoraConfig::default()
    })
}

/// Writes `rules` as files have them.
pub(crate) fn write_rules(rules: &LoraConfig, out: &mut PeftConfig) {
    out.set("target_modules", modules_json(&rules.target_modules));
    out.set("exclude_modules", modules_json(&rules.exclude_modules));
    out.set("layers_to_transform", json!(rules.layers_to_transform));
    out.set("layers_pattern", list_or_null(rules.layers_pattern.clone()));
    out.set("modules_to_save", list_or_null(rules.modules_to_save.clone()));
}

/// A list as a file has it.
pub(crate) fn list_or_null(names: Vec<String>) -> Value {
    if names.is_empty() { Value::Null } else { json!(names) }
}

/// A setting that names nothing: the last parts of module paths are what a user may put there.
pub(crate) fn nothing(key: &'static str, given: String, paths: &[String]) -> Error {
    let mut kinds: Vec<&str> = paths.iter().filter_map(|p| p.rsplit('.').next()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    Error::NothingMatches { key, given, available: kinds.join(", ") }
}
