//! Heads of tasks in AdapterHub's format: `head_config.json` beside `model_head.safetensors`.
//!
//! A head is either one of transformers' classes, whose tensors have the names that the class has, or one of the package's
//! own ("flex"): dropout, linear layers and activations in a row, `heads.NAME.1`, `heads.NAME.4`. Where a class of
//! transformers computes the same, such a head is read under the class' names; the table is the package's
//! `STATIC_TO_FLEX_HEAD_MAP`, and BERT's pooler beside it, which is the first layer of the package's usual head.

use super::VERSION;
use crate::atomic::write_atomic;
use crate::peft::PeftConfig;
use crate::tensor::TensorView;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Name of the file.
pub const HEAD_CONFIG: &str = "head_config.json";
/// What names of the package's own heads begin with.
const FLEX: &str = "heads.";

/// A family as the package knows it.
struct Family {
    model_type: &'static str,
    /// activation between the two layers of its head for texts, and their names
    two: Option<(&'static str, [&'static str; 2])>,
    /// its head for texts if it is one layer: name, and whether it reads the model's pooler (and has a bias)
    one: Option<(&'static str, bool)>,
    /// its head for tokens
    tokens: &'static str,
}

const ROBERTA: Option<(&str, [&str; 2])> = Some(("tanh", ["classifier.dense", "classifier.out_proj"]));
const SCORE: Option<(&str, bool)> = Some(("score", false));

const fn family(
    model_type: &'static str,
    two: Option<(&'static str, [&'static str; 2])>,
    one: Option<(&'static str, bool)>,
    tokens: &'static str,
) -> Family {
    Family { model_type, two, one, tokens }
}

const FAMILIES: [Family; 9] = [
    family(
        "bert",
        Some(("tanh", ["bert.pooler.dense", "classifier"])),
        Some(("classifier", true)),
        "classifier",
    ),
    family("roberta", ROBERTA, None, "classifier"),
    family("xlm-roberta", ROBERTA, None, "classifier"),
    family("distilbert", Some(("relu", ["pre_classifier", "classifier"])), None, "classifier"),
    family("electra", Some(("gelu", ["classifier.dense", "classifier.out_proj"])), None, "classifier"),
    family("deberta-v2", Some(("gelu", ["pooler.dense", "classifier"])), None, "classifier"),
    family("llama", None, SCORE, "score"),
    family("mistral", None, SCORE, "score"),
    family("gpt2", None, SCORE, "classifier"),
];

fn known(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|f| f.model_type == model_type)
}

/// What a head is for.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// transformers' class of the model with it
    pub model_class: &'a str,
    /// Hugging Face's name of the model's architecture
    pub model_type: &'a str,
    /// width of the hidden states
    pub hidden_size: usize,
    /// its classes
    pub labels: &'a [String],
}

/// Writes [`HEAD_CONFIG`] into `dir` for an adapter of `config` in AdapterHub's format, and nothing for others. Without it
/// the package loads a head only into transformers' own class, and not under another name.
///
/// # Errors
/// The file cannot be written.
pub fn describe(dir: &Path, config: &PeftConfig, head: &Head<'_>) -> Result<()> {
    if config.peft_type() != super::BOTTLENECK {
        return Ok(());
    }
    let ids: Map<String, Value> =
        head.labels.iter().enumerate().map(|(i, name)| (name.clone(), json!(i))).collect();
    let text = json!({
        "config": null,
        "hidden_size": head.hidden_size,
        "label2id": ids,
        "model_class": head.model_class,
        "model_name": config.text("base_model_name_or_path"),
        "model_type": head.model_type,
        "name": null,
        "num_labels": head.labels.len(),
        "version": VERSION,
    });
    write_atomic(&dir.join(HEAD_CONFIG), format!("{text:#}\n").as_bytes())
}

/// A head's configuration in a directory, if there is one.
fn read(dir: &Path) -> Result<Option<Map<String, Value>>> {
    let path = dir.join(HEAD_CONFIG);
    match fs::read(&path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(Some(map)),
            Ok(_) => Err(Error::corrupt(&path, "is no JSON object")),
            Err(e) => Err(Error::corrupt(&path, format!("invalid JSON: {e}"))),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(&path)(e)),
    }
}

/// Names of a head's classes in the order of their ids, as [`HEAD_CONFIG`] has them; none if it has none, or gaps.
///
/// # Errors
/// The file is no JSON object.
pub fn labels(dir: &Path) -> Result<Vec<String>> {
    let Some(file) = read(dir)? else { return Ok(Vec::new()) };
    let flex = file.get("config").and_then(|c| c.get("label2id"));
    let Some(ids) = flex.or_else(|| file.get("label2id")).and_then(Value::as_object) else {
        return Ok(Vec::new());
    };
    let by_id: BTreeMap<u64, &String> =
        ids.iter().filter_map(|(name, id)| Some((id.as_u64()?, name))).collect();
    let dense = by_id.len() == ids.len() && by_id.keys().copied().eq(0..ids.len() as u64);
    Ok(if dense { by_id.into_values().cloned().collect() } else { Vec::new() })
}

/// A head's tensors under the names of transformers' class.
///
/// # Errors
/// The package's own head is none that a class of transformers has.
pub(super) fn renamed(dir: &Path, tensors: Vec<TensorView>) -> Result<BTreeMap<String, TensorView>> {
    if !tensors.iter().any(|t| t.name.starts_with(FLEX)) {
        return Ok(tensors.into_iter().map(|t| (t.name.clone(), t)).collect());
    }
    let path = dir.join(HEAD_CONFIG);
    let file = read(dir)?.ok_or_else(|| {
        Error::corrupt(
            dir,
            "has a head of AdapterHub's without its head_config.json: save it again with with_head=True",
        )
    })?;
    let layers = layers(&file).map_err(|what| Error::corrupt(&path, what))?;
    let name = file.get("name").and_then(Value::as_str).unwrap_or_default();
    let prefix = format!("{FLEX}{name}.");
    let mut out = BTreeMap::new();
    for view in tensors {
        let place = view.name.strip_prefix(&prefix).and_then(|rest| rest.split_once('.'));
        let module = place.and_then(|(at, kind)| {
            let (_, module) = layers.iter().find(|(known, _)| at.parse() == Ok(*known))?;
            Some(format!("{module}.{kind}"))
        });
        let module = module.ok_or_else(|| {
            Error::corrupt(&path, format!("describes no layer for {} of model_head.safetensors", view.name))
        })?;
        out.insert(module, view);
    }
    Ok(out)
}

/// Places of the package's layers, and the modules of transformers' class that compute the same.
fn layers(file: &Map<String, Value>) -> std::result::Result<Vec<(usize, &'static str)>, String> {
    let text = |map: &Value, key: &str| map.get(key).and_then(Value::as_str).map(str::to_string);
    let model_type = file.get("model_type").and_then(Value::as_str).unwrap_or("missing");
    let family = known(model_type).ok_or_else(|| {
        let all: Vec<&str> = FAMILIES.iter().map(|f| f.model_type).collect();
        format!("model_type {model_type}: heads are known of {}", all.join(", "))
    })?;
    let head = file.get("config").cloned().unwrap_or_default();
    let kind = text(&head, "head_type").unwrap_or_else(|| "missing".to_string());
    let number = head.get("layers").and_then(Value::as_u64).unwrap_or(0);
    let pooler = head.get("use_pooler").and_then(Value::as_bool).unwrap_or(false);
    let bias = head.get("bias").and_then(Value::as_bool).unwrap_or(true);
    let between = text(&head, "activation_function").unwrap_or_else(|| "none".to_string());
    match (kind.as_str(), number) {
        ("tagging", 1) => return Ok(vec![(1, family.tokens)]),
        ("classification" | "multilabel_classification", 1) => {
            if let Some((name, _)) = family.one.filter(|(_, reads)| (*reads, *reads) == (pooler, bias)) {
                return Ok(vec![(1, name)]);
            }
        }
        ("classification" | "multilabel_classification", 2) if !pooler && bias => {
            if let Some((_, [first, last])) = family.two.filter(|(activation, _)| *activation == between) {
                // dropout, linear, activation, dropout, linear
                return Ok(vec![(1, first), (4, last)]);
            }
        }
        _ => {}
    }
    Err(format!(
        "a head of type {kind} with layers {number}, activation_function {between}, use_pooler {pooler}, bias {bias} is none that transformers has over {model_type}; {}",
        alike(family)
    ))
}

/// What a family's head must be to be read.
fn alike(family: &Family) -> String {
    let mut all = Vec::new();
    if let Some((_, pooler)) = family.one {
        all.push(format!("layers 1, use_pooler {pooler}, bias {pooler}"));
    }
    if let Some((activation, _)) = family.two {
        all.push(format!("layers 2, activation_function {activation}, use_pooler false"));
    }
    format!("one of type classification with {} is, and one of type tagging with layers 1", all.join(" or "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(model_type: &str, head: Value) -> std::result::Result<Vec<(usize, &'static str)>, String> {
        let file = json!({ "model_type": model_type, "config": head });
        layers(file.as_object().unwrap())
    }

    #[test]
    fn heads_that_transformers_has_are_found() {
        let usual = json!({"head_type": "classification", "layers": 2, "activation_function": "tanh", "use_pooler": false, "bias": true});
        assert_eq!(of("bert", usual.clone()).unwrap(), [(1, "bert.pooler.dense"), (4, "classifier")]);
        assert_eq!(
            of("roberta", usual.clone()).unwrap(),
            [(1, "classifier.dense"), (4, "classifier.out_proj")]
        );
        let pooled = json!({"head_type": "classification", "layers": 1, "activation_function": null, "use_pooler": true});
        assert_eq!(of("bert", pooled.clone()).unwrap(), [(1, "classifier")]);
        let error = of("distilbert", usual).unwrap_err();
        assert!(
            error.contains("activation_function tanh") && error.contains("activation_function relu"),
            "{error}"
        );
        assert!(of("roberta", pooled.clone()).is_err());
        assert!(of("llama", pooled).is_err(), "score reads no pooler and has no bias");
        let scores = json!({"head_type": "multilabel_classification", "layers": 1, "bias": false});
        assert_eq!(of("llama", scores).unwrap(), [(1, "score")]);
        let tags = json!({"head_type": "tagging", "layers": 1, "activation_function": "tanh"});
        assert_eq!(of("deberta-v2", tags.clone()).unwrap(), [(1, "classifier")]);
        assert!(of("albert", tags).unwrap_err().contains("deberta-v2"));
        assert!(of("bert", json!(null)).is_err());
    }
}
