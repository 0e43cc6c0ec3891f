//! `merge`, `inspect --model`, `plan` and `lint` of models with a task's head and of encoder-decoders: what is merged says
//! what the model said with its adapter.

mod support;

use engobe_formats::safetensors_file::SafetensorsFile;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use support::{engobe, error, json, with_tokenizer};

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

/// A model, its rows, and what it is trained for.
struct Case {
    base: &'static str,
    tokenizer: &'static str,
    vocab: usize,
    grown: &'static [&'static str],
    rows: fn(usize) -> Value,
    /// flags of training
    flags: &'static [&'static str],
    /// the class in the merged configuration
    class: &'static str,
}

fn word(i: usize) -> (&'static str, usize) {
    let (word, class) = if i.is_multiple_of(2) { ("funny", 0) } else { ("mat", 1) };
    (word, class)
}

fn classes(i: usize) -> Value {
    let (word, class) = word(i);
    json!({ "text": format!("{word} ").repeat(1 + i), "label": (["fine", "poor"][class]) })
}

fn numbers(i: usize) -> Value {
    let (word, class) = word(i);
    json!({ "text": format!("{word} ").repeat(1 + i), "label": 0.5 + class as f64 })
}

fn tags(i: usize) -> Value {
    let cats = 1 + i % 3;
    let tokens: Vec<&str> = std::iter::repeat_n("cat", cats).chain(["jim"]).collect();
    let tags: Vec<&str> = std::iter::repeat_n("O", cats).chain(["B-PER"]).collect();
    json!({ "tokens": tokens, "tags": tags })
}

fn texts(i: usize) -> Value {
    let (word, class) = word(i);
    json!({ "source": ([word].repeat(1 + i).join(" ")), "target": (["the sun", "a dog"][class]) })
}

const WORDS: &[&str] = &["word_embeddings.weight"];
const CASES: &[Case] = &[
    Case {
        base: "encoders/bert",
        tokenizer: "bert",
        vocab: 120,
        grown: WORDS,
        rows: classes,
        flags: &["--target-modules", "all-linear"],
        class: "BertForSequenceClassification",
    },
    Case {
        base: "encoders/deberta_v2_conv_task",
        tokenizer: "deberta",
        vocab: 70,
        grown: WORDS,
        rows: tags,
        flags: &["--task", "token-cls"],
        class: "DebertaV2ForTokenClassification",
    },
    Case {
        base: "encoders/bert",
        tokenizer: "bert",
        vocab: 120,
        grown: WORDS,
        rows: numbers,
        flags: &["--method", "ia3"],
        class: "BertForSequenceClassification",
    },
    Case {
        base: "llama/gqa_tied",
        tokenizer: "roberta",
        vocab: 320,
        grown: &["embed_tokens.weight"],
        rows: classes,
        flags: &["--task", "seq-cls"],
        class: "LlamaForSequenceClassification",
    },
    Case {
        base: "t5/v11",
        tokenizer: "t5",
        vocab: 68,
        grown: &["shared.weight", "lm_head.weight"],
        rows: texts,
        flags: &["--target-modules", "q,v,wo"],
        class: "T5ForConditionalGeneration",
    },
];

impl Case {
    fn model(&self, dir: &Path) -> PathBuf {
        let to = dir.join("model");
        with_tokenizer(self.base, self.tokenizer, self.vocab, self.grown, &to);
        to
    }

    fn data(&self, path: &Path) {
        fs::write(path, (0..8).map(|i| format!("{}\n", (self.rows)(i))).collect::<String>()).unwrap();
    }

    /// Trains it; the adapter lies in `run`.
    fn train(&self, dir: &Path) -> Value {
        let at = |name: &str| text(&dir.join(name));
        let (model, data, out) = (at("model"), at("rows.jsonl"), at("run"));
        let all = ["train", "--model", &model, "--data", &data, "--out", &out, "--batch-size", "4"];
        json(&mut engobe(&[&all[..], &["--max-steps", "12", "--learning-rate", "2e-2"], self.flags].concat()))
    }
}

#[test]
fn what_is_merged_says_what_the_adapter_said() {
    for case in CASES {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| text(&dir.path().join(name));
        let model = case.model(dir.path());
        case.data(&dir.path().join("rows.jsonl"));
        let trained = case.train(dir.path());
        let (m, run, data, merged) = (text(&model), at("run"), at("rows.jsonl"), at("merged"));
        let looked = json(&mut engobe(&["inspect", &run, "--model", &m]));
        assert_eq!(
            looked["config"]["trainable_parameters"], trained["trainable_parameters"],
            "{}",
            case.base
        );

        let asked = ["merge", "--model", &m, "--adapter", &run, "--out", &merged, "--dtype", "f32"];
        let done = json(&mut engobe(&asked));
        assert!(done["changed"].as_u64().unwrap() >= 3, "{}: {done}", case.base);
        let before = json(&mut engobe(&["eval", "--model", &m, "--adapter", &run, "--data", &data]));
        let bare =
            json(&mut engobe(&["eval", "--model", &m, "--data", &data, "--task", task(&before, case)]));
        // the merged model says itself what it is for
        let after = json(&mut engobe(&["eval", "--model", &merged, "--data", &data]));
        let losses = [&before, &after, &bare].map(|found| found["loss"].as_f64().unwrap());
        // sums in another order
        assert!((losses[0] - losses[1]).abs() < 2e-5 * losses[0].max(1.0), "{}: {losses:?}", case.base);
        assert!((losses[0] - losses[2]).abs() > 1e-2, "{}: the adapter does nothing: {losses:?}", case.base);
        assert_eq!(before["task"], after["task"], "{}", case.base);

        let config = config(Path::new(&merged));
        assert_eq!(config["architectures"], json!([case.class]), "{}", case.base);
        if before["task"] == "seq-cls" {
            assert_eq!(config["id2label"], json!({ "0": "fine", "1": "poor" }), "{}", case.base);
            assert_eq!(config["label2id"], json!({ "fine": 0, "poor": 1 }), "{}", case.base);
            // transformers takes a head of several classes for one of single labels
            assert!(config["problem_type"].is_null(), "{}", case.base);
        }
        match after["task"].as_str() {
            Some("regression") => {
                assert_eq!(config["problem_type"], "regression");
                assert_eq!(config["id2label"], json!({ "0": "LABEL_0" }));
            }
            Some("token-cls") => assert_eq!(config["id2label"], json!({ "0": "B-PER", "1": "O" })),
            _ => {}
        }
    }
}

fn task<'a>(found: &'a Value, case: &Case) -> &'a str {
    match found["task"].as_str() {
        Some(task) => task,
        None => {
            assert!(case.base.starts_with("t5"), "{}", case.base);
            "seq2seq-lm"
        }
    }
}

/// PEFT keeps no labels: what a head's logits mean is said by the base, or by how many there are.
#[test]
fn an_adapter_of_pefts_says_what_it_is_for() {
    let merged = |case: &Case, problem: Option<&str>| {
        let dir = tempfile::tempdir().unwrap();
        let model = case.model(dir.path());
        case.data(&dir.path().join("rows.jsonl"));
        case.train(dir.path());
        fs::remove_file(dir.path().join("run/labels.json")).unwrap();
        let mut base = config(&model);
        base["problem_type"] = json!(problem);
        fs::write(model.join("config.json"), base.to_string()).unwrap();
        let [m, run, merged] = ["model", "run", "merged"].map(|name| text(&dir.path().join(name)));
        json(&mut engobe(&["merge", "--model", &m, "--adapter", &run, "--out", &merged]));
        config(Path::new(&merged))
    };
    assert_eq!(merged(&CASES[2], None)["problem_type"], "regression", "a head of one");
    let several = "multi_label_classification";
    assert_eq!(merged(&CASES[0], Some(several))["problem_type"], several, "as the base says");
    assert!(merged(&CASES[0], None)["problem_type"].is_null(), "nobody says it");
    assert_eq!(
        merged(&CASES[0], Some("regression"))["problem_type"],
        "single_label_classification",
        "a head of two"
    );
}

/// The convolution, which nothing adapts, is in the merged file as it was.
#[test]
fn what_no_module_holds_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let case = &CASES[1];
    let model = case.model(dir.path());
    case.data(&dir.path().join("rows.jsonl"));
    case.train(dir.path());
    let [m, run, merged] = ["model", "run", "merged"].map(|name| text(&dir.path().join(name)));
    json(&mut engobe(&["merge", "--model", &m, "--adapter", &run, "--out", &merged]));
    let tensors = |dir: &Path| {
        let file = SafetensorsFile::open(&dir.join("model.safetensors")).unwrap();
        let conv = |t: &engobe_formats::tensor::TensorView| t.name.contains(".conv.conv.");
        let mut found: Vec<(String, Vec<usize>, Vec<u8>)> = file
            .tensors()
            .filter(|t| conv(t))
            .map(|t| (t.name.clone(), t.shape.clone(), t.bytes().to_vec()))
            .collect();
        found.sort();
        found
    };
    let (base, written) = (tensors(&model), tensors(Path::new(&merged)));
    assert_eq!(base.len(), 2);
    assert!(base == written, "the convolution differs");
}

#[test]
fn gguf_holds_next_tokens_alone() {
    let dir = tempfile::tempdir().unwrap();
    let case = &CASES[3];
    let model = case.model(dir.path());
    case.data(&dir.path().join("rows.jsonl"));
    case.train(dir.path());
    let (m, run, out) = (text(&model), text(&dir.path().join("run")), text(&dir.path().join("merged.gguf")));
    let merge = |out: &str, more: &[&str]| {
        let args = ["merge", "--model", &m, "--adapter", &run, "--out", out];
        error(&mut engobe(&[&args[..], more].concat()))
    };
    let (status, line) = merge(&out, &[]);
    assert!(status == 1 && line.contains("trained for the task seq-cls"), "{line}");
    let (status, line) = merge(&text(&dir.path().join("merged")), &["--verify"]);
    assert!(status == 2 && line.contains("--verify compares next tokens"), "{line}");
    assert!(!dir.path().join("merged").exists() && !dir.path().join("merged.gguf").exists());
}

/// A head stands on a GGUF file's decoder as on a directory's, whose weights it holds.
#[test]
fn heads_stand_on_gguf_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&dir.path().join(name));
    let case = &CASES[3];
    case.model(dir.path());
    case.data(&dir.path().join("rows.jsonl"));
    let (m, gguf, data) = (at("model"), at("model.gguf"), at("rows.jsonl"));
    json(&mut engobe(&["convert", "--to", "gguf", "--model", &m, "--type", "f32", "--out", &gguf]));
    let trained = |model: &str, out: &str| {
        let args = ["train", "--model", model, "--data", &data, "--out", out, "--max-steps", "12"];
        json(&mut engobe(&[&args[..], case.flags, &["--learning-rate", "2e-2"]].concat()));
        let eval = |more: &[&str]| json(&mut engobe(&[&["eval", "--data", &data], more].concat()));
        let merged = format!("{out}-merged");
        json(&mut engobe(&["merge", "--model", model, "--adapter", out, "--out", &merged]));
        let found = eval(&["--model", model, "--adapter", out]);
        assert_eq!(found["task"], "seq-cls");
        [found, eval(&["--model", &merged])].map(|found| found["loss"].as_f64().unwrap())
    };
    let (plain, over_gguf) = (trained(&m, &at("run")), trained(&gguf, &at("over-gguf")));
    // queries and keys lie in another order in GGUF files, so sums differ by their rounding
    for (a, b) in [(plain[0], over_gguf[0]), (plain[0], plain[1]), (plain[0], over_gguf[1])] {
        assert!((a - b).abs() < 1e-4 * a.max(0.1), "{plain:?} {over_gguf:?}");
    }
    let planned = json(&mut engobe(&[&["plan", "--model", &gguf, "--data", &data], case.flags].concat()));
    assert!(planned["trainable_parameters"].as_u64().unwrap() > 0 && planned["has_weights"] == true);
}

/// A head on a decoder is planned with the parameters that are trained, refused where it can't fit, and its rows are checked.
#[test]
fn heads_on_decoders_and_encoder_decoders_are_planned_or_refused() {
    for case in [&CASES[3], &CASES[4]] {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| text(&dir.path().join(name));
        case.model(dir.path());
        case.data(&dir.path().join("rows.jsonl"));
        let (m, data) = (at("model"), at("rows.jsonl"));
        let settings = ["--model", &m, "--data", &data, "--memory-limit", "1GB"];
        let planned = json(&mut engobe(&[&["plan"], &settings[..], case.flags].concat()));
        let out = at("limited");
        let run = [&["train", "--out", &out, "--max-steps", "2"], &settings[..], case.flags].concat();
        let trained = json(&mut engobe(&run));
        assert_eq!(planned["trainable_parameters"], trained["trainable_parameters"], "{}", case.base);
        let out = at("small");
        let tight = ["--model", &m, "--data", &data, "--memory-limit", "5MB", "--out", &out];
        let (status, line) = error(&mut engobe(&[&["train"], &tight[..], case.flags].concat()));
        assert!(status == 1 && line.contains("memory_limit 5 MB: this run takes"), "{line}");
        let task: &[&str] = if case.flags[0] == "--task" { case.flags } else { &[] };
        let found = json(&mut engobe(&[&["lint", "--model", &m, "--data", &data], task].concat()));
        assert_eq!((&found["rows"], &found["errors"]), (&8.into(), &json!([])), "{}: {found}", case.base);
    }
}
