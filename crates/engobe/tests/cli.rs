//! The way of a user: train, resume, evaluate, generate, inspect, merge; and what goes wrong on it.

mod support;

use engobe_formats::safetensors_file::{SafetensorsFile, write_safetensors};
use serde_json::Value;
use std::fs;
use std::path::Path;
use support::{engobe, error, golden, json};

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn train(out: &Path, more: &[&str]) -> Vec<String> {
    let (model, data) = (text(&golden("llama/gqa_tied")), text(&golden("peft/rows.jsonl")));
    let out = text(out);
    let r = if more.contains(&"--r") { vec![] } else { vec!["--r", "4"] };
    let base = ["train", "--model", &model, "--data", &data, "--out", &out, "--max-steps", "6"];
    base.iter()
        .chain(&r)
        .chain(&["--allow", "eot-never-label", "--learning-rate", "3e-3"])
        .chain(more)
        .map(|s| s.to_string())
        .collect()
}

#[test]
fn from_rows_to_a_merged_model() {
    let dir = tempfile::tempdir().unwrap();
    let (out, merged) = (dir.path().join("run"), dir.path().join("merged"));
    let done = json(&mut engobe(&train(
        &out,
        &["--val-split", "0.2", "--eval-steps", "2", "--compute-dtype", "bf16"],
    )));
    for key in [
        "steps",
        "final_loss",
        "best_eval_loss",
        "tokens_per_second",
        "label_tokens_per_second",
        "peak_rss_bytes",
        "startup_seconds",
        "trainable_parameters",
        "adapter",
    ] {
        assert!(!done[key].is_null(), "{key} in {done}");
    }
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "run.toml",
        "loss.svg",
        "report.html",
    ] {
        assert!(out.join(file).exists(), "{file}");
    }
    let settings = fs::read_to_string(out.join("run.toml")).unwrap();
    assert!(settings.contains("compute_dtype = \"bf16\""), "{settings}");
    let line: Value =
        serde_json::from_str(fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines().next().unwrap())
            .unwrap();
    for key in ["step", "loss", "lr", "grad_norm", "tokens", "label_tokens", "seconds"] {
        assert!(line[key].is_number(), "{key} in {line}");
    }
    let (model, data, adapter) =
        (text(&golden("llama/gqa_tied")), text(&golden("peft/rows.jsonl")), text(&out));
    let with = json(&mut engobe(&["eval", "--model", &model, "--adapter", &adapter, "--data", &data]));
    let plain = json(&mut engobe(&["eval", "--model", &model, "--data", &data]));
    assert!(with["loss"].as_f64().unwrap() < plain["loss"].as_f64().unwrap());
    assert!(with["exact_match"].is_null() && with["rows"] == 18 && with["label_tokens"].is_u64());
    json(&mut engobe(&[
        "merge",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--out",
        &text(&merged),
        "--dtype",
        "f32",
    ]));
    let baked = json(&mut engobe(&["eval", "--model", &text(&merged), "--data", &data]));
    let (a, b) = (baked["loss"].as_f64().unwrap(), with["loss"].as_f64().unwrap());
    assert!((a - b).abs() < 1e-5 * b, "{a} {b}"); // one rounding of W + sBA to f32
    let said = json(&mut engobe(&[
        "generate",
        "--model",
        &text(&merged),
        "--prompt-ids",
        "3,4,5",
        "--max-new-tokens",
        "4",
    ]));
    assert!(said["prompt_tokens"] == 3 && said["token_ids"].is_array() && said["prompt_seconds"].is_f64());
    let found = json(&mut engobe(&["inspect", &adapter, "--model", &model]));
    assert_eq!(found["config"]["trainable_parameters"], done["trainable_parameters"]);
}

#[test]
fn run_toml_repeats_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("a"), dir.path().join("b"));
    json(&mut engobe(&train(&first, &["--no-packing", "--set", "rank_pattern={ \"q_proj\" = 2 }"])));
    let config = text(&first.join("run.toml"));
    json(&mut engobe(&["train", "--config", &config, "--out", &text(&second)]));
    let bytes = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert_eq!(bytes(&first), bytes(&second));
}

#[test]
fn a_run_is_not_overwritten_and_can_be_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    json(&mut engobe(&train(&out, &["--resume"])));
    let (status, line) = error(&mut engobe(&train(&out, &[])));
    assert!(status == 1 && line.contains("--resume"), "{line}");
    json(&mut engobe(&train(&out, &["--resume"])));
    let (_, line) = error(&mut engobe(&train(&out, &["--resume", "--seed", "7"])));
    assert!(line.contains("seed = 42 then, seed = 7 now"), "{line}");
}

#[test]
fn an_adapter_is_trained_further() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("a"), dir.path().join("b"));
    json(&mut engobe(&train(&first, &[])));
    let start = text(&first);
    json(&mut engobe(&train(&second, &["--init-adapter", &start, "--target-modules", "all-linear"])));
    let (status, line) =
        error(&mut engobe(&train(&dir.path().join("c"), &["--init-adapter", &start, "--lora-alpha", "7"])));
    assert!(status == 1 && line.contains("lora_alpha = 7"), "{line}");
}

#[test]
fn a_dropout_that_is_typed_takes_the_place_of_the_start_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let start = dir.path().join("start");
    json(&mut engobe(&train(&start, &["--lora-dropout", "0.5"])));
    let losses = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let start = text(&start);
        let more: Vec<&str> = ["--init-adapter", &start].iter().chain(more).copied().collect();
        json(&mut engobe(&train(&out, &more)));
        let config: Value =
            serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
        let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let first: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
        (config["lora_dropout"].as_f64().unwrap(), first["loss"].as_f64().unwrap())
    };
    let (kept, off, other) = (
        losses("kept", &[]),
        losses("off", &["--lora-dropout", "0"]),
        losses("other", &["--lora-dropout", "0.3"]),
    );
    assert_eq!((kept.0, off.0, other.0), (0.5, 0.0, 0.3));
    assert!(kept.1 != off.1 && off.1 != other.1 && other.1 != kept.1, "{kept:?} {off:?} {other:?}");
}

#[test]
fn mistakes_end_with_one_line_that_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("x");
    let broken = dir.path().join("broken.jsonl");
    fs::write(&broken, "{\"input_ids\": [1, 2]}\n{oops\n").unwrap();
    let (model, data, broken) =
        (text(&golden("llama/plain")), text(&golden("peft/rows.jsonl")), text(&broken));
    let with = |more: &[&str]| train(&out, more);
    let words = |words: &[&str]| words.iter().map(|w| w.to_string()).collect::<Vec<_>>();
    for (status, args, parts) in [
        (2, words(&["trian"]), vec!["train"]),
        (2, words(&["train", "--lerning-rate", "1"]), vec!["--learning-rate"]),
        (2, words(&["train", "--model", &model, "--out", "x"]), vec!["--data"]),
        (2, words(&["generate", "--model", &model]), vec!["--prompt"]),
        (2, words(&["eval", "--model", &model, "--data", &data, "--dtype", "int3"]), vec!["int3", "bf16"]),
        (1, with(&["--compute-dtype", "f8"]), vec!["compute_dtype is \"f8\"", "bf16"]),
        (1, words(&["eval", "--model", "/no/where", "--data", &data]), vec!["/no/where"]),
        (1, words(&["eval", "--model", &model, "--data", &broken]), vec!["broken.jsonl", "line 2"]),
        (1, words(&["eval", "--model", &model, "--data", "/no/rows.jsonl"]), vec!["/no/rows.jsonl"]),
        (1, with(&["--r", "0"]), vec!["r is 0"]),
        (2, with(&["--method", "dora"]), vec!["dora", "qlora"]),
        (2, with(&["--quantize", "nf3"]), vec!["--quantize nf3", "fp4"]),
        (2, with(&["--double-quant"]), vec!["--double-quant", "--quantize"]),
        (2, with(&["--quantize", "int8", "--quant-block-size", "64"]), vec!["--quant-block-size", "int8"]),
        (2, with(&["--method", "qlora", "--dtype", "bf16"]), vec!["--dtype bf16", "NF4+dq"]),
        (2, words(&["quantize", "--model", &model, "--to", "q4", "--out", "x"]), vec!["--to q4", "nf4"]),
        (
            2,
            words(&["quantize", "--model", &model, "--to", "int8", "--double-quant", "--out", "x"]),
            vec!["--to int8"],
        ),
        (1, words(&["quantize", "--model", "/no/where", "--to", "nf4", "--out", "x"]), vec!["/no/where"]),
        (1, with(&["--r", "-4"]), vec!["r is", "-4"]),
        (1, with(&["--lora-alpha", "0"]), vec!["lora_alpha"]),
        (1, with(&["--target-modules", "query"]), vec!["query", "q_proj"]),
        (1, with(&["--set", "lora_aplha=3"]), vec!["lora_alpha"]),
        (
            1,
            with(&["--target-modules", "q_proj", "--layers-to-transform", "99"]),
            vec!["layers_to_transform = [99]"],
        ),
        (
            2,
            words(&["lint", "--model", &model, "--data", &data, "--allow", "val-overlp"]),
            vec!["val-overlap"],
        ),
        (2, words(&["generate", "--model", &model, "--prompt-ids", "1", "--top-k", "-1"]), vec!["--top-k"]),
        (1, with(&["--batch-size", "0"]), vec!["batch_size"]),
        (1, words(&["generate", "--model", &model, "--prompt", "hi"]), vec!["tokenizer"]),
        (1, words(&["generate", "--model", &model, "--prompt-ids", "1,99999"]), vec!["99999"]),
        (
            1,
            words(&[
                "eval",
                "--model",
                &model,
                "--adapter",
                &text(&golden("peft/saved")),
                "--data",
                &data,
                "--exact-match",
            ]),
            vec!["--exact-match"],
        ),
    ] {
        let (found, line) = error(&mut engobe(&args));
        assert!(found == status && parts.iter().all(|p| line.contains(p)), "{args:?}: [{found}] {line}");
        assert!(!out.join("adapter_config.json").exists());
    }
}

/// Quantized on the way in, or into a directory first: the same model, for evaluation and for training.
#[test]
fn quantized_on_the_way_or_beforehand_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (text(&golden("llama/gqa_tied")), text(&golden("peft/rows.jsonl")));
    let plain = json(&mut engobe(&["eval", "--model", &model, "--data", &data]));
    for (i, (flags, qlora)) in [
        (vec!["nf4", "--double-quant"], vec!["--method", "qlora"]),
        (
            vec!["nf4", "--double-quant", "--block-size", "128"],
            vec!["--method", "qlora", "--quant-block-size", "128"],
        ),
        (vec!["fp4"], vec!["--quantize", "fp4"]),
        (vec!["int8"], vec!["--quantize", "int8", "--method", "lora"]),
    ]
    .into_iter()
    .enumerate()
    {
        let out = text(&dir.path().join(format!("quantized{i}")));
        let args = ["quantize", "--model", &model, "--out", &out, "--max-shard-size", "2e-5", "--to"];
        let done = json(&mut engobe(&[&args[..], &flags].concat()));
        assert!(done["bytes_after"].as_u64() < done["bytes_before"].as_u64(), "{done}");
        assert_eq!(done["quantized"], 14);
        let before = json(&mut engobe(&["eval", "--model", &out, "--data", &data]));
        let block: Vec<&str> =
            flags.iter().map(|f| if *f == "--block-size" { "--quant-block-size" } else { f }).collect();
        let args = ["eval", "--model", &model, "--data", &data, "--quantize"];
        let on_the_way = json(&mut engobe(&[&args[..], &block].concat()));
        assert_eq!(before["loss"], on_the_way["loss"], "{flags:?}");
        assert_ne!(before["loss"], plain["loss"], "{flags:?}");
        let (a, b) = (dir.path().join(format!("a{i}")), dir.path().join(format!("b{i}")));
        json(&mut engobe(&train(&a, &qlora)));
        let mut over = train(&b, &[]);
        let at = over.iter().position(|a| a == "--model").unwrap();
        over[at + 1] = out.clone();
        json(&mut engobe(&over));
        let adapter = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
        assert_eq!(adapter(&a), adapter(&b), "{qlora:?}");
        let run = fs::read_to_string(a.join("run.toml")).unwrap();
        assert!(run.contains(qlora[1]), "{run}");
    }
    // a merge over codes gives plain floats
    let (quantized, merged) = (text(&dir.path().join("quantized0")), text(&dir.path().join("merged")));
    let adapter = text(&dir.path().join("b0"));
    let over = ["--model", &quantized, "--adapter", &adapter];
    // without a tokenizer nothing can be read to measure on: the losses below do it
    json(&mut engobe(&[&["merge"], &over[..], &["--out", &merged, "--no-verify"]].concat()));
    let with = json(&mut engobe(&[&["eval"], &over[..], &["--data", &data]].concat()));
    let baked = json(&mut engobe(&["eval", "--model", &merged, "--data", &data]));
    let (a, b) = (baked["loss"].as_f64().unwrap(), with["loss"].as_f64().unwrap());
    assert!((a - b).abs() < 1e-5 * b, "{a} {b}"); // one rounding of W + sBA to f32
    let (status, line) = error(&mut engobe(&[
        "quantize",
        "--model",
        &quantized,
        "--to",
        "fp4",
        "--out",
        &text(&dir.path().join("again")),
    ]));
    assert!(status == 1 && line.contains("quantized already (NF4+dq)"), "{line}");
    let (_, line) =
        error(&mut engobe(&["eval", "--model", &quantized, "--data", &data, "--quantize", "nf4"]));
    assert!(line.contains("leave --quantize"), "{line}");
}

#[test]
fn a_loss_that_is_no_number_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    json(&mut engobe(&train(&out, &[])));
    let path = out.join("adapter_model.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    // finite, but its products are not
    let huge = |n: usize| 1e30f32.to_le_bytes().repeat(n);
    let tensors: Vec<_> =
        file.tensors().map(|t| (t.name.clone(), t.shape.clone(), huge(t.elements()))).collect();
    write_safetensors(&path, &tensors, &Default::default()).unwrap();
    let (model, data) = (text(&golden("llama/gqa_tied")), text(&golden("peft/rows.jsonl")));
    let args = ["eval", "--model", &model, "--adapter", &text(&out), "--data", &data, "--json"];
    let (status, line) = error(&mut engobe(&args));
    assert!(status == 1 && line.contains("the loss over these rows is NaN"), "{line}");
}

#[test]
fn help_fits_a_person() {
    for command in [
        "", "demo", "fetch", "train", "eval", "generate", "merge", "quantize", "convert", "plan", "inspect",
        "lint", "methods", "compare",
    ] {
        let args: Vec<&str> = [command, "--help"].into_iter().filter(|a| !a.is_empty()).collect();
        let done = engobe(&args).output().unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        assert!(done.status.success() && text.contains("engobe "), "{command}");
        assert!(text.lines().all(|l| l.chars().count() <= 112), "{command}: too wide for a terminal");
        assert!(text.lines().count() <= 120, "{command}: {} lines", text.lines().count());
    }
}

#[test]
fn lint_finds_and_shows() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    fs::write(&rows, "{\"input_ids\": [1, 2, 3], \"labels\": [-100, 2, 3]}\n{\"input_ids\": [4, 5], \"labels\": [-100, -100]}\n").unwrap();
    let model = text(&golden("llama/plain"));
    let (status, line) = error(&mut engobe(&["lint", "--model", &model, "--data", &text(&rows)]));
    assert!(status == 1 && line.contains("all-masked-rows"), "{line}");
    let args =
        ["lint", "--model", &model, "--data", &text(&rows), "--allow", "all-masked-rows", "--show", "1"];
    let done = engobe(&args).output().unwrap();
    let shown = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success() && shown.contains("[1]⟦[2]|[3]⟧"), "{shown}");
}

#[test]
fn a_plan_says_what_a_run_would_take_and_what_would_fit() {
    let dir = tempfile::tempdir().unwrap();
    // the configuration is enough
    let config = dir.path().join("config.json");
    fs::copy(golden("llama/gqa_tied/config.json"), &config).unwrap();
    for model in [text(&config), text(dir.path()), text(&golden("llama/gqa_tied"))] {
        let plan = ["plan", "--model", &model, "--r", "4", "--batch-size", "64", "--max-seq-len", "2048"];
        let all = json(&mut engobe(&plan));
        let parts = ["weights", "adapter", "optimizer", "gradients", "activations", "head", "other"];
        let bytes = |key: &str| all[format!("{key}_bytes")].as_u64().unwrap();
        let sum: u64 = parts.iter().map(|p| bytes(p)).sum();
        assert!(bytes("peak") <= sum && parts.iter().all(|p| bytes(p) < bytes("peak")), "{all}");
        let less = json(engobe(&plan).args(["--memory-limit", "200MB"]));
        assert_eq!((less["fits"].as_bool(), all["fits"].as_bool()), (Some(false), None));
        let would = less["would_fit"].as_array().unwrap();
        assert!(!would.is_empty() && would.iter().all(|s| s["peak_bytes"].as_u64().unwrap() < 200_000_000));
    }
    let run = json(&mut engobe(&train(&dir.path().join("run"), &[])));
    let model = text(&golden("llama/gqa_tied"));
    let plan = json(&mut engobe(&["plan", "--model", &model, "--r", "4"]));
    assert_eq!(plan["trainable_parameters"], run["trainable_parameters"]);
}

#[test]
fn a_memory_limit_chooses_or_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, limited) = (dir.path().join("plain"), dir.path().join("limited"));
    let large = ["--batch-size", "8", "--max-seq-len", "4096"];
    let free = json(&mut engobe(&train(&plain, &large)));
    let with = |limit: &'static str| [&large[..], &["--memory-limit", limit]].concat();
    let kept = json(&mut engobe(&train(&limited, &with("150MB"))));
    let toml = fs::read_to_string(limited.join("run.toml")).unwrap();
    let table: toml::Table = toml.parse().unwrap();
    let of = |key: &str| table[key].as_integer().unwrap();
    assert!(of("batch_size") < 8 && of("batch_size") * of("gradient_accumulation") == 8, "{toml}");
    assert!(kept["peak_rss_bytes"].as_u64().unwrap() < 150_000_000);
    // the optimizer saw the same rows together; sums are rounded in another order
    let (a, b) = (free["final_loss"].as_f64().unwrap(), kept["final_loss"].as_f64().unwrap());
    assert!((a - b).abs() < 1e-4 * a, "{a} {b}");
    let refused = dir.path().join("refused");
    let (status, line) = error(&mut engobe(&train(&refused, &with("25MB"))));
    assert!(status == 1 && line.contains("memory_limit 25 MB") && line.contains("--max-seq-len"), "{line}");
    let (_, line) = error(&mut engobe(&train(&refused, &with("60XB"))));
    assert!(line.contains("memory_limit") && line.contains("16GB"), "{line}");
    let (_, line) = error(&mut engobe(&train(&refused, &["--state-file", "x"])));
    assert!(line.contains("state_file") && line.contains("paged_adamw"), "{line}");
}
