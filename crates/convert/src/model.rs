//! A model, with or without an adapter, as a GGUF file: tensor by tensor, no more than one of them in memory.
//!
//! A GGUF base keeps all of its metadata and every tensor that nothing asks to change, byte for byte. For a Hugging
//! Face base the metadata is made of its configuration and tokenizer, as llama.cpp's `convert_hf_to_gguf.py` does.

use crate::types::{GgufType, Matrix, file_type};
use crate::{Error, Mapped, Result};
use engobe_adapters::Adapter;
use engobe_adapters::merge::{MergePlan, Planned, each_tensor, encode, plan};
use engobe_autograd::tensor_of;
use engobe_data::TextTokenizer;
use engobe_formats::checkpoint::Checkpoint;
use engobe_formats::gguf::{Announced, GgufValue, GgufWriter, MetaValue};
use engobe_formats::tensor::{Dtype, TensorView};
use engobe_kernels::storage::StorageType;
use engobe_models::{LoadOptions, Outline, Stored};
use engobe_nn::CausalLm;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What is written, and from what.
pub struct ModelSource<'a> {
    /// the model's directory or file
    pub path: &'a Path,
    /// its tokenizer; a GGUF base's own metadata goes before it
    pub tokenizer: Option<&'a TextTokenizer>,
    /// the adapter that is attached to the model
    pub adapter: Option<&'a Adapter>,
    /// `general.name` of a model that has none yet
    pub name: &'a str,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct WrittenModel {
    /// every tensor
    pub mapped: Vec<Mapped>,
    /// number of tensors that the adapter changed
    pub changed: usize,
    /// tensors that could not have the type that was asked for, with the type that they got
    pub otherwise: Vec<(String, StorageType)>,
}

/// A tensor to be written.
struct Output {
    name: String,
    storage: StorageType,
    shape: Vec<usize>,
    from: From,
}

/// Where its bytes come from.
enum From {
    /// the base file, as they lie
    Stored(TensorView),
    /// a setting
    Values(Vec<f32>),
    /// the model, by the place in the merge plan
    Module,
}

/// Writes `model` (which `source` describes) to `out`, beside its place first. `progress` sees how many tensors of
/// how many are written.
///
/// # Errors
/// A tensor of the base that has no place in the file, settings or a tokenizer that GGUF cannot express, numbers
/// beyond the type's range.
pub fn write_model(
    model: &mut dyn CausalLm,
    source: &ModelSource<'_>,
    wanted: GgufType,
    out: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<WrittenModel> {
    let checkpoint = Checkpoint::open(source.path)?;
    let outline = Outline::read(source.path, &LoadOptions::default())?;
    outline.gguf_architecture()?;
    let tied_head = model.info().tied_head;
    let plan = plan(model, tied_head);
    let job = Job { source, wanted, checkpoint: &checkpoint, outline: &outline, plan: &plan };
    let (outputs, otherwise) = job.outputs()?;
    let metadata = job.metadata(&outputs)?;
    let announced: Vec<Announced> =
        outputs.iter().map(|o| (o.name.clone(), o.storage, o.shape.clone())).collect();
    let mut writer = GgufWriter::create(out, &metadata, announced)?;
    let total = outputs.len();
    let mut waiting = outputs.iter();
    let mut mapped = Vec::new();
    let mut done = |output: &Output, from: &str, mapped: &mut Vec<Mapped>| {
        let (to, shape, dtype) = (output.name.clone(), output.shape.clone(), output.storage.to_string());
        mapped.push(Mapped { from: from.to_string(), to, shape, dtype });
        progress(mapped.len(), total);
    };
    each_tensor(model, source.adapter, &plan, &mut |tensor, value| -> Result<()> {
        let Some(output) = waiting.next() else { return Ok(()) };
        match &output.from {
            From::Stored(view) => writer.write(&output.name, view.bytes())?,
            _ => {
                let mut value = value()?;
                if job.is_transposed(tensor) {
                    value = value.t().and_then(|v| v.contiguous()).map_err(engobe_autograd::Error::from)?;
                }
                let stored = outline.stored(&tensor.name);
                if stored != Stored::AsIs {
                    let rows = output.shape.first().copied().unwrap_or(0);
                    let values = stored.values_to_gguf(&engobe_autograd::host(&value)?, rows);
                    value = tensor_of(values, output.shape.as_slice())?;
                }
                writer.write(&output.name, &encode(&output.name, &value, output.storage, out)?)?;
            }
        }
        done(output, &job.source_name(tensor), &mut mapped);
        Ok(())
    })?;
    for output in waiting {
        match &output.from {
            From::Stored(view) => writer.write(&output.name, view.bytes())?,
            From::Values(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                writer.write(&output.name, &bytes)?;
            }
            From::Module => {}
        }
        let from =
            if matches!(output.from, From::Values(_)) { "config.json: rope_scaling" } else { &output.name };
        done(output, from, &mut mapped);
    }
    writer.finish()?;
    let changed = plan.tensors.iter().filter(|t| t.changed).count();
    Ok(WrittenModel { mapped, changed, otherwise })
}

struct Job<'a> {
    source: &'a ModelSource<'a>,
    wanted: GgufType,
    checkpoint: &'a Checkpoint,
    outline: &'a Outline,
    plan: &'a MergePlan,
}

type Outputs = (Vec<Output>, Vec<(String, StorageType)>);

impl Job<'_> {
    /// All tensors of the file: the model's in the plan's order, then what else there is.
    fn outputs(&self) -> Result<Outputs> {
        let (mut outputs, mut otherwise) = (Vec::new(), Vec::new());
        let mut taken = BTreeSet::new();
        for tensor in &self.plan.tensors {
            let Some(name) = self.outline.gguf_name(&tensor.name) else {
                return Err(self.cannot(&tensor.name, "GGUF has no name for it"));
            };
            let stored = self.stored(tensor)?;
            if let Some(view) = &stored {
                taken.insert(view.name.clone());
            }
            let output = self.output(tensor, name, stored)?;
            if let GgufType::One(wanted) = self.wanted
                && output.shape.len() > 1
                && output.storage != wanted
            {
                otherwise.push((output.name.clone(), output.storage));
            }
            outputs.push(output);
        }
        outputs.extend(self.extras(&taken)?);
        Ok((outputs, otherwise))
    }

    /// The base's tensor that a planned one comes from; a head that was the embedding's matrix has none.
    fn stored(&self, tensor: &Planned) -> Result<Option<TensorView>> {
        let name = self.source_name(tensor);
        match self.checkpoint.contains(&name) {
            true => Ok(Some(self.checkpoint.get(&name)?.clone())),
            false => Ok(None),
        }
    }

    /// The base's name of a planned tensor.
    fn source_name(&self, tensor: &Planned) -> String {
        self.outline.name_in(self.checkpoint, &tensor.name)
    }

    fn output(&self, tensor: &Planned, name: String, stored: Option<TensorView>) -> Result<Output> {
        let is_gguf = self.checkpoint.gguf().is_some();
        let mut shape = tensor.shape.clone();
        if self.is_transposed(tensor) {
            shape.reverse();
        }
        let [_, cols] = *shape else {
            // norms and biases are in f32, as ggml's kernels take them
            let same = stored.filter(|view| {
                is_gguf
                    && !tensor.changed
                    && (self.wanted == GgufType::Keep || view.storage().is_ok_and(|s| s == StorageType::F32))
            });
            return Ok(match same {
                Some(view) => Output { name, storage: view.storage()?, shape, from: From::Stored(view) },
                None => Output { name, storage: StorageType::F32, shape, from: From::Module },
            });
        };
        let own = match &stored {
            Some(view) => Some(self.own_storage(view)?),
            None => None,
        };
        let matrix = Matrix {
            cols,
            head: self.is_head(tensor),
            stored: match own {
                Some(storage) => storage,
                None => self.embedding_storage()?,
            },
            changed: tensor.changed,
        };
        let storage = self.wanted.storage(&matrix);
        let from = match stored {
            // (a Hugging Face base's rows may lie in another order)
            Some(view) if is_gguf && !tensor.changed && own == Some(storage) => From::Stored(view),
            _ => From::Module,
        };
        Ok(Output { name, storage, shape, from })
    }

    /// What a matrix is stored as. The codes of bitsandbytes' weights count as 16-bit floats, from which they were
    /// made: GGUF has nothing like them.
    fn own_storage(&self, view: &TensorView) -> Result<StorageType> {
        match view.dtype {
            Dtype::U8 | Dtype::I8 if self.wanted == GgufType::Keep => {
                let why =
                    "GGUF has no type for the codes of bitsandbytes: give --type, f16 or q8_0 for example";
                Err(self.cannot(&view.name, why))
            }
            Dtype::U8 | Dtype::I8 => Ok(StorageType::F16),
            _ => Ok(view.storage()?),
        }
    }

    /// True for a matrix that Hugging Face's files hold as `[in, out]`: GGUF has `[out, in]` always.
    fn is_transposed(&self, tensor: &Planned) -> bool {
        let path = tensor.name.strip_suffix(".weight");
        path.and_then(|path| self.outline.linear(path)).is_some_and(|l| l.transposed)
    }

    /// True for output heads, and for an embedding that serves as one.
    fn is_head(&self, tensor: &Planned) -> bool {
        let path = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        match self.outline.linear(path) {
            Some(linear) => linear.head,
            None => self.plan.tied_head,
        }
    }

    /// What a head that becomes one of its own is stored as: the embedding's type.
    fn embedding_storage(&self) -> Result<StorageType> {
        let name = "token_embd.weight";
        let hf = self.outline.hf_name(name).unwrap_or_else(|| name.to_string());
        let name = self.outline.name_in(self.checkpoint, &hf);
        Ok(self.checkpoint.get(&name)?.storage()?)
    }

    /// Tensors that are no module's: settings, and whatever else a GGUF base holds.
    fn extras(&self, taken: &BTreeSet<String>) -> Result<Vec<Output>> {
        let left = self.checkpoint.tensors().filter(|view| !taken.contains(&view.name));
        if self.checkpoint.gguf().is_some() {
            let stored = |view: &TensorView| -> Result<Output> {
                let (name, storage, shape) = (view.name.clone(), view.storage()?, view.shape.clone());
                Ok(Output { name, storage, shape, from: From::Stored(view.clone()) })
            };
            return left.map(stored).collect();
        }
        for view in left {
            let heads = self.outline.linears.iter().filter(|l| l.head);
            let unused_head = self.outline.sizes.tied_head
                && heads.into_iter().any(|l| view.name == format!("{}.weight", l.path));
            // old transformers stored what it computes: frequencies and causal masks
            let computed = [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias"]
                .iter()
                .any(|end| view.name.ends_with(end));
            // 4-bit weights have their scales beside them
            let part = taken
                .iter()
                .any(|name| view.name.strip_prefix(name.as_str()).is_some_and(|r| r.starts_with('.')));
            if !(unused_head || computed || part) {
                return Err(self.cannot(&view.name, "GGUF has no name for it"));
            }
        }
        let values = |(name, values): (String, Vec<f32>)| Output {
            name,
            storage: StorageType::F32,
            shape: vec![values.len()],
            from: From::Values(values),
        };
        Ok(self.outline.gguf_settings()?.tensors.into_iter().map(values).collect())
    }

    /// The file's metadata.
    fn metadata(&self, outputs: &[Output]) -> Result<Vec<(String, MetaValue)>> {
        let kind = GgufValue::Unsigned(u64::from(file_type(main_storage(outputs))));
        let key = "general.file_type";
        if let Some(gguf) = self.checkpoint.gguf() {
            let mut metadata = gguf.copied_metadata();
            // nothing to correct where everything stays as it was
            if self.wanted != GgufType::Keep {
                metadata.retain(|(k, _)| k != key);
                metadata.push((key.to_string(), kind.into()));
            }
            return Ok(metadata);
        }
        let text = |v: &str| GgufValue::String(v.to_string());
        let mut values = vec![
            ("general.architecture".to_string(), text(self.outline.gguf_architecture()?)),
            ("general.type".to_string(), text("model")),
            ("general.name".to_string(), text(self.source.name)),
            (key.to_string(), kind),
            ("general.quantization_version".to_string(), GgufValue::Unsigned(2)),
        ];
        values.extend(self.outline.gguf_settings()?.metadata);
        match self.source.tokenizer {
            Some(tokenizer) => values.extend(tokenizer.to_gguf(self.outline.vocab_size())?.entries()),
            // llama.cpp's word for a model that takes token ids alone
            None => values.push(("tokenizer.ggml.model".to_string(), text("none"))),
        }
        Ok(values.into_iter().map(|(key, value)| (key, value.into())).collect())
    }

    fn cannot(&self, what: &str, why: &str) -> Error {
        Error::Cannot { path: self.source.path.to_path_buf(), what: what.to_string(), why: why.to_string() }
    }
}

/// The storage that most elements of matrices are in.
fn main_storage(outputs: &[Output]) -> StorageType {
    let mut elements: BTreeMap<&str, (usize, StorageType)> = BTreeMap::new();
    for output in outputs.iter().filter(|o| o.shape.len() > 1) {
        elements.entry(output.storage.name()).or_insert((0, output.storage)).0 +=
            output.shape.iter().product::<usize>();
    }
    elements.into_values().max_by_key(|(count, _)| *count).map_or(StorageType::F32, |(_, storage)| storage)
}
