//! Adapters between PEFT, mlx-lm and GGUF: what comes back says the same.

mod support;

use engobe_convert::{AdapterFormat, Lora};
use engobe_formats::gguf::lora::GgufLora;
use engobe_formats::mlx::MlxAdapter;
use engobe_formats::peft::{LoraConfig, PeftAdapter};
use engobe_kernels::storage::StorageType;
use engobe_models::{LoadOptions, Outline};
use engobe_testkit::{assert_close, base_of, doubles, golden};
use std::path::Path;
use support::logits;

/// Those of `golden/peft` that consist of LoRA pairs alone: plain, rank-stabilised, ranks and alphas by pattern,
/// some layers only, a head.
const PAIRS: [&str; 6] = ["default", "all_linear", "patterns", "regex", "layers", "head"];

/// Factors other than the format's own are rounded into B once: some 1e-7 of the largest logit a layer.
const TOLERANCE: f64 = 2e-6;

fn read(name: &str) -> (Outline, Lora) {
    let outline = Outline::read(&base_of(name), &LoadOptions::default()).unwrap();
    let lora = Lora::read(&golden(format!("peft/{name}")), Some(&outline), Some(&base_of(name))).unwrap();
    (outline, lora)
}

#[test]
fn peft_to_mlx_and_back() {
    for name in PAIRS {
        let (outline, lora) = read(name);
        let expected = logits(&base_of(name), Some(&golden(format!("peft/{name}"))));
        assert_ne!(expected, logits(&base_of(name), None), "{name} changes nothing");
        // without the model, paths are spelled out
        for outline in [Some(&outline), None] {
            if outline.is_none() && name == "head" {
                continue; // refused, see below
            }
            let dir = tempfile::tempdir().unwrap();
            let (mlx, back) = (dir.path().join("mlx"), dir.path().join("peft"));
            let report = lora.write_mlx(&mlx, outline, Some("base")).unwrap();
            assert_eq!(report.len(), 2 * lora.pairs.len());
            assert!(
                report
                    .iter()
                    .all(|m| m.from.starts_with("base_model.model.") && !m.to.contains("base_model"))
            );
            assert_eq!(AdapterFormat::of(&mlx).unwrap(), AdapterFormat::Mlx);
            let again = Lora::read(&mlx, outline, None).unwrap();
            again.write_peft(&back, outline, None).unwrap();
            let found = logits(&base_of(name), Some(&back));
            assert_close(
                &found,
                &doubles(&expected),
                TOLERANCE,
                &format!("{name}, model known: {}", outline.is_some()),
            );
            let ranks = |l: &Lora| l.pairs.iter().map(|p| p.rank).collect::<Vec<_>>();
            assert_eq!(ranks(&again), ranks(&lora), "{name}: ranks that were filled up are taken away again");
        }
    }
}

#[test]
fn peft_to_gguf_and_back() {
    for name in PAIRS {
        let (outline, lora) = read(name);
        let expected = logits(&base_of(name), Some(&golden(format!("peft/{name}"))));
        let dir = tempfile::tempdir().unwrap();
        let (gguf, back) = (dir.path().join("lora.gguf"), dir.path().join("peft"));
        // f16 rounds A and B by 2^-11 each
        for (storage, tolerance) in [(StorageType::F32, TOLERANCE), (StorageType::F16, 2e-3)] {
            let report = lora.write_gguf(&gguf, &outline, storage).unwrap();
            assert!(report.iter().all(|m| m.dtype == storage.name()));
            let again = Lora::read(&gguf, Some(&outline), None).unwrap();
            again.write_peft(&back, Some(&outline), Some("base")).unwrap();
            let found = logits(&base_of(name), Some(&back));
            assert_close(&found, &doubles(&expected), tolerance, &format!("{name} as {storage}"));
        }
    }
}

/// mlx-lm's tensors are ours with rows and columns exchanged, and its one scale is the factor itself.
#[test]
fn what_mlx_lm_reads() {
    let (outline, lora) = read("patterns");
    let dir = tempfile::tempdir().unwrap();
    lora.write_mlx(dir.path(), Some(&outline), Some("base")).unwrap();
    let MlxAdapter { config, tensors } = MlxAdapter::load(dir.path()).unwrap();
    assert_eq!((config.rank, config.num_layers, config.model.as_deref()), (6, -1, Some("base")));
    // layer 1's k_proj is left out, so that whole paths must name what is adapted
    assert!(config.keys.contains(&"model.layers.0.self_attn.k_proj".to_string()));
    assert_eq!(config.keys.len(), lora.pairs.len());
    for pair in &lora.pairs {
        let a = &tensors[&format!("{}.lora_a", pair.path)];
        let b = &tensors[&format!("{}.lora_b", pair.path)];
        assert_eq!(
            (a.shape.as_slice(), b.shape.as_slice()),
            ([pair.width, 6].as_slice(), [6, pair.out].as_slice())
        );
        let float = |bytes: &[u8], i: usize| f32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap());
        for (row, col) in [(0, 1), (pair.width - 1, pair.rank - 1)] {
            assert_eq!(float(a.bytes(), row * 6 + col), pair.a[col * pair.width + row]);
        }
        // scale·b is (alpha/r)·B
        let (row, col) = (pair.rank - 1, pair.out - 1);
        let product = config.scale * f64::from(float(b.bytes(), row * pair.out + col));
        let expected = pair.scale() * f64::from(pair.b[col * pair.rank + row]);
        assert!((product - expected).abs() < 1e-6 * expected.abs(), "{product} {expected}");
    }
    // where all blocks are adapted alike, modules are named within them
    let (outline, lora) = read("default");
    lora.write_mlx(dir.path(), Some(&outline), None).unwrap();
    let config = MlxAdapter::load(dir.path()).unwrap().config;
    assert_eq!(
        (config.num_layers, config.keys),
        (2, vec!["self_attn.q_proj".into(), "self_attn.v_proj".into()])
    );
    let (outline, lora) = read("layers");
    lora.write_mlx(dir.path(), Some(&outline), None).unwrap();
    assert_eq!(MlxAdapter::load(dir.path()).unwrap().config.num_layers, 1);
}

/// A factor that is the format's own leaves B's bits alone; llama.cpp divides alpha by each pair's rank.
#[test]
fn what_llama_cpp_reads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lora.gguf");
    for name in PAIRS {
        let (outline, lora) = read(name);
        lora.write_gguf(&path, &outline, StorageType::F32).unwrap();
        let file = GgufLora::open(&path).unwrap();
        assert_eq!((file.architecture.as_str(), file.pairs.len()), ("llama", lora.pairs.len()));
        for pair in &lora.pairs {
            let tensor = outline.gguf_name(&format!("{}.weight", pair.path)).unwrap();
            let [a, b] = &file.pairs[&tensor];
            assert_eq!(
                (a.shape.as_slice(), b.shape.as_slice()),
                ([pair.rank, pair.width].as_slice(), [pair.out, pair.rank].as_slice())
            );
            let sum = |bytes: &[u8]| {
                let floats =
                    bytes.chunks_exact(4).map(|c| f64::from(f32::from_le_bytes(c.try_into().unwrap())));
                floats.map(f64::abs).sum::<f64>()
            };
            // whatever the order of B's rows
            let effective = f64::from(file.alpha) / pair.rank as f64 * sum(b.bytes());
            let expected = pair.scale() * pair.b.iter().map(|v| f64::from(v.abs())).sum::<f64>();
            assert!(
                (effective - expected).abs() < 1e-6 * expected,
                "{name} {tensor}: {effective} {expected}"
            );
        }
    }
}

#[test]
fn what_is_no_lora_pair_is_refused_by_name() {
    let said = |name: &str| {
        let outline = Outline::read(&base_of(name), &LoadOptions::default()).unwrap();
        Lora::read(&golden(format!("peft/{name}")), Some(&outline), Some(&base_of(name)))
            .unwrap_err()
            .to_string()
    };
    for (name, part) in [
        ("saved", "modules_to_save"),
        ("saved_embed", "embed_tokens"),
        ("bias_all", "bias"),
        ("bias_lora", "bias"),
    ] {
        let error = said(name);
        assert!(error.contains(part) && error.contains("engobe merge"), "{error}");
    }
    // a copy of the base's head can only be told from another head with the base at hand
    let error = Lora::read(&golden("peft/head"), None, None).unwrap_err().to_string();
    assert!(error.contains("lm_head.base_layer.weight") && error.contains("--model"), "{error}");
    // gqa_tied's head is its embedding
    let (_, lora) = read("head");
    let tied = Outline::read(&golden("llama/gqa_tied"), &LoadOptions::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let error = lora.write_gguf(&dir.path().join("x.gguf"), &tied, StorageType::F32).unwrap_err().to_string();
    assert!(error.contains("lm_head") && error.contains("--to gguf"), "{error}");
    let error = lora.write_mlx(dir.path(), Some(&tied), None).unwrap_err().to_string();
    assert!(error.contains("lm_head") && error.contains("engobe merge"), "{error}");
    let error = lora.write_mlx(dir.path(), None, None).unwrap_err().to_string();
    assert!(error.contains("lm_head") && error.contains("--model"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
    let error = AdapterFormat::of(&golden("llama/plain")).unwrap_err().to_string();
    assert!(error.contains("adapters.safetensors"), "{error}");
}

#[test]
fn adapters_of_other_models_are_refused() {
    let (_, lora) = read("all_linear");
    let dir = tempfile::tempdir().unwrap();
    let (mlx, gguf) = (dir.path().join("mlx"), dir.path().join("lora.gguf"));
    let own = Outline::read(&base_of("all_linear"), &LoadOptions::default()).unwrap();
    lora.write_mlx(&mlx, Some(&own), None).unwrap();
    lora.write_gguf(&gguf, &own, StorageType::F32).unwrap();
    let other = Outline::read(&golden("llama/head_dim_bias"), &LoadOptions::default()).unwrap();
    for path in [&golden("peft/all_linear"), &mlx, &gguf] {
        let error = Lora::read(path, Some(&other), None).unwrap_err().to_string();
        assert!(error.contains("does not fit") && error.contains("k_proj is ["), "{error}");
    }
    let error = Lora::read(&gguf, None, None).unwrap_err().to_string();
    assert!(error.contains("--model"), "{error}");
}

/// A module that the configuration names and the file lacks, and tensors of the wrong rank.
#[test]
fn missing_and_misshapen_tensors_are_listed() {
    let outline = Outline::read(&base_of("default"), &LoadOptions::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let PeftAdapter { config, tensors } = PeftAdapter::load(&golden("peft/default")).unwrap();
    let config = LoraConfig::read(&config).unwrap();
    let all: Vec<_> =
        tensors.values().map(|t| (t.name.clone(), t.shape.clone(), t.bytes().to_vec())).collect();
    let said = |config: &LoraConfig, tensors: &[(String, Vec<usize>, Vec<u8>)], outline: Option<&Outline>| {
        PeftAdapter::save(dir.path(), config, tensors).unwrap();
        Lora::read(dir.path(), outline, None).map(|_| ()).unwrap_err().to_string()
    };
    let error = said(&config, &all[2..], Some(&outline));
    assert!(error.contains("layers.0.self_attn.q_proj is a target and has no tensors"), "{error}");
    let error = said(&config, &all[1..], None);
    assert!(error.contains("layers.0.self_attn.q_proj has only one of"), "{error}");
    let error = said(&LoraConfig { r: 5, ..config.clone() }, &all, None);
    assert!(error.contains("the configuration says rank 5") && error.contains("q_proj"), "{error}");
    let mut odd = all.clone();
    odd[0].0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_E".into();
    let error = said(&config, &odd, None);
    assert!(error.contains("lora_E cannot be converted"), "{error}");
    let mut infinite = all;
    infinite[0].2[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let error = said(&config, &infinite, None);
    assert!(error.contains("finite") && error.contains(&infinite[0].0), "{error}");
}

#[test]
fn peft_files_name_targets_as_people_do_where_that_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let targets =
        |path: &Path| match PeftAdapter::load(path).unwrap().config.modules("target_modules").unwrap() {
            Some(engobe_formats::peft::TargetModules::List(names)) => names,
            other => panic!("{other:?}"),
        };
    let (outline, lora) = read("default");
    lora.write_peft(dir.path(), Some(&outline), None).unwrap();
    assert_eq!(targets(dir.path()), ["q_proj", "v_proj"]);
    let (outline, lora) = read("layers");
    lora.write_peft(dir.path(), Some(&outline), None).unwrap();
    assert_eq!(targets(dir.path()), ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.o_proj"]);
}
