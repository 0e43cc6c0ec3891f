//! LoRA adapters in GGUF files, as llama.cpp loads them with `--lora` (`src/llama-adapter.cpp`).
//!
//! For a base tensor T `[out, in]` there are `T.lora_a` `[r, in]` and `T.lora_b` `[out, r]`. The factor on B·A is
//! `adapter.lora.alpha` divided by each pair's own r, or 1 if alpha is 0. Whatever the converter does to a base
//! tensor's rows it does to B's.

use super::{Announced, Gguf, GgufValue, GgufWriter, MetaValue};
use crate::tensor::TensorView;
use crate::{Error, Result};
use engobe_kernels::storage::StorageType;
use std::collections::BTreeMap;
use std::path::Path;

/// An adapter as it lies in its file.
#[derive(Debug)]
pub struct GgufLora {
    /// `general.architecture` of the base
    pub architecture: String,
    /// `general.name`
    pub name: Option<String>,
    /// `adapter.lora.alpha`; 0 means that B·A is taken as it is
    pub alpha: f32,
    /// A `[r, in]` and B `[out, r]` by the base tensor's name
    pub pairs: BTreeMap<String, [TensorView; 2]>,
}

/// Shape of one pair to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraShape {
    /// the base tensor's name
    pub tensor: String,
    /// rank
    pub rank: usize,
    /// its columns
    pub width: usize,
    /// its rows
    pub out: usize,
}

impl GgufLora {
    /// Reads a file.
    ///
    /// # Errors
    /// It is no LoRA adapter, a pair is incomplete, or the two do not fit together.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Gguf::open(path)?;
        for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora")] {
            let found = file.opt_str(key)?.unwrap_or("nothing");
            if found != expected {
                return Err(Error::BadValue {
                    path: path.to_path_buf(),
                    key: key.to_string(),
                    found: found.to_string(),
                    expected: format!("{expected:?}, as in an adapter's file"),
                });
            }
        }
        let mut halves: BTreeMap<String, [Option<TensorView>; 2]> = BTreeMap::new();
        for (name, view) in file.tensors() {
            let (base, which) = match (name.strip_suffix(".lora_a"), name.strip_suffix(".lora_b")) {
                (Some(base), _) => (base, 0),
                (_, Some(base)) => (base, 1),
                _ => {
                    let what = format!("{name}: only tensors that end in .lora_a or .lora_b belong here");
                    return Err(Error::corrupt(path, what));
                }
            };
            halves.entry(base.to_string()).or_default()[which] = Some(view.clone());
        }
        let mut pairs = BTreeMap::new();
        for (base, halves) in halves {
            let [Some(a), Some(b)] = halves else {
                return Err(Error::corrupt(path, format!("{base} has only one of .lora_a and .lora_b")));
            };
            match (a.shape.as_slice(), b.shape.as_slice()) {
                ([r, _], [_, also_r]) if r == also_r => {}
                (a, b) => {
                    let what =
                        format!("{base}: .lora_a is {a:?} and .lora_b {b:?}; expected [r, in] and [out, r]");
                    return Err(Error::corrupt(path, what));
                }
            }
            pairs.insert(base, [a, b]);
        }
        if pairs.is_empty() {
            return Err(Error::corrupt(path, "holds no tensors: the adapter was saved empty"));
        }
        Ok(Self {
            architecture: file.str("general.architecture")?.to_string(),
            name: file.opt_str("general.name")?.map(str::to_string),
            alpha: file.opt_f32("adapter.lora.alpha")?.unwrap_or(0.0),
            pairs,
        })
    }
}

/// Begins an adapter's file: for each of `shapes`, `.lora_a` and then `.lora_b` are to be written.
pub fn create(
    path: &Path,
    architecture: &str,
    name: &str,
    alpha: f32,
    storage: StorageType,
    shapes: &[LoraShape],
) -> Result<GgufWriter> {
    let text =
        |key: &str, value: &str| (key.to_string(), MetaValue::from(GgufValue::String(value.to_string())));
    let metadata = [
        text("general.type", "adapter"),
        text("general.architecture", architecture),
        text("general.name", name),
        text("adapter.type", "lora"),
        ("adapter.lora.alpha".to_string(), GgufValue::Float(f64::from(alpha)).into()),
    ];
    let tensors: Vec<Announced> = shapes
        .iter()
        .flat_map(|s| {
            [
                (format!("{}.lora_a", s.tensor), storage, vec![s.rank, s.width]),
                (format!("{}.lora_b", s.tensor), storage, vec![s.out, s.rank]),
            ]
        })
        .collect();
    GgufWriter::create(path, &metadata, tensors)
}

#[cfg(test)]
mod tests {
    use super::super::write_gguf;
    use super::*;

    fn write(path: &Path, change: impl Fn(&mut Vec<(String, GgufValue)>, &mut Vec<(String, Vec<usize>)>)) {
        let text = |v: &str| GgufValue::String(v.to_string());
        let mut metadata = vec![
            ("general.type".to_string(), text("adapter")),
            ("general.architecture".to_string(), text("llama")),
            ("adapter.type".to_string(), text("lora")),
            ("adapter.lora.alpha".to_string(), GgufValue::Float(8.0)),
        ];
        let mut tensors = vec![
            ("blk.0.attn_q.weight.lora_a".to_string(), vec![2, 4]),
            ("blk.0.attn_q.weight.lora_b".to_string(), vec![6, 2]),
        ];
        change(&mut metadata, &mut tensors);
        let tensors: Vec<_> = tensors
            .into_iter()
            .map(|(name, shape)| {
                let bytes = vec![0; shape.iter().product::<usize>() * 4];
                (name, StorageType::F32, shape, bytes)
            })
            .collect();
        write_gguf(path, &metadata, &tensors).unwrap();
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let shape = LoraShape { tensor: "output.weight".into(), rank: 2, width: 3, out: 5 };
        let mut writer = create(&path, "llama", "mine", 4.5, StorageType::F32, &[shape]).unwrap();
        writer.write("output.weight.lora_a", &[0; 24]).unwrap();
        writer.write("output.weight.lora_b", &[0; 40]).unwrap();
        writer.finish().unwrap();
        let back = GgufLora::open(&path).unwrap();
        assert_eq!((back.architecture.as_str(), back.alpha), ("llama", 4.5));
        let [a, b] = &back.pairs["output.weight"];
        assert_eq!((a.shape.as_slice(), b.shape.as_slice()), ([2, 3].as_slice(), [5, 2].as_slice()));
    }

    #[test]
    fn what_is_no_adapter_is_named() {
        type Change = fn(&mut Vec<(String, GgufValue)>, &mut Vec<(String, Vec<usize>)>);
        let cases: [(Change, &str); 6] = [
            (|m, _| m[0].1 = GgufValue::String("model".into()), "general.type is model"),
            (|m, _| drop(m.remove(2)), "adapter.type is nothing"),
            (|_, t| drop(t.remove(1)), "only one of .lora_a and .lora_b"),
            (|_, t| t[1].1 = vec![6, 3], "expected [r, in] and [out, r]"),
            (|_, t| t[0].0 = "token_embd.weight".into(), "token_embd.weight"),
            (|_, t| t.clear(), "saved empty"),
        ];
        for (change, part) in cases {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.gguf");
            write(&path, change);
            let error = GgufLora::open(&path).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("a.gguf"), "{part}: {error}");
        }
    }
}
