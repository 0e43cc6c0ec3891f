//! What tests of several crates share: where the golden files are, and how numbers are compared.
//!
//! Golden files are outputs of transformers, PEFT and llama.cpp; `golden/` keeps them beside the scripts that made
//! them.

#[cfg(feature = "damage")]
pub mod damage;
#[cfg(feature = "models")]
pub mod models;

use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// A file or directory in `golden/`.
pub fn golden(path: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(path)
}

/// A JSON file in `golden/`. Panics, as tests do, if it cannot be read.
pub fn golden_json<T: DeserializeOwned>(path: impl AsRef<Path>) -> T {
    json(&golden(path))
}

/// A JSON file. Panics if it cannot be read.
pub fn json<T: DeserializeOwned>(path: &Path) -> T {
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Names of the directories in a directory of `golden/`, in order.
pub fn cases(dir: &str) -> Vec<String> {
    let entries = std::fs::read_dir(golden(dir)).unwrap_or_else(|e| panic!("golden/{dir}: {e}"));
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|e| e.path().is_dir())
        .filter_map(|e| e.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// The directory of the base of an adapter in `golden/peft`.
pub fn base_of(adapter: &str) -> PathBuf {
    let expected: serde_json::Value = golden_json(format!("peft/{adapter}/expected.json"));
    let base = expected["base"].as_str().unwrap_or_else(|| panic!("golden/peft/{adapter}: no base"));
    golden(format!("llama/{base}"))
}

/// What [`assert_close`] expects, of what another model said.
pub fn doubles(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|v| f64::from(*v)).collect()
}

/// Panics if some element differs by more than `tolerance` times the largest expected one.
pub fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*a) - b).abs();
        assert!(error <= tolerance * size, "{what}: element {i} is {a}, expected {b} (off by {error:.2e})");
    }
}

/// Panics if the numbers differ by more than `tolerance` times the expected one.
pub fn assert_relative(found: f64, expected: f64, tolerance: f64, what: &str) {
    let error = (found - expected).abs() / expected.abs();
    assert!(error <= tolerance, "{what}: {found}, expected {expected} (off by {error:.2e})");
}
