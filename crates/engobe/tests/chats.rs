//! Models with a tokenizer and a chat template: templates that print the date, templates of the user's own, dialogues.

mod support;

use engobe_formats::safetensors_file::write_safetensors;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use support::{engobe, error, json};

const VOCAB: usize = 482;

/// A model of one small layer with the tokenizer of `crates/data/tests/golden/hf` and this chat template.
fn model(dir: &Path, template: Option<&str>) -> PathBuf {
    let dir = dir.join("model");
    fs::create_dir_all(&dir).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/golden/hf");
    fs::copy(tokenizer.join("tokenizer.json"), dir.join("tokenizer.json")).unwrap();
    let mut config = json!({ "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast" });
    if let Some(template) = template {
        config["chat_template"] = json!(template);
    }
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true,
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors = Vec::new();
    let mut tensor = |name: &str, shape: &[usize]| {
        let n: usize = shape.iter().product();
        // spread out, and another for each element: nothing here depends on the values
        let value = |i: usize| ((i * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.4;
        let bytes: Vec<u8> = (0..n).flat_map(|i| value(i).to_le_bytes()).collect();
        tensors.push((name.to_string(), shape.to_vec(), bytes));
    };
    tensor("model.embed_tokens.weight", &[VOCAB, 16]);
    tensor("model.norm.weight", &[16]);
    for (name, shape) in [
        ("self_attn.q_proj", &[16, 16][..]),
        ("self_attn.k_proj", &[8, 16]),
        ("self_attn.v_proj", &[8, 16]),
        ("self_attn.o_proj", &[16, 16]),
        ("mlp.gate_proj", &[24, 16]),
        ("mlp.up_proj", &[24, 16]),
        ("mlp.down_proj", &[16, 24]),
        ("input_layernorm", &[16]),
        ("post_attention_layernorm", &[16]),
    ] {
        tensor(&format!("model.layers.0.{name}.weight"), shape);
    }
    write_safetensors(&dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    dir
}

fn chats(dir: &Path) -> PathBuf {
    let path = dir.join("chats.jsonl");
    let row = |i: usize| json!({ "messages": [{ "role": "user", "content": format!("say {i}") }, { "role": "assistant", "content": format!("it is {i}") }] });
    fs::write(&path, (0..6).map(|i| format!("{}\n", row(i))).collect::<String>()).unwrap();
    path
}

const DATED: &str = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n\
     {{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn a_run_whose_template_prints_the_date_is_resumed_on_another_day() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (text(&model(dir.path(), Some(DATED))), text(&chats(dir.path())));
    let train = |out: &Path, steps: &str, more: &[&str]| {
        let out = text(out);
        let args =
            ["train", "--model", &model, "--data", &data, "--out", &out, "--max-steps", steps, "--r", "2"];
        let fixed = ["--lr-scheduler", "constant", "--set", "date=2024-02-29"];
        let fixed = if more.is_empty() { &fixed[..] } else { &fixed[..2] };
        json(&mut engobe(&args.iter().chain(fixed).chain(more).copied().collect::<Vec<_>>()));
    };
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    train(&whole, "6", &[]);
    train(&parts, "3", &[]);
    // the date of the first part, not today's
    train(&parts, "6", &["--resume"]);
    let bytes = |out: &Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
    assert_eq!(bytes(&whole), bytes(&parts));
    assert!(fs::read_to_string(parts.join("run.toml")).unwrap().contains("date = \"2024-02-29\""));
    // without a date in the settings, today's is written down
    let today = dir.path().join("today");
    train(&today, "1", &["--no-packing"]);
    assert!(fs::read_to_string(today.join("run.toml")).unwrap().contains("date = \"20"));
}

#[test]
fn a_base_model_takes_a_template_from_the_user() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (text(&model(dir.path(), None)), text(&chats(dir.path())));
    let (status, line) = error(&mut engobe(&["lint", "--model", &model, "--data", &data]));
    assert!(status == 1 && line.contains("--chat-template"), "{line}");
    let shown = |template: &str| {
        let args = ["lint", "--model", &model, "--data", &data, "--show", "1", "--chat-template", template];
        let done = engobe(&args).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap().replace('|', "")
    };
    let text_of = |shown: String| shown.split("\n\n").next().unwrap().to_string();
    assert!(text_of(shown("chatml")).contains("⟦it is 0<im_end>⟧"), "{}", shown("chatml"));
    let own = dir.path().join("own.jinja");
    fs::write(&own, "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}").unwrap();
    assert!(
        text_of(shown(&text(&own))).contains("[user] say 0<im_end>[assistant]"),
        "{}",
        shown(&text(&own))
    );
    let out = text(&dir.path().join("run"));
    json(&mut engobe(&[
        "train",
        "--model",
        &model,
        "--data",
        &data,
        "--out",
        &out,
        "--max-steps",
        "1",
        "--chat-template",
        "chatml",
    ]));
    let (_, line) =
        error(&mut engobe(&["lint", "--model", &model, "--data", &data, "--chat-template", "/no/file"]));
    assert!(line.contains("--chat-template /no/file"), "{line}");
}

#[test]
fn a_dialogue_goes_over_stdin_and_outgrows_its_first_cache() {
    let dir = tempfile::tempdir().unwrap();
    let model = text(&model(dir.path(), Some(DATED)));
    let mut child =
        engobe(&["generate", "--model", &model, "--chat", "--max-new-tokens", "40", "--system", "- x"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
    child.stdin.take().unwrap().write_all(b"Hello\nAgain\nand again\n").unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(done.stdout.iter().filter(|b| **b == b'\n').count() >= 3);
}
