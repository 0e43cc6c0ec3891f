//! What each crate must not know (ARCHITECTURE.md), checked on the manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Crate, what it may depend on among ours, and which outside crates it must not have.
const ROOMS: [(&str, &[&str], &[&str]); 13] = [
    ("kernels", &[], &["candle-core", "tokenizers", "clap", "anyhow"]),
    ("autograd", &["kernels"], &["safetensors", "tokenizers", "clap", "anyhow"]),
    ("nn", &["kernels", "autograd"], &["safetensors", "tokenizers", "clap", "anyhow"]),
    ("formats", &["kernels"], &["candle-core", "tokenizers", "clap", "anyhow"]),
    ("adapters", &["kernels", "autograd", "nn", "formats"], &["tokenizers", "clap", "anyhow"]),
    ("models", &["kernels", "autograd", "nn", "formats"], &["tokenizers", "clap", "anyhow"]),
    ("data", &["formats"], &["candle-core", "clap", "anyhow", "gemm"]),
    ("metrics", &[], &["candle-core", "tokenizers", "serde", "clap", "anyhow"]),
    (
        "train",
        &["kernels", "autograd", "nn", "formats", "adapters", "models", "data", "metrics"],
        &["clap", "anyhow", "indicatif", "plotters"],
    ),
    (
        "convert",
        &["kernels", "autograd", "nn", "formats", "adapters", "models", "data"],
        &["clap", "anyhow", "indicatif"],
    ),
    ("infer", &["kernels", "autograd", "nn", "adapters", "models"], &["clap", "anyhow", "indicatif"]),
    ("testkit", &["kernels", "autograd", "nn", "formats", "models"], &["clap"]),
    (
        "engobe",
        &[
            "kernels", "autograd", "nn", "formats", "adapters", "models", "data", "convert", "train",
            "infer", "metrics",
        ],
        &[],
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Names under `[dependencies]` (not the dev ones) of a crate.
fn dependencies(name: &str) -> BTreeSet<String> {
    let path = root().join("crates").join(name).join("Cargo.toml");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let manifest: toml::Table = toml::from_str(&text).unwrap();
    let mut found = BTreeSet::new();
    for (section, table) in &manifest {
        if section == "dependencies" {
            found.extend(table.as_table().unwrap().keys().cloned());
        }
        if section == "target" {
            for (_, target) in table.as_table().unwrap() {
                let table = target.get("dependencies").and_then(toml::Value::as_table);
                found.extend(table.into_iter().flat_map(|t| t.keys().cloned()));
            }
        }
    }
    found
}

#[test]
fn every_crate_knows_only_what_it_may() {
    for (name, may, must_not) in ROOMS {
        for dependency in dependencies(name) {
            if let Some(ours) = dependency.strip_prefix("engobe-") {
                assert!(may.contains(&ours), "{name} must not know {ours}");
            }
            assert!(!must_not.contains(&dependency.as_str()), "{name} must not know {dependency}");
        }
    }
}

#[test]
fn every_crate_is_in_the_table() {
    let listed: BTreeSet<&str> = ROOMS.iter().map(|(name, ..)| *name).collect();
    for entry in std::fs::read_dir(root().join("crates")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(listed.contains(name.as_str()), "crates/{name} has no rule in this test and ARCHITECTURE.md");
    }
}

/// Models never name a method; methods, layers and ops never name a model.
#[test]
fn names_stay_in_their_rooms() {
    let forbidden: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("models", ["lora", "prefix_tuning", "ia3"].as_slice()),
        ("adapters", ["llama", "mistral", "gguf"].as_slice()),
        ("nn", ["lora", "mistral", "llamaconfig"].as_slice()),
        ("kernels", ["candle", "tensor::"].as_slice()),
    ]);
    for (name, words) in forbidden {
        for file in sources(&root().join("crates").join(name).join("src")) {
            let text = std::fs::read_to_string(&file).unwrap();
            for (i, line) in text.lines().enumerate() {
                let code = line.split("//").next().unwrap_or_default().to_lowercase();
                for word in words {
                    assert!(
                        !code.contains(word),
                        "{}:{}: {name} must not say {word:?}",
                        file.display(),
                        i + 1
                    );
                }
            }
        }
    }
}

/// House rules that the compiler does not check.
#[test]
fn house_rules() {
    for entry in std::fs::read_dir(root().join("crates")).unwrap() {
        for file in sources(&entry.unwrap().path().join("src")) {
            let text = std::fs::read_to_string(&file).unwrap();
            let lines = text.lines().count();
            assert!(lines <= 560, "{} has {lines} lines: split it", file.display());
            for word in ["todo!(", "unimplemented!(", "dbg!("] {
                assert!(!text.contains(word), "{} has {word}", file.display());
            }
        }
    }
}

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}
