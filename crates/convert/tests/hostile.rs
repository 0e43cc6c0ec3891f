//! Whatever the bytes of an adapter's files, a conversion ends with a file or an error, never a panic.

use engobe_convert::Lora;
use engobe_kernels::storage::StorageType;
use engobe_models::{LoadOptions, Outline};
use engobe_testkit::damage::{damaged, damages};
use engobe_testkit::{base_of, golden};
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};

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
    let cases = (0..sources.len(), damages(), any::<bool>());
    let whole: Vec<Vec<u8>> = sources
        .map(|(at, file)| {
            let path = if file.is_empty() { files.path(at) } else { files.path(at).join(file) };
            fs::read(path).unwrap()
        })
        .into();
    runner
        .run(&cases, |(which, damage, known)| {
            let (at, file) = sources[which];
            let path = if file.is_empty() { files.path(at) } else { files.path(at).join(file) };
            fs::write(&path, damaged(whole[which].clone(), &damage)).unwrap();
            convert(&files.path(at), known.then_some(&outline));
            fs::write(&path, &whole[which]).unwrap();
            Ok(())
        })
        .unwrap();
}
