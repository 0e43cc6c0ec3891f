//! What soft prompts, their encoders and prefixes share: PEFT's `PromptLearningConfig` and the sites of a model.

use crate::method::{Kind, Setting, setting};
use crate::modules::SAVED_HELP;
use crate::{Error, Result, fill};
use candle_core::{DType, Device, Tensor};
use engobe_autograd::Param;
use engobe_formats::peft::{KnownKeys, PeftConfig};
use engobe_formats::tensor::TensorView;
use engobe_nn::{FrozenWeight, InputRows, ModuleMut, ModuleTree, SiteMut, Weight};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The tensor in a file.
pub(crate) const TENSOR: &str = "prompt_embeddings";

/// The setting of all of them.
pub(crate) const COUNT: Setting =
    setting("num_virtual_tokens", Kind::Whole, "rows before each sequence [20]");

/// Modules trained in full beside them: a task's head.
pub(crate) const SAVED: Setting = setting("modules_to_save", Kind::Names, SAVED_HELP);

/// Keys in files that say what the model was; the model itself says so to us.
const OF_MODEL: [&str; 4] = ["num_attention_heads", "num_layers", SUBMODULES, "token_dim"];

const SUBMODULES: &str = "num_transformer_submodules";

/// Virtual tokens engobe has by default; PEFT has no default.
pub(crate) const DEFAULT_COUNT: usize = 20;

/// Checks the keys of a configuration, and gives the number of virtual tokens.
pub(crate) fn read(config: &PeftConfig, settings: &[&str], notes: &[&str]) -> Result<usize> {
    let settings: Vec<&str> = settings.iter().copied().chain([COUNT.name, SAVED.name]).collect();
    let notes: Vec<&str> = notes.iter().copied().chain(OF_MODEL).collect();
    config.check_keys(KnownKeys { settings: &settings, notes: &notes, not_yet: &[] })?;
    Ok(config.whole(COUNT.name)?.unwrap_or(DEFAULT_COUNT))
}

/// What PEFT's files say of the model, of width `token_dim` in each of `heads` heads together.
pub(crate) fn write_model(config: &mut PeftConfig, token_dim: usize, heads: usize, layers: usize) {
    config.set("token_dim", token_dim);
    config.set("num_attention_heads", heads);
    config.set("num_layers", layers);
    config.set(SUBMODULES, 1);
}

/// Says in PEFT's words that a prefix is an encoder-decoder's.
pub(crate) fn write_encoder_decoder(config: &mut PeftConfig) {
    config.set(SUBMODULES, 2);
}

/// How many prompts a file holds, one below the other. PEFT makes two for an encoder-decoder, and uses the first.
pub(crate) fn prompts_in_file(config: &PeftConfig) -> Result<usize> {
    let count = config.whole(SUBMODULES)?.unwrap_or(1);
    match count {
        1 | 2 => Ok(count),
        other => Err(config.bad(SUBMODULES, &other.to_string(), "1 or 2").into()),
    }
}

/// Fills `prompt` `[count, d]` with the first of the prompts that a file holds below each other, and the modules that were
/// trained in full beside it.
pub(crate) fn fill_first(
    prompt: &Param,
    in_file: usize,
    saved: &[Param],
    path: &Path,
    tensors: &BTreeMap<String, TensorView>,
) -> Result<()> {
    let (count, width) = prompt.tensor().dims2()?;
    let all = Param::new(TENSOR, &Tensor::zeros((in_file * count, width), DType::F32, &Device::Cpu)?)?;
    let params: Vec<&Param> = [&all].into_iter().chain(saved).collect();
    fill::by_name(&params, path, tensors)?;
    let first = all.tensor().narrow(0, 0, count)?.contiguous()?;
    Ok(prompt.set(&first.to_device(prompt.tensor().device())?)?)
}

/// What methods of virtual tokens need to know of a model.
pub(crate) struct Sites {
    /// the token embedding, and its width
    pub embedding: FrozenWeight,
    /// width of an embedded token
    pub width: usize,
    /// heads and width of the keys of each attention module
    pub key_values: Vec<(usize, usize)>,
    /// rows go before sources, keys and values before targets
    pub encoder_decoder: bool,
}

impl Sites {
    /// Looks for them.
    pub fn find(model: &mut dyn ModuleTree, method: &'static str) -> Result<Self> {
        let (mut entry, mut key_values, mut encoder_decoder) = (None, Vec::new(), false);
        model.visit_sites(&mut |site| match site {
            SiteMut::Entry(e) if e.takes_rows() => entry = Some((e.path().to_string(), e.width())),
            SiteMut::Entry(_) => encoder_decoder = true,
            SiteMut::KvPrefix(site) => key_values.push((site.kv_heads(), site.width())),
            SiteMut::SubLayer(_) => {}
        });
        let missing = || Error::NoSite { method, needs: "a place for rows before its embedded tokens" };
        let (path, width) = entry.ok_or_else(missing)?;
        let mut embedding = None;
        model.visit_modules(&mut |module| {
            if let ModuleMut::Embedding(m) = module
                && m.path() == path
                && let Weight::Frozen(weight) = m.weight()
            {
                embedding = Some(weight.clone());
            }
        });
        Ok(Self { embedding: embedding.ok_or_else(missing)?, width, key_values, encoder_decoder })
    }

    /// Puts `rows` before the embedded tokens, and what PEFT's files say of the model into `config`.
    pub fn attach_rows<R: InputRows + 'static>(
        &self,
        model: &mut dyn ModuleTree,
        rows: &Arc<R>,
        config: &mut PeftConfig,
    ) {
        model.visit_sites(&mut |site| {
            if let SiteMut::Entry(entry) = site {
                entry.attach(rows.clone());
            }
        });
        match self.key_values.first() {
            Some((heads, _)) => write_model(config, self.width, *heads, self.key_values.len()),
            // PEFT finds the others in the model's configuration
            None => {
                config.set("token_dim", self.width);
                config.set(SUBMODULES, 1);
            }
        }
    }

    /// Embedded tokens `ids`: `[ids, d]`.
    pub fn embedded(&self, ids: &[u32]) -> Result<Tensor> {
        use engobe_autograd::{Tape, ops};
        let matrix = ops::Matrix::Frozen(self.embedding.clone());
        let mut tape = Tape::inference();
        Ok(ops::embedding(&mut tape, &matrix, ids.into(), &candle_core::Device::Cpu)?.into_tensor())
    }
}

/// `count` of the ids, from the first again after the last.
pub(crate) fn repeated(ids: &[u32], count: usize) -> Vec<u32> {
    ids.iter().copied().cycle().take(if ids.is_empty() { 0 } else { count }).collect()
}
