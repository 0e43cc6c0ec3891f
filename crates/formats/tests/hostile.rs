//! Every file is hostile: whatever its bytes, a parser answers with tensors that lie within it, or with an error.

use engobe_formats::gguf::{self, Gguf, GgufValue, GgufWriter, MetaValue, write_gguf};
use engobe_formats::peft::LoraConfig;
use engobe_formats::safetensors_file::{self, SafetensorsFile, write_safetensors};
use engobe_kernels::storage::StorageType;
use engobe_testkit::damage::{damaged, damages};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

type Owned = (String, Vec<usize>, Vec<u8>);

/// Tensors with distinct names and small shapes.
fn tensors() -> impl Strategy<Value = Vec<Owned>> {
    let shape = prop::collection::vec(0usize..5, 0..4);
    prop::collection::btree_map("[a-z.]{1,12}", shape, 0..6).prop_map(|map| {
        let fill = |(name, shape): (String, Vec<usize>)| {
            let bytes = (0..shape.iter().product::<usize>() * 4).map(|i| i as u8).collect();
            (name, shape, bytes)
        };
        map.into_iter().map(fill).collect()
    })
}

fn safetensors_bytes(tensors: &[Owned]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write_safetensors(&path, tensors, &BTreeMap::new()).unwrap();
    std::fs::read(path).unwrap()
}

fn values() -> Vec<(String, GgufValue)> {
    vec![
        ("general.architecture".into(), GgufValue::String("llama".into())),
        ("a.count".into(), GgufValue::Unsigned(3)),
        ("a.below".into(), GgufValue::Signed(-3)),
        ("a.scale".into(), GgufValue::Float(0.5)),
        ("a.on".into(), GgufValue::Bool(true)),
        (
            "a.words".into(),
            GgufValue::Array(vec![GgufValue::String("x".into()), GgufValue::String("é".into())]),
        ),
    ]
}

fn gguf_bytes() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let floats: Vec<u8> = (0..64 * 4).map(|i| i as u8).collect();
    let tensors = [
        ("a".to_string(), StorageType::F32, vec![2, 32], floats.clone()),
        ("b".to_string(), StorageType::Q4_0, vec![1, 32], floats[..18].to_vec()),
    ];
    write_gguf(&path, &values(), &tensors).unwrap();
    std::fs::read(path).unwrap()
}

/// All ranges lie within the file.
fn check_safetensors(bytes: &[u8]) {
    if let Ok((entries, _)) = safetensors_file::parse(bytes) {
        assert!(entries.iter().all(|(_, _, _, range)| range.end <= bytes.len()));
    }
}

fn check_gguf(bytes: &[u8]) {
    if let Ok(header) = gguf::parse(bytes) {
        assert!(header.tensors.iter().all(|t| t.range.end <= bytes.len()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        check_safetensors(&bytes);
        check_gguf(&bytes);
        check_gguf(&[&b"GGUF\x03\0\0\0"[..], &bytes].concat());
        let _ = LoraConfig::parse(Path::new("x"), &bytes);
    }

    #[test]
    fn safetensors_with_damage(tensors in tensors(), all in damages()) {
        check_safetensors(&damaged(safetensors_bytes(&tensors), &all));
    }

    #[test]
    fn gguf_with_damage(all in damages()) {
        check_gguf(&damaged(gguf_bytes(), &all));
    }

    #[test]
    fn lora_config_with_damage(all in damages()) {
        let text = LoraConfig::default().to_json().into_bytes();
        let _ = LoraConfig::parse(Path::new("x"), &damaged(text, &all));
    }

    #[test]
    fn what_is_written_is_read(tensors in tensors()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        let found: Vec<Owned> = file.tensors().map(|t| (t.name.clone(), t.shape.clone(), t.bytes().to_vec())).collect();
        prop_assert_eq!(found, tensors);
    }
}

#[test]
fn every_cut_of_a_file_is_an_error() {
    let whole = safetensors_bytes(&[("x".into(), vec![3], vec![7; 12])]);
    assert!(safetensors_file::parse(&whole).is_ok());
    for cut in 0..whole.len() {
        assert!(safetensors_file::parse(&whole[..cut]).is_err(), "safetensors cut at {cut}");
    }
    let whole = gguf_bytes();
    let end = gguf::parse(&whole).unwrap().tensors.iter().map(|t| t.range.end).max().unwrap();
    for cut in 0..end {
        assert!(gguf::parse(&whole[..cut]).is_err(), "GGUF cut at {cut}");
    }
}

#[test]
fn a_claim_is_not_believed() {
    let with_header = |json: &str, data: usize| {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        safetensors_file::parse(&bytes)
    };
    for (json, data) in [
        (r#"{"x":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}"#, 4),
        (r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4),
        (r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4),
        (
            r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#,
            6,
        ),
        (r#"{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#, 4),
        (r#"{"x":3}"#, 0),
        ("[]", 0),
    ] {
        assert!(with_header(json, data).is_err(), "{json}");
    }
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    for count in [1u64 << 60, u64::MAX] {
        bytes.truncate(8);
        bytes.extend(count.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        assert!(gguf::parse(&bytes).is_err());
    }
}

/// A file written from another's metadata says the same in the same bytes, whatever the widths of its numbers.
#[test]
fn copied_metadata_is_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let mut odd: Vec<(String, MetaValue)> =
        values().into_iter().map(|(key, value)| (key, value.into())).collect();
    // u8, i16, u64, f64, an empty list of strings, a list of lists
    let more: [(u32, Vec<u8>); 6] = [
        (0, vec![7]),
        (3, vec![0xff, 0xff]),
        (10, 5u64.to_le_bytes().to_vec()),
        (12, 0.1f64.to_le_bytes().to_vec()),
        (9, [&8u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat()),
        (
            9,
            [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &0u32.to_le_bytes(), &1u64.to_le_bytes(), &[3]]
                .concat(),
        ),
    ];
    for (i, (kind, bytes)) in more.into_iter().enumerate() {
        odd.push((format!("odd.{i}"), MetaValue::Copied { kind, bytes }));
    }
    let tensor = || vec![("x".to_string(), StorageType::F32, vec![1])];
    let write = |path: &Path, metadata: &[(String, MetaValue)]| {
        let mut writer = GgufWriter::create(path, metadata, tensor()).unwrap();
        writer.write("x", &[0; 4]).unwrap();
        writer.finish().unwrap();
    };
    write(&first, &odd);
    write(&second, &Gguf::open(&first).unwrap().copied_metadata());
    assert_eq!(std::fs::read(first).unwrap(), std::fs::read(second).unwrap());
}

#[test]
fn what_was_not_announced_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let start = || {
        let tensors =
            vec![("x".to_string(), StorageType::F32, vec![2]), ("y".to_string(), StorageType::F32, vec![1])];
        GgufWriter::create(&path, &[], tensors).unwrap()
    };
    let said = |result: Result<(), engobe_formats::Error>| result.unwrap_err().to_string();
    assert!(said(start().write("y", &[0; 4])).contains("where x was announced"));
    assert!(said(start().write("x", &[0; 9])).contains("9 bytes where 8 are left"));
    assert!(said(start().append(&[0])).contains("no tensor was begun"));
    let mut short = start();
    short.write("x", &[0; 4]).unwrap();
    assert!(said(short.write("y", &[0; 4])).contains("x: 4 bytes are missing"));
    let mut few = start();
    few.write("x", &[0; 8]).unwrap();
    assert!(said(few.finish()).contains("y was announced"));
    let partial = vec![("z".to_string(), StorageType::Q8_0, vec![33])];
    assert!(GgufWriter::create(&path, &[], partial).unwrap_err().to_string().contains("z: [33]"));
    // nothing of all that is left behind
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let mut parts = start();
    parts.begin("x").unwrap();
    parts.append(&[1; 3]).unwrap();
    parts.append(&[2; 5]).unwrap();
    parts.write("y", &[3; 4]).unwrap();
    parts.finish().unwrap();
    let file = Gguf::open(&path).unwrap();
    assert_eq!(file.tensor("x").unwrap().bytes(), [1, 1, 1, 2, 2, 2, 2, 2]);
    assert_eq!(file.tensor("y").unwrap().bytes(), [3; 4]);
}

#[test]
fn gguf_values_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    std::fs::write(&path, gguf_bytes()).unwrap();
    let file = Gguf::open(&path).unwrap();
    for (key, value) in values() {
        assert_eq!(file.metadata()[&key], value, "{key}");
    }
    assert_eq!(file.tensor("b").unwrap().shape, [1, 32]);
    let error = file.tensor("bb").unwrap_err().to_string();
    assert!(error.contains("a.gguf") && error.contains("\"bb\""), "{error}");
    let error = file.u32("a.cuont").unwrap_err().to_string();
    assert!(error.contains("did you mean \"a.count\""), "{error}");
}
