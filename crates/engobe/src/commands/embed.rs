//! `engobe embed`

use crate::args::EmbedArgs;
use crate::terminal::{Note, Progress, print, print_json, since_start};
use crate::{Usage, memory, scoring, workbench};
use anyhow::{Context, Result, bail};
use engobe_adapters::Adapter;
use engobe_autograd::{Tape, host};
use engobe_data::{MicroBatch, Sample, Task, TaskEncoder, TaskOptions, reader};
use engobe_formats::atomic::write_atomic;
use engobe_models::{Naming, load_encoder};
use engobe_nn::{Encoder, Pooling, TokenBatch, pool};
use serde_json::{Value, json};
use std::path::Path;

/// Makes a vector of each text.
pub fn run(args: &EmbedArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    workbench::set_threads(args.model.threads)?;
    let path = workbench::resolve(&args.model.model, &args.common, &mut note)?;
    let mut encoder = load_encoder(&path, &workbench::options_of(&args.model)?, Naming::Bare)?;
    if let Some(dir) = workbench::one_adapter(&args.model)? {
        let device = encoder.device().clone();
        Adapter::load(encoder.as_mut(), &dir, &device)?;
    }
    let habits = Habits::of(&path)?;
    let pooling = match &args.pooling {
        Some(name) => pooling_named(name)?,
        None => habits.pooling,
    };
    let normalize = args.normalize.unwrap_or(habits.normalize);
    let samples = read(args, &path, encoder.as_ref(), habits.max_seq_len)?;
    note.line(&format!(
        "{} pooling{}; texts are cut after {} tokens",
        name_of(pooling),
        if normalize { ", vectors of length 1" } else { "" },
        args.max_seq_len.or(habits.max_seq_len).unwrap_or(encoder.info().max_positions)
    ));
    let batches = scoring::eval_batches(&samples);
    let mut vectors = vec![Vec::new(); samples.len()];
    let mut progress = Progress::new("batches", batches.len(), 0, &note);
    let begun = since_start();
    for (i, batch) in batches.iter().enumerate() {
        for (row, vector) in batch.rows.iter().zip(embed(encoder.as_ref(), batch, pooling)?) {
            vectors[*row] = if normalize { unit(vector) } else { vector };
        }
        progress.update(i + 1, || "embedding".to_string());
    }
    drop(progress);
    let seconds = (since_start() - begun).as_secs_f64();
    write(&vectors, args.out.as_deref())?;
    if args.common.json {
        return print_json(&json!({
            "rows": vectors.len(),
            "dimensions": encoder.info().hidden_size,
            "tokens": samples.iter().map(|s| s.ids.len()).sum::<usize>(),
            "seconds": seconds,
            "pooling": name_of(pooling),
            "normalize": normalize,
            "peak_rss_bytes": memory::peak_resident_bytes(),
            "out": args.out,
        }));
    }
    Ok(())
}

/// What sentence-transformers' files beside a model say of its use.
struct Habits {
    pooling: Pooling,
    normalize: bool,
    max_seq_len: Option<usize>,
}

impl Habits {
    /// Of the model in `dir`; the mean of the tokens where nothing is said.
    fn of(dir: &Path) -> Result<Self> {
        let pooled = json_file(&dir.join("1_Pooling/config.json"))?;
        let is = |key: &str| pooled.as_ref().is_some_and(|c| c[key] == true);
        let pooling = match () {
            () if is("pooling_mode_cls_token") => Pooling::First,
            () if is("pooling_mode_lasttoken") => Pooling::Last,
            () if is("pooling_mode_max_tokens") || is("pooling_mode_mean_sqrt_len_tokens") => {
                bail!(
                    "{}: 1_Pooling asks for a pooling other than mean, cls and last: choose with --pooling",
                    dir.display()
                )
            }
            () => Pooling::Mean,
        };
        let modules = json_file(&dir.join("modules.json"))?.unwrap_or_default();
        let is_norm = |m: &Value| m["type"].as_str().is_some_and(|t| t.ends_with("Normalize"));
        let sentence = json_file(&dir.join("sentence_bert_config.json"))?.unwrap_or_default();
        Ok(Self {
            pooling,
            normalize: modules.as_array().is_some_and(|list| list.iter().any(is_norm)),
            max_seq_len: sentence["max_seq_length"].as_u64().map(|n| n as usize),
        })
    }
}

fn json_file(path: &Path) -> Result<Option<Value>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

const POOLINGS: [(&str, Pooling); 4] =
    [("mean", Pooling::Mean), ("cls", Pooling::First), ("last", Pooling::Last), ("pooler", Pooling::Pooler)];

fn pooling_named(name: &str) -> Result<Pooling> {
    let found = POOLINGS.iter().find(|(n, _)| *n == name).map(|(_, pooling)| *pooling);
    found.ok_or_else(|| Usage(format!("--pooling {name}: expected mean, cls, last or pooler")).into())
}

fn name_of(pooling: Pooling) -> &'static str {
    POOLINGS.iter().find(|(_, p)| *p == pooling).map_or("", |(name, _)| name)
}

/// The texts as tokens.
fn read(args: &EmbedArgs, path: &Path, encoder: &dyn Encoder, habit: Option<usize>) -> Result<Vec<Sample>> {
    let tokenizer = workbench::tokenizer(path)?
        .with_context(|| format!("{}: has no tokenizer.json: texts need one", path.display()))?;
    let info = encoder.info();
    let most = args.max_seq_len.or(habit).unwrap_or(info.max_positions).min(info.max_positions);
    let options = TaskOptions { task: Task::Embedding, max_seq_len: most };
    let rows = TaskEncoder::new(Some(&tokenizer), None, info.vocab_size, options);
    if args.text.is_empty() == args.data.is_empty() {
        bail!(Usage("give texts with --text, or files of them with --data".to_string()));
    }
    if !args.data.is_empty() {
        return Ok(rows.encode(&reader::read(&args.data)?)?);
    }
    let sample = |(i, text): (usize, &String)| {
        let place = engobe_data::Place { file: "--text".into(), number: i + 1, unit: "number" };
        rows.encode_row(&engobe_data::Row { place, content: engobe_data::Content::Text(text.clone()) })
    };
    Ok(args.text.iter().enumerate().map(sample).collect::<Result<_, _>>()?)
}

/// A vector a row.
fn embed(encoder: &dyn Encoder, batch: &MicroBatch, pooling: Pooling) -> Result<Vec<Vec<f32>>> {
    let mut tape = Tape::inference();
    let mut tokens = TokenBatch::packed(&batch.tokens, &batch.segments);
    if let Some(types) = &batch.types {
        tokens = tokens.with_token_types(types)?;
    }
    let hidden = encoder.hidden_states(&mut tape, &tokens)?;
    let pooled = pool(&mut tape, encoder, &tokens, &hidden, pooling)?;
    let pooled = pooled.tensor().to_device(&candle_core::Device::Cpu)?;
    Ok(host(&pooled)?.chunks_exact(encoder.info().hidden_size).map(<[f32]>::to_vec).collect())
}

/// The vector at length 1, as torch's `normalize`: a vector of zeros stays one.
fn unit(mut vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt().max(1e-12);
    vector.iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32);
    vector
}

/// Lines of JSON lists, or NumPy's format for a file that ends in .npy.
fn write(vectors: &[Vec<f32>], out: Option<&Path>) -> Result<()> {
    let lines = || vectors.iter().map(|v| format!("{}\n", json!(v))).collect::<String>();
    match out {
        None => print(&lines()),
        Some(path) if path.extension().is_some_and(|e| e == "npy") => Ok(write_atomic(path, &npy(vectors))?),
        Some(path) => Ok(write_atomic(path, lines().as_bytes())?),
    }
}

/// NumPy's format 1.0: magic, length of the header, a Python literal padded to 64 bytes, the numbers row by row.
fn npy(vectors: &[Vec<f32>]) -> Vec<u8> {
    let shape = format!("({}, {})", vectors.len(), vectors.first().map_or(0, Vec::len));
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    let before = 10;
    header.extend(std::iter::repeat_n(' ', (64 - (before + header.len() + 1) % 64) % 64));
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(vectors.iter().flatten().flat_map(|v| v.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn npy_has_its_numbers_at_a_multiple_of_64() {
        let bytes = npy(&[vec![1.0, 2.0], vec![3.0, 4.5]]);
        let header = u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
        assert_eq!((10 + header) % 64, 0);
        assert!(std::str::from_utf8(&bytes[10..10 + header]).unwrap().contains("'shape': (2, 2)"));
        assert_eq!(bytes.len(), 10 + header + 16);
        assert_eq!(bytes[bytes.len() - 4..], 4.5f32.to_le_bytes());
    }
}
