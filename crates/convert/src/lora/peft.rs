//! PEFT's directories.

use super::{Lora, Pair, cannot, floats, mapped, to_bytes};
use crate::{Error, Mapped, Result};
use engobe_adapters::Targets;
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::peft::{BiasMode, LoraConfig, PeftAdapter, TargetModules};
use engobe_formats::shorten;
use engobe_formats::tensor::TensorView;
use engobe_kernels::storage::StorageType;
use engobe_models::Outline;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const PREFIX: &str = "base_model.model.";
/// The other way to take a whole adapter along.
const MERGE: &str = "`engobe convert --to gguf` or `engobe merge` bakes the whole adapter into the model";

pub(super) fn read(dir: &Path, outline: Option<&Outline>, base: Option<&Path>) -> Result<Lora> {
    let PeftAdapter { config, tensors } = PeftAdapter::load(dir)?;
    let config = LoraConfig::read(&config)?;
    refuse_more_than_pairs(dir, &config)?;
    let targets = Targets::new(&config)?;
    let mut halves: BTreeMap<String, [Option<TensorView>; 2]> = BTreeMap::new();
    for (name, view) in tensors {
        let inner = name.strip_prefix(PREFIX).unwrap_or(&name);
        let factor = |suffix: &str| inner.strip_suffix(suffix);
        match (factor(".lora_A.weight"), factor(".lora_B.weight")) {
            (Some(path), _) => halves.entry(path.to_string()).or_default()[0] = Some(view),
            (_, Some(path)) => halves.entry(path.to_string()).or_default()[1] = Some(view),
            _ if inner.contains(".lora_embedding_") => {
                return Err(cannot(
                    dir,
                    &name,
                    "it adapts an embedding; only linear layers can be converted",
                ));
            }
            _ => check_copy(dir, inner, &view, outline, base)?,
        }
    }
    let mut problems = Vec::new();
    let mut pairs = Vec::new();
    for (path, halves) in &halves {
        let [Some(a), Some(b)] = halves else {
            problems.push(format!("{path} has only one of lora_A and lora_B"));
            continue;
        };
        match pair(path, a, b, &config, &targets) {
            Ok(pair) => pairs.push(pair?),
            Err(problem) => problems.push(problem),
        }
    }
    for linear in outline.into_iter().flat_map(|o| &o.linears) {
        if targets.adapts(&linear.path, !linear.head) && !halves.contains_key(&linear.path) {
            problems.push(format!("{} is a target and has no tensors", linear.path));
        }
    }
    if !problems.is_empty() {
        return Err(Error::DoesNotFit { path: dir.to_path_buf(), problems: shorten(problems) });
    }
    Ok(Lora {
        origin: dir.to_path_buf(),
        base: config.base_model_name_or_path,
        dropout: config.lora_dropout,
        pairs,
    })
}

/// What PEFT can train beside LoRA's factors has no place in the other formats.
fn refuse_more_than_pairs(dir: &Path, config: &LoraConfig) -> Result<()> {
    if !config.modules_to_save.is_empty() {
        let what = format!("modules_to_save {:?}", config.modules_to_save);
        let why = format!("these modules are trained in full, and only LoRA pairs can be converted; {MERGE}");
        return Err(cannot(dir, &what, &why));
    }
    if config.bias != BiasMode::None {
        let why = format!("trained biases are no LoRA pairs; {MERGE}");
        return Err(cannot(dir, "bias", &why));
    }
    let more = [
        ("use_dora", config.use_dora),
        ("lora_bias", config.lora_bias),
        ("trainable_token_indices", config.trainable_token_indices.is_some()),
        ("init_lora_weights", config.init_lora_weights.changes_base()),
    ];
    match more.iter().find(|(_, on)| *on) {
        Some(("init_lora_weights", _)) => {
            let why = format!("the adapter belongs to a base that its start changed; {MERGE}");
            Err(cannot(dir, "init_lora_weights", &why))
        }
        Some((key, _)) => Err(cannot(dir, key, &format!("it is more than LoRA pairs; {MERGE}"))),
        None => Ok(()),
    }
}

/// One pair, or what does not fit together.
fn pair(
    path: &str,
    a: &TensorView,
    b: &TensorView,
    config: &LoraConfig,
    targets: &Targets,
) -> std::result::Result<Result<Pair>, String> {
    let ([rank, width], [out, also_rank]) = (a.shape.as_slice(), b.shape.as_slice()) else {
        return Err(format!("{path}: lora_A is {:?} and lora_B {:?}; expected matrices", a.shape, b.shape));
    };
    let expected = targets.rank(path, config.r);
    if rank != also_rank || *rank != expected {
        let (a, b) = (&a.shape, &b.shape);
        return Err(format!(
            "{path}: lora_A is {a:?} and lora_B {b:?}; the configuration says rank {expected}"
        ));
    }
    let alpha = targets.alpha(path, config.lora_alpha);
    // alpha/√r = (alpha·√r)/r
    let alpha = if config.use_rslora { alpha * (*rank as f64).sqrt() } else { alpha };
    Ok(floats(a).and_then(|values| {
        Ok(Pair {
            path: path.to_string(),
            from: [a.name.clone(), b.name.clone()],
            rank: *rank,
            width: *width,
            out: *out,
            alpha,
            a: values,
            b: floats(b)?,
        })
    }))
}

/// PEFT (`save_embedding_layers="auto"`) stores copies of the base's embedding and head beside some adapters. A copy
/// that equals the base is passed over; anything else cannot be converted.
fn check_copy(
    dir: &Path,
    name: &str,
    view: &TensorView,
    outline: Option<&Outline>,
    base: Option<&Path>,
) -> Result<()> {
    let weight = name.replace(".base_layer.weight", ".weight");
    if !weight.ends_with(".weight") || weight.contains(".lora_") {
        return Err(cannot(dir, &view.name, "it is no lora_A or lora_B of a linear layer"));
    }
    let (Some(outline), Some(base)) = (outline, base) else {
        let why = "it seems to be a copy of the base's own weight; --model lets it be compared";
        return Err(cannot(dir, &view.name, why));
    };
    let checkpoint = Checkpoint::open(base)?;
    let is_head = outline.linears.iter().any(|l| l.head && format!("{}.weight", l.path) == weight);
    let tied = (outline.sizes.tied_head && is_head).then(|| outline.hf_name("token_embd.weight")).flatten();
    let name = outline.name_in(&checkpoint, &tied.unwrap_or(weight));
    let Some(original) = Some(name).filter(|n| checkpoint.contains(n)) else {
        return Err(cannot(dir, &view.name, "it is neither a LoRA pair nor a weight of the base"));
    };
    let original = checkpoint.get(&original)?;
    if original.shape != view.shape {
        let why = format!("it is {:?}, the base's own is {:?}; {MERGE}", view.shape, original.shape);
        return Err(cannot(dir, &view.name, &why));
    }
    let (copy, base) = (floats(view)?, floats(original)?);
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let size = square(&mut base.iter().copied());
    let error = square(&mut base.iter().zip(&copy).map(|(a, b)| a - b));
    // 4-bit storage errs by up to a tenth of a weight's size; another model's weights by more than all of it
    match error <= size * 0.2 * 0.2 {
        true => Ok(()),
        false => Err(cannot(dir, &view.name, &format!("it differs from the base's own weight; {MERGE}"))),
    }
}

pub(super) fn write(
    lora: &Lora,
    dir: &Path,
    outline: Option<&Outline>,
    base: Option<&str>,
) -> Result<Vec<Mapped>> {
    let default = LoraConfig::default();
    let r = lora.most_common(|p| p.rank).unwrap_or(default.r);
    let lora_alpha = lora.most_common(|p| p.alpha).unwrap_or(default.lora_alpha);
    // a pattern is a regular expression for the end of a path
    let pattern = |p: &Pair| p.path.replace('.', r"\.");
    let config = LoraConfig {
        r,
        lora_alpha,
        lora_dropout: lora.dropout,
        target_modules: Some(TargetModules::List(target_names(lora, outline))),
        rank_pattern: lora.pairs.iter().filter(|p| p.rank != r).map(|p| (pattern(p), p.rank)).collect(),
        alpha_pattern: lora
            .pairs
            .iter()
            .filter(|p| p.alpha != lora_alpha)
            .map(|p| (pattern(p), p.alpha))
            .collect(),
        // PEFT says of layers whose files hold `[in, out]` (Conv1D) that they are so
        fan_in_fan_out: outline.is_some_and(|o| adapted_transposed(lora, o)),
        base_model_name_or_path: base.map(str::to_string).or_else(|| lora.base.clone()),
        ..default
    };
    config.check().map_err(|(key, found, expected)| {
        lora.cannot(&format!("{key} = {found}"), &format!("PEFT expects {expected}"))
    })?;
    let (mut tensors, mut report) = (Vec::new(), Vec::new());
    for pair in &lora.pairs {
        let names = ["A", "B"].map(|half| format!("{PREFIX}{}.lora_{half}.weight", pair.path));
        let shapes = [[pair.rank, pair.width], [pair.out, pair.rank]];
        tensors.push((names[0].clone(), shapes[0].to_vec(), to_bytes(&pair.a)));
        tensors.push((names[1].clone(), shapes[1].to_vec(), to_bytes(&pair.b)));
        report.extend(mapped(pair, names, shapes, StorageType::F32));
    }
    PeftAdapter::save(dir, &config, &tensors)?;
    Ok(report)
}

/// True if an adapted layer's matrix is `[in, out]` in files.
fn adapted_transposed(lora: &Lora, outline: &Outline) -> bool {
    lora.pairs.iter().any(|p| outline.linear(&p.path).is_some_and(|l| l.transposed))
}

/// The last names of the adapted modules, if in this model they name those and no others; else whole paths.
fn target_names(lora: &Lora, outline: Option<&Outline>) -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_string();
    let adapted: BTreeSet<&str> = lora.pairs.iter().map(|p| p.path.as_str()).collect();
    let names: BTreeSet<String> = adapted.iter().map(|p| last(p)).collect();
    let exact = outline.is_some_and(|o| {
        o.linears.iter().all(|l| adapted.contains(l.path.as_str()) == names.contains(&last(&l.path)))
    });
    match exact {
        true => names.into_iter().collect(),
        false => adapted.into_iter().map(str::to_string).collect(),
    }
}
