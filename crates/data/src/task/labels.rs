//! Names of classes and their ids, as `id2label` and `label2id` in Hugging Face's configurations.
//!
//! PEFT keeps them nowhere: an adapter's user must know. So they stand in `labels.json` beside the adapter.

use super::Task;
use crate::reader::Label;
use crate::{Content, DataFile, Error, Result};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The file beside an adapter.
pub const LABELS_FILE: &str = "labels.json";

/// What the logits of a row mean: `problem_type` in Hugging Face's configurations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// one class holds
    SingleLabel,
    /// each class holds or not
    MultiLabel,
    /// numbers
    Regression,
}

impl Problem {
    /// Hugging Face's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::SingleLabel => "single_label_classification",
            Self::MultiLabel => "multi_label_classification",
            Self::Regression => "regression",
        }
    }

    /// The one that Hugging Face calls `name`.
    pub fn of_name(name: &str) -> Option<Self> {
        [Self::SingleLabel, Self::MultiLabel, Self::Regression].into_iter().find(|p| p.name() == name)
    }
}

/// The classes of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelSet {
    /// the task
    pub task: Task,
    /// what logits mean
    pub problem: Problem,
    /// names by id; one, that nothing reads, for a number
    names: Vec<String>,
}

impl LabelSet {
    /// Classes with these names.
    pub fn new(task: Task, problem: Problem, names: Vec<String>) -> Self {
        Self { task, problem, names }
    }

    /// The classes that occur in rows. `known` are the base's names by id, if it has any of its own: labels that are
    /// ids take them, and names that all stand there keep their ids. Otherwise names get ids in their order, and ids
    /// the names `LABEL_0`, `LABEL_1`, ...
    ///
    /// # Errors
    /// No row has a label, ids and names are mixed, an id is negative, or a number has a name.
    pub fn of_rows(task: Task, files: &[DataFile], known: &[String]) -> Result<Self> {
        let mut names = BTreeSet::new();
        let (mut most, mut many) = (None, false);
        for (row, label) in files.iter().flat_map(|f| &f.rows).flat_map(|row| {
            let labels: &[Label] = match &row.content {
                Content::Labelled { label: Some(label), .. } => std::slice::from_ref(label),
                Content::Tagged { tags: Some(tags), .. } => tags,
                _ => &[],
            };
            labels.iter().map(move |l| (row, l))
        }) {
            many |= matches!(label, Label::Many(_));
            for part in label.parts() {
                match (task, part) {
                    (Task::Regression, part) if part.number().is_some() => most = Some(0),
                    (Task::Regression, part) => {
                        return Err(row
                            .place
                            .error(format!("label {part} is no number; regression needs one")));
                    }
                    (_, Label::Whole(id)) => match u32::try_from(*id).ok().filter(|id| *id < MOST_CLASSES) {
                        Some(id) => most = most.max(Some(id)),
                        // -100 is what libraries write for "not to be learned"
                        None if *id == -100 && task == Task::TokenCls => {}
                        None => {
                            let what =
                                format!("label {id} is no class: ids go from 0 to {}", MOST_CLASSES - 1);
                            return Err(row.place.error(what));
                        }
                    },
                    (_, Label::Name(name)) => drop(names.insert(name.clone())),
                    (_, part) => {
                        let what =
                            format!("label {part} is no class; for numbers there is the task regression");
                        return Err(row.place.error(what));
                    }
                }
            }
        }
        if most.is_some() && !names.is_empty() && task != Task::Regression {
            let name = names.first().cloned().unwrap_or_default();
            return Err(Error::Options(format!(
                "labels are ids in some rows and names ({name:?}) in others: use one"
            )));
        }
        let problem = match task {
            Task::Regression => Problem::Regression,
            _ if many => Problem::MultiLabel,
            _ => Problem::SingleLabel,
        };
        let names = match most {
            _ if task == Task::Regression && most.is_some() => vec!["LABEL_0".to_string()],
            Some(most) if (most as usize) < known.len() => known.to_vec(),
            // two at least: one class is none
            Some(most) => (0..=most.max(1)).map(|id| format!("LABEL_{id}")).collect(),
            None if names.is_empty() => {
                return Err(Error::Options(format!("no row has a label, and the task {task} needs them")));
            }
            None if names.iter().all(|name| known.contains(name)) => known.to_vec(),
            None => names.into_iter().collect(),
        };
        Ok(Self { task, problem, names })
    }

    /// Number of logits.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// True without classes.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Names by id.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The name of a class.
    pub fn name(&self, id: u32) -> &str {
        self.names.get(id as usize).map_or("?", String::as_str)
    }

    /// The id of a label.
    pub fn id(&self, label: &Label) -> Option<u32> {
        match label {
            Label::Whole(id) => u32::try_from(*id).ok().filter(|id| (*id as usize) < self.len()),
            Label::Name(name) => self.names.iter().position(|n| n == name).map(|i| i as u32),
            Label::Number(_) | Label::Many(_) => None,
        }
    }

    /// What an error says of a label that is not among these.
    pub(super) fn unknown(&self, label: &Label) -> String {
        let mut names: Vec<&str> = self.names.iter().take(8).map(String::as_str).collect();
        if self.len() > names.len() {
            names.push("...");
        }
        format!("label {label} is none of the {} classes {}", self.len(), names.join(", "))
    }

    /// Names of a configuration's `id2label`, in the order of ids; nothing if it is not there, has gaps, or only has
    /// the names that transformers makes up.
    pub fn known(config: &Value) -> Vec<String> {
        let Some(map) = config.get("id2label").and_then(Value::as_object) else { return Vec::new() };
        names_of(map).filter(|names| !names.iter().all(|n| n.starts_with("LABEL_"))).unwrap_or_default()
    }

    /// The file's content.
    pub fn to_json(&self) -> String {
        let by_id: Map<String, Value> =
            self.names.iter().enumerate().map(|(i, n)| (i.to_string(), json!(n))).collect();
        let by_name: Map<String, Value> =
            self.names.iter().enumerate().map(|(i, n)| (n.clone(), json!(i))).collect();
        let value = json!({
            "task": self.task,
            "problem_type": self.problem.name(),
            "id2label": by_id,
            "label2id": by_name,
        });
        format!("{value:#}\n")
    }

    /// Writes [`LABELS_FILE`] into `dir`.
    pub fn save(&self, dir: &Path) -> Result<()> {
        Ok(engobe_formats::atomic::write_atomic(&dir.join(LABELS_FILE), self.to_json().as_bytes())?)
    }

    /// Reads [`LABELS_FILE`] from an adapter's directory, or from the run that a checkpoint belongs to. `None` if there
    /// is none: PEFT writes none.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let run = dir
            .parent()
            .and_then(Path::parent)
            .filter(|_| dir.parent().is_some_and(|p| p.ends_with("checkpoints")));
        for dir in [Some(dir), run].into_iter().flatten() {
            let path = dir.join(LABELS_FILE);
            match std::fs::read(&path) {
                Ok(bytes) => return Self::parse(&bytes).map(Some).map_err(|what| Error::File { path, what }),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::Io { path, source }),
            }
        }
        Ok(None)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(bytes).map_err(|e| format!("invalid JSON: {e}"))?;
        let text = |key: &str| value.get(key).and_then(Value::as_str).ok_or(format!("{key} is missing"));
        let task = text("task")?.parse::<Task>().map_err(|e| e.to_string())?;
        let problem = text("problem_type")?;
        let problem = Problem::of_name(problem).ok_or(format!("problem_type {problem:?} is not known"))?;
        let map = value.get("id2label").and_then(Value::as_object).ok_or("id2label is missing")?;
        let names = names_of(map).ok_or("id2label must have a name for each id from 0 on")?;
        Ok(Self { task, problem, names })
    }
}

/// More classes than any task has; ids beyond are a mistake (a timestamp, an index of rows).
const MOST_CLASSES: u32 = 100_000;

fn names_of(map: &Map<String, Value>) -> Option<Vec<String>> {
    let mut names = BTreeMap::new();
    for (id, name) in map {
        names.insert(id.parse::<usize>().ok()?, name.as_str()?.to_string());
    }
    let dense = names.keys().copied().eq(0..names.len());
    (dense && !names.is_empty()).then(|| names.into_values().collect())
}
