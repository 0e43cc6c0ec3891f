//! What the checks find, and what they leave alone.

use engobe_data::reader::read_file;
use engobe_data::{
    EncodeOptions, Encoder, LintContext, LintKind, LintReport, PromptStyle, Severity, TextTokenizer, TrainOn,
    lint,
};
use serde_json::{Value, json};
use std::path::Path;

fn tokenizer(template: &str) -> TextTokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/hf");
    let mut tokenizer = TextTokenizer::from_hf_dir(&dir).unwrap();
    tokenizer.set_chat_template(template.into());
    tokenizer
}

fn report(template: &str, max_seq_len: usize, rows: &[Value], val: &[Value]) -> LintReport {
    let tokenizer = tokenizer(template);
    let options = EncodeOptions { train_on: TrainOn::Completions, style: PromptStyle::Auto, max_seq_len };
    let encoder = Encoder::new(Some(&tokenizer), 482, options).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str, rows: &[Value]| {
        let path = dir.path().join(name);
        std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        read_file(&path).unwrap()
    };
    let files = [read("train.jsonl", rows)];
    let train = encoder.encode(&files).unwrap();
    let val = if val.is_empty() { vec![] } else { encoder.encode(&[read("val.jsonl", val)]).unwrap() };
    lint(&train, &val, &LintContext::of(&encoder, &files, Some(&tokenizer), max_seq_len))
}

fn kinds(report: &LintReport) -> Vec<(&'static str, usize)> {
    report.findings.iter().map(|f| (f.kind.name(), f.count)).collect()
}

fn row(user: &str, assistant: &str) -> Value {
    json!({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]})
}

const CHATML: &str = engobe_data::template::CHATML;

#[test]
fn good_rows_pass() {
    assert_eq!(kinds(&report(CHATML, 512, &[row("a", "b"), row("c", "d")], &[row("e", "f")])), []);
}

#[test]
fn rows_without_labels() {
    let no_answer = json!({"messages": [{"role": "user", "content": "a"}]});
    let found = report(CHATML, 512, &[row("a", "b"), no_answer], &[]);
    assert_eq!(kinds(&found), [("all-masked-rows", 1)]);
    assert!(found.findings[0].message.contains("train.jsonl line 2"), "{}", found.findings[0].message);
    assert_eq!(found.errors(&[]).count(), 1);
    assert_eq!(found.errors(&[LintKind::AllMaskedRows]).count(), 0);
}

#[test]
fn a_completion_cut_off_is_said_to_be_so() {
    let long = "word ".repeat(40);
    let found = report(CHATML, 32, &[row(&long, "b"), row("a", "b")], &[]);
    assert_eq!(kinds(&found), [("all-masked-rows", 1), ("truncated-rows", 1)]);
    assert!(found.findings[0].message.contains("max_seq_len 32 cuts"), "{}", found.findings[0].message);
}

#[test]
fn an_end_that_is_no_token_is_never_learned() {
    let stranger = CHATML.replace("<|im_end|>", "<|eot|>");
    let found = report(&stranger, 512, &[row("a", "b")], &[]);
    assert_eq!(kinds(&found), [("eot-never-label", 1)]);
    assert!(found.findings[0].message.contains("no special token of this tokenizer"));
    // generation blocks that leave the end of turn out
    let outside = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}{% endfor %}";
    assert_eq!(kinds(&report(outside, 512, &[row("a", "b")], &[]))[0].0, "eot-never-label");
}

#[test]
fn an_end_at_which_generation_does_not_stop() {
    let other = CHATML.replace("<|im_end|>", "<|im_start|>");
    assert_eq!(kinds(&report(&other, 512, &[row("a", "b")], &[])), [("eot-not-a-stop-token", 1)]);
}

#[test]
fn double_bos() {
    let found = report(&format!("<|endoftext|><|endoftext|>{CHATML}"), 512, &[row("a", "b")], &[]);
    assert_eq!(kinds(&found), [("double-bos", 1)]);
}

#[test]
fn repeated_empty_and_leaked_rows() {
    let rows = [row("a", "b"), row("a", "b"), row("a", "c"), row("x", "")];
    let found = report(CHATML, 512, &rows, &[row("a", "c"), row("q", "r")]);
    assert_eq!(kinds(&found), [("val-overlap", 1), ("empty-completions", 1), ("duplicate-rows", 1)]);
    let found = report(CHATML, 512, &[json!({"input_ids": [5]}), json!({"input_ids": [5, 2]})], &[]);
    assert_eq!(kinds(&found), [("empty-rows", 1), ("empty-completions", 1)]);
}

#[test]
fn token_rows_that_never_end_are_only_a_warning() {
    let found = report(CHATML, 512, &[json!({"input_ids": [5, 6, 7]})], &[]);
    assert_eq!(kinds(&found), [("eot-never-label", 1)]);
    assert_eq!(found.findings[0].severity, Severity::Warning);
}

#[test]
fn names_of_kinds_are_read_back_and_a_wrong_one_says_the_nearest() {
    for kind in LintKind::ALL {
        assert_eq!(kind.name().parse::<LintKind>().unwrap(), kind);
    }
    let error = "duplicate-row".parse::<LintKind>().unwrap_err().to_string();
    assert!(error.contains("is \"duplicate-rows\" meant?"), "{error}");
}
