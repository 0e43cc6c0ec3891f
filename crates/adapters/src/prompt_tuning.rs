//! Soft prompts (Lester et al. 2021): trained rows before the embedded tokens of each sequence, and nothing else. In an
//! encoder-decoder they stand before the source, as in the paper. PEFT makes as many rows for the decoder, which it neither
//! uses nor changes: they are left out of what is read from its files, and of what is written (`num_transformer_submodules`
//! is 1, so PEFT makes none either when it reads them).

use crate::Result;
use crate::method::{Attached, Attaching, Card, Decides, Kind, Method, NeedsText, Purpose, Setting, setting};
use crate::random::{gaussian, generator};
use crate::saved;
use crate::virtual_tokens::{self, COUNT, DEFAULT_COUNT, SAVED, Sites, TENSOR, repeated};
use engobe_autograd::{Param, Tape, Var, tensor_of};
use engobe_formats::peft::PeftConfig;
use engobe_formats::tensor::TensorView;
use engobe_nn::{InputRows, ModuleTree};
use rand::Rng;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Soft prompts.
#[derive(Debug)]
pub(crate) struct PromptTuning;

/// How a prompt starts (`prompt_tuning_init`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Init {
    /// normal numbers
    Random,
    /// embedded tokens drawn from the vocabulary
    Vocabulary,
    /// the embedded tokens of a text, again from its start if it is too short
    Text,
}

const INIT: &str = "prompt_tuning_init";
const INIT_TEXT: &str = "prompt_tuning_init_text";
const TOKENIZER: &str = "tokenizer_name_or_path";
const NAMES: [(&str, Init); 3] =
    [("RANDOM", Init::Random), ("SAMPLE_VOCAB", Init::Vocabulary), ("TEXT", Init::Text)];

const SETTINGS: [Setting; 4] = [
    COUNT,
    SAVED,
    Setting {
        decides: Decides::Start,
        ..setting(INIT, Kind::Text, "how a prompt starts: random, sample_vocab, text [sample_vocab]")
    },
    Setting {
        decides: Decides::Start,
        ..setting(INIT_TEXT, Kind::Text, "the text it starts from, with prompt_tuning_init text")
    },
];

impl PromptTuning {
    fn init(config: &PeftConfig) -> Result<Init> {
        Ok(config.choice(INIT, &NAMES, Init::Random)?)
    }
}

const CARD: Card = Card {
    name: "prompt-tuning",
    about: "trained rows before the embedded tokens",
    peft_type: "PROMPT_TUNING",
    settings: &SETTINGS,
    learning_rate: Some(0.03),
    head_learning_rate: None,
};

impl Method for PromptTuning {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn defaults(&self) -> Vec<(&'static str, Value)> {
        vec![(COUNT.name, json!(DEFAULT_COUNT)), (INIT, json!("SAMPLE_VOCAB"))]
    }

    fn normalize(&self, config: &PeftConfig) -> Result<PeftConfig> {
        let keys = [INIT, INIT_TEXT, TOKENIZER, "tokenizer_kwargs"];
        let count = virtual_tokens::read(config, &keys, &[])?;
        let init = Self::init(config)?;
        let mut config = config.clone();
        if init == Init::Text {
            if config.text(INIT_TEXT).is_none_or(|text| text.trim().is_empty()) {
                return Err(config.bad(INIT_TEXT, "missing", "a text, as prompt_tuning_init is TEXT").into());
            }
            if config.text(TOKENIZER).is_none() {
                // PEFT does not read such a file without it
                let base = config.text("base_model_name_or_path").unwrap_or_default().to_string();
                config.set(TOKENIZER, base);
            }
        }
        let name = NAMES.iter().find(|(_, i)| *i == init).map_or("RANDOM", |(name, _)| name);
        config.set(INIT, name);
        config.set(COUNT.name, count);
        Ok(config)
    }

    fn needs_text(&self, config: &PeftConfig) -> Option<NeedsText> {
        let text = config.text(INIT_TEXT)?.to_string();
        (Self::init(config).ok()? == Init::Text).then_some(NeedsText { text, key_values: false })
    }

    fn attach(
        &self,
        model: &mut dyn ModuleTree,
        config: &PeftConfig,
        at: &Attaching<'_>,
    ) -> Result<Box<dyn Attached>> {
        let sites = Sites::find(model, self.name())?;
        let count = config.whole(COUNT.name)?.unwrap_or(DEFAULT_COUNT);
        let mut rng = generator(at.start.seed, TENSOR);
        let init = if at.purpose == Purpose::Start { Self::init(config)? } else { Init::Random };
        let rows = match init {
            Init::Random => tensor_of(gaussian(&mut rng, count * sites.width, 1.0), (count, sites.width))?,
            Init::Vocabulary => {
                let vocab = sites.embedding.rows() as u32;
                let ids: Vec<u32> = (0..count).map(|_| rng.random_range(0..vocab)).collect();
                sites.embedded(&ids)?
            }
            Init::Text => {
                let ids = repeated(&at.text.ids, count);
                if ids.len() != count {
                    return Err(config.bad(INIT_TEXT, "a text of no tokens", "at least one token").into());
                }
                sites.embedded(&ids)?
            }
        };
        let prompt = Param::new(TENSOR, &rows.to_device(at.device)?)?;
        let rows = Arc::new(Prompt(prompt));
        let in_file = virtual_tokens::prompts_in_file(config)?;
        let mut config = config.clone();
        sites.attach_rows(model, &rows, &mut config);
        let saved = saved::train_named(model, &config, saved::PROMPT_ROOT)?;
        Ok(Box::new(Attachment { config, rows, saved, in_file }))
    }
}

/// The prompt, `[count, d]`.
#[derive(Debug)]
struct Prompt(Param);

impl InputRows for Prompt {
    fn count(&self) -> usize {
        self.0.tensor().dims()[0]
    }

    fn rows(&self, tape: &mut Tape<'_>) -> engobe_autograd::Result<Var> {
        Ok(tape.param(&self.0))
    }
}

#[derive(Debug)]
struct Attachment {
    config: PeftConfig,
    rows: Arc<Prompt>,
    saved: Vec<Param>,
    /// prompts in the file that it came from
    in_file: usize,
}

impl Attached for Attachment {
    fn config(&self) -> PeftConfig {
        self.config.clone()
    }

    fn params(&self) -> Vec<&Param> {
        [&self.rows.0].into_iter().chain(&self.saved).collect()
    }

    fn fill(&self, path: &Path, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
        virtual_tokens::fill_first(&self.rows.0, self.in_file, &self.saved, path, tensors)
    }

    fn lead(&self) -> usize {
        self.rows.count()
    }

    fn merge_refusal(&self) -> Option<&'static str> {
        Some("a prompt is input, and no change of weights")
    }
}
