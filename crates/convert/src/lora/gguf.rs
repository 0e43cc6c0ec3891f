//! llama.cpp's files. One alpha serves all pairs, each divided by its own rank: where that is not the pair's factor,
//! the rest is baked into B. B's rows go through the reordering that the base tensor's rows went through.

use super::{Lora, Pair, cannot, floats, mapped, scaled};
use crate::{Error, Mapped, Result};
use engobe_formats::gguf::lora::{GgufLora, LoraShape, create};
use engobe_kernels::codec;
use engobe_kernels::storage::StorageType;
use engobe_models::Outline;
use std::path::Path;

pub(super) fn read(path: &Path, outline: Option<&Outline>) -> Result<Lora> {
    let file = GgufLora::open(path)?;
    let Some(outline) = outline else {
        return Err(cannot(
            path,
            "a GGUF LoRA",
            "its tensors can only be named with the base model: give --model",
        ));
    };
    let architecture = outline.gguf_architecture()?;
    if file.architecture != architecture {
        let what = format!("general.architecture {:?}", file.architecture);
        return Err(cannot(path, &what, &format!("the model's is {architecture:?}")));
    }
    let mut pairs = Vec::new();
    for (tensor, [a, b]) in file.pairs {
        let name = outline.hf_name(&tensor);
        let module = name.as_deref().and_then(|name| name.strip_suffix(".weight"));
        let Some((name, module)) = name.as_deref().zip(module).filter(|(_, m)| outline.linear(m).is_some())
        else {
            return Err(cannot(path, &a.name, "only linear layers of the model can be converted"));
        };
        let (rank, width, out) = (a.shape[0], a.shape[1], b.shape[0]);
        let values = outline.stored(name).rows_from_gguf(&floats(&b)?, out);
        pairs.push(Pair {
            path: module.to_string(),
            from: [a.name.clone(), b.name.clone()],
            rank,
            width,
            out,
            alpha: if file.alpha == 0.0 { rank as f64 } else { f64::from(file.alpha) },
            a: floats(&a)?,
            b: values,
        });
    }
    Ok(Lora { origin: path.to_path_buf(), base: None, dropout: 0.0, pairs })
}

pub(super) fn write(
    lora: &Lora,
    path: &Path,
    outline: &Outline,
    storage: StorageType,
) -> Result<Vec<Mapped>> {
    // what llama.cpp reads is an f32
    let alpha = lora.most_common(|p| p.alpha).unwrap_or(1.0) as f32;
    let mut shapes = Vec::new();
    for pair in &lora.pairs {
        let tensor = tensor_name(lora, pair, outline)?;
        shapes.push(LoraShape { tensor, rank: pair.rank, width: pair.width, out: pair.out });
    }
    let name = lora.origin.file_name().and_then(|n| n.to_str()).unwrap_or("adapter");
    let mut writer = create(path, outline.gguf_architecture()?, name, alpha, storage, &shapes)?;
    let mut report = Vec::new();
    for (pair, shape) in lora.pairs.iter().zip(&shapes) {
        // the nearest f32 of the most common alpha is that alpha
        let factor = if pair.alpha as f32 == alpha { 1.0 } else { pair.alpha / f64::from(alpha) };
        let stored = outline.stored(&format!("{}.weight", pair.path));
        let b = stored.rows_to_gguf(&scaled(&pair.b, factor), pair.out);
        let names = ["lora_a", "lora_b"].map(|half| format!("{}.{half}", shape.tensor));
        for (name, data) in names.iter().zip([&pair.a, &b]) {
            writer.write(name, &encoded(lora, name, data, storage)?)?;
        }
        let shapes = [[pair.rank, pair.width], [pair.out, pair.rank]];
        report.extend(mapped(pair, names, shapes, storage));
    }
    writer.finish()?;
    Ok(report)
}

/// The base tensor that a pair belongs to.
fn tensor_name(lora: &Lora, pair: &Pair, outline: &Outline) -> Result<String> {
    let head = outline.linear(&pair.path).is_some_and(|l| l.head);
    if head && outline.sizes.tied_head {
        let why = "this model's head is its embedding, for which llama.cpp takes no LoRA of a head; `engobe convert --to gguf` with --adapter gives it a head of its own";
        return Err(lora.cannot(&pair.path, why));
    }
    let name = outline.gguf_name(&format!("{}.weight", pair.path));
    name.ok_or_else(|| lora.cannot(&pair.path, "GGUF has no name for it"))
}

fn encoded(lora: &Lora, name: &str, data: &[f32], storage: StorageType) -> Result<Vec<u8>> {
    let most = if storage == StorageType::F16 { 65504.0 } else { f32::MAX };
    if !data.iter().all(|v| v.abs() <= most) {
        let (path, tensor) = (lora.origin.clone(), name.to_string());
        return Err(Error::NotFinite { path, tensor, storage: storage.to_string() });
    }
    let mut bytes = Vec::new();
    codec::encode(storage, data, &mut bytes)?;
    Ok(bytes)
}
