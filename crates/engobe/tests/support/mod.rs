//! Runs the binary as a user does.

// each file of tests uses what it needs of this
#![allow(dead_code)]

use engobe_formats::safetensors_file::{SafetensorsFile, write_typed};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A file or directory in `golden/`.
pub fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(path)
}

/// engobe, with nothing of the caller's environment that changes what it does.
pub fn engobe(args: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engobe"));
    command.args(args);
    for name in ["HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "ENGOBE_CACHE"] {
        command.env_remove(name);
    }
    command
}

/// What `--json` printed.
pub fn json(command: &mut Command) -> Value {
    let done = command.arg("--json").arg("--quiet").output().unwrap();
    assert!(done.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8(done.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap()
}

/// The one line of an error, and its exit status.
pub fn error(command: &mut Command) -> (i32, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    let text = String::from_utf8(stderr).unwrap();
    let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("engobe:")).collect();
    assert_eq!(lines.len(), 1, "{command:?}\n{text}");
    assert!(!text.contains("mistake of ours"), "{text}");
    (status.code().unwrap(), lines[0].to_string())
}

/// A model of `golden/` with a tiny tokenizer of the data crate's tests: the matrices in `grown` get as many rows as the
/// tokenizer has tokens, by repeating rows, each time turned by an element more.
pub fn with_tokenizer(base: &str, tokenizer: &str, vocab: usize, grown: &[&str], to: &Path) {
    let from = golden(base);
    fs::create_dir_all(to).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    config["vocab_size"] = vocab.into();
    fs::write(to.join("config.json"), config.to_string()).unwrap();
    let file = SafetensorsFile::open(&from.join("model.safetensors")).unwrap();
    let tensors = file.tensors().map(|view| {
        let (mut shape, mut bytes) = (view.shape.clone(), view.bytes().to_vec());
        if grown.iter().any(|name| view.name.ends_with(name)) {
            let (row, element) = (bytes.len() / shape[0], bytes.len() / shape[0] / shape[1]);
            let turned = |i: usize| {
                let mut row = bytes[i % shape[0] * row..][..row].to_vec();
                row.rotate_left(i / shape[0] * element);
                row
            };
            bytes = (0..vocab).flat_map(turned).collect();
            shape[0] = vocab;
        }
        (view.name.clone(), view.dtype.clone(), shape, bytes)
    });
    write_typed(&to.join("model.safetensors"), tensors.collect(), &BTreeMap::new()).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/golden/tasks").join(tokenizer);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(tokenizer.join(name), to.join(name)).unwrap();
    }
}
