//! PEFT's trainable tokens as a method of its own: embeddings of some tokens are trained, and nothing else.

use crate::method::{Attached, Attaching, Card, Kind, Method, Setting, by_name, setting};
use crate::modules::{TARGETS_HELP, nothing};
use crate::tokens::TokenRows;
use crate::{Result, fill, target};
use candle_core::Tensor;
use engobe_autograd::Param;
use engobe_formats::peft::{PeftConfig, TokenIndices, tokens};
use engobe_formats::tensor::TensorView;
use engobe_nn::{ModuleMut, ModuleTree, SiteMut, Weight};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Trained embeddings of tokens.
#[derive(Debug)]
pub(crate) struct TrainableTokens;

const SETTINGS: [Setting; 2] = [
    setting(IDS, Kind::Wholes, "trainable-tokens: ids of tokens whose embeddings are trained"),
    setting("target_modules", Kind::Names, TARGETS_HELP),
];
const IDS: &str = "token_indices";

const CARD: Card = Card {
    name: "trainable-tokens",
    about: "embeddings of some tokens",
    peft_type: "TRAINABLE_TOKENS",
    settings: &SETTINGS,
    learning_rate: Some(1e-3),
    head_learning_rate: None,
};

impl Method for TrainableTokens {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        CARD.check_keys(config, &["init_weights"], &[], &[])?;
        match tokens(config, IDS)? {
            Some(TokenIndices::Input(ids)) if !ids.is_empty() => {}
            _ => return Err(config.bad(IDS, "empty", "a list of token ids").into()),
        }
        let mut out = config.clone();
        out.set("init_weights", config.get("init_weights").cloned().unwrap_or(Value::Bool(true)));
        Ok(out)
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        let Some(TokenIndices::Input(ids)) = tokens(config, IDS)? else {
            return Err(config.bad(IDS, "missing", "a list of token ids").into());
        };
        // a text is a name here, as one embedding is all that there is to choose
        let mut config = config.clone();
        if config.get("target_modules").is_none() {
            config.set("target_modules", input_embedding(model));
        }
        let wanted = config.names("target_modules")?;
        let (mut rows, mut result, mut paths): (Vec<(Weight, Arc<TokenRows>)>, _, _) =
            (vec![], Ok(()), vec![]);
        model.visit_modules(&mut |module| {
            paths.push(module.path().to_string());
            match module {
                ModuleMut::Embedding(m)
                    if result.is_ok() && wanted.iter().any(|w| target::ends_with_module(m.path(), w)) =>
                {
                    result = TokenRows::new(m, &ids, "", at).map(|new| {
                        let new = Arc::new(new);
                        rows.push((m.weight().clone(), new.clone()));
                        m.attach(new);
                    });
                }
                ModuleMut::Linear(m) => {
                    let tied = rows.iter().find(|(weight, _)| weight.is_same(m.weight()));
                    if let Some((_, rows)) = tied {
                        rows.tie(m.path());
                        m.attach(rows.clone());
                    }
                }
                _ => {}
            }
        });
        result?;
        if rows.is_empty() {
            return Err(nothing("target_modules", format!("{wanted:?} among embeddings"), &paths));
        }
        Ok(Box::new(Attachment { config, rows: rows.into_iter().map(|(_, r)| r).collect() }))
    }
}

/// The name of the embedding whose rows enter the blocks.
fn input_embedding(model: &mut dyn ModuleTree) -> String {
    let mut name = "embed_tokens".to_string();
    model.visit_sites(&mut |site| {
        if let SiteMut::Entry(entry) = site {
            name = entry.path().rsplit('.').next().unwrap_or_default().to_string();
        }
    });
    name
}

#[derive(Debug)]
struct Attachment {
    config: PeftConfig,
    rows: Vec<Arc<TokenRows>>,
}

impl Attached for Attachment {
    fn config(&self) -> PeftConfig {
        self.config.clone()
    }

    fn params(&self) -> Vec<&Param> {
        self.rows.iter().map(|r| r.param()).collect()
    }

    /// A tied head and other paths of the embedding have copies of their own in PEFT's files.
    fn export(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = by_name(&self.params())?;
        for rows in &self.rows {
            if let Some(value) = tensors.get(rows.param().name()).cloned() {
                tensors.extend(rows.names_of_copies().map(|name| (name, value.clone())));
            }
        }
        Ok(tensors)
    }

    fn fill(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        let mut tensors = tensors.clone();
        for name in self.rows.iter().flat_map(|r| r.names_of_copies()) {
            tensors.remove(&name);
        }
        fill::by_name(&self.params(), path, &tensors)
    }

    fn merged_weight(&self, path: &str, mut weight: Tensor) -> Result<Tensor> {
        for rows in self.rows.iter().filter(|r| r.covers(path)) {
            weight = rows.merged(weight)?;
        }
        Ok(weight)
    }
}
