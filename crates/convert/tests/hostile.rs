//! Whatever the bytes of an adapter's files, a conversion ends with a file or an error, never a panic.

mod support;

use engobe_convert::Lora;
use engobe_kernels::storage::StorageType;
use engobe_models::{LoadOptions, Outline};
use engobe_testkit::golden;
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};
use support::base_of;

#[derive(Clone, Debug)]
enum Damage {
    Byte(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Number(prop::sample::Index, u64),
    /// a digit of a JSON header or configuration
    Digit(prop::sample::Index, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    let large = prop_oneof![any::<u64>(), Just(u64::MAX), Just(0), Just(1 << 31)];
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(i, b)| Damage::Byte(i, b)),
        at().prop_map(Damage::Cut),
        (at(), large).prop_map(|(i, n)| Damage::Number(i, n)),
        (at(), b'0'..=b'9').prop_map(|(i, d)| Damage::Digit(i, d)),
    ]
}

fn damaged(mut bytes: Vec<u8>, all: &[Damage]) -> Vec<u8> {
    for damage in all {
        if bytes.is_empty() {
            break;
        }
        match damage {
            Damage::Byte(i, b) => *i.get_mut(&mut bytes) = *b,
            Damage::Cut(i) => bytes.truncate(i.index(bytes.len())),
            Damage::Number(i, n) => {
                let at = i.index(bytes.len());
                let end = bytes.len().min(at + 8);
                bytes[at..end].copy_from_slice(&n.to_le_bytes()[..end - at]);
            }
            Damage::Digit(i, d) => {
                let digits: Vec<usize> =
                    (0..bytes.len().min(8192)).filter(|at| bytes[*at].is_ascii_digit()).collect();
                if !digits.is_empty() {
                    bytes[*i.get(&digits)] = *d;
                }
            }
        }
    }
    bytes
}

/// The three formats of one adapter.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> (Outline, Self) {
        let outline = Outline::read(&base_of("patterns"), &LoadOptions::default()).unwrap();
        let this = Self { dir: tempfile::tempdir().unwrap() };
        let lora = Lora::read(&golden("peft/patterns"), Some(&outline), None).unwrap();
        lora.write_peft(&this.path("peft"), Some(&outline), None).unwrap();
        lora.write_mlx(&this.path("mlx"), Some(&outline), None).unwrap();
        lora.write_gguf(&this.path("lora.gguf"), &outline, StorageType::F32).unwrap();
        (outline, this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Reads, and writes what was read in all formats.
fn convert(path: &Path, outline: Option<&Outline>) {
    let Ok(lora) = Lora::read(path, outline, None) else { return };
    let dir = tempfile::tempdir().unwrap();
    let _ = lora.write_peft(&dir.path().join("peft"), outline, None);
    let _ = lora.write_mlx(&dir.path().join("mlx"), outline, None);
    if let Some(outline) = outline {
        let _ = lora.write_gguf(&dir.path().join("lora.gguf"), outline, StorageType::F16);
    }
}

#[test]
fn damaged_files_end_in_an_error_or_a_file() {
    let (outline, files) = Files::new();
    let sources = [
        ("peft", "adapter_model.safetensors"),
        ("peft", "adapter_config.json"),
        ("mlx", "adapters.safetensors"),
        ("mlx", "adapter_config.json"),
        ("lora.gguf", ""),
    ];
    let config = ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let damages = (0..sources.len(), prop::collection::vec(damage(), 1..4), any::<bool>());
    let whole: Vec<Vec<u8>> = sources
        .map(|(at, file)| {
            let path = if file.is_empty() { files.path(at) } else { files.path(at).join(file) };
            fs::read(path).unwrap()
        })
        .into();
    runner
        .run(&damages, |(which, damage, known)| {
            let (at, file) = sources[which];
            let path = if file.is_empty() { files.path(at) } else { files.path(at).join(file) };
            fs::write(&path, damaged(whole[which].clone(), &damage)).unwrap();
            convert(&files.path(at), known.then_some(&outline));
            fs::write(&path, &whole[which]).unwrap();
            Ok(())
        })
        .unwrap();
}
