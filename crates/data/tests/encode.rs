//! Ids and labels of rows, in every form.

use engobe_data::reader::read_file;
use engobe_data::{EncodeOptions, Encoder, PromptStyle, Sample, TextTokenizer, TrainOn, show};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn hf_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/hf")
}

fn tokenizer() -> TextTokenizer {
    TextTokenizer::from_hf_dir(&hf_dir()).unwrap()
}

const OPTIONS: EncodeOptions =
    EncodeOptions { train_on: TrainOn::Completions, style: PromptStyle::Auto, max_seq_len: 4096 };

fn encode(
    tokenizer: Option<&TextTokenizer>,
    options: EncodeOptions,
    rows: &[Value],
) -> Result<Vec<Sample>, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(&path, text).unwrap();
    let file = read_file(&path).map_err(|e| e.to_string())?;
    let encoder = Encoder::new(tokenizer, 482, options).map_err(|e| e.to_string())?;
    encoder.encode(&[file]).map_err(|e| e.to_string())
}

/// The row as text, labels in brackets.
fn marked(sample: &Sample, tokenizer: &TextTokenizer) -> String {
    let mut out = String::new();
    let mut inside = false;
    for (text, label) in show(sample, Some(tokenizer)) {
        if label != inside {
            out.push(if label { '[' } else { ']' });
        }
        inside = label;
        out += &text;
    }
    if inside { out + "]" } else { out }
}

#[track_caller]
fn check(options: EncodeOptions, template: Option<&str>, row: Value, want: &str) {
    let mut tokenizer = tokenizer();
    if let Some(template) = template {
        tokenizer.set_chat_template(template.to_owned());
    }
    let samples = encode(Some(&tokenizer), options, &[row]).unwrap();
    assert_eq!(marked(&samples[0], &tokenizer), want);
}

fn chat(turns: &[(&str, &str)]) -> Value {
    json!({ "messages": turns.iter().map(|(r, c)| json!({"role": r, "content": c})).collect::<Vec<_>>() })
}

#[test]
fn ids_and_masks_are_those_of_transformers() {
    #[derive(Deserialize)]
    struct Chat {
        messages: Value,
        ids: Vec<u32>,
        mask: Vec<u32>,
    }
    #[derive(Deserialize)]
    struct Golden {
        chats: Vec<Chat>,
    }
    let golden: Golden =
        serde_json::from_str(&std::fs::read_to_string(hf_dir().join("golden.json")).unwrap()).unwrap();
    assert_eq!(golden.chats.len(), 2);
    for case in golden.chats {
        let samples = encode(Some(&tokenizer()), OPTIONS, &[json!({"messages": case.messages})]).unwrap();
        assert_eq!(samples[0].ids, case.ids);
        let want: Vec<Option<u32>> =
            case.ids.iter().zip(&case.mask).map(|(&id, &m)| (m == 1).then_some(id)).collect();
        assert_eq!(samples[0].labels, want);
    }
}

const CHATML: &str = engobe_data::template::CHATML;

#[test]
fn the_end_of_turn_is_a_label_and_what_follows_it_is_not() {
    let two = chat(&[("user", "One?"), ("assistant", " 1 "), ("user", "Two?"), ("assistant", "2")]);
    check(
        OPTIONS,
        Some(CHATML),
        two.clone(),
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n[ 1 <|im_end|>]\n\
         <|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n[2<|im_end|>]\n",
    );
    check(
        EncodeOptions { train_on: TrainOn::Last, ..OPTIONS },
        Some(CHATML),
        two.clone(),
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n 1 <|im_end|>\n\
         <|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n[2<|im_end|>]\n",
    );
    check(
        EncodeOptions { train_on: TrainOn::All, ..OPTIONS },
        Some(CHATML),
        chat(&[("user", "a"), ("assistant", "b")]),
        "[<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n]",
    );
    // found by content: the template ends the whole text, not the turn, in its own way
    let tail = format!("{CHATML}{{% if not add_generation_prompt %}}<|endoftext|>{{% endif %}}");
    check(
        OPTIONS,
        Some(&tail),
        two,
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n[ 1 <|im_end|>]\n\
         <|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n[2<|im_end|>\n<|endoftext|>]",
    );
}

#[test]
fn prompts_and_completions() {
    let row = json!({"question": "1 plus 1?", "answer": 2});
    check(
        OPTIONS,
        Some(CHATML),
        row.clone(),
        "<|im_start|>user\n1 plus 1?<|im_end|>\n<|im_start|>assistant\n[2<|im_end|>]\n",
    );
    let plain = EncodeOptions { style: PromptStyle::Plain, ..OPTIONS };
    check(plain, None, row.clone(), "<|endoftext|>1 plus 1?[2<|im_end|>]");
    // EOS that stands there already is not doubled
    check(plain, None, json!({"prompt": "a", "completion": " b<|im_end|>"}), "<|endoftext|>a[ b<|im_end|>]");
    check(
        EncodeOptions { train_on: TrainOn::All, ..plain },
        None,
        row,
        "[<|endoftext|>1 plus 1?2<|im_end|>]",
    );
    // lists of messages, as TRL has them: the assistant in the prompt is not learned
    let row = json!({
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}],
    });
    check(
        OPTIONS,
        Some(CHATML),
        row,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n\
         <|im_start|>assistant\n[d<|im_end|>]\n",
    );
}

#[test]
fn alpaca_and_text() {
    let row = json!({"instruction": "Add", "input": "1 1", "output": "2"});
    check(
        OPTIONS,
        Some(CHATML),
        row.clone(),
        "<|im_start|>user\nAdd\n\n1 1<|im_end|>\n<|im_start|>assistant\n[2<|im_end|>]\n",
    );
    let plain = EncodeOptions { style: PromptStyle::Plain, ..OPTIONS };
    check(
        plain,
        None,
        row,
        "<|endoftext|>Below is an instruction that describes a task, paired with an input that provides further \
         context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n\
         ### Input:\n1 1\n\n### Response:\n[2<|im_end|>]",
    );
    check(OPTIONS, None, json!({"text": "a b"}), "[<|endoftext|>a b<|im_end|>]");
    check(OPTIONS, None, json!({"text": "<|endoftext|>a b<|im_end|>"}), "[<|endoftext|>a b<|im_end|>]");
}

#[test]
fn long_rows_keep_their_head_and_count_what_is_cut() {
    let options = EncodeOptions { max_seq_len: 3, ..OPTIONS };
    let samples =
        encode(None, options, &[json!({"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5]})])
            .unwrap();
    assert_eq!(samples[0].ids, [1, 2, 3]);
    assert_eq!(samples[0].labels, [None, Some(2), None]);
    assert_eq!((samples[0].truncated, samples[0].label_tokens()), (2, 1));
}

#[test]
fn token_ids_are_taken_as_they_are() {
    let rows = [json!({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}), json!({"input_ids": [8, 9]})];
    let samples = encode(None, OPTIONS, &rows).unwrap();
    assert_eq!(samples[1].labels, [Some(8), Some(9)]);
    let error = encode(None, OPTIONS, &[rows[0].clone(), json!({"input_ids": [1, 482]})]).unwrap_err();
    assert!(
        error.ends_with(
            "rows.jsonl line 2: id 482 is beyond the model's vocabulary of 482; ids go from 0 to 481"
        ),
        "{error}"
    );
}

#[test]
fn errors_name_the_row() {
    let no_tokenizer = encode(None, OPTIONS, &[json!({"text": "a"})]).unwrap_err();
    assert!(no_tokenizer.contains("rows.jsonl line 1: the model has no tokenizer"), "{no_tokenizer}");
    let mut raising = tokenizer();
    raising.set_chat_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}".into(),
    );
    let rows = [chat(&[("user", "a")]), chat(&[("system", "b")])];
    let error = encode(Some(&raising), OPTIONS, &rows).unwrap_err();
    assert!(error.ends_with("rows.jsonl line 2: chat template line 1: No system"), "{error}");
    let short = encode(None, EncodeOptions { max_seq_len: 1, ..OPTIONS }, &[json!({"input_ids": [1, 2]})])
        .unwrap_err();
    assert!(short.contains("max_seq_len 1"), "{short}");
}

#[test]
fn many_rows_keep_their_order_over_threads() {
    let rows: Vec<Value> = (0..1000).map(|i| json!({"input_ids": [i % 482, 1]})).collect();
    let samples = encode(None, OPTIONS, &rows).unwrap();
    assert!(samples.iter().enumerate().all(|(i, s)| s.ids[0] as usize == i % 482 && s.place.number == i + 1));
}

#[test]
fn prompts_end_where_the_model_goes_on() {
    let tokenizer = tokenizer();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, json!({"prompt": "a", "completion": "b"}).to_string()).unwrap();
    let file = read_file(&path).unwrap();
    for (style, want) in [
        (PromptStyle::Auto, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"),
        (PromptStyle::Plain, "<|endoftext|>a"),
    ] {
        let encoder = Encoder::new(Some(&tokenizer), 482, EncodeOptions { style, ..OPTIONS }).unwrap();
        let prompt = encoder.prompt(&file.rows[0]).unwrap().unwrap();
        assert_eq!(tokenizer.decode(&prompt.ids, false).unwrap(), want);
        assert_eq!(prompt.completion, "b");
        // the row's own ids go on from there
        assert!(encoder.encode_row(&file.rows[0]).unwrap().ids.starts_with(&prompt.ids));
    }
}
