//! `engobe convert`

use crate::args::{ConvertArgs, VerifyArgs};
use crate::beside::Beside;
use crate::terminal::{Note, Progress, print, print_json};
use crate::verification::{self, Verdict};
use crate::workbench::{self, Bench};
use crate::{Usage, fetch, hub};
use anyhow::{Context, Result, bail};
use engobe_convert::model::{ModelSource, WrittenModel, write_model};
use engobe_convert::{AdapterFormat, GgufType, Lora, Mapped};
use engobe_formats::mlx::MlxAdapter;
use engobe_formats::peft::PeftAdapter;
use engobe_kernels::storage::StorageType;
use engobe_models::{LoadOptions, Outline};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Writes a model or an adapter in another format.
pub fn run(args: &ConvertArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    verification::check_args(&args.verify)?;
    let done = match args.to.as_str() {
        "gguf" => model(args, &mut note)?,
        "gguf-lora" | "mlx" | "peft" => adapter(args, &mut note)?,
        other => bail!(Usage(format!("--to {other}: expected gguf-lora, gguf, mlx or peft"))),
    };
    if args.common.json {
        let mapped: Vec<Value> = done.mapped.iter().map(row).collect();
        let mut json = json!({ "out": args.out, "mapped": mapped });
        verification::add_to_json(done.verdict.as_ref(), &mut json);
        return print_json(&json);
    }
    print(&(table(&done.mapped) + &done.remarks))?;
    if let Some(verdict) = &done.verdict {
        print(&format!("{}\n", verdict.line()))?;
    }
    print(&format!("{}: {} tensors\n", args.out.display(), done.mapped.len()))
}

/// What there is to tell.
struct Done {
    mapped: Vec<Mapped>,
    remarks: String,
    verdict: Option<Verdict>,
}

fn row(m: &Mapped) -> Value {
    json!({ "from": m.from, "to": m.to, "shape": m.shape, "dtype": m.dtype })
}

/// One line a tensor.
fn table(mapped: &[Mapped]) -> String {
    let width = |of: &dyn Fn(&Mapped) -> usize| mapped.iter().map(of).max().unwrap_or(0);
    let (from, to) = (width(&|m| m.from.len()), width(&|m| m.to.len()));
    mapped
        .iter()
        .map(|m| format!("{:<from$}  {:<to$}  {:<5} {:?}\n", m.from, m.to, m.dtype, m.shape))
        .collect()
}

/// Makes a GGUF LoRA, or an adapter for PEFT or mlx-lm.
fn adapter(args: &ConvertArgs, note: &mut Note) -> Result<Done> {
    if args.verify.verify || !args.verify.verify_data.is_empty() || args.verify.max_kl.is_some() {
        bail!(Usage(format!(
            "--to {}: only merged models are verified; leave --verify and its like out",
            args.to
        )));
    }
    let missing = || Usage(format!("--to {} needs --adapter: what is to be converted", args.to));
    let from = args.adapter.as_deref().ok_or_else(missing)?;
    let storage = match (args.to.as_str(), args.kind.as_deref()) {
        (_, None) | ("gguf-lora", Some("f32")) => StorageType::F32,
        ("gguf-lora", Some("f16")) => StorageType::F16,
        ("gguf-lora", Some(other)) => {
            bail!(Usage(format!("--type {other}: a GGUF LoRA is written in f32 or f16")))
        }
        (to, Some(other)) => {
            bail!(Usage(format!("--type {other}: --to {to} always writes f32; leave it out")))
        }
    };
    let format = AdapterFormat::of(from)?;
    let base = base(args, from, format, note)?;
    let outline = base.as_deref().map(|path| Outline::read(path, &LoadOptions::default())).transpose()?;
    let lora = Lora::read(from, outline.as_ref(), base.as_deref())?;
    // what the user typed means more to the next reader than where it was found
    let name = args.model.as_deref();
    let place = match args.to.as_str() {
        "gguf-lora" => Beside::file(&args.out)?,
        _ => Beside::dir(&args.out)?,
    };
    let mapped = match (args.to.as_str(), &outline) {
        ("gguf-lora", Some(outline)) => lora.write_gguf(place.path(), outline, storage)?,
        ("gguf-lora", None) => {
            let hint = "the base model decides names and order of rows";
            bail!(Usage(format!(
                "--to gguf-lora needs --model: {hint}, and the adapter names none that is here"
            )))
        }
        ("mlx", outline) => lora.write_mlx(place.path(), outline.as_ref(), name)?,
        (_, outline) => lora.write_peft(place.path(), outline.as_ref(), name)?,
    };
    place.keep()?;
    Ok(Done { mapped, remarks: String::new(), verdict: None })
}

/// The base model: what `--model` says, or what the adapter's files name if it is here.
fn base(
    args: &ConvertArgs,
    adapter: &Path,
    format: AdapterFormat,
    note: &mut Note,
) -> Result<Option<PathBuf>> {
    if let Some(model) = &args.model {
        return workbench::resolve(model, &args.common, note).map(Some);
    }
    let named = match format {
        AdapterFormat::Peft => {
            PeftAdapter::load(adapter)?.config.text("base_model_name_or_path").map(str::to_string)
        }
        AdapterFormat::Mlx => MlxAdapter::load(adapter)?.config.model,
        AdapterFormat::Gguf => None,
    };
    let Some(named) = named else { return Ok(None) };
    let path = Path::new(&named);
    let found = if path.exists() {
        Some(path.to_path_buf())
    } else if let Some(known) = fetch::known(&named) {
        let cache = fetch::cache_dir(args.common.cache_dir.as_deref())?;
        fetch::fetch(known, &cache, true, &mut |_| ()).ok()
    } else if hub::is_hub_id(&named) {
        // nothing is downloaded that was not asked for
        hub::download(&named, &hub::HubOptions { offline: true }).ok()
    } else {
        None
    };
    match &found {
        Some(path) => note.line(&format!("base model: {} ({named}, named by the adapter)", path.display())),
        None => {
            note.line(&format!("base model {named}, named by the adapter, is not here; --model names one"))
        }
    }
    Ok(found)
}

/// Makes a GGUF model.
fn model(args: &ConvertArgs, note: &mut Note) -> Result<Done> {
    let missing = || Usage("--to gguf needs --model: what is to be converted".to_string());
    let spec = args.model.as_deref().ok_or_else(missing)?;
    let path = workbench::resolve(spec, &args.common, note)?;
    let wanted = gguf_type(args.kind.as_deref(), &path, args.adapter.is_some())?;
    let adapter = args.adapter.as_deref();
    if let Some(adapter) = adapter
        && AdapterFormat::of(adapter)? != AdapterFormat::Peft
    {
        bail!(
            "{}: only PEFT directories can be merged; `engobe convert --to peft` makes one",
            adapter.display()
        );
    }
    let place = Beside::file(&args.out)?;
    let mut bench = Bench::load(&path, adapter, &LoadOptions::default())?;
    let written = bake(&mut bench, wanted, place.path(), &name(spec, &args.out), note)?;
    let verdict = verify(&args.verify, &bench, wanted, place.path(), note)?;
    place.keep()?;
    let remarks = remarks(&written);
    Ok(Done { mapped: written.mapped, remarks, verdict })
}

/// `--type` of a GGUF model. Where an adapter is merged into quantized weights and nothing is said, 8 bits: on
/// their own grid most of what it learned would be rounded away.
pub fn gguf_type(name: Option<&str>, base: &Path, adapter: bool) -> Result<GgufType> {
    match name {
        Some(name) => name.parse().map_err(|e| Usage(format!("--type {e}")).into()),
        None if adapter && verification::is_quantized(base)? => Ok(GgufType::One(StorageType::Q8_0)),
        None => Ok(GgufType::Keep),
    }
}

/// What a model that has no name yet is called: as its directory is, or the file that is written.
pub fn name(spec: &str, out: &Path) -> String {
    let last =
        spec.trim_end_matches('/').rsplit('/').next().filter(|n| !n.is_empty() && *n != "." && *n != "..");
    let stem = || out.file_stem().map_or_else(|| "model".to_string(), |s| s.to_string_lossy().into_owned());
    last.map_or_else(stem, str::to_string)
}

/// Writes the model on the bench, with its adapter, as a GGUF file.
pub fn bake(
    bench: &mut Bench,
    wanted: GgufType,
    out: &Path,
    name: &str,
    note: &Note,
) -> Result<WrittenModel> {
    let mut progress = Progress::new("tensors", 1, 0, note);
    let mut tell = |done, of| progress.of(done, of, || "written".to_string());
    let source = ModelSource {
        path: &bench.path,
        tokenizer: bench.tokenizer.as_ref(),
        adapter: bench.adapter.as_ref(),
        name,
    };
    Ok(write_model(bench.model.as_mut(), &source, wanted, out, &mut tell)?)
}

/// Measures a GGUF file that was made of the bench's model, where that is called for: an adapter was merged and
/// numbers are quantized, or it was asked for.
pub fn verify(
    args: &VerifyArgs,
    bench: &Bench,
    wanted: GgufType,
    written: &Path,
    note: &mut Note,
) -> Result<Option<Verdict>> {
    let quantized = match wanted {
        GgufType::One(storage) if storage.is_quantized() => true,
        _ => verification::is_quantized(&bench.path)?,
    };
    let merged = bench.adapter.is_some() && quantized && !args.no_verify;
    if !(merged || args.verify || !args.verify_data.is_empty() || args.max_kl.is_some()) {
        return Ok(None);
    }
    verification::run(args, bench, written, note).map(Some)
}

/// Tensors that got another type than the one that was asked for, by type.
pub fn remarks(written: &WrittenModel) -> String {
    let mut kinds: Vec<&str> = written.otherwise.iter().map(|(_, kind)| kind.name()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let of = |kind: &str| {
        let names: Vec<&str> =
            written.otherwise.iter().filter(|(_, k)| k.name() == kind).map(|(n, _)| n.as_str()).collect();
        let more = if names.len() > 1 { format!(" and {} more", names.len() - 1) } else { String::new() };
        format!(
            "as {kind}: {}{more} (heads, and rows that are not whole blocks)\n",
            names.first().unwrap_or(&"")
        )
    };
    kinds.into_iter().map(of).collect()
}

/// Types of the tensors that were written, each once.
pub fn types(written: &WrittenModel) -> Result<Vec<String>> {
    let mut types: Vec<String> = written.mapped.iter().map(|m| m.dtype.to_lowercase()).collect();
    types.sort();
    types.dedup();
    Some(types).filter(|t| !t.is_empty()).context("nothing was written")
}
