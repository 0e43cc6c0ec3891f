//! mlx-lm's directories. All modules share a rank and a scale there: smaller ranks are filled up with zeros, which
//! change nothing, and other scales are baked into B.

use super::{Lora, Pair, cannot, floats, mapped, scaled, to_bytes, transposed};
use crate::{Error, Mapped, Result};
use engobe_formats::mlx::{MlxAdapter, MlxConfig};
use engobe_formats::shorten;
use engobe_formats::tensor::TensorView;
use engobe_kernels::storage::StorageType;
use engobe_models::Outline;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub(super) fn read(dir: &Path) -> Result<Lora> {
    let MlxAdapter { config, tensors } = MlxAdapter::load(dir)?;
    let mut halves: BTreeMap<String, [Option<TensorView>; 2]> = BTreeMap::new();
    for (name, view) in tensors {
        match (name.strip_suffix(".lora_a"), name.strip_suffix(".lora_b")) {
            (Some(path), _) => halves.entry(path.to_string()).or_default()[0] = Some(view),
            (_, Some(path)) => halves.entry(path.to_string()).or_default()[1] = Some(view),
            _ => return Err(cannot(dir, &name, "it is no lora_a or lora_b of a linear layer")),
        }
    }
    let (mut pairs, mut problems) = (Vec::new(), Vec::new());
    for (path, halves) in halves {
        let [Some(a), Some(b)] = halves else {
            problems.push(format!("{path} has only one of lora_a and lora_b"));
            continue;
        };
        match (a.shape.as_slice(), b.shape.as_slice()) {
            ([width, rank], [also_rank, out]) if rank == also_rank && *rank > 0 => {
                let (a_values, b_values) = (floats(&a)?, floats(&b)?);
                let used = used_rank(&a_values, &b_values, *width, *rank, *out);
                pairs.push(Pair {
                    path,
                    from: [a.name.clone(), b.name.clone()],
                    rank: used,
                    width: *width,
                    out: *out,
                    alpha: config.scale * used as f64,
                    a: transposed(&a_values, *width, *rank)[..used * width].to_vec(),
                    b: transposed(&b_values[..used * out], used, *out),
                });
            }
            (a, b) => problems
                .push(format!("{path}: lora_a is {a:?} and lora_b {b:?}; expected [in, r] and [r, out]")),
        }
    }
    if !problems.is_empty() {
        return Err(Error::DoesNotFit { path: dir.to_path_buf(), problems: shorten(problems) });
    }
    Ok(Lora { origin: dir.to_path_buf(), base: config.model, dropout: config.dropout, pairs })
}

/// Ranks without those at the end that are zero in A and B alike: what [`write`] filled up. (Nothing trains such a
/// rank: its gradients are zero too.)
fn used_rank(a: &[f32], b: &[f32], width: usize, rank: usize, out: usize) -> usize {
    let is_empty = |i: usize| {
        b[i * out..(i + 1) * out].iter().all(|v| *v == 0.0) && (0..width).all(|row| a[row * rank + i] == 0.0)
    };
    (1..rank).rev().find(|i| !is_empty(*i)).map_or(1, |i| i + 1)
}

pub(super) fn write(
    lora: &Lora,
    dir: &Path,
    outline: Option<&Outline>,
    base: Option<&str>,
) -> Result<Vec<Mapped>> {
    refuse_tied_head(lora, outline)?;
    let usual = |path: &str| path.starts_with("model.layers.") || path == "lm_head";
    if let (Some(outline), Some(pair)) = (outline, lora.pairs.iter().find(|p| !usual(&p.path))) {
        let why = format!("mlx-lm has other names for the layers of {} models", outline.model_type());
        return Err(lora.cannot(&pair.path, &why));
    }
    let rank = lora.pairs.iter().map(|p| p.rank).max().unwrap_or(1);
    let scale = lora.most_common(Pair::scale).unwrap_or(1.0);
    let (num_layers, keys) = keys(lora, outline);
    let config = MlxConfig {
        model: base.map(str::to_string).or_else(|| lora.base.clone()),
        num_layers,
        rank,
        scale,
        dropout: lora.dropout,
        keys,
    };
    let (mut tensors, mut report) = (Vec::new(), Vec::new());
    for pair in &lora.pairs {
        let mut a = pair.a.clone();
        a.resize(rank * pair.width, 0.0);
        let mut b = transposed(&scaled(&pair.b, pair.scale() / scale), pair.out, pair.rank);
        b.resize(rank * pair.out, 0.0);
        let names = ["a", "b"].map(|half| format!("{}.lora_{half}", pair.path));
        let shapes = [[pair.width, rank], [rank, pair.out]];
        tensors.push((names[0].clone(), shapes[0].to_vec(), to_bytes(&transposed(&a, rank, pair.width))));
        tensors.push((names[1].clone(), shapes[1].to_vec(), to_bytes(&b)));
        report.extend(mapped(pair, names, shapes, StorageType::F32));
    }
    MlxAdapter::save(dir, &config, &tensors)?;
    Ok(report)
}

/// A tied head is no module of its own in mlx-lm, which would pass its tensors over in silence.
fn refuse_tied_head(lora: &Lora, outline: Option<&Outline>) -> Result<()> {
    let is_head = |path: &str| match outline {
        Some(o) => o.sizes.tied_head && o.linear(path).is_some_and(|l| l.head),
        None => path == "lm_head",
    };
    match lora.pairs.iter().find(|p| is_head(&p.path)) {
        None => Ok(()),
        Some(pair) if outline.is_none() => {
            Err(lora
                .cannot(&pair.path, "whether the head is tied to the embedding is not known; give --model"))
        }
        Some(pair) => {
            let why = "this model's head is its embedding, which is no linear layer in mlx-lm; `engobe merge` gives it a head of its own";
            Err(lora.cannot(&pair.path, why))
        }
    }
}

/// How many blocks from the last one on are wrapped, and which modules: by path within a block where all of these
/// blocks are adapted alike, by whole path elsewhere.
fn keys(lora: &Lora, outline: Option<&Outline>) -> (i64, Vec<String>) {
    let mut outside: BTreeSet<&str> = BTreeSet::new();
    let mut blocks: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    for pair in &lora.pairs {
        let inside = pair.path.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        match inside.and_then(|(index, name)| Some((index.parse().ok()?, name))) {
            Some((index, name)) => {
                blocks.entry(index).or_default().insert(name);
            }
            None => {
                outside.insert(&pair.path);
            }
        }
    }
    let whole = || (-1, lora.pairs.iter().map(|p| p.path.clone()).collect());
    let Some(outline) = outline else { return whole() };
    let Some(names) = blocks.values().next() else { return whole() };
    let first = outline.sizes.layers - blocks.len().min(outline.sizes.layers);
    let tail = blocks.keys().copied().eq(first..outline.sizes.layers);
    if !tail || blocks.values().any(|b| b != names) {
        return whole();
    }
    let all = names.iter().chain(&outside).map(|n| (*n).to_string()).collect();
    (blocks.len() as i64, all)
}
