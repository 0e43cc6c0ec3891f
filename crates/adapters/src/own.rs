//! Methods that train parameters of the base's own, chosen by kind: norms (PEFT's LN tuning), biases (BitFit, Ben
//! Zaken et al. 2022), or whole modules. They are baselines for the others. PEFT has only the first; files of the
//! others have the same form with a `peft_type` of ours.

use crate::method::{Attached, Attaching, Card, Kind, Method, Purpose, Setting, StartText, setting};
use crate::modules::{EXCLUDE_HELP, SAVED_HELP, TARGETS_HELP, list_or_null, nothing};
use crate::saved;
use crate::target::Targets;
use crate::{AdapterSizes, Error, Result};
use engobe_autograd::Param;
use engobe_formats::peft::{LoraConfig, PeftConfig, TargetModules, modules_json};
use engobe_nn::{ModuleMut, ModuleTree};
use serde_json::json;
use std::collections::BTreeSet;

/// Norms, PEFT's LN tuning.
pub(crate) const LN_TUNING: Own = Own {
    card: &Card {
        name: "ln-tuning",
        about: "the norms' own weights",
        peft_type: "LN_TUNING",
        settings: &SETTINGS,
        learning_rate: Some(1e-3),
        head_learning_rate: None,
    },
    part: Part::Norms,
};

/// Biases.
pub(crate) const BITFIT: Own = Own {
    card: &Card {
        name: "bitfit",
        about: "the base's own biases",
        peft_type: "BITFIT",
        settings: &SETTINGS,
        learning_rate: Some(1e-3),
        head_learning_rate: Some(3e-3),
    },
    part: Part::Biases,
};

/// Whole modules.
pub(crate) const FULL: Own = Own {
    card: &Card {
        name: "full",
        about: "chosen modules in full",
        peft_type: "FULL",
        settings: &SETTINGS,
        learning_rate: Some(2e-5),
        head_learning_rate: Some(1e-4),
    },
    part: Part::Modules,
};

const SETTINGS: [Setting; 3] = [
    setting("target_modules", Kind::Names, TARGETS_HELP),
    setting("exclude_modules", Kind::Names, EXCLUDE_HELP),
    setting("modules_to_save", Kind::Names, SAVED_HELP),
];

/// A method of this kind.
#[derive(Debug)]
pub(crate) struct Own {
    card: &'static Card,
    part: Part,
}

/// What of the chosen modules is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Norms,
    Biases,
    Modules,
}

impl Part {
    /// True for a module that has such a part.
    fn is_in(self, module: &ModuleMut<'_>) -> bool {
        match (self, module) {
            (Self::Norms, ModuleMut::RmsNorm(_) | ModuleMut::LayerNorm(_)) | (Self::Modules, _) => true,
            (Self::Biases, ModuleMut::Linear(m)) => m.bias().is_some(),
            (Self::Biases, ModuleMut::LayerNorm(m)) => m.bias().is_some(),
            _ => false,
        }
    }
}

impl Method for Own {
    fn card(&self) -> &'static Card {
        self.card
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        self.card.check_keys(config, &[], &[], &[])?;
        let targets = match (config.modules("target_modules")?, self.part) {
            (None, Part::Modules) => Some(TargetModules::AllLinear),
            (targets, _) => targets,
        };
        let mut out = config.clone();
        out.set("target_modules", modules_json(&targets));
        out.set("exclude_modules", modules_json(&config.modules("exclude_modules")?));
        out.set("modules_to_save", list_or_null(config.names("modules_to_save")?));
        Ok(out)
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        Ok(Box::new(self.choose(model, config, at)?.0))
    }

    fn sizes(&self, model: &mut dyn ModuleTree, config: &PeftConfig) -> Result<AdapterSizes> {
        let (_, full) = self.choose(model, config, &Attaching::to_count(&StartText::default()))?;
        Ok(AdapterSizes { base_elements: full.iter().sum(), full, ..AdapterSizes::default() })
    }
}

impl Own {
    /// The attachment, and the sizes of what it trains (in counting, it trains nothing whole).
    fn choose(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<(Attachment, Vec<usize>)> {
        let given = config.modules("target_modules")?;
        let targets = Targets::new(&LoraConfig {
            target_modules: given.clone().or_else(|| Some(TargetModules::Regex(".*".to_string()))),
            exclude_modules: config.modules("exclude_modules")?,
            modules_to_save: config.names("modules_to_save")?,
            ..LoraConfig::default()
        })?;
        let counting = at.purpose == Purpose::Count;
        let heads = model.output_heads();
        let (mut params, mut names, mut paths, mut sizes) =
            (Vec::new(), BTreeSet::new(), Vec::new(), Vec::new());
        let (mut trained, mut result) = (0, Ok(()));
        model.visit_modules(&mut |mut module| {
            let path = module.path().to_string();
            paths.push(path.clone());
            let plain = matches!(module, ModuleMut::Linear(_)) && !heads.contains(&path);
            let saves = targets.saves(&path);
            if result.is_err() || !(saves || self.part.is_in(&module) && targets.adapts(&path, plain)) {
                return;
            }
            if !saves {
                trained += 1;
                names.insert(path.rsplit('.').next().unwrap_or_default().to_string());
            }
            let part = if saves { Part::Modules } else { self.part };
            // copies of whole modules are not made for the sake of their sizes
            match counting && part == Part::Modules {
                true => sizes.extend(saved::elements(&module)),
                false => result = train(&mut module, part).map(|new| params.extend(new)),
            }
        });
        result?;
        if trained == 0 {
            let given = given.map_or("all".to_string(), |g| format!("{g:?}"));
            let error = nothing("target_modules", given, &paths);
            return Err(match (error, self.part) {
                (Error::NothingMatches { .. }, Part::Biases) => {
                    let reason = "leaves no layer with a bias: this model may have none";
                    Error::Conflict { keys: "target_modules", reason: reason.into() }
                }
                (error, _) => error,
            });
        }
        let (unmatched, unsaved) = targets.unmatched(&paths);
        if let Some(name) = unsaved.first() {
            return Err(nothing("modules_to_save", (*name).to_string(), &paths));
        }
        let unmatched = unmatched.into_iter().map(str::to_string).collect();
        let mut config = config.clone();
        if !matches!(given, Some(TargetModules::List(_) | TargetModules::Regex(_))) {
            config.set("target_modules", json!(names));
        }
        sizes.extend(params.iter().map(Param::len));
        Ok((Attachment { config, params, unmatched, names }, sizes))
    }
}

/// Trains a part of a module, under the names that PEFT's files have.
fn train(module: &mut ModuleMut<'_>, part: Part) -> Result<Vec<Param>> {
    match (part, module) {
        (Part::Biases, ModuleMut::Linear(linear)) => {
            Ok(saved::train_bias(linear, false)?.into_iter().collect())
        }
        (Part::Biases, ModuleMut::LayerNorm(norm)) => Ok(saved::train_norm_bias(norm)?.into_iter().collect()),
        (Part::Norms, module) => Ok(saved::train_module_as(module, saved::ROOT, ".ln_tuning_layers")?),
        (_, module) => Ok(saved::train_module(module)?),
    }
}

#[derive(Debug)]
struct Attachment {
    config: PeftConfig,
    params: Vec<Param>,
    unmatched: Vec<String>,
    names: BTreeSet<String>,
}

impl Attached for Attachment {
    fn config(&self) -> PeftConfig {
        self.config.clone()
    }

    fn params(&self) -> Vec<&Param> {
        self.params.iter().collect()
    }

    fn base_elements(&self) -> usize {
        // nothing is added to the base: its own are trained
        self.params.iter().map(Param::len).sum()
    }

    fn unmatched_targets(&self) -> &[String] {
        &self.unmatched
    }

    fn expand(&self, config: &mut PeftConfig) {
        let shorthand = config.text("target_modules").is_some_and(|t| t.eq_ignore_ascii_case("all-linear"));
        if shorthand || config.get("target_modules").is_none() {
            config.set("target_modules", json!(self.names));
        }
    }
}
