//! The header of a GGUF file, with every claim checked before it is believed.

use super::GgufValue;
use crate::tensor::{Dtype, bytes_of};
use engobe_kernels::storage::StorageType;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Arrays in arrays deeper than this are refused.
const MAX_DEPTH: usize = 4;

/// A parsed header.
#[derive(Debug)]
pub struct Header {
    /// metadata by key
    pub metadata: BTreeMap<String, GgufValue>,
    /// the same as it lies in the file, in its order: key, type of the value, bytes of the value
    pub raw_metadata: Vec<(String, u32, Range<usize>)>,
    /// tensors in the file's order
    pub tensors: Vec<TensorInfo>,
}

/// Where a tensor lies.
#[derive(Debug)]
pub struct TensorInfo {
    /// name
    pub name: String,
    /// shape, outermost first
    pub shape: Vec<usize>,
    /// type
    pub dtype: Dtype,
    /// bytes within the file; empty for types that we do not know the size of
    pub range: Range<usize>,
}

type Result<T> = std::result::Result<T, String>;

/// Values by key, and each as it lies in the file.
type Metadata = (BTreeMap<String, GgufValue>, Vec<(String, u32, Range<usize>)>);

/// Checks a whole file and lists what is in it. The reason is without the file's name.
pub fn parse(bytes: &[u8]) -> Result<Header> {
    let mut r = Reader { bytes, at: 0 };
    if r.take(4)? != b"GGUF" {
        return Err("not a GGUF file (it does not start with \"GGUF\")".to_string());
    }
    let version = r.u32()?;
    if !(2..=3).contains(&version) {
        let swapped = (2..=3).contains(&version.swap_bytes());
        let why = if swapped { "it is big-endian" } else { "known: 2 and 3" };
        return Err(format!("GGUF version {version} is not supported: {why}"));
    }
    let (tensor_count, value_count) = (r.u64()?, r.u64()?);
    let (metadata, raw_metadata) = r.metadata(value_count)?;
    let alignment = alignment(&metadata)?;
    let mut infos = Vec::new();
    let mut names = BTreeSet::new();
    // a tensor's entry takes at least 8 + 4 + 4 + 8 bytes
    r.check_count(tensor_count, 24, "tensors")?;
    for _ in 0..tensor_count {
        let info = r.tensor()?;
        if !names.insert(info.name.clone()) {
            return Err(format!("tensor {} is listed twice", info.name));
        }
        infos.push(info);
    }
    let data = r.at.checked_next_multiple_of(alignment).ok_or("the header is too long")?;
    let tensors =
        infos.into_iter().map(|i| i.place(data, alignment, bytes.len())).collect::<Result<Vec<_>>>()?;
    overlap(&tensors)?;
    Ok(Header { metadata, raw_metadata, tensors })
}

fn alignment(metadata: &BTreeMap<String, GgufValue>) -> Result<usize> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(value) => match value.as_u32().filter(|a| a.is_power_of_two() && *a <= 1 << 20) {
            Some(a) => Ok(a as usize),
            None => Err(format!("general.alignment is {}; expected a power of two", value.describe())),
        },
    }
}

fn overlap(tensors: &[TensorInfo]) -> Result<()> {
    let mut ranges: Vec<_> = tensors.iter().filter(|t| !t.range.is_empty()).collect();
    ranges.sort_by_key(|t| t.range.start);
    match ranges.windows(2).find(|w| w[0].range.end > w[1].range.start) {
        Some(w) => Err(format!("tensors {} and {} overlap", w[0].name, w[1].name)),
        None => Ok(()),
    }
}

/// A tensor's entry, before its place is known to be good.
struct Info {
    name: String,
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

impl Info {
    fn place(self, data: usize, alignment: usize, file_len: usize) -> Result<TensorInfo> {
        let name = self.name;
        let dtype = dtype(self.kind);
        let Dtype::Storage(storage) = dtype else {
            return Ok(TensorInfo { name, shape: self.shape, dtype, range: 0..0 });
        };
        let size = bytes_of(storage, &self.shape).ok_or_else(|| {
            format!("{name}: shape {:?} is not whole blocks of {storage}, or too large", self.shape)
        })?;
        let offset = usize::try_from(self.offset)
            .map_err(|_| format!("{name}: offset {} is too large", self.offset))?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!("{name}: offset {offset} is not aligned to {alignment}"));
        }
        let start = data.checked_add(offset);
        match start.and_then(|s| Some((s, s.checked_add(size)?))).filter(|(_, end)| *end <= file_len) {
            Some((start, end)) => Ok(TensorInfo { name, shape: self.shape, dtype, range: start..end }),
            None => Err(format!(
                "{name}: needs {size} bytes at offset {offset} of the data, which starts at {data}; the file ends at {file_len}: it is cut off"
            )),
        }
    }
}

/// ggml's type numbers.
fn dtype(kind: u32) -> Dtype {
    use StorageType as S;
    Dtype::Storage(match kind {
        0 => S::F32,
        1 => S::F16,
        2 => S::Q4_0,
        3 => S::Q4_1,
        6 => S::Q5_0,
        7 => S::Q5_1,
        8 => S::Q8_0,
        10 => S::Q2_K,
        11 => S::Q3_K,
        12 => S::Q4_K,
        13 => S::Q5_K,
        14 => S::Q6_K,
        30 => S::BF16,
        other => return Dtype::Other(other_name(other)),
    })
}

fn other_name(kind: u32) -> String {
    const NAMES: [(u32, &str); 22] = [
        (9, "Q8_1"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
        (40, "NVFP4"),
        (4, "Q4_2"),
        (5, "Q4_3"),
    ];
    match NAMES.iter().find(|(n, _)| *n == kind) {
        Some((_, name)) => (*name).to_string(),
        None => format!("ggml type {kind}"),
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|e| *e <= self.bytes.len());
        let end =
            end.ok_or_else(|| format!("the file is cut off at byte {} of its header", self.bytes.len()))?;
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Refuses a count of things that cannot fit into what is left of the file.
    fn check_count(&self, count: u64, each: usize, what: &str) -> Result<()> {
        let left = (self.bytes.len() - self.at) / each.max(1);
        match usize::try_from(count).is_ok_and(|c| c <= left) {
            true => Ok(()),
            false => Err(format!("claims {count} {what}, more than the file can hold")),
        }
    }

    fn string(&mut self) -> Result<String> {
        let len = self.u64()?;
        self.check_count(len, 1, "bytes of text")?;
        let bytes = self.take(len as usize)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(e) => Err(format!("text at byte {} is not UTF-8: {e}", self.at - bytes.len())),
        }
    }

    fn metadata(&mut self, count: u64) -> Result<Metadata> {
        self.check_count(count, 13, "metadata values")?;
        let (mut map, mut raw) = (BTreeMap::new(), Vec::new());
        for _ in 0..count {
            let key = self.string()?;
            let kind = self.u32()?;
            let start = self.at;
            let value = self.value(kind, 0).map_err(|e| format!("metadata {key:?}: {e}"))?;
            if map.insert(key.clone(), value).is_some() {
                return Err(format!("metadata {key:?} is listed twice"));
            }
            raw.push((key, kind, start..self.at));
        }
        Ok((map, raw))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<GgufValue> {
        use GgufValue as V;
        Ok(match kind {
            0 => V::Unsigned(u64::from(u8::from_le_bytes(self.array()?))),
            1 => V::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => V::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => V::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => V::Unsigned(u64::from(self.u32()?)),
            5 => V::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => V::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => match self.array::<1>()?[0] {
                0 => V::Bool(false),
                1 => V::Bool(true),
                other => return Err(format!("a boolean is {other}; expected 0 or 1")),
            },
            8 => V::String(self.string()?),
            9 => self.list(depth)?,
            10 => V::Unsigned(self.u64()?),
            11 => V::Signed(i64::from_le_bytes(self.array()?)),
            12 => V::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("value type {other} is unknown")),
        })
    }

    fn list(&mut self, depth: usize) -> Result<GgufValue> {
        if depth >= MAX_DEPTH {
            return Err(format!("lists are nested deeper than {MAX_DEPTH}"));
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        let each = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            9 => 12,
            _ => 8,
        };
        self.check_count(count, each, "list entries")?;
        let values = (0..count).map(|_| self.value(kind, depth + 1)).collect::<Result<_>>()?;
        Ok(GgufValue::Array(values))
    }

    fn tensor(&mut self) -> Result<Info> {
        let name = self.string()?;
        let dims = self.u32()?;
        if !(1..=4).contains(&dims) {
            return Err(format!("{name}: has {dims} dimensions; expected 1 to 4"));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let size = self.u64()?;
            let size = usize::try_from(size).ok().filter(|s| *s > 0 && *s <= 1 << 40);
            shape.push(size.ok_or_else(|| format!("{name}: a dimension is 0 or too large"))?);
        }
        shape.reverse();
        Ok(Info { name, shape, kind: self.u32()?, offset: self.u64()? })
    }
}
