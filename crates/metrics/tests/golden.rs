//! The same numbers as scikit-learn, scipy, seqeval, sacrebleu and rouge_score (`golden/metrics.py`).

use engobe_metrics::{Score, classes, regression, tags, text};
use serde::Deserialize;
use std::path::Path;

/// The same arithmetic in f64, in another order of sums.
const TOLERANCE: f64 = 1e-9;

#[derive(Deserialize)]
struct F1 {
    micro: [f64; 3],
    #[serde(rename = "macro")]
    macro_: [f64; 3],
    per_class: Vec<(f64, f64, f64, usize)>,
}

#[derive(Deserialize)]
struct Classes {
    labels: Vec<u32>,
    predicted: Vec<u32>,
    accuracy: f64,
    matthews: f64,
    f1: F1,
}

#[derive(Deserialize)]
struct Multi {
    labels: Vec<Vec<u32>>,
    predicted: Vec<Vec<u32>>,
    classes: u32,
    accuracy: f64,
    f1: F1,
}

#[derive(Deserialize)]
struct Numbers {
    labels: Vec<f64>,
    predicted: Vec<f64>,
    pearson: Option<f64>,
    spearman: Option<f64>,
    mse: f64,
}

#[derive(Deserialize)]
struct Tags {
    labels: Vec<Vec<String>>,
    predicted: Vec<Vec<String>>,
    accuracy: f64,
    micro: [f64; 3],
    #[serde(rename = "macro")]
    macro_: [f64; 3],
    per_type: Vec<(String, f64, f64, f64, f64)>,
}

#[derive(Deserialize)]
struct Texts {
    references: Vec<String>,
    texts: Vec<String>,
    bleu: f64,
    rouge_l: f64,
}

#[derive(Deserialize)]
struct Golden {
    classes: Vec<Classes>,
    multi: Vec<Multi>,
    numbers: Vec<Numbers>,
    tags: Vec<Tags>,
    texts: Vec<Texts>,
}

fn golden() -> Golden {
    engobe_testkit::json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/metrics.json"))
}

fn near(found: f64, expected: f64, what: &str) {
    let size = expected.abs().max(1.0);
    assert!((found - expected).abs() <= TOLERANCE * size, "{what}: {found}, expected {expected}");
}

fn same(found: Score, expected: [f64; 3], what: &str) {
    for (f, e) in [found.precision, found.recall, found.f1].into_iter().zip(expected) {
        near(f, e, what);
    }
}

fn same_f1(found: &classes::F1, expected: &F1, what: &str) {
    same(found.micro, expected.micro, what);
    same(found.macro_, expected.macro_, what);
    assert_eq!(found.per_class.len(), expected.per_class.len(), "{what}");
    for ((class, score), &(p, r, f, support)) in found.per_class.iter().zip(&expected.per_class) {
        same(*score, [p, r, f], &format!("{what}, class {class}"));
        assert_eq!(score.support, support, "{what}, class {class}");
    }
}

#[test]
fn classes_score_as_in_scikit_learn() {
    for (i, case) in golden().classes.iter().enumerate() {
        let what = format!("case {i}");
        near(classes::accuracy(&case.labels, &case.predicted), case.accuracy, &what);
        near(classes::matthews(&case.labels, &case.predicted), case.matthews, &what);
        same_f1(&classes::f1(&case.labels, &case.predicted), &case.f1, &what);
    }
}

#[test]
fn sets_of_classes_score_as_in_scikit_learn() {
    for (i, case) in golden().multi.iter().enumerate() {
        let what = format!("case {i}");
        near(classes::subset_accuracy(&case.labels, &case.predicted), case.accuracy, &what);
        same_f1(&classes::f1_multi(&case.labels, &case.predicted, case.classes), &case.f1, &what);
    }
}

#[test]
fn numbers_correlate_as_in_scipy() {
    for (i, case) in golden().numbers.iter().enumerate() {
        near(regression::mean_squared_error(&case.labels, &case.predicted), case.mse, &format!("case {i}"));
        for (found, expected) in [
            (regression::pearson(&case.labels, &case.predicted), case.pearson),
            (regression::spearman(&case.labels, &case.predicted), case.spearman),
        ] {
            assert_eq!(found.is_some(), expected.is_some(), "case {i}");
            near(found.unwrap_or(0.0), expected.unwrap_or(0.0), &format!("case {i}"));
        }
    }
    assert_eq!(regression::pearson(&[], &[]), None);
    assert_eq!(regression::spearman(&[1.0, f64::NAN], &[1.0, 2.0]), None);
}

#[test]
fn spans_score_as_in_seqeval() {
    for (i, case) in golden().tags.iter().enumerate() {
        let found = tags::score(&case.labels, &case.predicted);
        near(found.accuracy, case.accuracy, &format!("case {i}"));
        same(found.micro, case.micro, &format!("case {i} micro"));
        same(found.macro_, case.macro_, &format!("case {i} macro"));
        assert_eq!(found.per_type.len(), case.per_type.len(), "case {i}");
        for ((name, score), (expected, p, r, f, support)) in found.per_type.iter().zip(&case.per_type) {
            assert_eq!(name, expected, "case {i}");
            same(*score, [*p, *r, *f], &format!("case {i}, type {name}"));
            near(score.support as f64, *support, &format!("case {i}, spans of type {name}"));
        }
    }
}

#[test]
fn texts_score_as_in_sacrebleu_and_rouge_score() {
    for (i, case) in golden().texts.iter().enumerate() {
        near(text::bleu(&case.references, &case.texts), case.bleu, &format!("case {i} BLEU"));
        near(text::rouge_l(&case.references, &case.texts), case.rouge_l, &format!("case {i} ROUGE-L"));
    }
    assert_eq!(text::exact_match(&["a ", "b", "c"], &["a", " b", "d"]), 2.0 / 3.0);
    assert_eq!(text::exact_match::<&str, &str>(&[], &[]), 0.0);
}
