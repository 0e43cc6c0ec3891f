//! Weights that bitsandbytes quantized, as transformers saves them.
//!
//! For a matrix called `W` (`…q_proj.weight`):
//!
//! | tensor                            | 4-bit                                      | with double quantization   |
//! |-----------------------------------|--------------------------------------------|----------------------------|
//! | `W`                               | codes, two a byte `[n/2, 1]`               |                            |
//! | `W.absmax`                        | f32, one for each block                    | u8 codes of them           |
//! | `W.quant_map`                     | the 16 levels                              |                            |
//! | `W.nested_absmax`                 |                                            | f32, one for 256 codes     |
//! | `W.nested_quant_map`              |                                            | what 256 codes stand for   |
//! | `W.quant_state.bitsandbytes__nf4` | JSON: shape, block size, type of the original, the mean of the factors | |
//!
//! Codes are u8, or any type of the same bytes (`bnb_4bit_quant_storage`). 8-bit matrices are i8 with the rows' factors
//! in `SCB` (and a `weight_format` of 0) beside the weight: `…q_proj.SCB`.

use crate::checkpoint::Checkpoint;
use crate::sharded::Announced;
use crate::tensor::{Dtype, TensorView};
use crate::{Error, Result};
use engobe_kernels::codec::{FourBit, NESTED_BLOCK, dynamic, is_block_size};
use engobe_kernels::quantize::{OwnedScales, QuantizedWeight, Scheme};
use engobe_kernels::storage::StorageType;
use serde_json::{Value, json};

/// A quantized matrix, by its tensors. Their types and the levels have been checked; lengths have not.
#[derive(Debug)]
pub enum Quantized<'a> {
    /// NF4 or FP4
    FourBit {
        /// which levels
        kind: FourBit,
        /// elements in a block
        block: usize,
        /// rows and columns
        shape: [usize; 2],
        /// two codes a byte
        codes: &'a TensorView,
        /// the blocks' factors
        scales: Scales<'a>,
    },
    /// 8-bit integers
    Int8 {
        /// rows and columns
        shape: [usize; 2],
        /// i8
        codes: &'a TensorView,
        /// f32, one for each row
        scales: &'a TensorView,
    },
}

/// Factors of 4-bit blocks, by their tensors.
#[derive(Debug)]
pub enum Scales<'a> {
    /// f32
    Plain(&'a TensorView),
    /// quantized a second time
    Double {
        /// u8, one for each block
        codes: &'a TensorView,
        /// 256 f32
        map: &'a TensorView,
        /// f32, one for each 256 codes
        nested: &'a TensorView,
        /// the mean
        offset: f32,
    },
}

impl Quantized<'_> {
    /// Rows and columns of the matrix.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::FourBit { shape, .. } | Self::Int8 { shape, .. } => *shape,
        }
    }

    /// What it is quantized to.
    pub fn scheme(&self) -> Scheme {
        match self {
            Self::FourBit { kind, block, scales, .. } => Scheme::FourBit {
                kind: *kind,
                block: *block,
                double: matches!(scales, Scales::Double { .. }),
            },
            Self::Int8 { .. } => Scheme::Int8,
        }
    }
}

/// The quantized matrix called `weight`; `None` if the checkpoint does not have it, or not quantized by
/// bitsandbytes.
///
/// # Errors
/// A tensor that belongs to it is missing or of another type; a state that cannot be read; levels that are not
/// bitsandbytes'.
pub fn find<'a>(checkpoint: &'a Checkpoint, weight: &str) -> Result<Option<Quantized<'a>>> {
    for kind in FourBit::ALL {
        let state = state_name(weight, kind);
        if checkpoint.contains(&state) {
            return four_bit(checkpoint, weight, kind, checkpoint.get(&state)?).map(Some);
        }
    }
    if !checkpoint.contains(weight) {
        return Ok(None);
    }
    let codes = checkpoint.get(weight)?;
    let (Dtype::I8, [rows, cols]) = (&codes.dtype, codes.shape.as_slice()) else { return Ok(None) };
    let scales = checkpoint.get(&beside(weight, "SCB"))?;
    expect(scales, &Dtype::Storage(StorageType::F32))?;
    let format = beside(weight, "weight_format");
    if checkpoint.contains(&format) && checkpoint.get(&format)?.bytes() != [0] {
        let what = format!("{format} is not 0: only row-major int8 weights can be read; save the model anew");
        return Err(Error::corrupt(codes.file.path(), what));
    }
    Ok(Some(Quantized::Int8 { shape: [*rows, *cols], codes, scales }))
}

/// What makes a 4-bit matrix besides its codes.
struct State {
    block: usize,
    shape: [usize; 2],
    offset: Option<f32>,
}

fn four_bit<'a>(
    checkpoint: &'a Checkpoint,
    weight: &str,
    kind: FourBit,
    state: &TensorView,
) -> Result<Quantized<'a>> {
    let broken = |what: String| Error::corrupt(state.file.path(), format!("{}: {what}", state.name));
    let state = parse_state(kind, state.bytes()).map_err(broken)?;
    let get = |part: &str| checkpoint.get(&format!("{weight}.{part}"));
    let codes = checkpoint.get(weight)?;
    let map = get("quant_map")?;
    expect(map, &Dtype::Storage(StorageType::F32))?;
    if !are_levels(map.bytes(), kind.levels()) {
        let what = format!("{} does not hold the levels of {}", map.name, kind.name());
        return Err(Error::corrupt(map.file.path(), what));
    }
    let absmax = get("absmax")?;
    let scales = match state.offset {
        None => {
            expect(absmax, &Dtype::Storage(StorageType::F32))?;
            Scales::Plain(absmax)
        }
        Some(offset) => {
            let (map, nested) = (get("nested_quant_map")?, get("nested_absmax")?);
            expect(absmax, &Dtype::U8)?;
            expect(map, &Dtype::Storage(StorageType::F32))?;
            expect(nested, &Dtype::Storage(StorageType::F32))?;
            Scales::Double { codes: absmax, map, nested, offset }
        }
    };
    Ok(Quantized::FourBit { kind, block: state.block, shape: state.shape, codes, scales })
}

/// Reads the JSON of a `quant_state`; the reason is without the tensor's name.
fn parse_state(kind: FourBit, bytes: &[u8]) -> std::result::Result<State, String> {
    let json: Value = serde_json::from_slice(bytes).map_err(|e| format!("is not valid JSON: {e}"))?;
    let wrong = |key: &str, expected: &str| {
        format!("{key} is {}; expected {expected}", json.get(key).unwrap_or(&Value::Null))
    };
    let whole = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    if json.get("quant_type").and_then(Value::as_str) != Some(kind.name()) {
        return Err(wrong("quant_type", &format!("{:?}", kind.name())));
    }
    let block = json.get("blocksize").and_then(whole).filter(|b| is_block_size(*b));
    let block = block.ok_or_else(|| wrong("blocksize", "a power of two from 32 to 4096"))?;
    let shape: Option<Vec<usize>> =
        json.get("shape").and_then(Value::as_array).and_then(|list| list.iter().map(whole).collect());
    let Some([rows, cols]) = shape.as_deref() else {
        return Err(wrong("shape", "rows and columns"));
    };
    // far above any matrix, far below what would overflow their product
    const MOST: usize = 1 << 28;
    if *rows > MOST || *cols > MOST {
        return Err(wrong("shape", "rows and columns below 2^28"));
    }
    let offset = match json.get("nested_offset") {
        None => None,
        Some(offset) => {
            if json.get("nested_blocksize").and_then(whole) != Some(NESTED_BLOCK) {
                return Err(wrong("nested_blocksize", "256"));
            }
            let number = offset.as_f64().map(|o| o as f32).filter(|o| o.is_finite());
            Some(number.ok_or_else(|| wrong("nested_offset", "a number"))?)
        }
    };
    Ok(State { block, shape: [*rows, *cols], offset })
}

/// True if `bytes` hold the levels as f32.
fn are_levels(bytes: &[u8], levels: &[f32; 16]) -> bool {
    let found = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
    bytes.len() == 4 * levels.len() && found.zip(levels).all(|(a, b)| (a - b).abs() <= 1e-6)
}

fn expect(tensor: &TensorView, dtype: &Dtype) -> Result<()> {
    if tensor.dtype == *dtype {
        return Ok(());
    }
    let what = format!("{} is stored as {}; expected {dtype}", tensor.name, tensor.dtype);
    Err(Error::corrupt(tensor.file.path(), what))
}

fn state_name(weight: &str, kind: FourBit) -> String {
    format!("{weight}.quant_state.bitsandbytes__{}", kind.name())
}

/// `a.b.weight` to `a.b.<name>`.
fn beside(weight: &str, name: &str) -> String {
    format!("{}{name}", weight.strip_suffix("weight").unwrap_or(weight))
}

/// Bytes that the JSON of a state is filled up to with spaces: tensors are announced before their factors' mean,
/// which stands in it, is known.
fn state_len(state: &Value) -> usize {
    /// digits of a mean, at most
    const ROOM: usize = 24;
    (state.to_string().len() + ROOM).next_multiple_of(8)
}

/// The JSON of a state but for the mean. `original` is the type before quantization.
fn state(
    kind: FourBit,
    block: usize,
    double: bool,
    (rows, cols): (usize, usize),
    original: StorageType,
) -> Value {
    let dtype = match original {
        StorageType::BF16 => "bfloat16",
        StorageType::F16 => "float16",
        _ => "float32",
    };
    let mut state =
        json!({"quant_type": kind.name(), "blocksize": block, "dtype": dtype, "shape": [rows, cols]});
    if double {
        state["nested_blocksize"] = json!(NESTED_BLOCK);
        state["nested_dtype"] = json!("float32");
        state["nested_offset"] = json!(0.0);
    }
    state
}

/// The tensors of a matrix `[rows, cols]` called `weight`, quantized by `scheme`, as [`tensors`] will give them.
pub fn announce(
    weight: &str,
    scheme: Scheme,
    (rows, cols): (usize, usize),
    original: StorageType,
) -> Vec<Announced> {
    let f32 = Dtype::Storage(StorageType::F32);
    let n = rows * cols;
    match scheme {
        Scheme::FourBit { kind, block, double } => {
            let of =
                |part: &str, dtype: Dtype, shape: usize| (format!("{weight}.{part}"), dtype, vec![shape]);
            let blocks = n.div_ceil(block);
            let state = state_len(&state(kind, block, double, (rows, cols), original));
            let mut all = vec![(weight.to_string(), Dtype::U8, vec![n.div_ceil(2), 1])];
            match double {
                true => all.extend([
                    of("absmax", Dtype::U8, blocks),
                    of("nested_absmax", f32.clone(), blocks.div_ceil(NESTED_BLOCK)),
                    of("nested_quant_map", f32.clone(), 256),
                ]),
                false => all.push(of("absmax", f32.clone(), blocks)),
            }
            all.push(of("quant_map", f32, 16));
            all.push((state_name(weight, kind), Dtype::U8, vec![state]));
            all
        }
        Scheme::Int8 => vec![
            (weight.to_string(), Dtype::I8, vec![rows, cols]),
            (beside(weight, "SCB"), f32, vec![rows]),
            (beside(weight, "weight_format"), Dtype::U8, vec![]),
        ],
    }
}

/// Names and bytes of a quantized matrix, in [`announce`]'s order.
pub fn tensors(weight: &str, quantized: QuantizedWeight, original: StorageType) -> Vec<(String, Vec<u8>)> {
    let (scheme, dims) = (quantized.scheme(), quantized.dims());
    let names = announce(weight, scheme, dims, original).into_iter().map(|(name, ..)| name);
    let le = |numbers: &[f32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let (codes, scales) = quantized.into_parts();
    let mut parts = vec![codes];
    let mut offset = 0.0;
    match scales {
        OwnedScales::Plain(absmax) => parts.push(le(&absmax)),
        OwnedScales::Double(d) => {
            offset = d.offset;
            parts.extend([d.codes, le(&d.nested), le(dynamic::map())]);
        }
    }
    match scheme {
        Scheme::FourBit { kind, block, double } => {
            parts.push(le(kind.levels()));
            let mut state = state(kind, block, double, dims, original);
            let len = state_len(&state);
            if double {
                state["nested_offset"] = json!(f64::from(offset));
            }
            let mut text = state.to_string().into_bytes();
            text.resize(len, b' ');
            parts.push(text);
        }
        Scheme::Int8 => parts.push(vec![0]),
    }
    names.zip(parts).collect()
}

/// The `quantization_config` of `config.json` for a model quantized by `scheme`, all linear layers but `skipped`.
/// `compute` names the type that transformers shall compute in (`float32`, `bfloat16`, …).
pub fn quantization_config(scheme: Scheme, skipped: &[String], compute: &str) -> Value {
    let (four, kind, double) = match scheme {
        Scheme::FourBit { kind, double, .. } => (true, kind.name(), double),
        Scheme::Int8 => (false, "fp4", false),
    };
    json!({
        "_load_in_4bit": four,
        "_load_in_8bit": !four,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": !four,
        "quant_method": "bitsandbytes",
    })
}
