//! Labelled rows: their forms, their classes, and their tokens as transformers has them (`golden/task_rows.py`).

use engobe_data::reader::read_file;
use engobe_data::{
    Content, DataFile, Goal, Label, LabelSet, MicroBatch, Problem, Task, TaskEncoder, TaskOptions,
    TextTokenizer,
};
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Text {
    text: String,
    pair: Option<String>,
    max: usize,
    ids: Vec<u32>,
    types: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct Words {
    words: Vec<String>,
    max: usize,
    ids: Vec<u32>,
    first: Vec<Option<usize>>,
}

#[derive(Deserialize)]
struct Cases {
    texts: Vec<Text>,
    words: Vec<Words>,
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tasks").join(name)
}

fn tokenizer(name: &str) -> TextTokenizer {
    TextTokenizer::from_hf_dir(&golden(name)).unwrap()
}

fn rows(name: &str, content: &str) -> Result<DataFile, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    read_file(&path).map_err(|e| e.to_string().replace(&format!("{}/", dir.path().display()), ""))
}

#[test]
fn texts_pairs_and_words_are_tokenized_as_transformers_does() {
    for name in ["bert", "roberta", "deberta", "t5"] {
        let tokenizer = tokenizer(name);
        let cases: Cases = engobe_testkit::json(&golden(name).join("cases.json"));
        for case in cases.texts {
            let what = format!("{name} {:?} {:?} {}", case.text, case.pair, case.max);
            let found = tokenizer.encode_pair(&case.text, case.pair.as_deref(), case.max).unwrap();
            assert_eq!(found.ids, case.ids, "{what}");
            let from = found.second_type_from.unwrap_or(found.ids.len());
            let types: Vec<u32> = (0..found.ids.len()).map(|i| u32::from(i >= from)).collect();
            assert_eq!(types, case.types.unwrap_or_else(|| vec![0; case.ids.len()]), "{what}");
        }
        for case in cases.words {
            let what = format!("{name} {:?} {}", case.words, case.max);
            let found = tokenizer.encode_words(&case.words, case.max).unwrap();
            assert_eq!(found.ids, case.ids, "{what}");
            assert_eq!(found.first_tokens, case.first, "{what}");
        }
    }
}

fn labelled(file: &DataFile) -> Vec<(String, Option<String>, Option<Label>)> {
    let content = |row: &engobe_data::Row| match &row.content {
        Content::Labelled { text, pair, label } => (text.clone(), pair.clone(), label.clone()),
        other => panic!("{other:?}"),
    };
    file.rows.iter().map(content).collect()
}

#[test]
fn labelled_texts_come_in_many_forms() {
    let one = |text: &str, label: Label| (text.to_string(), None, Some(label));
    let want = [one("good \"film\"", Label::Whole(1)), one("bad", Label::Whole(0))];
    for (name, content) in [
        ("a.jsonl", "{\"text\":\"good \\\"film\\\"\",\"label\":1}\n{\"text\":\"bad\",\"label\":0}"),
        ("a.tsv", "sentence\tlabel\ngood \"film\"\t1\nbad\t0\n"),
        ("a.tsv", "good \"film\"\t1\nbad\t0\n"),
        ("a.csv", "idx,label,sentence\n0,1,\"good \"\"film\"\"\"\n1,0,bad\n"),
    ] {
        assert_eq!(labelled(&rows(name, content).unwrap()), want, "{content}");
    }
    // quotes that nothing closes are part of the text; those around whole cells are not
    let quoted = rows("a.tsv", "\"so\" they say\t1\n\"\t0\n").unwrap();
    assert_eq!(labelled(&quoted)[0].0, "\"so\" they say");
    assert_eq!(labelled(&quoted)[1].0, "\"");
    let enclosed = rows("a.tsv", "text\tlabel\n\"say \"\"no\"\"\"\tx\n").unwrap();
    assert_eq!(labelled(&enclosed), [one("say \"no\"", Label::Name("x".into()))]);
    for (a, b) in [
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question", "sentence"),
        ("text", "text_pair"),
    ] {
        let file = rows("a.jsonl", &format!("{{\"{a}\":\"x\",\"{b}\":\"y\",\"label\":2.5}}")).unwrap();
        assert_eq!(labelled(&file), [("x".to_string(), Some("y".to_string()), Some(Label::Number(2.5)))]);
        // rows to be labelled are pairs all the same
        let file = rows("a.jsonl", &format!("{{\"{a}\":\"x\",\"{b}\":\"y\"}}")).unwrap();
        assert_eq!(labelled(&file), [("x".to_string(), Some("y".to_string()), None)]);
    }
    let several =
        rows("a.jsonl", "{\"text\":\"x\",\"labels\":[\"a\",\"b\"]}\n{\"text\":\"y\",\"labels\":[]}").unwrap();
    let names = Label::Many(vec![Label::Name("a".into()), Label::Name("b".into())]);
    assert_eq!(labelled(&several)[0].2, Some(names));
    // what answers a prompt stays a prompt and its completion
    let scored = rows("a.jsonl", "{\"prompt\":\"x\",\"completion\":\"y\",\"score\":3}").unwrap();
    assert!(matches!(scored.rows[0].content, Content::Pair { .. }));
    let pair = rows("a.tsv", "source\ttarget\nHaus\thouse\n").unwrap();
    assert!(matches!(pair.rows[0].content, Content::Pair { .. }));
}

#[test]
fn tagged_words_come_as_lists_and_as_text() {
    for (name, content) in [
        ("a.jsonl", "{\"tokens\":[\"Jim\",\"ran\"],\"tags\":[\"B-PER\",\"O\"]}"),
        ("a.jsonl", "{\"words\":\"Jim ran\",\"ner_tags\":\"B-PER O\"}"),
        ("a.tsv", "tokens\ttags\nJim ran\tB-PER O\n"),
        ("a.csv", "tokens,tags\n\"[\"\"Jim\"\", \"\"ran\"\"]\",\"[\"\"B-PER\"\", \"\"O\"\"]\"\n"),
    ] {
        let file = rows(name, content).unwrap();
        let Content::Tagged { tokens, tags } = &file.rows[0].content else { panic!("{content}") };
        assert_eq!(tokens, &["Jim", "ran"]);
        assert_eq!(tags.as_ref().unwrap(), &[Label::Name("B-PER".into()), Label::Name("O".into())]);
    }
    let error = rows("a.jsonl", "{\"tokens\":[\"a\",\"b\"],\"tags\":[\"O\"]}").unwrap_err();
    assert_eq!(error, "a.jsonl line 1: 1 tags for 2 tokens; one tag a word");
    let error = rows("a.jsonl", "{\"text\":\"a\",\"label\":{\"x\":1}}").unwrap_err();
    assert_eq!(
        error,
        "a.jsonl line 1: \"label\" must be a name, a number, or a list of either, this is an object"
    );
}

fn set(task: Task, content: &str, known: &[&str]) -> Result<LabelSet, String> {
    let known: Vec<String> = known.iter().map(|s| s.to_string()).collect();
    let file = rows("a.jsonl", content)?;
    LabelSet::of_rows(task, &[file], &known).map_err(|e| e.to_string())
}

#[test]
fn classes_get_ids_and_keep_those_that_the_model_knows() {
    let names = "{\"text\":\"a\",\"label\":\"pos\"}\n{\"text\":\"b\",\"label\":\"neg\"}";
    assert_eq!(set(Task::SeqCls, names, &[]).unwrap().names(), ["neg", "pos"]);
    assert_eq!(
        set(Task::SeqCls, names, &["pos", "neutral", "neg"]).unwrap().names(),
        ["pos", "neutral", "neg"]
    );
    let ids = "{\"text\":\"a\",\"label\":2}\n{\"text\":\"b\",\"label\":0}";
    assert_eq!(set(Task::SeqCls, ids, &[]).unwrap().names(), ["LABEL_0", "LABEL_1", "LABEL_2"]);
    assert_eq!(set(Task::SeqCls, ids, &["x", "y", "z"]).unwrap().names(), ["x", "y", "z"]);
    let many =
        set(Task::SeqCls, "{\"text\":\"a\",\"labels\":[\"q\",\"p\"]}\n{\"text\":\"b\",\"labels\":[]}", &[])
            .unwrap();
    assert_eq!((many.problem, many.len()), (Problem::MultiLabel, 2));
    let number = set(Task::Regression, "{\"text\":\"a\",\"label\":2}", &[]).unwrap();
    assert_eq!((number.problem, number.len()), (Problem::Regression, 1));
    for (task, content, part) in [
        (
            Task::SeqCls,
            "{\"text\":\"a\",\"label\":1}\n{\"text\":\"b\",\"label\":\"x\"}",
            "labels are ids in some rows",
        ),
        (Task::SeqCls, "{\"text\":\"a\",\"label\":-1}", "a.jsonl line 1: label -1 is no class"),
        (Task::SeqCls, "{\"text\":\"a\",\"label\":1.5}", "label 1.5 is no class"),
        (Task::Regression, "{\"text\":\"a\",\"label\":\"x\"}", "label x is no number"),
        (Task::SeqCls, "{\"text\":\"a\",\"label\":\"\"}", "no row has a label"),
    ] {
        let error = set(task, content, &[]).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn labels_are_kept_beside_the_adapter() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(LabelSet::load(dir.path()).unwrap(), None);
    let labels = LabelSet::new(Task::TokenCls, Problem::SingleLabel, vec!["O".into(), "B-x".into()]);
    labels.save(dir.path()).unwrap();
    assert_eq!(LabelSet::load(dir.path()).unwrap().as_ref(), Some(&labels));
    let checkpoint = dir.path().join("checkpoints/step-00000001");
    std::fs::create_dir_all(&checkpoint).unwrap();
    assert_eq!(LabelSet::load(&checkpoint).unwrap().as_ref(), Some(&labels));
    for (bad, part) in [
        ("{", "invalid JSON"),
        ("{}", "task is missing"),
        (r#"{"task":"seq-cls","problem_type":"x"}"#, "is not known"),
        (r#"{"task":"seq-cls","problem_type":"regression","id2label":{"1":"a"}}"#, "from 0 on"),
    ] {
        std::fs::write(dir.path().join("labels.json"), bad).unwrap();
        let error = LabelSet::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

fn batch(task: Task, labels: &LabelSet, content: &str) -> Result<MicroBatch, String> {
    let tokenizer = tokenizer("bert");
    let options = TaskOptions { task, max_seq_len: 8 };
    let encoder = TaskEncoder::new(Some(&tokenizer), Some(labels), tokenizer.vocab_size(), options);
    // the file lies in a directory of its own
    let short = |e: engobe_data::Error| e.to_string().split('/').next_back().unwrap_or_default().to_string();
    let samples = encoder.encode(&[rows("a.jsonl", content)?]).map_err(short)?;
    Ok(MicroBatch::of(&samples, &(0..samples.len()).collect::<Vec<_>>()))
}

#[test]
fn batches_hold_types_goals_and_tags() {
    let labels = LabelSet::new(Task::SeqCls, Problem::SingleLabel, vec!["no".into(), "yes".into()]);
    let rows = "{\"text\":\"the\",\"text_pair\":\"cat\",\"label\":\"yes\"}\n{\"text\":\"a\",\"text_pair\":\"a\",\"label\":0}";
    let found = batch(Task::SeqCls, &labels, rows).unwrap();
    assert_eq!(found.goals, [Goal::Class(1), Goal::Class(0)]);
    assert_eq!((found.label_tokens, found.targets.iter().flatten().count()), (2, 0));
    let types = found.types.unwrap();
    for segment in &found.segments {
        let from = segment.start + found.tokens[segment.clone()].iter().position(|t| *t == 3).unwrap() + 1;
        assert!((segment.clone()).all(|i| types[i] == u32::from(i >= from)), "{types:?}");
    }
    let tags = LabelSet::new(Task::TokenCls, Problem::SingleLabel, vec!["O".into(), "X".into()]);
    let found =
        batch(Task::TokenCls, &tags, "{\"tokens\":[\"the\",\"puppeteer\"],\"tags\":[\"X\",\"O\"]}").unwrap();
    // [CLS] the p ##u ...: the first token of a word has its tag, unshifted
    assert_eq!(found.targets[..4], [None, Some(1), Some(0), None]);
    assert_eq!(found.label_tokens, 2);
    let error = batch(Task::SeqCls, &labels, "{\"text\":\"a\",\"label\":\"maybe\"}").unwrap_err();
    assert_eq!(error, "a.jsonl line 1: label maybe is none of the 2 classes no, yes");
    let error = batch(Task::TokenCls, &tags, "{\"text\":\"a\",\"label\":1}").unwrap_err();
    assert_eq!(error, "a.jsonl line 1: the task token-cls needs columns tokens and tags");
}
