//! Models that bitsandbytes quantized (`golden/bitsandbytes`): logits, and what is said about those that do not fit.

use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::tensor::TensorView;
use engobe_kernels::codec::FourBit;
use engobe_kernels::quantize::Scheme;
use engobe_models::{LoadOptions, WeightDtype, load_causal_lm};
use engobe_nn::{CausalLm, ModuleMut};
use engobe_testkit::models::logits;
use engobe_testkit::{assert_close, cases, golden, golden_json};
use serde::Deserialize;
use std::fs;
use std::path::Path;

#[derive(Deserialize)]
struct Expected {
    ids: Vec<u32>,
    /// of tokens 0, 12 and 23
    logits: [Vec<f64>; 3],
}

/// f32 sums in another order differ by some 1e-7; a factor in other bits would show at 1e-3 and above.
const TOLERANCE: f64 = 1e-5;

/// Storages of the linear layers, head included, each once.
fn storages(model: &mut dyn CausalLm) -> Vec<String> {
    let mut names = Vec::new();
    model.visit_modules(&mut |module| {
        if let ModuleMut::Linear(linear) = module
            && let engobe_nn::Weight::Frozen(weight) = linear.weight()
        {
            names.push(weight.storage_name());
        }
    });
    names.dedup();
    names
}

#[test]
fn logits_are_those_of_transformers() {
    assert_eq!(cases("bitsandbytes"), ["fp4_bias", "int8", "nf4_bf16", "nf4_dq"]);
    for (name, storage) in [
        ("fp4_bias", ["FP4", "F32"]),
        ("int8", ["INT8", "F32"]),
        ("nf4_bf16", ["NF4", "BF16"]),
        ("nf4_dq", ["NF4+dq", "F32"]),
    ] {
        let dir = golden(format!("bitsandbytes/{name}"));
        let expected: Expected = golden_json(format!("bitsandbytes/{name}/expected.json"));
        for (dtype, storages_expected) in
            [(WeightDtype::Stored, storage.as_slice()), (WeightDtype::F32, &["F32"])]
        {
            let options = LoadOptions { dtype, ..Default::default() };
            let mut model = load_causal_lm(&dir, &options).unwrap();
            assert_eq!(storages(model.as_mut()), storages_expected, "{name}");
            let found = logits(model.as_ref(), &expected.ids);
            for (at, expected) in [0, 12, 23].into_iter().zip(&expected.logits) {
                assert_close(&found[at], expected, TOLERANCE, &format!("{name} {dtype:?}"));
            }
        }
    }
}

/// The nearest codes of a 4-bit model's own weights are its codes: quantizing its f32 copy changes nothing.
#[test]
fn quantizing_while_reading_gives_the_quantized_model() {
    let dir = golden("llama/plain");
    let plain = load_causal_lm(&dir, &LoadOptions::default()).unwrap();
    let ids: Vec<u32> = (0..24).collect();
    let exact = logits(plain.as_ref(), &ids);
    let mut errors = Vec::new();
    for (scheme, name) in [
        (Scheme::Int8, "INT8"),
        (Scheme::FourBit { kind: FourBit::Nf4, block: 64, double: false }, "NF4"),
        (Scheme::FourBit { kind: FourBit::Fp4, block: 64, double: true }, "FP4+dq"),
    ] {
        let options = LoadOptions { quantize: Some(scheme), ..Default::default() };
        let mut model = load_causal_lm(&dir, &options).unwrap();
        assert_eq!(storages(model.as_mut()), [name, "F32"], "the head stays as it is");
        let found = logits(model.as_ref(), &ids);
        let pairs = found.iter().flatten().zip(exact.iter().flatten());
        errors.push(pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt());
    }
    let size = exact.iter().flatten().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    // each is coarser than the one before, and none is far off
    assert!(errors[0] < errors[1] && errors[1] < errors[2] && errors[2] < 0.5 * size, "{errors:?} of {size}");
}

fn error(dir: &Path, options: &LoadOptions) -> String {
    match load_causal_lm(dir, options) {
        Ok(_) => panic!("{} loads", dir.display()),
        Err(e) => e.to_string(),
    }
}

#[test]
fn what_is_quantized_is_not_quantized_again() {
    let quantize = Some(Scheme::Int8);
    let options = LoadOptions { quantize, ..Default::default() };
    let line = error(&golden("bitsandbytes/nf4_dq"), &options);
    assert!(line.contains("is quantized already (NF4+dq)") && line.contains("_proj.weight"), "{line}");
    let options = LoadOptions { quantize, dtype: WeightDtype::Bf16, ..Default::default() };
    let line = error(&golden("llama/plain"), &options);
    assert!(line.contains("kept in their own type"), "{line}");
}

type Tensors = Vec<(String, String, Vec<usize>, Vec<u8>)>;

/// Writes a copy of a golden model whose tensors or configuration `change` has changed.
fn changed(name: &str, change: impl FnOnce(&mut Tensors, &mut String)) -> tempfile::TempDir {
    let from = golden(format!("bitsandbytes/{name}"));
    let checkpoint = Checkpoint::open(&from).unwrap();
    let of = |t: &TensorView| (t.name.clone(), t.dtype.to_string(), t.shape.clone(), t.bytes().to_vec());
    let mut tensors: Tensors = checkpoint.tensors().map(of).collect();
    let mut config = fs::read_to_string(from.join("config.json")).unwrap();
    change(&mut tensors, &mut config);
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, dtype, shape, bytes) in &tensors {
        let entry =
            serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes.len()]});
        header.insert(name.clone(), entry);
        at += bytes.len();
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    tensors.iter().for_each(|(.., bytes)| file.extend(bytes));
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    dir
}

/// The last tensor whose name ends so.
fn tensor<'t>(tensors: &'t mut Tensors, end: &str) -> &'t mut (String, String, Vec<usize>, Vec<u8>) {
    tensors.iter_mut().rfind(|t| t.0.ends_with(end)).unwrap()
}

#[test]
fn broken_parts_are_named() {
    type Change = fn(&mut Tensors, &mut String);
    let cases: [(&str, Change, &[&str]); 15] = [
        ("nf4_dq", |t, _| t.retain(|t| !t.0.ends_with("v_proj.weight.absmax")), &["v_proj.weight.absmax"]),
        ("nf4_dq", |t, _| t.retain(|t| !t.0.ends_with("nested_absmax")), &["no tensor", "nested_absmax"]),
        ("nf4_dq", |t, _| tensor(t, "bitsandbytes__nf4").3[0] = b'?', &["bitsandbytes__nf4", "JSON"]),
        (
            "nf4_dq",
            |t, _| {
                let state = tensor(t, "q_proj.weight.quant_state.bitsandbytes__nf4");
                let text = String::from_utf8(state.3.clone()).unwrap().replace("[64, 64]", "[64, 65]");
                state.3 = text.into_bytes();
            },
            &["q_proj.weight", "[64, 65]", "[64, 64]"],
        ),
        (
            "nf4_dq",
            |t, _| {
                let state = tensor(t, "bitsandbytes__nf4");
                let text = String::from_utf8(state.3.clone()).unwrap().replace("256", "128");
                state.3 = text.into_bytes();
            },
            &["nested_blocksize is 128", "256"],
        ),
        (
            "nf4_dq",
            |t, _| {
                let state = tensor(t, "bitsandbytes__nf4");
                let text = String::from_utf8(state.3.clone())
                    .unwrap()
                    .replace("\"blocksize\": 64", "\"blocksize\": 63");
                state.3 = text.into_bytes();
            },
            &["blocksize is 63", "power of two"],
        ),
        (
            "nf4_dq",
            |t, _| {
                let absmax = tensor(t, "weight.absmax");
                (absmax.2, absmax.3) = (vec![3], vec![0; 3]);
            },
            &["codes of block factors", "expected"],
        ),
        (
            "nf4_dq",
            |t, _| {
                let codes = tensor(t, "q_proj.weight");
                codes.3.pop();
                codes.2 = vec![codes.3.len()];
            },
            &["q_proj.weight", "2047 4-bit codes, expected 2048"],
        ),
        (
            "nf4_dq",
            |t, _| tensor(t, "nested_absmax").3[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
            &["nested_absmax", "NaN"],
        ),
        (
            "nf4_dq",
            |t, _| tensor(t, "weight.quant_map").3[..4].copy_from_slice(&2f32.to_le_bytes()),
            &["quant_map", "levels of nf4"],
        ),
        ("fp4_bias", |t, _| tensor(t, "weight.absmax").1 = "I32".to_string(), &["absmax", "I32", "F32"]),
        ("int8", |t, _| t.retain(|t| !t.0.ends_with("up_proj.SCB")), &["up_proj.SCB"]),
        ("int8", |t, _| tensor(t, "weight_format").3 = vec![1], &["weight_format is not 0"]),
        (
            "int8",
            |t, _| {
                let scales = tensor(t, "q_proj.SCB");
                (scales.2, scales.3) = (vec![1], vec![0; 4]);
            },
            &["q_proj.weight", "1 row factors, expected 64"],
        ),
        (
            "int8",
            |_, config| *config = config.replace("\"bitsandbytes\"", "\"gptq\""),
            &["quant_method is \"gptq\"", "bitsandbytes"],
        ),
    ];
    for (name, change, parts) in cases {
        let dir = changed(name, change);
        let line = error(dir.path(), &LoadOptions::default());
        assert!(parts.iter().all(|p| line.contains(p)) && !line.contains('\n'), "{parts:?}: {line}");
    }
    // unchanged, the copy loads
    load_causal_lm(changed("int8", |_, _| ()).path(), &LoadOptions::default()).unwrap();
}
