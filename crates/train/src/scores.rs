//! Scores of labelled rows, by name.

use crate::model::likeliest;
use engobe_data::{Goal, LabelSet, MicroBatch, Problem};
use engobe_metrics::{Score, classes, regression, tags};

/// A score; `None` where it is not defined (a correlation with a constant).
pub type Named = (String, Option<f64>);

/// What a row is, and what was predicted of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// the row's index among the samples
    pub row: usize,
    /// the row's goal
    pub goal: Goal,
    /// labels of its tokens: positions within the row, and classes
    pub tokens: Vec<(usize, u32)>,
    /// logits: one line for the row, or one a token of `tokens` (of every token where there are none)
    pub logits: Vec<Vec<f32>>,
}

/// Sorts the logits of a batch to its rows. `of_tokens`: the head reads tokens.
pub(crate) fn predictions(batch: &MicroBatch, logits: Vec<Vec<f32>>, of_tokens: bool) -> Vec<Prediction> {
    let unlabelled = batch.goals.contains(&Goal::Nothing);
    let mut logits = logits.into_iter();
    let mut found = Vec::with_capacity(batch.rows.len());
    for ((row, goal), segment) in batch.rows.iter().zip(&batch.goals).zip(&batch.segments) {
        let targets = batch.targets[segment.clone()].iter().enumerate();
        let tokens: Vec<(usize, u32)> = targets.filter_map(|(i, t)| t.map(|t| (i, t))).collect();
        let lines = match (of_tokens, unlabelled) {
            (false, _) => 1,
            (true, true) => segment.len(),
            (true, false) => tokens.len(),
        };
        found.push(Prediction {
            row: *row,
            goal: goal.clone(),
            tokens,
            logits: logits.by_ref().take(lines).collect(),
        });
    }
    found
}

impl Prediction {
    /// The likeliest class of each line of logits.
    pub fn classes(&self) -> Vec<u32> {
        self.logits.iter().map(|row| likeliest(row)).collect()
    }

    /// The classes that hold, of a row of which several may.
    pub fn set(&self) -> Vec<u32> {
        let row = self.logits.first().map_or(&[][..], Vec::as_slice);
        (0..).zip(row).filter(|(_, z)| **z > 0.0).map(|(class, _)| class).collect()
    }

    /// The number.
    pub fn value(&self) -> f64 {
        self.logits.first().and_then(|row| row.first()).map_or(f64::NAN, |z| f64::from(*z))
    }
}

/// Scores of predictions against their labels. The first is the one that people ask for.
pub fn score(labels: &LabelSet, predictions: &[Prediction]) -> Vec<Named> {
    match labels.problem {
        Problem::Regression => {
            let value = |p: &Prediction| if let Goal::Value(v) = p.goal { Some(f64::from(v)) } else { None };
            let (actual, found): (Vec<f64>, Vec<f64>) =
                predictions.iter().filter_map(|p| Some((value(p)?, p.value()))).unzip();
            vec![
                ("pearson".into(), regression::pearson(&actual, &found)),
                ("spearman".into(), regression::spearman(&actual, &found)),
                ("mse".into(), Some(regression::mean_squared_error(&actual, &found))),
            ]
        }
        Problem::MultiLabel => {
            let holds = |p: &Prediction| match &p.goal {
                Goal::Classes(holds) => Some((0..).zip(holds).filter(|(_, h)| **h).map(|(c, _)| c).collect()),
                _ => None,
            };
            let (actual, found): (Vec<Vec<u32>>, Vec<Vec<u32>>) =
                predictions.iter().filter_map(|p| Some((holds(p)?, p.set()))).unzip();
            let accuracy = classes::subset_accuracy(&actual, &found);
            let f1 = classes::f1_multi(&actual, &found, labels.len() as u32);
            with_accuracy(accuracy, f1_scores(labels, &f1), None)
        }
        Problem::SingleLabel if predictions.iter().any(|p| p.goal == Goal::Tags) => {
            tag_scores(labels, predictions)
        }
        Problem::SingleLabel => {
            let class = |p: &Prediction| if let Goal::Class(class) = p.goal { Some(class) } else { None };
            let found = |p: &Prediction| p.classes().first().copied().unwrap_or_default();
            let (actual, found): (Vec<u32>, Vec<u32>) =
                predictions.iter().filter_map(|p| Some((class(p)?, found(p)))).unzip();
            class_scores(labels, &actual, &found)
        }
    }
}

fn class_scores(labels: &LabelSet, actual: &[u32], found: &[u32]) -> Vec<Named> {
    let f1 = f1_scores(labels, &classes::f1(actual, found));
    with_accuracy(classes::accuracy(actual, found), f1, Some(classes::matthews(actual, found)))
}

fn with_accuracy(accuracy: f64, f1: Vec<Named>, matthews: Option<f64>) -> Vec<Named> {
    let matthews = matthews.map(|m| ("matthews".to_string(), Some(m)));
    [("accuracy".to_string(), Some(accuracy))].into_iter().chain(matthews).chain(f1).collect()
}

fn f1_scores(labels: &LabelSet, f1: &classes::F1) -> Vec<Named> {
    let mut scores = vec![("f1_micro".into(), Some(f1.micro.f1)), ("f1_macro".into(), Some(f1.macro_.f1))];
    scores.extend(f1.per_class.iter().map(|(class, s)| (format!("f1_{}", labels.name(*class)), Some(s.f1))));
    scores
}

/// F1 of spans where tags are `B-`, `I-` and the like, else of classes.
fn tag_scores(labels: &LabelSet, predictions: &[Prediction]) -> Vec<Named> {
    let actual = |p: &Prediction| p.tokens.iter().map(|(_, class)| *class).collect::<Vec<u32>>();
    if !has_spans(labels) {
        let all = |f: &dyn Fn(&Prediction) -> Vec<u32>| predictions.iter().flat_map(f).collect::<Vec<u32>>();
        return class_scores(labels, &all(&actual), &all(&Prediction::classes));
    }
    let names = |classes: Vec<u32>| classes.into_iter().map(|c| labels.name(c)).collect::<Vec<&str>>();
    let (actual, found): (Vec<_>, Vec<_>) =
        predictions.iter().map(|p| (names(actual(p)), names(p.classes()))).unzip();
    let spans = tags::score(&actual, &found);
    let Score { precision, recall, f1, .. } = spans.micro;
    let mut scores: Vec<Named> = vec![
        ("f1".into(), Some(f1)),
        ("precision".into(), Some(precision)),
        ("recall".into(), Some(recall)),
        ("f1_macro".into(), Some(spans.macro_.f1)),
        ("accuracy".into(), Some(spans.accuracy)),
    ];
    scores.extend(spans.per_type.iter().map(|(kind, s)| (format!("f1_{kind}"), Some(s.f1))));
    scores
}

fn has_spans(labels: &LabelSet) -> bool {
    let prefixed = |name: &String| name.starts_with(['B', 'I', 'E', 'S']) && name[1..].starts_with('-');
    labels.names().iter().any(prefixed) && labels.names().iter().all(|name| name == "O" || prefixed(name))
}

/// Names that [`score`] gives, those of single classes left out.
pub fn names(labels: &LabelSet) -> &'static [&'static str] {
    match labels.problem {
        Problem::Regression => &["pearson", "spearman", "mse"],
        Problem::MultiLabel => &["accuracy", "f1_micro", "f1_macro"],
        Problem::SingleLabel if labels.task == engobe_data::Task::TokenCls && has_spans(labels) => {
            &["f1", "precision", "recall", "f1_macro", "accuracy"]
        }
        Problem::SingleLabel => &["accuracy", "matthews", "f1_micro", "f1_macro"],
    }
}

/// True if less of this score is better.
pub fn less_is_better(name: &str) -> bool {
    matches!(name, "loss" | "mse")
}
