//! Checks of labelled rows before the first step.

use super::{LabelSet, Problem};
use crate::encode::{Goal, Sample};
use crate::lint::{LintKind, LintReport, Reporter, Severity, repeats};
use std::collections::{BTreeMap, HashMap};

/// A class with more than this share of the rows is worth a word: always saying it would be nearly right.
const MOST_SHARE: f64 = 0.9;

/// Checks labelled rows to be trained on, and the validation rows. `special` is the number of special tokens around a
/// text; rows that are not longer are empty.
pub fn lint_task(
    samples: &[Sample],
    val_samples: &[Sample],
    labels: Option<&LabelSet>,
    special: usize,
    max_seq_len: usize,
) -> LintReport {
    let mut report = Reporter::new(samples.len());
    let is_empty = |s: &&Sample| s.ids.len() <= special;
    report.rows(LintKind::EmptyRows, samples.iter().filter(is_empty), "have no text");
    report.rows(
        LintKind::AllMaskedRows,
        samples.iter().filter(|s| s.label_tokens() == 0),
        "have no label: nothing is learned from them",
    );
    report.truncated(samples, max_seq_len);
    if let Some(labels) = labels.filter(|l| l.problem != Problem::Regression) {
        classes(&mut report, samples, val_samples, labels);
    }
    conflicts(&mut report, samples);
    repeats(&mut report, samples, val_samples);
    report.finish()
}

/// The classes that a row has.
fn classes_of(sample: &Sample) -> Vec<u32> {
    match &sample.goal {
        Goal::Class(class) => vec![*class],
        Goal::Classes(holds) => (0..).zip(holds).filter(|(_, holds)| **holds).map(|(c, _)| c).collect(),
        Goal::Tags => sample.labels.iter().flatten().copied().collect(),
        Goal::NextTokens | Goal::Value(_) | Goal::Sequence(_) | Goal::Nothing => Vec::new(),
    }
}

fn classes(report: &mut Reporter, samples: &[Sample], val_samples: &[Sample], labels: &LabelSet) {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    samples.iter().flat_map(classes_of).for_each(|class| *counts.entry(class).or_default() += 1);
    let total: usize = counts.values().sum();
    if let Some((class, most)) = counts.iter().max_by_key(|(_, n)| **n)
        && labels.problem == Problem::SingleLabel
    {
        let name = labels.name(*class);
        let share = *most as f64 / total as f64;
        if counts.len() == 1 {
            let message = format!("every label is {name:?}: there is nothing to tell apart");
            report.push(LintKind::OneClass, LintKind::OneClass.severity(), samples.iter(), message);
        } else if share > MOST_SHARE && samples.iter().any(|s| matches!(s.goal, Goal::Class(_))) {
            let message = format!(
                "{:.1} % of the labels are {name:?}: always saying that would be nearly right; look at F1 beside accuracy",
                100.0 * share
            );
            report.push(LintKind::ClassImbalance, Severity::Warning, samples.iter(), message);
        }
    }
    let unseen = |s: &&Sample| classes_of(s).iter().any(|class| !counts.contains_key(class));
    let rows: Vec<&Sample> = val_samples.iter().filter(unseen).collect();
    if let Some(first) = rows.first() {
        let class = classes_of(first).into_iter().find(|c| !counts.contains_key(c)).unwrap_or_default();
        let message = format!(
            "{} of {} validation rows have a label that no training row has, {:?} for one ({})",
            rows.len(),
            val_samples.len(),
            labels.name(class),
            first.place
        );
        report.push(LintKind::UnseenLabel, LintKind::UnseenLabel.severity(), rows.into_iter(), message);
    }
}

/// Rows of the same text with other labels.
fn conflicts(report: &mut Reporter, samples: &[Sample]) {
    let mut seen: HashMap<(&[u32], Option<usize>), &Sample> = HashMap::new();
    let mut rows = Vec::new();
    for sample in samples.iter().filter(|s| s.label_tokens() > 0) {
        let first = seen.entry((&sample.ids, sample.second_type_from)).or_insert(sample);
        if first.goal != sample.goal || first.labels != sample.labels {
            rows.push(sample);
        }
    }
    report.rows(LintKind::ConflictingLabels, rows.into_iter(), "repeat an earlier text with another label");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Place, Task};

    fn sample(number: usize, ids: &[u32], goal: Goal) -> Sample {
        let place = Place { file: "x".into(), number, unit: "line" };
        Sample {
            ids: ids.to_vec(),
            labels: vec![None; ids.len()],
            place,
            truncated: 0,
            goal,
            second_type_from: None,
        }
    }

    fn kinds(samples: &[Sample], val: &[Sample]) -> Vec<&'static str> {
        let labels =
            LabelSet::new(Task::SeqCls, Problem::SingleLabel, vec!["a".into(), "b".into(), "c".into()]);
        lint_task(samples, val, Some(&labels), 2, 16).findings.iter().map(|f| f.kind.name()).collect()
    }

    #[test]
    fn each_finding_is_found_and_clean_rows_have_none() {
        let rows = [sample(1, &[1, 5, 2], Goal::Class(0)), sample(2, &[1, 6, 2], Goal::Class(1))];
        assert!(kinds(&rows, &[sample(1, &[1, 7, 2], Goal::Class(1))]).is_empty());
        assert_eq!(kinds(&rows, &[sample(1, &[1, 7, 2], Goal::Class(2))]), ["unseen-label"]);
        assert_eq!(kinds(&rows, &[sample(1, &[1, 5, 2], Goal::Class(0))]), ["val-overlap"]);
        let with = |more: Sample| [rows.to_vec(), vec![more]].concat();
        assert_eq!(kinds(&with(sample(3, &[1, 2], Goal::Class(0))), &[]), ["empty-rows"]);
        assert_eq!(kinds(&with(sample(3, &[1, 8, 2], Goal::Nothing)), &[]), ["all-masked-rows"]);
        assert_eq!(kinds(&with(sample(3, &[1, 5, 2], Goal::Class(1))), &[]), ["conflicting-labels"]);
        assert_eq!(kinds(&with(sample(3, &[1, 5, 2], Goal::Class(0))), &[]), ["duplicate-rows"]);
        assert_eq!(kinds(&rows[..1], &[]), ["one-class"]);
        let many: Vec<Sample> =
            (0..20).map(|i| sample(i, &[1, 9 + i as u32, 2], Goal::Class(u32::from(i == 0)))).collect();
        assert_eq!(kinds(&many, &[]), ["class-imbalance"]);
    }
}
