//! Texts out of texts: scores, predictions, answers.

use super::{Kind, TaskBench, tell_files};
use crate::args::{EvalArgs, ModelArgs};
use crate::scoring::eval_batches;
use crate::terminal::{Note, Progress};
use crate::text_scores::{self, Completed};
use crate::workbench;
use anyhow::{Result, bail};
use engobe_data::{Goal, Row, Sample, Task, TextTokenizer, reader};
use engobe_infer::answer_all;
use engobe_nn::Seq2Seq;
use engobe_train::evaluate;
use std::path::{Path, PathBuf};

/// An encoder-decoder and its tokenizer.
pub struct Answerer {
    path: PathBuf,
    bench: TaskBench,
}

impl Answerer {
    /// Loads the model at `path` as was typed, with at most one adapter.
    pub fn open(path: &Path, args: &ModelArgs) -> Result<Self> {
        let options = workbench::options_of(args)?;
        let bench = match workbench::one_adapter(args)? {
            Some(dir) => TaskBench::with_adapter(path, Task::Seq2SeqLm, &dir, &[], &options)?,
            None => TaskBench::load(path, Task::Seq2SeqLm, None, &options, 0)?,
        };
        Ok(Self { path: path.to_path_buf(), bench })
    }

    /// The model.
    pub fn model(&self) -> Result<&dyn Seq2Seq> {
        match &self.bench.kind {
            Kind::Texts(model) => Ok(model.as_ref()),
            Kind::Labels(..) => bail!("the model makes labels, not texts"),
        }
    }

    /// Its tokenizer, if it has one.
    pub fn tokenizer(&self) -> Option<&TextTokenizer> {
        self.bench.tokenizer.as_ref()
    }

    /// The tokenizer, or an error that says what is missing.
    pub fn need_tokenizer(&self) -> Result<&TextTokenizer> {
        workbench::need(self.tokenizer(), &self.path)
    }

    /// Tokens at which texts end.
    pub fn end_ids(&self) -> Result<Vec<u32>> {
        workbench::end_ids(self.tokenizer(), &self.path)
    }
}

/// Scores an encoder-decoder.
pub fn eval(args: &EvalArgs, path: &Path, note: &mut Note) -> Result<()> {
    let wanted = text_scores::wanted(args, "texts out of texts")?;
    let answerer = Answerer::open(path, &args.model)?;
    let files = reader::read(&args.rows.data)?;
    let samples = answerer.bench.encoder(args.max_seq_len).encode(&files)?;
    tell_files(&files, &samples, note);
    let is_scored = |s: &&Sample| s.goal != Goal::Nothing;
    let scored: Vec<Sample> = samples.iter().filter(is_scored).cloned().collect();
    if scored.len() < samples.len() {
        let without = samples.len() - scored.len();
        note.line(&format!("{without} of {} rows have no target and are not scored", samples.len()));
    }
    let found = match scored.is_empty() {
        true => None,
        false => {
            let batches = eval_batches(&scored);
            let mut progress = Progress::new("batches", batches.len(), 0, note);
            Some(evaluate(answerer.model()?, &batches, None, &mut |done| {
                progress.update(done, || "measuring the loss".to_string())
            })?)
        }
    };
    let mut completed = Completed::default();
    if args.predictions.is_some() || !(wanted.is_empty() || scored.is_empty()) {
        let rows = files.iter().flat_map(|f| &f.rows).zip(&samples);
        let targets = rows.map(|(row, sample)| target(row, sample, &answerer)).collect::<Result<Vec<_>>>()?;
        let answers = answers(&answerer, &samples, args, note)?;
        completed = Completed(targets.into_iter().zip(answers).collect());
    }
    if let Some(file) = &args.predictions {
        completed.write(file)?;
        note.line(&format!("predictions of {} rows: {}", samples.len(), file.display()));
    }
    match found {
        Some(found) => {
            let (scores, of) = (completed.scores(&wanted), completed.scored());
            text_scores::show(args.common.json, &found, scored.len(), &scores, of)
        }
        None if args.predictions.is_some() => Ok(()),
        None => bail!("no row has a target: --predictions FILE writes what the model makes of them"),
    }
}

/// The text that a row wants, if it wants one; that of token ids is what they stand for.
fn target(row: &Row, sample: &Sample, answerer: &Answerer) -> Result<Option<String>> {
    match (row.content.as_pair(), &sample.goal) {
        (Some((_, target)), _) => Ok(Some(target.to_string())),
        (None, Goal::Sequence(ids)) => Ok(Some(answerer.need_tokenizer()?.decode(ids, true)?)),
        (None, _) => Ok(None),
    }
}

/// What the model makes of the samples' sources, greedily.
fn answers(answerer: &Answerer, samples: &[Sample], args: &EvalArgs, note: &Note) -> Result<Vec<String>> {
    let sources: Vec<Vec<u32>> = samples.iter().map(|s| s.ids.clone()).collect();
    let (model, tokenizer) = (answerer.model()?, answerer.need_tokenizer()?);
    let mut progress = Progress::new("rows", sources.len(), 0, note);
    let mut tell = |done| progress.update(done, || "answering".to_string());
    let activations = workbench::activations(&args.model);
    let all = answer_all(model, &sources, args.max_new_tokens, &answerer.end_ids()?, activations, &mut tell)?;
    all.iter().map(|ids| Ok(tokenizer.decode(ids, true)?)).collect()
}
