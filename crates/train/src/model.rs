//! What can be trained: a decoder on next tokens, an encoder-decoder on texts out of texts, an encoder with a head on
//! labels.

use crate::step::LossSums;
use crate::{Error, Result};
use engobe_autograd::ops::{self, HeadLoss, RowTargets};
use engobe_autograd::{Tape, Var, host};
use engobe_data::{Goal, LabelSet, MicroBatch, Problem};
use engobe_nn::{CausalLm, ModelInfo, Seq2Seq, TaskModel, TokenBatch};
use std::ops::Range;

/// A model with what its output means.
#[derive(Clone, Copy)]
pub enum Model<'a> {
    /// next tokens
    Causal(&'a dyn CausalLm),
    /// a text out of a text
    Seq2Seq(&'a dyn Seq2Seq),
    /// labels of texts or tokens
    Task(&'a TaskModel, &'a LabelSet),
}

impl<'a> From<&'a dyn Seq2Seq> for Model<'a> {
    fn from(model: &'a dyn Seq2Seq) -> Self {
        Self::Seq2Seq(model)
    }
}

impl<'a> From<&'a dyn CausalLm> for Model<'a> {
    fn from(model: &'a dyn CausalLm) -> Self {
        Self::Causal(model)
    }
}

/// What one forward pass gave.
pub(crate) struct Pass {
    /// summed loss; `None` where no row has a label
    pub loss: Option<Var>,
    /// sums
    pub sums: LossSums,
    /// logits of each label's place, where they are few
    pub logits: Vec<Vec<f32>>,
}

impl Model<'_> {
    /// The classes, if it has any.
    pub fn labels(&self) -> Option<&LabelSet> {
        match self {
            Self::Causal(_) | Self::Seq2Seq(_) => None,
            Self::Task(_, labels) => Some(labels),
        }
    }

    /// True if a head reads every token.
    pub(crate) fn reads_tokens(&self) -> bool {
        matches!(self, Self::Task(model, _) if model.head().pooling.is_none())
    }

    /// Sizes.
    pub fn info(&self) -> &ModelInfo {
        match self {
            Self::Causal(model) => model.info(),
            Self::Seq2Seq(model) => model.info(),
            Self::Task(model, _) => model.info(),
        }
    }
}

impl<'m> Model<'m> {
    /// Runs a micro-batch; `None` if there is nothing to predict.
    pub(crate) fn forward(self, tape: &mut Tape<'m>, batch: &MicroBatch) -> Result<Option<Pass>> {
        match self {
            Self::Causal(model) => next_tokens(model, tape, batch),
            Self::Seq2Seq(model) => texts(model, tape, batch),
            Self::Task(model, set) => labels(model, set.problem, tape, batch),
        }
    }
}

/// Cross entropy of the labelled positions.
fn next_tokens<'m>(model: &'m dyn CausalLm, tape: &mut Tape<'m>, batch: &MicroBatch) -> Result<Option<Pass>> {
    let (rows, targets) = labelled(batch);
    if rows.is_empty() {
        return Ok(None);
    }
    let tokens = TokenBatch::packed(&batch.tokens, &batch.segments);
    let hidden = model.hidden_states(tape, &tokens, None)?;
    // positions without a label need no logits
    let labelled =
        if rows.len() == tokens.len() { hidden } else { ops::select_rows(tape, &hidden, rows.into())? };
    let out = model.head_loss(tape, &labelled, targets.into())?;
    Ok(Some(of_head(out)))
}

/// What the fused head says of all labels.
fn of_head(out: HeadLoss) -> Pass {
    let sums = LossSums {
        loss: out.tokens.iter().map(|t| f64::from(t.loss)).sum(),
        label_tokens: out.tokens.len(),
        correct: out.tokens.iter().filter(|t| t.correct).count(),
    };
    Pass { loss: Some(out.loss), sums, logits: Vec::new() }
}

/// Cross entropy of each row's target, which the decoder sees shifted right behind its start token.
fn texts<'m>(model: &'m dyn Seq2Seq, tape: &mut Tape<'m>, batch: &MicroBatch) -> Result<Option<Pass>> {
    let (mut sources, mut inputs, mut labels) = (Rows::default(), Rows::default(), Vec::new());
    for (segment, goal) in batch.segments.iter().zip(&batch.goals) {
        // a row without a target teaches nothing
        let Goal::Sequence(target) = goal else { continue };
        let Some((_, before)) = target.split_last() else { continue };
        sources.push(batch.tokens[segment.clone()].iter());
        inputs.push([model.start_token()].iter().chain(before));
        labels.extend(target);
    }
    if labels.is_empty() {
        return Ok(None);
    }
    let states = model.encode(tape, &sources.batch())?;
    let hidden = model.decoder_states(tape, &inputs.batch(), &states)?;
    drop(states);
    let out = model.head_loss(tape, &hidden, labels.into())?;
    Ok(Some(of_head(out)))
}

/// Rows end to end.
#[derive(Default)]
struct Rows {
    tokens: Vec<u32>,
    ranges: Vec<Range<usize>>,
}

impl Rows {
    fn push<'t>(&mut self, row: impl Iterator<Item = &'t u32>) {
        let start = self.tokens.len();
        self.tokens.extend(row);
        self.ranges.push(start..self.tokens.len());
    }

    fn batch(&self) -> TokenBatch {
        TokenBatch::packed(&self.tokens, &self.ranges)
    }
}

/// Positions with a target, and their targets.
fn labelled(batch: &MicroBatch) -> (Vec<u32>, Vec<u32>) {
    let with = |(i, t): (usize, &Option<u32>)| t.map(|t| (i as u32, t));
    batch.targets.iter().enumerate().filter_map(with).unzip()
}

/// The loss of texts' or tokens' labels. Rows without a label get logits alone.
fn labels<'m>(
    model: &'m TaskModel,
    problem: Problem,
    tape: &mut Tape<'m>,
    batch: &MicroBatch,
) -> Result<Option<Pass>> {
    let mut tokens = TokenBatch::packed(&batch.tokens, &batch.segments);
    if let Some(types) = &batch.types {
        tokens = tokens.with_token_types(types)?;
    }
    let of_tokens = model.head().pooling.is_none();
    let unlabelled = batch.goals.contains(&Goal::Nothing);
    let (rows, classes) = match (of_tokens, unlabelled) {
        (true, false) => labelled(batch),
        // without labels every token's logits are wanted
        (true, true) => ((0..tokens.len() as u32).collect(), Vec::new()),
        (false, _) => (Vec::new(), Vec::new()),
    };
    if tokens.is_empty() || (of_tokens && rows.is_empty()) {
        return Ok(None);
    }
    let logits = model.logits(tape, &tokens, rows.into())?;
    let width = model.num_labels();
    let on_host: Vec<Vec<f32>> = host(&logits.tensor().to_device(&candle_core::Device::Cpu)?)?
        .chunks_exact(width.max(1))
        .map(<[f32]>::to_vec)
        .collect();
    if unlabelled {
        return Ok(Some(Pass { loss: None, sums: LossSums::default(), logits: on_host }));
    }
    let targets = if of_tokens { RowTargets::Classes(classes.into()) } else { goals(batch, problem)? };
    let (label_tokens, correct) = hits(&targets, &on_host);
    let loss = ops::row_loss(tape, &logits, targets)?;
    let sums = LossSums { loss: f64::from(loss.scalar()?), label_tokens, correct };
    Ok(Some(Pass { loss: Some(loss), sums, logits: on_host }))
}

/// What each segment's row shall be.
fn goals(batch: &MicroBatch, problem: Problem) -> Result<RowTargets> {
    let mut classes = Vec::new();
    let mut numbers = Vec::new();
    for goal in &batch.goals {
        match (problem, goal) {
            (Problem::SingleLabel, Goal::Class(class)) => classes.push(*class),
            (Problem::MultiLabel, Goal::Classes(holds)) => {
                numbers.extend(holds.iter().map(|holds| f32::from(u8::from(*holds))));
            }
            (Problem::Regression, Goal::Value(value)) => numbers.push(*value),
            _ => return Err(Error::Labels { problem: problem.name() }),
        }
    }
    Ok(match problem {
        Problem::SingleLabel => RowTargets::Classes(classes.into()),
        Problem::MultiLabel => RowTargets::Sets(numbers.into()),
        Problem::Regression => RowTargets::Values(numbers.into()),
    })
}

/// Number of labels, and how many of them the logits have right; numbers are never just right.
fn hits(targets: &RowTargets, logits: &[Vec<f32>]) -> (usize, usize) {
    match targets {
        RowTargets::Classes(t) => {
            (t.len(), t.iter().zip(logits).filter(|(t, row)| likeliest(row) == **t).count())
        }
        RowTargets::Sets(t) => (
            t.len(),
            t.iter().zip(logits.iter().flatten()).filter(|(t, z)| (**t == 1.0) == (**z > 0.0)).count(),
        ),
        RowTargets::Values(t) => (t.len(), 0),
    }
}

/// The class with the largest logit, the first of equals.
pub fn likeliest(logits: &[f32]) -> u32 {
    let best = (0u32..)
        .zip(logits)
        .fold((0, f32::NEG_INFINITY), |best, (i, z)| if *z > best.1 { (i, *z) } else { best });
    best.0
}
