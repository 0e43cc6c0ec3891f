//! One label an item, or several: accuracy, F1, Matthews' correlation, with scikit-learn's numbers.

use crate::{Counts, Score, mean};
use std::collections::{BTreeMap, BTreeSet};

/// F1 in its averages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct F1 {
    /// over all decisions alike
    pub micro: Score,
    /// over classes alike
    pub macro_: Score,
    /// each class that was there or predicted, in order
    pub per_class: Vec<(u32, Score)>,
}

/// Share of items whose prediction is the label; 0 without items.
pub fn accuracy(labels: &[u32], predicted: &[u32]) -> f64 {
    let n = labels.len().min(predicted.len());
    let hits = labels.iter().zip(predicted).filter(|(a, b)| a == b).count();
    hits as f64 / n.max(1) as f64
}

/// F1 of single labels. As in scikit-learn, the classes are those that occur among labels or predictions.
pub fn f1(labels: &[u32], predicted: &[u32]) -> F1 {
    let mut counts: BTreeMap<u32, Counts> = BTreeMap::new();
    for (&label, &guess) in labels.iter().zip(predicted) {
        counts.entry(label).or_default().actual += 1;
        let guessed = counts.entry(guess).or_default();
        guessed.predicted += 1;
        guessed.hits += usize::from(label == guess);
    }
    averages(counts)
}

/// F1 of items that each have any of `classes` labels, given as the numbers of those that hold.
pub fn f1_multi(labels: &[Vec<u32>], predicted: &[Vec<u32>], classes: u32) -> F1 {
    let mut counts: BTreeMap<u32, Counts> = (0..classes).map(|c| (c, Counts::default())).collect();
    for (labels, guesses) in labels.iter().zip(predicted) {
        let labels: BTreeSet<u32> = labels.iter().copied().collect();
        let guesses: BTreeSet<u32> = guesses.iter().copied().collect();
        for &label in &labels {
            counts.entry(label).or_default().actual += 1;
        }
        for &guess in &guesses {
            let guessed = counts.entry(guess).or_default();
            guessed.predicted += 1;
            guessed.hits += usize::from(labels.contains(&guess));
        }
    }
    averages(counts)
}

/// Share of items whose set of labels is predicted exactly.
pub fn subset_accuracy(labels: &[Vec<u32>], predicted: &[Vec<u32>]) -> f64 {
    let set = |v: &Vec<u32>| v.iter().copied().collect::<BTreeSet<u32>>();
    let n = labels.len().min(predicted.len());
    let hits = labels.iter().zip(predicted).filter(|(a, b)| set(a) == set(b)).count();
    hits as f64 / n.max(1) as f64
}

fn averages(counts: BTreeMap<u32, Counts>) -> F1 {
    let mut all = Counts::default();
    counts.values().for_each(|c| all.add(*c));
    let per_class: Vec<(u32, Score)> = counts.into_iter().map(|(class, c)| (class, c.score())).collect();
    let scores: Vec<Score> = per_class.iter().map(|(_, s)| *s).collect();
    F1 { micro: all.score(), macro_: mean(&scores), per_class }
}

/// Matthews' correlation in Gorodkin's form for any number of classes (Gorodkin 2004, "Comparing two K-category
/// assignments"); 0 where labels or predictions are all of one class.
pub fn matthews(labels: &[u32], predicted: &[u32]) -> f64 {
    let mut counts: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
    let (mut hits, mut n) = (0.0, 0.0);
    for (&label, &guess) in labels.iter().zip(predicted) {
        counts.entry(label).or_default().0 += 1.0;
        counts.entry(guess).or_default().1 += 1.0;
        hits += f64::from(label == guess);
        n += 1.0;
    }
    let sum = |f: fn(&(f64, f64)) -> f64| counts.values().map(f).sum::<f64>();
    let covariance = hits * n - sum(|c| c.0 * c.1);
    let (actual, guessed) = (n * n - sum(|c| c.0 * c.0), n * n - sum(|c| c.1 * c.1));
    if actual * guessed == 0.0 { 0.0 } else { covariance / (actual * guessed).sqrt() }
}
