//! A tiny model of any kind.

use engobe_data::{LabelSet, Problem, Task};
use engobe_models::{HeadKind, LoadOptions, load_causal_lm, load_seq2seq, load_task_model};
use engobe_nn::{CausalLm, ModuleTree, Seq2Seq, TaskModel};
use engobe_train::Model;
use std::path::Path;

/// What a family's models are.
#[allow(dead_code)] // of the tests that share this file, some have no encoders
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Decoder,
    Encoder,
    EncoderDecoder,
}

/// A family's tiny model, as it is trained: a decoder on next tokens, an encoder on classes of texts, an encoder-decoder on
/// texts out of texts.
pub enum Base {
    Decoder(Box<dyn CausalLm>),
    Headed(Box<TaskModel>, LabelSet),
    Answerer(Box<dyn Seq2Seq>),
}

impl Base {
    /// The model in a directory. Panics if it cannot be read.
    pub fn load(dir: &Path, kind: Kind) -> Self {
        let options = LoadOptions::default();
        match kind {
            Kind::Decoder => Self::Decoder(load_causal_lm(dir, &options).unwrap()),
            Kind::EncoderDecoder => Self::Answerer(load_seq2seq(dir, &options).unwrap()),
            Kind::Encoder => {
                let labels = LabelSet::new(Task::SeqCls, Problem::SingleLabel, vec!["a".into(), "b".into()]);
                let model = load_task_model(dir, &options, HeadKind::Sequence, 2, 1).unwrap();
                Self::Headed(Box::new(model), labels)
            }
        }
    }

    /// As adapters see it.
    pub fn tree(&mut self) -> &mut dyn ModuleTree {
        match self {
            Self::Decoder(model) => model.as_mut(),
            Self::Headed(model, _) => model.as_mut(),
            Self::Answerer(model) => model.as_mut(),
        }
    }

    /// As training sees it.
    pub fn model(&self) -> Model<'_> {
        match self {
            Self::Decoder(model) => model.as_ref().into(),
            Self::Headed(model, labels) => Model::Task(model, labels),
            Self::Answerer(model) => model.as_ref().into(),
        }
    }
}
