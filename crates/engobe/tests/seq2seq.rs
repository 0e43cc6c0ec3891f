//! Texts out of texts from the command line: train, resume, evaluate, predict, generate, plan; and what goes wrong.

mod support;

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use support::{engobe, error, json, with_tokenizer};

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The tiny T5 v1.1 of `golden/t5` with a tokenizer.
fn model(dir: &Path) -> PathBuf {
    let to = dir.join("model");
    with_tokenizer("t5/v11", "t5", 68, &["shared.weight", "lm_head.weight"], &to);
    to
}

/// Sources whose words say what the target is.
fn rows(path: &Path, from: usize, to: usize) {
    let row = |i: usize| {
        let (word, target) = if i.is_multiple_of(2) { ("funny", "the sun") } else { ("mat", "a dog") };
        format!("{{\"source\":\"{}\",\"target\":\"{target}\"}}\n", [word].repeat(1 + i / 2).join(" "))
    };
    fs::write(path, (from..to).map(row).collect::<String>()).unwrap();
}

fn train(model: &Path, data: &Path, out: &Path, more: &[&str]) -> Vec<String> {
    let (model, data, out) = (text(model), text(data), text(out));
    let base = ["train", "--model", &model, "--data", &data, "--out", &out, "--batch-size", "4"];
    base.iter().chain(more).map(|s| s.to_string()).collect()
}

const LORA: [&str; 6] = ["--r", "8", "--learning-rate", "2e-2", "--max-steps", "80"];

#[test]
fn an_encoder_decoder_from_rows_to_texts() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (model, data, val) = (model(dir.path()), at("train.jsonl"), at("val.jsonl"));
    rows(&data, 0, 16);
    rows(&val, 16, 24);
    let v = text(&val);
    let with_val = [&LORA[..], &["--val-data", &v, "--eval-steps", "40", "--load-best"]].concat();
    let done = json(&mut engobe(&train(&model, &data, &at("run"), &with_val)));
    // the norm before the frozen head and the head's rows bound how sure the model can be: it ends at 0.38
    assert!(done["best_eval_loss"].as_f64().unwrap() < 0.4, "{done}");
    let config: Value = serde_json::from_slice(&fs::read(at("run/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["task_type"], "SEQ_2_SEQ_LM");
    assert!(!at("run/labels.json").exists());

    // rows that training did not see
    let (m, adapter, said) = (text(&model), text(&at("run")), text(&at("said.jsonl")));
    let eval = ["eval", "--model", &m, "--adapter", &adapter, "--data", &v];
    let more = ["--metrics", "exact_match,rouge_l,bleu", "--predictions", &said, "--max-new-tokens", "12"];
    let found = json(&mut engobe(&[&eval[..], &more].concat()));
    assert_eq!((&found["exact_match"], &found["rouge_l"]), (&1.0.into(), &1.0.into()), "{found}");
    assert!(found["token_accuracy"] == 1.0 && found["rows"] == 8 && found["bleu"].is_number(), "{found}");
    let lines = fs::read_to_string(&said).unwrap();
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(first, serde_json::json!({"completion": "the sun", "prediction": "the sun"}));
    let base = json(&mut engobe(&["eval", "--model", &m, "--data", &v, "--exact-match"]));
    assert_eq!(base["exact_match"], 0.0);

    // sources alone
    fs::write(at("new.jsonl"), "{\"text\":\"mat mat\"}\n{\"text\":\"funny\"}\n").unwrap();
    let new = text(&at("new.jsonl"));
    let only = ["eval", "--model", &m, "--adapter", &adapter, "--data", &new, "--predictions", &said];
    assert!(engobe(&only).output().unwrap().status.success());
    let lines = fs::read_to_string(&said).unwrap();
    let said: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(said[0], serde_json::json!({"completion": null, "prediction": "a dog"}));
    assert_eq!(said[1]["prediction"], "the sun");

    let generate = ["generate", "--model", &m, "--adapter", &adapter, "--prompt", "mat mat mat"];
    let answer = json(&mut engobe(&generate));
    assert_eq!((&answer["text"], &answer["finish_reason"]), (&"a dog".into(), &"end_token".into()));
    let drawn = [&generate[..], &["--temperature", "5", "--seed", "7", "--max-new-tokens", "9"]].concat();
    let drawn = json(&mut engobe(&drawn));
    assert_ne!(drawn["text"], "a dog", "drawn at a high temperature");
}

#[test]
fn a_run_in_two_parts_ends_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (model, data) = (model(dir.path()), at("train.jsonl"));
    rows(&data, 0, 12);
    let steps = ["--max-steps", "20", "--save-steps", "8"];
    json(&mut engobe(&train(&model, &data, &at("parts"), &steps)));
    fs::remove_dir_all(at("parts/checkpoints/step-00000020")).unwrap();
    json(&mut engobe(&train(&model, &data, &at("parts"), &[&steps[..], &["--resume"]].concat())));
    json(&mut engobe(&train(&model, &data, &at("whole"), &steps[..2])));
    let weights = |run: &str| fs::read(at(run).join("adapter_model.safetensors")).unwrap();
    assert!(weights("parts") == weights("whole"), "resumed and whole run differ");
}

/// Every method that trains without a head: its loss falls, its file is read again, and `generate` says what `eval` does.
#[test]
fn methods_train_and_are_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (model, data) = (model(dir.path()), at("train.jsonl"));
    rows(&data, 0, 8);
    let (m, d) = (text(&model), text(&data));
    let base = json(&mut engobe(&["eval", "--model", &m, "--data", &d]));
    let methods: [&[&str]; 12] = [
        &["bottleneck", "--reduction-factor", "4", "--learning-rate", "1e-2"],
        &["lora", "--use-dora", "--learning-rate", "1e-2"],
        &["qlora", "--learning-rate", "1e-2"],
        &["adalora", "--learning-rate", "3e-2"],
        &["vera", "--learning-rate", "3e-2"],
        &["miss", "--r", "8", "--learning-rate", "1e-3"],
        &["ln-tuning", "--learning-rate", "1e-2"],
        &["trainable-tokens", "--token-indices", "3,4,5,6,7,8,9", "--learning-rate", "3e-2"],
        &["p-tuning", "--num-virtual-tokens", "4", "--learning-rate", "1e-2"],
        &["prefix-tuning", "--num-virtual-tokens", "4", "--learning-rate", "0.1"],
        &["ia3", "--target-modules", "k,v,wo", "--feedforward-modules", "wo"],
        &["prompt-tuning", "--num-virtual-tokens", "4"],
    ];
    for method in methods {
        let out = at(method[0]);
        let more = [&["--max-steps", "20", "--method"], method].concat();
        json(&mut engobe(&train(&model, &data, &out, &more)));
        let found = json(&mut engobe(&["eval", "--model", &m, "--data", &d, "--adapter", &text(&out)]));
        let (before, after) = (base["loss"].as_f64().unwrap(), found["loss"].as_f64().unwrap());
        assert!(after < 0.95 * before, "{}: {before} {after}", method[0]);
        let said = at("said.jsonl");
        let predict = ["eval", "--model", &m, "--data", &d, "--adapter", &text(&out), "--predictions"];
        let more = [&text(&said), "--max-new-tokens", "6", "--exact-activations"];
        json(&mut engobe(&[&predict[..], &more].concat()));
        let first: Value =
            serde_json::from_str(fs::read_to_string(&said).unwrap().lines().next().unwrap()).unwrap();
        let generate = ["generate", "--model", &m, "--adapter", &text(&out), "--prompt", "funny"];
        let answer = json(&mut engobe(&[&generate[..], &more[1..]].concat()));
        assert_eq!(answer["text"], first["prediction"], "{}", method[0]);
    }
}

/// Alpaca's rows and those of summaries are sources and targets too, and a score's name may be spelled as elsewhere.
#[test]
fn other_columns_and_other_spellings() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = model(dir.path());
    // ids of the same source and target
    let tokenizer = engobe_data::TextTokenizer::from_hf_dir(&model).unwrap();
    let [source, target] = ["funny\n\nmat", "the sun"].map(|text| tokenizer.encode(text, true).unwrap());
    let ids = serde_json::json!({"input_ids": source, "labels": target}).to_string();
    let files = [
        ("ids.jsonl", ids.as_str()),
        ("pair.jsonl", r#"{"source":"funny\n\nmat","target":"the sun"}"#),
        ("alpaca.jsonl", r#"{"instruction":"funny","input":"mat","output":"the sun"}"#),
        ("summary.jsonl", r#"{"article":"funny\n\nmat","highlights":"the sun"}"#),
    ];
    let eval = |name: &str| {
        let (m, data) = (text(&model), text(&at(name)));
        json(&mut engobe(&["eval", "--model", &m, "--data", &data, "--metrics", "rougeL,exact-match"]))
    };
    let found = files.map(|(name, row)| {
        fs::write(at(name), row).unwrap();
        eval(name)
    });
    assert!(found[0]["rouge_l"].is_number() && found[0]["exact_match"].is_number(), "{}", found[0]);
    for (other, (name, _)) in found.iter().zip(files) {
        assert_eq!((&other["loss"], &other["rouge_l"]), (&found[0]["loss"], &found[0]["rouge_l"]), "{name}");
    }
}

/// Lester et al. (2021): five tokens before the sources of T5-XXL are 20,480 parameters.
#[test]
fn a_plan_needs_no_weights() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let config = r#"{"model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240,
        "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false,
        "torch_dtype": "bfloat16"}"#;
    fs::write(&path, config).unwrap();
    let plan = ["plan", "--model", &text(&path), "--method"].map(str::to_string);
    let of = |more: &[&str]| {
        let args: Vec<String> = plan.iter().cloned().chain(more.iter().map(|s| s.to_string())).collect();
        json(&mut engobe(&args))
    };
    let prompt = of(&["prompt-tuning", "--num-virtual-tokens", "5"]);
    assert_eq!(prompt["trainable_parameters"], 20_480);
    // 11,135,332,352 are transformers' own count
    assert_eq!(prompt["all_parameters"], 11_135_332_352u64 + 20_480);
    // q and v of 24 encoder blocks with one attention and 24 decoder blocks with two, (4096 + 4096)·16 each
    let lora = of(&["lora", "--r", "16", "--target-modules", "q,v"]);
    assert_eq!(lora["trainable_parameters"], 2 * 72 * 16 * 8192);
}

#[test]
fn mistakes_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = model(dir.path());
    rows(&at("train.jsonl"), 0, 8);
    fs::write(at("labels.tsv"), "sentence\tlabel\nfunny\tmaybe\n").unwrap();
    let (m, data) = (text(&model), text(&at("train.jsonl")));
    let fails = |args: &[&str], status: i32, part: &str| {
        let (found, line) = error(&mut engobe(args));
        assert!(found == status && line.contains(part), "{found} {line}");
    };
    let (labels, out) = (text(&at("labels.tsv")), text(&at("out")));
    fs::write(
        at("chat.jsonl"),
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
    )
    .unwrap();
    let chat = text(&at("chat.jsonl"));
    fails(&["train", "--model", &m, "--data", &chat, "--out", &out], 1, "instruction and output");
    let compared = ["compare", "--model", &m, "--methods", "lora", "--data", &data, "--test-data", &data];
    fails(&[&compared[..], &["--max-steps", "1", "--out", &out]].concat(), 1, "is an encoder-decoder");
    let vectors = ["embed", "--model", &m, "--data", &data, "--out", &out];
    fails(&vectors, 1, "is an encoder-decoder");
    let prefix = ["--method", "prefix-tuning", "--prefix-init-text", "a"];
    let prefix = [&["train", "--model", &m, "--data", &data, "--out", &out][..], &prefix].concat();
    fails(&prefix, 1, "prefix_init_text: keys and values of an encoder-decoder's decoder");
    fails(&["train", "--model", &m, "--data", &labels, "--out", &out], 1, "needs columns source and target");
    fs::rename(at("model/tokenizer.json"), at("kept")).unwrap();
    fs::write(at("model/spiece.model"), "").unwrap();
    fails(&["eval", "--model", &m, "--data", &data], 1, "save_pretrained(DIR) writes it");
    fails(&["generate", "--model", &m, "--prompt", "a"], 1, "has spiece.model but no tokenizer.json");
    fs::rename(at("kept"), at("model/tokenizer.json")).unwrap();
    fails(&["eval", "--model", &m, "--data", &data, "--metrics", "accuracy"], 2, "for texts out of texts");
    fails(&["generate", "--model", &m, "--chat", "--prompt", "a"], 2, "holds no dialogue");
    fails(&["generate", "--model", &m, "--prompt-ids", "99"], 1, "beyond the model's vocabulary of 68");
    fails(
        &["train", "--model", &m, "--data", &data, "--out", &text(&at("b")), "--task", "causal-lm"],
        1,
        "t5",
    );
}
