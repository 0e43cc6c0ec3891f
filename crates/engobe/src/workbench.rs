//! A model on the bench: resolved, loaded, with its tokenizer and adapter.

use crate::args::{Common, ModelArgs};
use crate::quantization::{Asked, SETTINGS};
use crate::terminal::Note;
use crate::{Usage, fetch, hub};
use anyhow::{Context, Result, bail};
use candle_core::Device;
use engobe_adapters::method::NeedsText;
use engobe_adapters::{Adapter, StartText};
use engobe_autograd::Tape;
use engobe_data::TextTokenizer;
use engobe_data::template::CHATML;
use engobe_formats::gguf::Gguf;
use engobe_infer::Activations;
use engobe_models::{LoadOptions, WeightDtype, load_causal_lm};
use engobe_nn::{CausalLm, ModuleMut, ModuleTree};
use std::path::{Path, PathBuf};

/// A model and what belongs to it.
pub struct Bench {
    /// directory or GGUF file
    pub path: PathBuf,
    /// the decoder
    pub model: Box<dyn CausalLm>,
    /// its tokenizer; token ids need none
    pub tokenizer: Option<TextTokenizer>,
    /// the adapter, if one was asked for
    pub adapter: Option<Adapter>,
    /// how generation takes activations
    pub activations: Activations,
}

/// Uses `threads` threads from here on.
pub fn set_threads(threads: Option<usize>) -> Result<()> {
    if threads == Some(0) {
        bail!(Usage("--threads 0: give a number above 0, or leave it out for all cores".to_string()));
    }
    // this thread works in the pool instead of sleeping until others are done: no wake-up at each parallel job
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).use_current_thread();
    // a second call finds the pool built: the first one counts
    let _ = builder.build_global();
    Ok(())
}

/// The device of `--device`.
pub fn device(name: &str) -> Result<Device> {
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => {
            (kind, index.parse().with_context(|| format!("--device {name}: expected cuda:N"))?)
        }
        None => (name, 0),
    };
    match kind {
        "cpu" => Ok(Device::Cpu),
        "cuda" => {
            Device::new_cuda(index).with_context(|| format!("--device {name}: not available in this build"))
        }
        "metal" => {
            Device::new_metal(index).with_context(|| format!("--device {name}: not available in this build"))
        }
        _ => bail!(Usage(format!("--device {name}: expected cpu, cuda[:N] or metal"))),
    }
}

/// The storage of `--dtype`.
pub fn weight_dtype(name: &str) -> Result<WeightDtype> {
    Ok(match name {
        "stored" => WeightDtype::Stored,
        "f32" => WeightDtype::F32,
        "bf16" => WeightDtype::Bf16,
        "f16" => WeightDtype::F16,
        _ => bail!(Usage(format!("--dtype {name}: expected stored, f32, bf16 or f16"))),
    })
}

/// How a model shall be held: what was said of its type, its place, and of quantizing it.
pub fn load_options(dtype: &str, place: &str, asked: Asked<'_>) -> Result<LoadOptions> {
    let (storage, device, quantize) = (weight_dtype(dtype)?, device(place)?, asked.scheme(SETTINGS)?);
    if let Some(scheme) = quantize {
        if storage != WeightDtype::Stored {
            bail!(Usage(format!("--dtype {dtype} contradicts quantizing to {scheme}: give one of both")));
        }
        if !device.is_cpu() {
            bail!(Usage(format!(
                "--device {place} contradicts quantizing to {scheme}: that works on the CPU"
            )));
        }
    }
    Ok(LoadOptions { dtype: storage, quantize, device })
}

/// Says what to leave out if a base is quantized already.
fn explain(error: engobe_models::Error) -> anyhow::Error {
    match error {
        engobe_models::Error::AlreadyQuantized { .. } => {
            anyhow::anyhow!("{error}: to work over it as it is, leave --quantize and --method qlora out")
        }
        other => other.into(),
    }
}

/// The directory or file that a model's name stands for; fetched if it must be.
pub fn resolve(spec: &str, common: &Common, note: &mut Note) -> Result<PathBuf> {
    let path = Path::new(spec);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    if let Some(known) = fetch::known(spec) {
        let cache = fetch::cache_dir(common.cache_dir.as_deref())?;
        return fetch::fetch(known, &cache, common.offline, &mut |line| note.line(line));
    }
    if hub::is_hub_id(spec) {
        return hub::download(spec, &hub::HubOptions { offline: common.offline });
    }
    bail!(
        "{spec}: no such directory or .gguf file, no known model (smollm2-135m), and not a hub id (org/name)"
    )
}

/// The directory of `DIR` or `NAME=DIR`; a directory whose own name has a `=` is meant as it stands.
fn adapter_dir(text: &str) -> PathBuf {
    match text.split_once('=') {
        Some((_, dir)) if !Path::new(text).exists() => PathBuf::from(dir),
        _ => PathBuf::from(text),
    }
}

/// Puts the template of `--chat-template`, a file or `chatml`, in the place of the model's own.
pub fn set_chat_template(tokenizer: Option<&mut TextTokenizer>, template: Option<&str>) -> Result<()> {
    let Some(template) = template else { return Ok(()) };
    let tokenizer = tokenizer.context("--chat-template: the model has no tokenizer, so it reads no chats")?;
    let source = match template {
        "chatml" => CHATML.to_string(),
        file => std::fs::read_to_string(file)
            .with_context(|| format!("--chat-template {file} (a file, or chatml)"))?,
    };
    tokenizer.set_chat_template(source);
    Ok(())
}

/// The tokenizer of a model; `None` if a directory has no tokenizer.json.
pub fn tokenizer(path: &Path) -> Result<Option<TextTokenizer>> {
    if path.is_dir() {
        if !path.join("tokenizer.json").exists() {
            return Ok(None);
        }
        return Ok(Some(TextTokenizer::from_hf_dir(path)?));
    }
    let gguf = Gguf::open(path)?;
    // llama.cpp's words for a model that takes token ids alone
    if matches!(gguf.opt_str("tokenizer.ggml.model")?, None | Some("none" | "no_vocab")) {
        return Ok(None);
    }
    Ok(Some(TextTokenizer::from_gguf_file(&gguf)?))
}

/// How the model of a command line shall be held.
pub fn options_of(args: &ModelArgs) -> Result<LoadOptions> {
    let asked = Asked {
        method: None,
        to: args.quantize.as_deref(),
        double: args.double_quant.then_some(true),
        block: args.quant_block_size,
    };
    load_options(&args.dtype, &args.device, asked)
}

/// How generation takes activations.
pub fn activations(args: &ModelArgs) -> Activations {
    if args.exact_activations { Activations::Exact } else { Activations::Rounded }
}

/// The adapter's directory, if one was named.
pub fn one_adapter(args: &ModelArgs) -> Result<Option<PathBuf>> {
    match args.adapter.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(adapter_dir(one))),
        more => bail!(Usage(format!("--adapter was given {} times: one at a time here", more.len()))),
    }
}

impl Bench {
    /// Loads a model by what was typed, with at most one adapter.
    pub fn open(args: &ModelArgs, common: &Common, note: &mut Note) -> Result<Self> {
        set_threads(args.threads)?;
        let path = resolve(&args.model, common, note)?;
        Self::open_at(&path, args)
    }

    /// Loads the model at `path` as was typed, with at most one adapter.
    pub fn open_at(path: &Path, args: &ModelArgs) -> Result<Self> {
        let bench = Self::load(path, one_adapter(args)?.as_deref(), &options_of(args)?)?;
        Ok(Self { activations: activations(args), ..bench })
    }

    /// Loads a model from a directory or GGUF file.
    pub fn load(path: &Path, adapter: Option<&Path>, options: &LoadOptions) -> Result<Self> {
        let (model, tokenizer) = rayon::join(|| load_causal_lm(path, options), || tokenizer(path));
        let device = options.device.clone();
        let mut model = model.map_err(explain)?;
        let adapter = adapter.map(|dir| Adapter::load(model.as_mut(), dir, &device)).transpose()?;
        let (path, tokenizer) = (path.to_path_buf(), tokenizer?);
        Ok(Self { path, model, tokenizer, adapter, activations: Activations::default() })
    }

    /// The tokenizer, or an error that says what is missing.
    pub fn need_tokenizer(&self) -> Result<&TextTokenizer> {
        need(self.tokenizer.as_ref(), &self.path)
    }

    /// Tokens at which generation ends.
    pub fn end_ids(&self) -> Result<Vec<u32>> {
        end_ids(self.tokenizer.as_ref(), &self.path)
    }
}

/// The tokenizer of the model at `path`, or an error that says what is missing.
pub fn need<'t>(tokenizer: Option<&'t TextTokenizer>, path: &Path) -> Result<&'t TextTokenizer> {
    tokenizer.with_context(|| {
        let other = ["spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json"];
        match other.iter().find(|name| path.join(name).exists()) {
            None => format!("{}: has no tokenizer.json: text needs one", path.display()),
            Some(name) => format!(
                "{}: has {name} but no tokenizer.json, and text needs one: transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it",
                path.display()
            ),
        }
    })
}

/// Tokens at which the model at `path` ends a text.
pub fn end_ids(tokenizer: Option<&TextTokenizer>, path: &Path) -> Result<Vec<u32>> {
    match tokenizer {
        Some(t) => Ok(t.end_ids().to_vec()),
        None if path.is_dir() => Ok(engobe_formats::hf_config::eos_token_ids(path)?),
        None => Ok(Vec::new()),
    }
}

/// What the text that a new adapter starts from is to the model, if it starts from one.
pub fn start_text(bench: &Bench, needs: Option<NeedsText>) -> Result<StartText> {
    let Some(needs) = needs else { return Ok(StartText::default()) };
    let ids = bench.need_tokenizer()?.encode(&needs.text, true)?;
    if ids.is_empty() || !needs.key_values {
        return Ok(StartText { ids, key_values: Vec::new() });
    }
    let model = bench.model.as_ref();
    let mut cache = model.new_cache(1, ids.len(), Activations::Exact)?;
    let batch = cache.batch(&[(0, &ids)])?;
    model.hidden_states(&mut Tape::inference(), &batch, Some(&mut cache))?;
    let key_values = (0..model.info().num_layers).map(|layer| cache.rows(layer, 0));
    let key_values = key_values.collect::<Result<_, _>>()?;
    Ok(StartText { ids, key_values })
}

/// What is trained and what is there, as PEFT's `print_trainable_parameters` says it.
pub fn trainable_line(model: &mut dyn CausalLm, adapter: &Adapter) -> String {
    trainable_text(adapter.num_parameters(), adapter.num_added() + parameters_of(model))
}

/// Both numbers in PEFT's words.
pub fn trainable_text(trainable: usize, all: usize) -> String {
    let share = 100.0 * trainable as f64 / all.max(1) as f64;
    format!(
        "trainable params: {} || all params: {} || trainable%: {share:.4}",
        thousands(trainable),
        thousands(all)
    )
}

/// [`base_parameters`] of a decoder.
pub fn parameters_of(model: &mut dyn CausalLm) -> usize {
    let tied = model.info().tied_head;
    base_parameters(model, tied)
}

/// Elements of the base model; a head that shares the embedding's matrix counts once.
pub fn base_parameters(model: &mut dyn ModuleTree, tied_head: bool) -> usize {
    let tied = if tied_head { model.output_heads() } else { Vec::new() };
    let mut shared = 0;
    model.visit_modules(&mut |module| {
        if let ModuleMut::Linear(m) = module
            && tied.iter().any(|head| head == m.path())
        {
            shared += m.in_features() * m.out_features();
        }
    });
    elements(model) - shared
}

/// Elements of all modules.
pub fn elements(model: &mut (impl ModuleTree + ?Sized)) -> usize {
    let mut total = 0;
    model.visit_modules(&mut |module| {
        total += match module {
            ModuleMut::Linear(m) => {
                m.in_features() * m.out_features() + m.bias().map_or(0, |b| b.elem_count())
            }
            ModuleMut::Embedding(m) => m.weight().dims().0 * m.weight().dims().1,
            ModuleMut::RmsNorm(m) => m.weight().elem_count(),
            ModuleMut::LayerNorm(m) => m.weight().elem_count() + m.bias().map_or(0, |b| b.elem_count()),
        }
    });
    total
}

/// `1,234,567`
pub fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let parts: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|c| std::str::from_utf8(c).ok()).collect();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_off() {
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (134_515_008, "134,515,008")] {
            assert_eq!(thousands(n), text);
        }
    }
}
