//! Scores of predictions: pure functions over labels, numbers and texts, nothing else.
//!
//! Each gives the numbers of the library that people compare with: scikit-learn ([`classes`]), scipy
//! ([`regression`]), seqeval ([`tags`]), sacrebleu and rouge_score ([`text`]). `golden/metrics.py` made the cases that
//! the tests compare with.
//!
//! Scores lie in 0..=1 (BLEU in 0..=100, as sacrebleu prints it). Where two slices belong together, the shorter one
//! decides how many items there are.
//!
//! Must not know: any other crate of ours.

pub mod classes;
pub mod regression;
pub mod tags;
pub mod text;

/// Precision, recall and F1 of one class, or averaged.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// share of what was predicted that is right; 0 if nothing was predicted
    pub precision: f64,
    /// share of what was there that was found; 0 if nothing was there
    pub recall: f64,
    /// harmonic mean of both
    pub f1: f64,
    /// how many were there
    pub support: usize,
}

/// What a class' score is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// predicted and right
    pub(crate) hits: usize,
    /// predicted
    pub(crate) predicted: usize,
    /// there
    pub(crate) actual: usize,
}

impl Counts {
    pub(crate) fn score(self) -> Score {
        let share = |of: usize| if of == 0 { 0.0 } else { self.hits as f64 / of as f64 };
        let (precision, recall) = (share(self.predicted), share(self.actual));
        let both = self.predicted + self.actual;
        let f1 = if both == 0 { 0.0 } else { 2.0 * self.hits as f64 / both as f64 };
        Score { precision, recall, f1, support: self.actual }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.hits += other.hits;
        self.predicted += other.predicted;
        self.actual += other.actual;
    }
}

/// The plain mean of scores; supports add up.
pub(crate) fn mean(scores: &[Score]) -> Score {
    let n = scores.len().max(1) as f64;
    let of = |f: fn(&Score) -> f64| scores.iter().map(f).sum::<f64>() / n;
    Score {
        precision: of(|s| s.precision),
        recall: of(|s| s.recall),
        f1: of(|s| s.f1),
        support: scores.iter().map(|s| s.support).sum(),
    }
}
