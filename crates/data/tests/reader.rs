//! Files of every kind and form, and what is said about bad ones.

use engobe_data::reader::{DataFile, read, read_file};
use engobe_data::{Content, Form};
use serde_json::json;
use std::path::PathBuf;

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn one(name: &str, bytes: impl AsRef<[u8]>) -> DataFile {
    let dir = Dir::new();
    read_file(&dir.file(name, bytes)).unwrap()
}

/// The error, without the directory.
fn error(name: &str, bytes: impl AsRef<[u8]>) -> String {
    let dir = Dir::new();
    let text = read_file(&dir.file(name, bytes)).unwrap_err().to_string();
    text.replace(&format!("{}/", dir.0.path().display()), "")
}

fn texts(file: &DataFile) -> Vec<(&str, usize)> {
    let text = |row: &'_ engobe_data::Row| row.place.number;
    file.rows
        .iter()
        .map(|row| match &row.content {
            Content::Text(t) => (t.as_str(), text(row)),
            other => panic!("{other:?}"),
        })
        .collect()
}

#[test]
fn json_lines_json_and_csv_give_the_same_rows() {
    let want = [("a", 1), ("b\n\"c\"", 2)];
    let jsonl = one("x.jsonl", "\u{feff}{\"text\":\"a\"}\r\n{\"text\":\"b\\n\\\"c\\\"\"}");
    assert_eq!(texts(&jsonl), want);
    let blank = one("x.ndjson", "\n\n{\"text\":\"a\"}\n   \n");
    assert_eq!(texts(&blank), [("a", 3)]);
    let rows = r#"[{"text":"a"},{"text":"b\n\"c\""}]"#;
    for name in
        [rows.to_owned(), format!("{{\"data\":{rows},\"version\":1}}"), format!("{{\"train\":{rows}}}")]
    {
        assert_eq!(texts(&one("x.json", name)), want);
    }
    // JSON lines under the name of JSON
    assert_eq!(texts(&one("x.json", "{\"text\":\"a\"}\n{\"text\":\"b\"}\n")), [("a", 1), ("b", 2)]);
    let csv = one("x.csv", "id,text\n1,a\n2,\"b\n\"\"c\"\"\"\n3,d\n");
    assert_eq!(texts(&csv), [("a", 2), ("b\n\"c\"", 3), ("d", 5)]);
    assert_eq!(csv.ignored, ["id"]);
    assert_eq!(texts(&one("x.tsv", "text\tid\na,b\t1\n")), [("a,b", 2)]);
}

#[test]
fn forms_are_recognised_and_said() {
    let say = |row: serde_json::Value| {
        let file = one("x.jsonl", row.to_string());
        (
            file.form.clone(),
            file.describe().rsplit('/').next().unwrap().to_owned(),
            file.rows[0].content.clone(),
        )
    };
    let message = json!({"role": "user", "content": "a"});
    let (form, said, content) = say(json!({"id": 1, "messages": [message]}));
    assert_eq!(form, Form::Messages { key: "messages".into() });
    assert_eq!(said, "x.jsonl: 1 row of chat messages (column messages: role, content); not used: id");
    assert_eq!(content, Content::Chat { messages: vec![message.clone()], tools: None, prompt_messages: 0 });
    let (form, _, content) = say(
        json!({"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    );
    assert_eq!(form, Form::ShareGpt { key: "conversations".into() });
    let want = vec![
        json!({"role": "system", "content": "s"}),
        message.clone(),
        json!({"role": "assistant", "content": "b"}),
    ];
    assert_eq!(content, Content::Chat { messages: want, tools: None, prompt_messages: 0 });
    let (_, said, content) = say(json!({"question": "a", "answer": 2}));
    assert_eq!(said, "x.jsonl: 1 row of prompt and completion (columns question, answer)");
    assert_eq!(content, Content::Pair { prompt: "a".into(), completion: "2".into() });
    let (_, _, content) = say(json!({"instruction": "a", "input": null, "output": "c"}));
    assert_eq!(
        content,
        Content::Alpaca { instruction: "a".into(), input: String::new(), output: "c".into() }
    );
    let (_, _, content) = say(json!({"instruction": "a", "context": "b", "response": "c"}));
    assert_eq!(content, Content::Alpaca { instruction: "a".into(), input: "b".into(), output: "c".into() });
    let (_, _, content) = say(
        json!({"prompt": [message], "completion": [{"role": "assistant", "content": "b"}], "tools": "[{}]"}),
    );
    let Content::Chat { messages, tools, prompt_messages } = content else { panic!() };
    assert_eq!((messages.len(), tools, prompt_messages), (2, Some(json!([{}])), 1));
    let (_, said, content) = say(json!({"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}));
    assert_eq!(said, "x.jsonl: 1 row of token ids (columns input_ids, labels); not used: attention_mask");
    assert_eq!(content, Content::Tokens { ids: vec![1, 2], labels: Some(vec![None, Some(2)]) });
    // labels may begin after the first row, and a row without them has all of its ids as labels
    let mixed = one("x.jsonl", "{\"input_ids\":[1,2]}\n{\"input_ids\":[3,4],\"labels\":[-100,4]}\n");
    assert_eq!(mixed.form, Form::Tokenized { labels: true });
    let labels: Vec<_> = mixed.rows.iter().map(|r| r.content.clone()).collect();
    assert_eq!(labels[0], Content::Tokens { ids: vec![1, 2], labels: None });
    assert_eq!(labels[1], Content::Tokens { ids: vec![3, 4], labels: Some(vec![None, Some(4)]) });
    let csv = one("x.csv", "input_ids,labels\n\"[1, 2]\",\"[-100, 2]\"\n");
    assert_eq!(csv.rows[0].content, content);
}

#[test]
fn bad_rows_are_named() {
    let good = "{\"prompt\":\"a\",\"completion\":\"b\"}\n";
    for (name, bytes, want) in [
        (
            "d.jsonl",
            format!("{good}{{\"prompt\": }}"),
            "d.jsonl line 2: invalid JSON: expected value at column 12",
        ),
        (
            "d.jsonl",
            format!("{good}\n[1]"),
            "d.jsonl line 3: a row is a JSON object like {\"text\": ...}, this is a list",
        ),
        (
            "d.jsonl",
            format!("{good}{{\"prompt\":\"a\",\"answer\":\"b\"}}"),
            "d.jsonl line 2: \"completion\" is missing; the file was read as prompt and completion (columns prompt, completion); this row has prompt, answer",
        ),
        (
            "d.jsonl",
            format!("{good}{{\"prompt\":\"a\",\"completion\":{{}}}}"),
            "d.jsonl line 2: \"completion\" must be a string, this is an object",
        ),
        (
            "d.json",
            "[{\"text\":\"a\"},{\"text\":null}]".into(),
            "d.json row 2: \"text\" is missing; the file was read as plain text (column text); this row has text",
        ),
        (
            "d.json",
            "[{\"text\":\"a\"},".into(),
            "d.json: invalid JSON: EOF while parsing a value at line 1 column 14",
        ),
        ("d.json", "3".into(), "d.json: a JSON data file is a list of rows, this is a number"),
        ("d.csv", "text,id\na,1\nb\n".into(), "d.csv line 3: 1 fields where the header has 2"),
        ("d.csv", "text,text\na,1\n".into(), "d.csv line 1: column \"text\" stands twice in the header"),
        (
            "d.jsonl",
            "{\"promt\":\"a\"}".into(),
            "d.jsonl line 1: the columns do not tell what to learn: found promt; needed are messages (chat), prompt + completion, source + target, instruction + output (Alpaca), text, text (+ text_pair) + label, tokens + tags, or input_ids; is \"promt\" meant to be \"prompt\"?",
        ),
        (
            "d.jsonl",
            "{\"messages\":[]}".into(),
            "d.jsonl line 1: \"messages\" is an empty list; a conversation has at least one message",
        ),
        (
            "d.jsonl",
            "{\"messages\":[{\"content\":\"a\"}]}".into(),
            "d.jsonl line 1: message 1 of \"messages\" has no \"role\"",
        ),
        (
            "d.jsonl",
            "{\"messages\":[{\"role\":\"user\",\"content\":null}]}".into(),
            "d.jsonl line 1: message 1 of \"messages\" has no \"content\"",
        ),
        (
            "d.jsonl",
            "{\"conversations\":[{\"from\":\"dog\",\"value\":\"a\"}]}".into(),
            "d.jsonl line 1: turn 1 of \"conversations\" is from \"dog\"; known are human, gpt, system, tool",
        ),
        ("d.jsonl", "{\"input_ids\":[1,-2]}".into(), "d.jsonl line 1: input_ids[1] is -2; ids begin at 0"),
        (
            "d.jsonl",
            "{\"input_ids\":[1],\"labels\":[-1]}".into(),
            "d.jsonl line 1: labels[0] is -1; a label is a token id, or -100 where masked",
        ),
        ("d.jsonl", "".into(), "d.jsonl: no rows: training needs at least one"),
        ("d.json", "[]".into(), "d.json: no rows: training needs at least one"),
        ("d.csv", "text\n".into(), "d.csv: no rows: training needs at least one"),
        (
            "d.txt",
            "a".into(),
            "d.txt: unknown kind of data file; data files end in .jsonl, .ndjson, .json, .csv, .tsv or .parquet",
        ),
        ("d.parquet", "PAR1 not really".into(), "d.parquet: not a readable Parquet file"),
    ] {
        let got = error(name, bytes);
        assert!(got.starts_with(want), "\n got {got}\nwant {want}");
    }
    assert!(
        error("d.jsonl", b"{\"text\":\"\xff\"}")
            .starts_with("d.jsonl line 1: invalid JSON: invalid unicode code point")
    );
    assert!(error("d.csv", b"text\n\xff\n").starts_with("d.csv line 2: not UTF-8"));
    let missing = read_file(std::path::Path::new("/no/such.jsonl")).unwrap_err().to_string();
    assert!(missing.starts_with("/no/such.jsonl: No such file"), "{missing}");
}

#[test]
fn directories_are_read_in_order_of_name() {
    let dir = Dir::new();
    dir.file("b.jsonl", "{\"text\":\"2\"}");
    dir.file("a.csv", "text\n1\n");
    dir.file("README.md", "no data");
    let files = read(&[dir.0.path().to_path_buf()]).unwrap();
    assert_eq!(files.iter().flat_map(texts).map(|t| t.0).collect::<Vec<_>>(), ["1", "2"]);
    let empty = Dir::new();
    assert!(
        read(&[empty.0.path().to_path_buf()])
            .unwrap_err()
            .to_string()
            .contains("no data files in this directory")
    );
}

#[test]
fn parquet_lists_of_structs_are_messages() {
    // written by pyarrow 21.0.0: {"messages": [[{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Yo"}], ...], "n": [1, 2]}
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/messages.parquet");
    let file = read_file(&path).unwrap();
    assert_eq!(file.form, Form::Messages { key: "messages".into() });
    assert_eq!(file.ignored, ["n"]);
    let Content::Chat { messages, .. } = &file.rows[0].content else { panic!() };
    assert_eq!(
        messages,
        &[json!({"role": "user", "content": "Hi é"}), json!({"role": "assistant", "content": "Yo"})]
    );
    assert_eq!(file.rows[1].place.to_string().rsplit('/').next().unwrap(), "messages.parquet row 2");
    // the same file with its end cut off, and with bytes changed: an error, never a panic
    let bytes = std::fs::read(&path).unwrap();
    for cut in [bytes.len() / 2, bytes.len() - 1, 4, 0] {
        assert!(error("cut.parquet", &bytes[..cut]).starts_with("cut.parquet: "), "{cut}");
    }
    let dir = Dir::new();
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 0xff;
        let _ = read_file(&dir.file("bad.parquet", &bad));
    }
}
