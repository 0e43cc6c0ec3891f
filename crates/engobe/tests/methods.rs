//! Every method on the way of a user, and several of them compared.

mod support;

use std::fs;
use std::path::Path;
use support::{engobe, error, golden, json};

const METHODS: [&str; 5] = ["lora", "prompt-tuning", "p-tuning", "prefix-tuning", "bottleneck"];

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn model() -> String {
    text(&golden("llama/gqa_tied"))
}

/// A command over the tiny model and its rows.
fn with_rows(command: &str, out: &Path, more: &[&str]) -> Vec<String> {
    let data = text(&golden("peft/rows.jsonl"));
    let (model, out) = (model(), text(out));
    let base = [command, "--model", &model, "--data", &data, "--val-split", "0.2", "--out", &out];
    let run = ["--max-steps", "3", "--allow", "eot-never-label"];
    base.iter().chain(&run).chain(more).map(|s| (*s).to_string()).collect()
}

#[test]
fn each_trains_evaluates_generates_and_is_planned_for() {
    let dir = tempfile::tempdir().unwrap();
    for method in METHODS {
        let out = dir.path().join(method);
        let plan = json(&mut engobe(&["plan", "--model", &model(), "--method", method]));
        let run = json(&mut engobe(&with_rows("train", &out, &["--method", method])));
        assert_eq!(plan["trainable_parameters"], run["trainable_parameters"], "{method}");
        let (model, adapter) = (model(), text(&out));
        let seen = json(&mut engobe(&["inspect", &adapter]));
        assert!(seen["parameters"].as_u64().unwrap() > 0, "{method}: {seen}");
        let prompt = ["generate", "--model", &model, "--adapter", &adapter, "--prompt-ids", "1,5,9"];
        let said = json(engobe(&prompt).args(["--max-new-tokens", "4"]));
        assert!(!said["token_ids"].as_array().unwrap().is_empty(), "{method}: {said}");
        let merged = text(&dir.path().join(format!("{method} merged")));
        let mut merge = engobe(&["merge", "--model", &model, "--adapter", &adapter, "--out", &merged]);
        match method {
            "lora" => drop(json(&mut merge)),
            _ => assert!(error(&mut merge).1.contains("can't be merged"), "{method}"),
        }
        // going on from it, by the same method and by another
        let init = ["--init-adapter", &adapter];
        let again = dir.path().join(format!("{method} again"));
        json(&mut engobe(&with_rows("train", &again, &init)));
        let other = if method == "lora" { "prompt-tuning" } else { "lora" };
        let wrong = [&init[..], &["--method", other]].concat();
        let said = error(&mut engobe(&with_rows("train", &dir.path().join("other"), &wrong))).1;
        assert!(said.contains("contradicts") && said.contains(method), "{said}");
        fs::remove_dir_all(dir.path().join("other")).ok();
    }
}

/// What a method cannot do without.
fn needed(method: &str) -> &'static [&'static str] {
    match method {
        "trainable-tokens" => &["--token-indices", "1,2,3"],
        // its rank is at most a layer's width
        "miss" => &["--r", "8"],
        _ => &[],
    }
}

/// Files of a run that say what it came to.
fn outcome(out: &Path) -> Vec<Vec<u8>> {
    let file = ["adapter_model.safetensors", "adapter.safetensors"].map(|name| out.join(name));
    let adapter = file.iter().find(|f| f.exists()).expect("the adapter's file");
    [adapter, &out.join("checkpoints/step-00000003/adapter.safetensors")]
        .map(|f| fs::read(f).unwrap_or_else(|e| panic!("{}: {e}", f.display())))
        .into()
}

/// Every method in the table of methods over a directory, a GGUF file and a quantized base: a run that is cut off and
/// resumed ends in the same bits; its adapter is inspected, evaluated to the loss of its run, generates, and is merged
/// into a model of the same loss or refused with the reason.
#[test]
fn every_method_does_everything_over_every_kind_of_base() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&dir.path().join(name));
    let (plain, rows) = (text(&golden("llama/head_dim_bias")), text(&golden("peft/rows.jsonl")));
    let lines: Vec<String> = fs::read_to_string(&rows).unwrap().lines().map(str::to_string).collect();
    let (data, val) = (at("train.jsonl"), at("val.jsonl"));
    fs::write(&data, lines[4..].join("\n")).unwrap();
    fs::write(&val, lines[..4].join("\n")).unwrap();
    let (gguf, nf4) = (at("model.gguf"), at("nf4"));
    json(&mut engobe(&["convert", "--to", "gguf", "--model", &plain, "--type", "q8_0", "--out", &gguf]));
    json(&mut engobe(&["quantize", "--model", &plain, "--to", "nf4", "--double-quant", "--out", &nf4]));
    let methods = json(&mut engobe(&["methods"]));
    let methods = methods.as_array().unwrap();
    assert!(methods.len() >= 12, "{methods:?}");
    for method in methods.iter().map(|m| m["name"].as_str().unwrap()) {
        for base in [&plain, &gguf, &nf4] {
            let what = format!("{method} over {base}");
            let out = at("run");
            let run = ["train", "--model", base, "--method", method, "--data", &data, "--val-data", &val];
            let how = ["--max-steps", "3", "--save-steps", "2", "--out", &out, "--allow", "eot-never-label"];
            let run = [&run[..], &how, needed(method)].concat();
            let whole = json(&mut engobe(&run));
            let planned = json(&mut engobe(
                &[&["plan", "--model", base, "--method", method][..], needed(method)].concat(),
            ));
            assert_eq!(planned["trainable_parameters"], whole["trainable_parameters"], "{what}");
            let came_to = outcome(Path::new(&out));
            // as if it had been killed after the second step
            fs::remove_dir_all(Path::new(&out).join("checkpoints/step-00000003")).unwrap();
            for file in ["adapter_model.safetensors", "adapter.safetensors"] {
                fs::remove_file(Path::new(&out).join(file)).ok();
            }
            let resumed = json(&mut engobe(&[&run[..], &["--resume"]].concat()));
            assert!(outcome(Path::new(&out)) == came_to, "{what}: other bits after resuming");
            assert_eq!(resumed["best_eval_loss"], whole["best_eval_loss"], "{what}");
            let seen = json(&mut engobe(&["inspect", &out]));
            assert!(seen["parameters"].as_u64().unwrap() > 0, "{what}: {seen}");
            assert!(seen["kind"].as_str().unwrap().ends_with("adapter"), "{what}: {seen}");
            let loss = |more: &[&str]| {
                let found = json(&mut engobe(&[&["eval", "--data", &val][..], more].concat()));
                found["loss"].as_f64().unwrap()
            };
            let with = ["--model", base, "--adapter", &out];
            let (last, found) = (last_eval_loss(Path::new(&out)), loss(&with));
            assert!((found / last - 1.0).abs() < 1e-5, "{what}: eval says {found}, its run {last}");
            assert_ne!(found, loss(&with[..2]), "{what}: the adapter changes nothing");
            let say = ["--prompt-ids", "1,5,9", "--max-new-tokens", "4"];
            let said = json(&mut engobe(&[&["generate"][..], &with, &say].concat()));
            assert!(!said["token_ids"].as_array().unwrap().is_empty(), "{what}: {said}");
            let merged = at("merged");
            let merge = [&["merge"][..], &with, &["--no-verify", "--out", &merged]].concat();
            match method {
                "prompt-tuning" | "p-tuning" | "prefix-tuning" | "bottleneck" => {
                    let (status, said) = error(&mut engobe(&merge));
                    assert!(status == 1 && said.contains("can't be merged: "), "{what}: {said}");
                }
                _ => {
                    json(&mut engobe(&merge));
                    let merged_loss = loss(&["--model", &merged]);
                    // weights are written in 16 bits where the base has 16
                    assert!(
                        (merged_loss / found - 1.0).abs() < 1e-3,
                        "{what}: {found}, merged {merged_loss}"
                    );
                    fs::remove_dir_all(&merged).unwrap();
                }
            }
            fs::remove_dir_all(&out).unwrap();
        }
    }
}

/// The last validation loss of a run.
fn last_eval_loss(out: &Path) -> f64 {
    let lines = text_of(&out.join("metrics.jsonl"));
    let last: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    last["eval_loss"].as_f64().unwrap()
}

fn text_of(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn settings_of_another_method_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (more, part) in [
        (["--method", "prompt-tuning", "--r", "4"], "r is no setting of prompt-tuning"),
        (["--method", "lora", "--num-virtual-tokens", "4"], "num_virtual_tokens is no setting of lora"),
        (["--method", "hydra", "--r", "4"], "expected one of lora"),
        (["--method", "bottleneck", "--reduction-factor", "0"], "reduction_factor is 0"),
    ] {
        let said = error(&mut engobe(&with_rows("train", &dir.path().join("run"), &more))).1;
        assert!(said.contains(part), "{part} in {said}");
    }
}

/// What a method comes to beside others is what it comes to by itself: the base is shared, and left as it was.
#[test]
fn compared_methods_leave_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("compared");
    let rate = ["--only", "prompt-tuning.learning_rate=0.02"];
    let more = [&["--methods", "prefix-tuning,lora,bottleneck,prompt-tuning"][..], &rate].concat();
    let found = json(&mut engobe(&with_rows("compare", &out, &more)));
    let rows = found["methods"].as_array().unwrap();
    assert_eq!(rows.len(), 4, "{found}");
    for row in rows {
        let method = row["method"].as_str().unwrap();
        let alone = dir.path().join(method);
        let mut settings = vec!["--method", method];
        if method == "prompt-tuning" {
            settings.extend(["--learning-rate", "0.02"]);
        }
        let run = json(&mut engobe(&with_rows("train", &alone, &settings)));
        assert_eq!(row["trainable_parameters"], run["trainable_parameters"], "{method}");
        let files = |dir: &Path| {
            let line = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
            let last: serde_json::Value = serde_json::from_str(line.lines().last().unwrap()).unwrap();
            (last["loss"].as_f64().unwrap().to_bits(), last["eval_loss"].as_f64().unwrap().to_bits())
        };
        assert_eq!(files(&out.join(method)), files(&alone), "{method}");
        assert!(row["file_bytes"].as_u64().unwrap() > 0 && row["peak_bytes"].as_u64().unwrap() > 0);
    }
    let table = fs::read_to_string(out.join("compare.md")).unwrap();
    assert!(table.lines().count() == 7 && table.contains("| lora "), "{table}");
    assert!(fs::read_to_string(out.join("compare.svg")).unwrap().starts_with("<svg"));
    assert!(table.contains("| base ") && found["base_eval_loss"].as_f64().unwrap() > 0.0, "{table}");
    // stopped before the last methods, it goes on: what is done stays, what is not is trained
    fs::remove_dir_all(out.join("bottleneck")).unwrap();
    fs::remove_file(out.join("lora/compare.json")).unwrap();
    assert!(error(&mut engobe(&with_rows("compare", &out, &more))).1.contains("prefix-tuning"));
    let again = json(&mut engobe(&with_rows("compare", &out, &[&more[..], &["--resume"]].concat())));
    for (row, before) in again["methods"].as_array().unwrap().iter().zip(rows) {
        assert_eq!(row["eval_loss"], before["eval_loss"], "{row}");
        let kept = ["prefix-tuning", "prompt-tuning"].contains(&row["method"].as_str().unwrap());
        assert_eq!(row["seconds"] == before["seconds"], kept || row["method"] == "lora", "{row}");
    }
    let wrong = with_rows("compare", &out, &["--methods", "lora", "--only", "ia3.r=4"]);
    assert!(error(&mut engobe(&wrong)).1.contains("ia3 is none of"));
}
