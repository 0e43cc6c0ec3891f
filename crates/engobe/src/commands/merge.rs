//! `engobe merge`

use crate::Usage;
use crate::any_model::AnyModel;
use crate::args::MergeArgs;
use crate::beside::Beside;
use crate::commands::convert;
use crate::companions;
use crate::tasks;
use crate::terminal::{Note, Progress, print, print_json};
use crate::verification::{self, Verdict};
use crate::workbench::{self, Bench};
use anyhow::{Result, bail};
use engobe_adapters::combine::{Combination, CombineOptions, combine};
use engobe_adapters::merge::{MergeOptions, Merged, merge};
use engobe_convert::GgufType;
use engobe_data::Task;
use engobe_formats::checkpoint::Checkpoint;
use engobe_kernels::storage::StorageType;
use engobe_models::LoadOptions;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Bakes an adapter into its model.
pub fn run(args: &MergeArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    if let Some(how) = &args.combine {
        return combined(args, how);
    }
    verification::check_args(&args.verify)?;
    if !(args.max_shard_size.is_finite() && args.max_shard_size > 0.0) {
        bail!(Usage(format!("--max-shard-size {}: expected a number of GB above 0", args.max_shard_size)));
    }
    let done = match args.out.extension().is_some_and(|e| e == "gguf") {
        true => into_file(args, &mut note)?,
        false => into_directory(args, &mut note)?,
    };
    let types = done.types.join(", ");
    if args.common.json {
        let mut json = json!({
            "out": args.out,
            "tensors": done.merged.tensors,
            "changed": done.merged.changed,
            "dtype": types,
            "tie_word_embeddings": done.merged.tied_head,
        });
        verification::add_to_json(done.verdict.as_ref(), &mut json);
        return print_json(&json);
    }
    print(&done.remarks)?;
    if let Some(verdict) = &done.verdict {
        print(&format!("{}\n", verdict.line()))?;
    }
    print(&format!(
        "{}: {} tensors, {} of them changed by the adapter, as {types}\n",
        args.out.display(),
        done.merged.tensors,
        done.merged.changed
    ))
}

/// The model and the adapter.
fn one(args: &MergeArgs) -> Result<(&str, PathBuf)> {
    match (&args.model, args.adapter.as_slice()) {
        (Some(model), [adapter]) => Ok((model, PathBuf::from(adapter))),
        _ => bail!(Usage(
            "--adapter: one adapter is baked into a model; --combine makes one of several".to_string()
        )),
    }
}

/// Several adapters as one.
fn combined(args: &MergeArgs, how: &str) -> Result<()> {
    let Some(combination) = Combination::find(how) else {
        bail!(Usage(format!("--combine {how}: expected one of {}", Combination::names())));
    };
    let density = match (args.density, combination.prunes()) {
        (Some(d), true) if d > 0.0 && d <= 1.0 => d,
        (Some(d), true) => bail!(Usage(format!("--density {d}: expected a share above 0 and up to 1"))),
        (None, true) => {
            bail!(Usage(format!("--combine {how} needs --density: the share of elements to keep")))
        }
        (Some(_), false) => bail!(Usage(format!("--density: {how} keeps all elements"))),
        (None, false) => 1.0,
    };
    if args.svd_rank == Some(0) {
        bail!(Usage("--svd-rank 0: expected a rank above 0".to_string()));
    }
    let parts = args.adapter.iter().map(|given| weighted(given)).collect::<Result<Vec<_>>>()?;
    let place = Beside::dir(&args.out)?;
    let options = CombineOptions { how: combination, density, rank: args.svd_rank, seed: args.seed };
    combine(&parts, &options, place.path())?;
    place.keep()?;
    if args.common.json {
        let weights: Vec<Value> =
            parts.iter().map(|(dir, w)| json!({ "adapter": dir, "weight": w })).collect();
        return print_json(&json!({ "out": args.out, "combine": how, "adapters": weights }));
    }
    print(&format!("{}: {} adapters as one ({how})\n", args.out.display(), parts.len()))
}

/// `DIR=WEIGHT`; a directory alone has the weight 1.
fn weighted(given: &str) -> Result<(PathBuf, f32)> {
    let Some((dir, weight)) = given.rsplit_once('=') else { return Ok((PathBuf::from(given), 1.0)) };
    match weight.parse::<f32>() {
        Ok(weight) if weight.is_finite() && !dir.is_empty() => Ok((PathBuf::from(dir), weight)),
        _ => bail!(Usage(format!("--adapter {given}: expected a directory and its weight, as in {dir}=0.7"))),
    }
}

/// What there is to tell.
struct Done {
    merged: Merged,
    types: Vec<String>,
    remarks: String,
    verdict: Option<Verdict>,
}

/// A GGUF file.
fn into_file(args: &MergeArgs, note: &mut Note) -> Result<Done> {
    let (name, adapter) = one(args)?;
    let model = workbench::resolve(name, &args.common, note)?;
    let task = tasks::of_adapter(&model, &adapter)?;
    if task != Task::CausalLm {
        bail!(
            "{}: was trained for the task {task}, and GGUF files hold models of next tokens: let --out be a directory",
            adapter.display()
        );
    }
    let wanted = convert::gguf_type(args.dtype.as_deref(), &model, true)?;
    let place = Beside::file(&args.out)?;
    let mut bench = Bench::load(&model, Some(&adapter), &LoadOptions::default())?;
    let written = convert::bake(&mut bench, wanted, place.path(), &convert::name(name, &args.out), note)?;
    let verdict = convert::verify(&args.verify, &bench, wanted, place.path(), note)?;
    place.keep()?;
    let merged = Merged {
        tensors: written.mapped.len(),
        changed: written.changed,
        tied_head: !written.mapped.iter().any(|m| m.to == "output.weight"),
    };
    Ok(Done { merged, types: convert::types(&written)?, remarks: convert::remarks(&written), verdict })
}

/// A Hugging Face directory.
fn into_directory(args: &MergeArgs, note: &mut Note) -> Result<Done> {
    let dtype = args.dtype.as_deref().map(storage).transpose()?;
    let (name, adapter) = one(args)?;
    let model = workbench::resolve(name, &args.common, note)?;
    let place = Beside::dir(&args.out)?;
    let mut whole = AnyModel::load(&model, &adapter)?;
    whole.check_mergeable(&model)?;
    let asked = args.verify.verify || !args.verify.verify_data.is_empty() || args.verify.max_kl.is_some();
    if asked && matches!(whole, AnyModel::Task(_)) {
        let why = "--verify compares next tokens, and this adapter was trained for another task: compare what engobe eval says of both models";
        bail!(Usage(why.to_string()));
    }
    let (merged, types) = write(args, &mut whole, &model, place.path(), dtype, note)?;
    let quantized = verification::is_quantized(&model)? && !args.verify.no_verify;
    let verdict = match (&whole, asked || quantized) {
        (_, false) => None,
        (AnyModel::NextTokens(bench), true) => {
            Some(verification::run(&args.verify, bench, place.path(), note)?)
        }
        (AnyModel::Task(_), true) => {
            note.line("not verified: the base is quantized, and what is written is not; engobe eval says what both make of rows");
            None
        }
    };
    place.keep()?;
    Ok(Done { merged, types, remarks: String::new(), verdict })
}

fn storage(name: &str) -> Result<StorageType> {
    Ok(match name {
        "f32" => StorageType::F32,
        "bf16" => StorageType::BF16,
        "f16" => StorageType::F16,
        _ if name.parse::<GgufType>().is_ok() => {
            let why = "is for GGUF files: let --out end in .gguf, or choose f32, bf16 or f16";
            bail!(Usage(format!("--dtype {name} {why}")))
        }
        _ => bail!(Usage(format!("--dtype {name}: expected f32, bf16 or f16"))),
    })
}

fn write(
    args: &MergeArgs,
    whole: &mut AnyModel,
    model: &Path,
    out: &Path,
    dtype: Option<StorageType>,
    note: &Note,
) -> Result<(Merged, Vec<String>)> {
    let checkpoint = Checkpoint::open(model)?;
    // a tensor keeps its float type; quantized ones become f32
    let stored = |name: &str| match checkpoint.get(name).and_then(|view| view.storage()) {
        Ok(storage) if !storage.is_quantized() => storage,
        _ => StorageType::F32,
    };
    let types = std::cell::RefCell::new(std::collections::HashSet::new());
    let storage = |name: &str| {
        let chosen = dtype.unwrap_or_else(|| stored(name));
        types.borrow_mut().insert(chosen);
        chosen
    };
    let options = MergeOptions {
        storage: &storage,
        max_shard_bytes: (args.max_shard_size * 1e9) as usize,
        tied_head: whole.tied_head(),
    };
    let (tree, adapter) = whole.parts()?;
    let mut progress = Progress::new("tensors", 1, 0, note);
    let mut tell = |done, of| progress.of(done, of, || "merged".to_string());
    let merged = merge(tree, adapter, out, &options, &mut tell)?;
    drop(progress);
    let mut types: Vec<StorageType> = types.into_inner().into_iter().collect();
    types.sort_by_key(|t| t.to_string());
    write_companions(whole, model, out, &merged, &types)?;
    Ok((merged, types.iter().map(|t| t.to_string().to_lowercase()).collect()))
}

/// Tokenizer and configuration; `config.json` comes last, for without it nothing takes the directory for a model.
fn write_companions(
    whole: &AnyModel,
    model: &Path,
    out: &Path,
    merged: &Merged,
    types: &[StorageType],
) -> Result<()> {
    let mut config = companions::write(model, whole.tokenizer(), out)?;
    whole.describe(model, merged.tied_head, &mut config)?;
    if let Some(config) = config.as_object_mut() {
        // what is written is not quantized any more
        config.remove("quantization_config");
    }
    // the widest type loses nothing
    let widest =
        [("float32", StorageType::F32), ("bfloat16", StorageType::BF16), ("float16", StorageType::F16)];
    if let Some((name, _)) = widest.iter().find(|(_, t)| types.contains(t)) {
        for key in ["torch_dtype", "dtype"] {
            if config.get(key).is_some() || key == "torch_dtype" {
                config[key] = json!(name);
            }
        }
    }
    companions::write_json(&out.join("config.json"), &config)
}
