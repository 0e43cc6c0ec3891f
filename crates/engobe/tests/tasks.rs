//! Labels from the command line: train, resume, evaluate, predict, embed; and what goes wrong.

mod support;

use engobe_formats::safetensors_file::SafetensorsFile;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use support::{engobe, error, golden, json, with_tokenizer};

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The tiny BERT of `golden/encoders`.
fn model(dir: &Path) -> PathBuf {
    model_of(dir, "bert", "bert", 120)
}

/// A tiny model of `golden/encoders` with a tokenizer.
fn model_of(dir: &Path, encoder: &str, tokenizer: &str, vocab: usize) -> PathBuf {
    let to = dir.join("model");
    with_tokenizer(&format!("encoders/{encoder}"), tokenizer, vocab, &["word_embeddings.weight"], &to);
    to
}

/// Two kinds of texts that a word tells apart.
fn rows(path: &Path, from: usize, to: usize) {
    let row = |i: usize| {
        let (word, label) = if i.is_multiple_of(2) { ("funny", "good") } else { ("mat", "bad") };
        format!("{}\t{label}\n", format!("{word} ").repeat(1 + i / 2))
    };
    let lines: String = (from..to).map(row).collect();
    fs::write(path, format!("sentence\tlabel\n{lines}")).unwrap();
}

fn train(model: &Path, data: &Path, val: &Path, out: &Path, more: &[&str]) -> Vec<String> {
    let (model, data, val, out) = (text(model), text(data), text(val), text(out));
    let base = [
        "train",
        "--model",
        &model,
        "--data",
        &data,
        "--val-data",
        &val,
        "--out",
        &out,
        "--r",
        "4",
        "--batch-size",
        "4",
        "--learning-rate",
        "1e-2",
    ];
    base.iter().chain(more).map(|s| s.to_string()).collect()
}

#[test]
fn a_classifier_from_rows_to_predictions() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (model, data, val) = (model(dir.path()), at("train.tsv"), at("val.tsv"));
    rows(&data, 0, 20);
    rows(&val, 20, 30);
    let best =
        ["--max-steps", "30", "--eval-steps", "10", "--metric-for-best-model", "accuracy", "--load-best"];
    let done = json(&mut engobe(&train(&model, &data, &val, &at("run"), &best)));
    assert_eq!(done["eval_scores"]["accuracy"], 1.0, "{done}");
    let config: Value = serde_json::from_slice(&fs::read(at("run/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["task_type"], &config["modules_to_save"][0]),
        (&"SEQ_CLS".into(), &"classifier".into())
    );
    let labels: Value = serde_json::from_slice(&fs::read(at("run/labels.json")).unwrap()).unwrap();
    assert_eq!(labels["id2label"], serde_json::json!({"0": "bad", "1": "good"}));
    let saved = SafetensorsFile::open(&at("run/adapter_model.safetensors")).unwrap();
    assert!(saved.tensors().any(|t| t.name == "base_model.model.classifier.weight" && t.shape == [2, 32]));
    assert!(
        saved
            .tensors()
            .any(|t| t.name.starts_with("base_model.model.bert.encoder.layer.0.attention.self.query.lora_A"))
    );

    // the same run in two parts
    json(&mut engobe(&train(
        &model,
        &data,
        &val,
        &at("parts"),
        &["--max-steps", "30", "--save-steps", "12"],
    )));
    fs::remove_dir_all(at("parts/checkpoints/step-00000030")).unwrap();
    json(&mut engobe(&train(
        &model,
        &data,
        &val,
        &at("parts"),
        &["--max-steps", "30", "--save-steps", "12", "--resume"],
    )));
    json(&mut engobe(&train(&model, &data, &val, &at("whole"), &["--max-steps", "30"])));
    let weights = |run: &str| fs::read(at(run).join("adapter_model.safetensors")).unwrap();
    assert!(weights("parts") == weights("whole"), "resumed and whole run differ");

    // the adapter knows its task and the names of its classes
    let (m, adapter, v, said) = (text(&model), text(&at("run")), text(&val), text(&at("said.jsonl")));
    let eval = ["eval", "--model", &m, "--adapter", &adapter, "--data", &v, "--predictions", &said];
    let found = json(&mut engobe(&eval));
    assert_eq!(
        (&found["accuracy"], &found["matthews"], &found["f1_macro"]),
        (&1.0.into(), &1.0.into(), &1.0.into())
    );
    assert_eq!((&found["task"], &found["rows"]), (&"seq-cls".into(), &10.into()));
    let lines = fs::read_to_string(&said).unwrap();
    let lines: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 10);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line["row"], i + 2, "the line of the file, its header counted");
        assert_eq!(line["prediction"], if i % 2 == 0 { "good" } else { "bad" });
        let sum = line["scores"]["good"].as_f64().unwrap() + line["scores"]["bad"].as_f64().unwrap();
        assert!((sum - 1.0).abs() < 1e-9);
    }
    let one = [&eval[..], &["--metrics", "matthews"]].concat();
    let one = json(&mut engobe(&one));
    assert!(one["matthews"].is_number() && one.get("accuracy").is_none());

    // rows without labels
    fs::write(at("new.jsonl"), "{\"text\":\"funny\"}\n{\"text\":\"mat\"}\n").unwrap();
    let new = text(&at("new.jsonl"));
    let done =
        engobe(&["eval", "--model", &m, "--adapter", &adapter, "--data", &new, "--predictions", &said])
            .output()
            .unwrap();
    assert!(done.status.success());
    assert_eq!(fs::read_to_string(&said).unwrap().lines().count(), 2);
}

#[test]
fn deberta_from_rows_to_predictions() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (data, val) = (at("train.tsv"), at("val.tsv"));
    let model = model_of(dir.path(), "deberta_v2_conv_task", "deberta", 70);
    rows(&data, 0, 8);
    rows(&val, 8, 12);
    let done = json(&mut engobe(&train(&model, &data, &val, &at("run"), &["--max-steps", "40"])));
    assert_eq!(done["eval_scores"]["accuracy"], 1.0, "{done}");
    let (m, adapter, v) = (text(&model), text(&at("run")), text(&val));
    let found = json(&mut engobe(&["eval", "--model", &m, "--adapter", &adapter, "--data", &v]));
    assert_eq!((&found["accuracy"], &found["task"]), (&1.0.into(), &"seq-cls".into()));
    let saved = SafetensorsFile::open(&at("run/adapter_model.safetensors")).unwrap();
    let name = "base_model.model.deberta.encoder.layer.1.attention.self.value_proj.lora_A.weight";
    assert!(saved.tensors().any(|t| t.name == name));
}

#[test]
fn a_run_is_planned_limited_and_its_rows_checked() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (model, data, val) = (model(dir.path()), at("train.tsv"), at("val.tsv"));
    rows(&data, 0, 20);
    rows(&val, 20, 30);
    let (m, d) = (text(&model), text(&data));
    let planned = json(&mut engobe(&["plan", "--model", &m, "--data", &d, "--r", "4"]));
    let trained = json(&mut engobe(&train(
        &model,
        &data,
        &val,
        &at("limited"),
        &["--max-steps", "2", "--memory-limit", "1GB"],
    )));
    assert_eq!(planned["trainable_parameters"], trained["trainable_parameters"]);
    assert!(planned["has_weights"] == true && planned["peak_bytes"].as_u64().unwrap() > 12_000_000);
    // a configuration alone, for tags
    let config = text(&model.join("config.json"));
    let tags = json(&mut engobe(&["plan", "--model", &config, "--task", "token-cls"]));
    assert_eq!(tags["has_weights"], false);
    let (status, line) =
        error(&mut engobe(&train(&model, &data, &val, &at("small"), &["--memory-limit", "5MB"])));
    assert!(status == 1 && line.contains("memory_limit 5 MB: this run takes"), "{line}");

    let found = json(&mut engobe(&["lint", "--model", &m, "--data", &d]));
    assert_eq!((&found["rows"], &found["label_tokens"]), (&20.into(), &20.into()), "{found}");
    fs::write(at("same.tsv"), "sentence\tlabel\nfunny\tgood\nmat\tgood\n").unwrap();
    let (status, line) = error(&mut engobe(&["lint", "--model", &m, "--data", &text(&at("same.tsv"))]));
    assert!(status == 1 && line.contains("one-class"), "{line}");
}

#[test]
fn tags_and_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = model(dir.path());
    let tagged = |range: std::ops::Range<usize>| -> String {
        let row = |i: usize| {
            let cats = "cat ".repeat(1 + i % 3);
            let tags = "\"O\",".repeat(1 + i % 3);
            let words: Vec<String> = cats.split_whitespace().map(|w| format!("\"{w}\"")).collect();
            format!(
                "{{\"tokens\":[{},\"Jim\",\"Henson\"],\"tags\":[{tags}\"B-PER\",\"I-PER\"],\"id\":{i}}}\n",
                words.join(",")
            )
        };
        range.map(row).collect()
    };
    fs::write(at("train.jsonl"), tagged(0..3)).unwrap();
    fs::write(at("val.jsonl"), tagged(0..3)).unwrap();
    let allow = ["--allow", "val-overlap", "--max-steps", "60"];
    let done = json(&mut engobe(&train(&model, &at("train.jsonl"), &at("val.jsonl"), &at("tags"), &allow)));
    assert_eq!(
        (&done["eval_scores"]["f1"], &done["eval_scores"]["f1_PER"]),
        (&1.0.into(), &1.0.into()),
        "{done}"
    );
    let (m, adapter, v, said) =
        (text(&model), text(&at("tags")), text(&at("val.jsonl")), text(&at("said.jsonl")));
    let eval = ["eval", "--model", &m, "--adapter", &adapter, "--data", &v, "--predictions", &said];
    assert_eq!(json(&mut engobe(&eval))["f1"], 1.0);
    let first: Value =
        serde_json::from_str(fs::read_to_string(&said).unwrap().lines().next().unwrap()).unwrap();
    assert_eq!(first["tags"], serde_json::json!(["O", "B-PER", "I-PER"]));

    let number = |i: usize| {
        let (word, value) = if i.is_multiple_of(2) { ("funny", 1.5) } else { ("mat", -0.5) };
        format!("{}\t{value}\n", format!("{word} ").repeat(1 + i / 2))
    };
    let numbers: String = (0..12).map(number).collect();
    fs::write(at("numbers.tsv"), format!("text\tlabel\n{numbers}")).unwrap();
    let numbers = at("numbers.tsv");
    let more = ["--max-steps", "40", "--allow", "val-overlap", "--metric-for-best-model", "pearson"];
    let done = json(&mut engobe(&train(&model, &numbers, &numbers, &at("numbers"), &more)));
    assert!(done["eval_scores"]["pearson"].as_f64().unwrap() > 0.9, "{done}");
}

#[test]
fn adapter_hub_is_told_of_a_head_and_tells_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (model, data) = (model(dir.path()), at("train.tsv"));
    rows(&data, 0, 8);
    let (m, d, out) = (text(&model), text(&data), text(&at("run")));
    let run =
        ["train", "--model", &m, "--data", &d, "--out", &out, "--method", "bottleneck", "--max-steps", "1"];
    json(&mut engobe(&run));
    let head: Value = serde_json::from_slice(&fs::read(at("run/head_config.json")).unwrap()).unwrap();
    assert_eq!(head["model_class"], "BertForSequenceClassification");
    assert_eq!((&head["model_type"], &head["num_labels"]), (&"bert".into(), &2.into()));
    assert_eq!(head["label2id"], serde_json::json!({"bad": 0, "good": 1}));

    // a head of the package's own model names its classes
    let hub = golden("peft_tasks/bert_flex");
    fs::create_dir(at("hub")).unwrap();
    for file in ["adapter_config.json", "adapter.safetensors", "model_head.safetensors"] {
        fs::copy(hub.join(file), at("hub").join(file)).unwrap();
    }
    let config = fs::read_to_string(hub.join("head_config.json")).unwrap();
    let config = config.replace("LABEL_0", "a").replace("LABEL_1", "b").replace("LABEL_2", "c");
    fs::write(at("hub/head_config.json"), &config).unwrap();
    fs::write(at("new.jsonl"), "{\"text\":\"funny\"}\n").unwrap();
    let (adapter, new, said) = (text(&at("hub")), text(&at("new.jsonl")), text(&at("said.jsonl")));
    let eval = ["eval", "--model", &m, "--adapter", &adapter, "--task", "seq-cls", "--data", &new];
    let eval = [&eval[..], &["--predictions", &said]].concat();
    assert!(engobe(&eval).output().unwrap().status.success());
    let line: Value = serde_json::from_str(&fs::read_to_string(&said).unwrap()).unwrap();
    let names: Vec<&String> = line["scores"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["a", "b", "c"]);
    // one that no class of transformers has
    fs::write(at("hub/head_config.json"), config.replace("tanh", "relu")).unwrap();
    let (status, line) = error(&mut engobe(&eval));
    assert!(
        status == 1 && line.contains("head_config.json") && line.contains("activation_function relu"),
        "{line}"
    );
    fs::remove_file(at("hub/head_config.json")).unwrap();
    let (status, line) = error(&mut engobe(&eval));
    assert!(status == 1 && line.contains("without its head_config.json"), "{line}");
}

#[test]
fn embeddings_are_means_of_unit_length() {
    let dir = tempfile::tempdir().unwrap();
    let model = text(&model(dir.path()));
    let out = text(&dir.path().join("v.jsonl"));
    let args = [
        "embed",
        "--model",
        &model,
        "--text",
        "the cat",
        "--text",
        "the cat",
        "--text",
        "a dog",
        "--normalize",
        "true",
        "--out",
        &out,
    ];
    let done = json(&mut engobe(&args));
    assert_eq!(
        (&done["rows"], &done["dimensions"], &done["pooling"]),
        (&3.into(), &32.into(), &"mean".into())
    );
    let lines = fs::read_to_string(&out).unwrap();
    let vectors: Vec<Vec<f64>> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(vectors[0], vectors[1]);
    assert_ne!(vectors[0], vectors[2]);
    assert!(vectors.iter().all(|v| (v.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-6));
}

#[test]
fn mistakes_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = model(dir.path());
    rows(&at("train.tsv"), 0, 8);
    fs::write(at("maybe.tsv"), "sentence\tlabel\nfunny\tmaybe\n").unwrap();
    fs::write(at("same.tsv"), "sentence\tlabel\nfunny\tgood\nmat\tgood\n").unwrap();
    fs::write(at("plain.jsonl"), "{\"prompt\":\"a\",\"completion\":\"b\"}\n").unwrap();
    let mut n = 0;
    let mut fails = |data: &str, val: &str, more: &[&str], status: i32, part: &str| {
        n += 1;
        let out = at(&format!("out{n}"));
        let (found, line) = error(&mut engobe(&train(&model, &at(data), &at(val), &out, more)));
        assert!(found == status && line.contains(part), "{found} {line}");
    };
    fails(
        "train.tsv",
        "maybe.tsv",
        &[],
        1,
        "maybe.tsv line 2: label maybe is none of the 2 classes bad, good",
    );
    fails("same.tsv", "same.tsv", &[], 1, "one-class: every label is \"good\"");
    fails("train.tsv", "train.tsv", &["--task", "seqcls"], 2, "task \"seqcls\" is not one of");
    fails("train.tsv", "train.tsv", &["--task", "token-cls"], 1, "needs");
    fails("plain.jsonl", "plain.jsonl", &[], 1, "give --task");
    fails(
        "train.tsv",
        "train.tsv",
        &["--metric-for-best-model", "bleu", "--allow", "val-overlap"],
        1,
        "accuracy, matthews",
    );
    fails("train.tsv", "train.tsv", &["--task", "embedding"], 2, "engobe embed");
    let (m, data) = (text(&model), text(&at("train.tsv")));
    let (status, line) = error(&mut engobe(&["eval", "--model", &m, "--data", &data, "--metrics", "bleu"]));
    assert!(status == 2 && line.contains("has loss, accuracy"), "{line}");
    let (status, line) = error(&mut engobe(&["embed", "--model", &m]));
    assert!(status == 2 && line.contains("--text"), "{line}");
}
