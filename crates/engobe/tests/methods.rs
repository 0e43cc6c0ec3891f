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
    assert!(table.lines().count() == 6 && table.contains("| lora "), "{table}");
    assert!(fs::read_to_string(out.join("compare.svg")).unwrap().starts_with("<svg"));
    let wrong = with_rows("compare", &out, &["--methods", "lora", "--only", "ia3.r=4"]);
    assert!(error(&mut engobe(&wrong)).1.contains("ia3 is none of"));
}
