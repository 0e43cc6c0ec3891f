//! `engobe quantize`

use crate::Usage;
use crate::args::QuantizeArgs;
use crate::beside::Beside;
use crate::companions;
use crate::memory::{self, bytes_text};
use crate::quantization::{Asked, COMMAND};
use crate::terminal::{Note, Progress, print, print_json};
use crate::workbench;
use anyhow::{Context, Result, bail};
use engobe_formats::bitsandbytes::quantization_config;
use engobe_kernels::quantize::Scheme;
use engobe_kernels::storage::StorageType;
use engobe_models::{QuantizedModel, quantize};
use serde_json::json;
use std::path::Path;

/// Writes a quantized copy of a model.
pub fn run(args: &QuantizeArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    let double = args.double_quant.then_some(true);
    let asked = Asked { method: None, to: Some(&args.to), double, block: args.block_size };
    let scheme = asked.scheme(COMMAND)?.context("--to is missing")?;
    if !(args.max_shard_size.is_finite() && args.max_shard_size > 0.0) {
        bail!(Usage(format!("--max-shard-size {}: expected a number of GB above 0", args.max_shard_size)));
    }
    workbench::set_threads(args.threads)?;
    let model = workbench::resolve(&args.model, &args.common, &mut note)?;
    let place = Beside::dir(&args.out)?;
    let done = write(args, &model, place.path(), scheme, &note)?;
    place.keep()?;
    if args.common.json {
        return print_json(&json!({
            "out": args.out,
            "type": scheme.to_string(),
            "quantized": done.quantized,
            "kept": done.kept,
            "bytes_before": done.bytes_before,
            "bytes_after": done.bytes_after,
            "peak_rss_bytes": memory::peak_resident_bytes(),
        }));
    }
    print(&format!(
        "{}: {} matrices as {scheme}, {} tensors as they were; {} became {}\n",
        args.out.display(),
        done.quantized,
        done.kept,
        bytes_text(done.bytes_before),
        bytes_text(done.bytes_after)
    ))
}

fn write(
    args: &QuantizeArgs,
    model: &Path,
    out: &Path,
    scheme: Scheme,
    note: &Note,
) -> Result<QuantizedModel> {
    let mut progress = Progress::new("tensors", 1, 0, note);
    let mut tell = |done, of| progress.of(done, of, || "quantized".to_string());
    let shard = (args.max_shard_size * 1e9) as usize;
    let done = quantize(model, scheme, out, shard, &mut tell)?;
    drop(progress);
    write_companions(model, out, scheme, &done)?;
    Ok(done)
}

/// Tokenizer and configuration; `config.json` comes last, for without it nothing takes the directory for a model.
fn write_companions(model: &Path, out: &Path, scheme: Scheme, done: &QuantizedModel) -> Result<()> {
    let mut config = companions::write(model, workbench::tokenizer(model)?.as_ref(), out)?;
    let compute = match done.original {
        StorageType::BF16 => "bfloat16",
        StorageType::F16 => "float16",
        _ => "float32",
    };
    config["quantization_config"] = quantization_config(scheme, &done.skipped, compute);
    companions::write_json(&out.join("config.json"), &config)
}
