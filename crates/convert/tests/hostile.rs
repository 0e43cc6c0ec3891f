//! Whatever the bytes of an adapter's files, a conversion ends with a file or an error, never a panic.

use engobe_convert::Lora;
use engobe_kernels::storage::StorageType;
use engobe_models::Blueprint;
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
    fn new() -> (Blueprint, Self) {
        let blueprint = Blueprint::read(&base_of("patterns")).unwrap();
        let this = Self { dir: tempfile::tempdir().unwrap() };
        let lora = Lora::read(&golden("peft/patterns"), Some(&blueprint), None).unwrap();
        lora.write_peft(&this.path("peft"), Some(&blueprint), None).unwrap();
        lora.write_mlx(&this.path("mlx"), Some(&blueprint), None).unwrap();
        lora.write_gguf(&this.path("lora.gguf"), &blueprint, StorageType::F32).unwrap();
        (blueprint, this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Reads, and writes what was read in all formats.
fn convert(path: &Path, blueprint: Option<&Blueprint>) {
    let Ok(lora) = Lora::read(path, blueprint, None) else { return };
    let dir = tempfile::tempdir().unwrap();
    let _ = lora.write_peft(&dir.path().join("peft"), blueprint, None);
    let _ = lora.write_mlx(&dir.path().join("mlx"), blueprint, None);
    if let Some(blueprint) = blueprint {
        let _ = lora.write_gguf(&dir.path().join("lora.gguf"), blueprint, StorageType::F16);
    }
}

#[test]
fn damaged_files_end_in_an_error_or_a_file() {
    let (blueprint, files) = Files::new();
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
            convert(&files.path(at), known.then_some(&blueprint));
            fs::write(&path, &whole[which]).unwrap();
            Ok(())
        })
        .unwrap();
}
