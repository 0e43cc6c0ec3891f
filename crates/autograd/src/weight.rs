//! Weights that are never trained, in whatever storage they came.

use crate::{Error, Result, host, tensor_of};
use candle_core::{DType, Device, Tensor};
use engobe_kernels::codec::{BlockScales, DoubleScales, F32s, FourBit, dynamic};
use engobe_kernels::quantize::{OwnedScales, QuantizedWeight, Scheme};
use engobe_kernels::storage::{StorageError, StorageType, WeightView};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes that somebody keeps alive: a memory map, or a buffer.
#[derive(Clone)]
pub struct HostBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl HostBytes {
    /// Part of what `owner` holds. Panics if `range` does not lie within it.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        assert!((*owner).as_ref().get(range.clone()).is_some(), "byte range outside its owner");
        Self { owner, range }
    }

    /// All of a buffer of floats.
    pub fn from_f32(data: Vec<f32>) -> Self {
        struct Floats(Vec<f32>);
        impl AsRef<[u8]> for Floats {
            fn as_ref(&self) -> &[u8] {
                bytemuck::cast_slice(&self.0)
            }
        }
        let len = data.len() * size_of::<f32>();
        Self { owner: Arc::new(Floats(data)), range: 0..len }
    }

    /// All of a buffer.
    pub fn from_vec(data: Vec<u8>) -> Self {
        let len = data.len();
        Self { owner: Arc::new(data), range: 0..len }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

/// A frozen matrix `[rows, cols]` = `[out_features, in_features]`.
#[derive(Clone)]
pub struct FrozenWeight {
    rows: usize,
    cols: usize,
    place: Place,
}

#[derive(Clone)]
enum Place {
    Host(Elements),
    Device(Tensor),
}

/// The elements of a weight in host memory, as `engobe_kernels::storage::Elements` borrows them.
#[derive(Clone)]
enum Elements {
    Blocks { storage: StorageType, bytes: HostBytes },
    FourBit { kind: FourBit, block: usize, codes: HostBytes, scales: HostScales },
    Int8 { codes: HostBytes, scales: HostBytes },
}

/// Factors of 4-bit blocks in host memory; numbers are little-endian f32.
#[derive(Clone)]
pub enum HostScales {
    /// as they are
    Plain(HostBytes),
    /// quantized a second time
    Double {
        /// one code for each block
        codes: HostBytes,
        /// what the 256 codes stand for
        map: HostBytes,
        /// one factor for each 256 codes
        nested: HostBytes,
        /// the mean, which was taken away
        offset: f32,
    },
}

impl HostScales {
    fn borrow(&self) -> Result<BlockScales<'_>, StorageError> {
        Ok(match self {
            Self::Plain(bytes) => BlockScales::Plain(numbers(bytes)?),
            Self::Double { codes, map, nested, offset } => BlockScales::Double(DoubleScales {
                codes: codes.as_slice(),
                map: numbers(map)?,
                nested: numbers(nested)?,
                offset: *offset,
            }),
        })
    }
}

fn numbers(bytes: &HostBytes) -> Result<F32s<'_>, StorageError> {
    let bytes = bytes.as_slice();
    let expected = bytes.len().next_multiple_of(4);
    F32s::new(bytes).ok_or(StorageError::Count { what: "bytes of f32 factors", expected, found: bytes.len() })
}

impl Elements {
    fn view(&self, rows: usize, cols: usize) -> Result<WeightView<'_>, StorageError> {
        match self {
            Self::Blocks { storage, bytes } => WeightView::new(*storage, rows, cols, bytes.as_slice()),
            Self::FourBit { kind, block, codes, scales } => {
                WeightView::four_bit(*kind, *block, rows, cols, codes.as_slice(), scales.borrow()?)
            }
            Self::Int8 { codes, scales } => WeightView::int8(rows, cols, codes.as_slice(), numbers(scales)?),
        }
    }

    fn size_bytes(&self) -> usize {
        let len = |bytes: &HostBytes| bytes.as_slice().len();
        match self {
            Self::Blocks { bytes, .. } => len(bytes),
            Self::FourBit { codes, scales: HostScales::Plain(scales), .. } | Self::Int8 { codes, scales } => {
                len(codes) + len(scales)
            }
            Self::FourBit { codes, scales: HostScales::Double { codes: c, map, nested, .. }, .. } => {
                len(codes) + len(c) + len(map) + len(nested)
            }
        }
    }
}

impl fmt::Debug for FrozenWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrozenWeight [{}, {}] {}", self.rows, self.cols, self.storage_name())
    }
}

impl FrozenWeight {
    /// A weight in host memory, in any storage.
    pub fn host(storage: StorageType, rows: usize, cols: usize, bytes: HostBytes) -> Result<Self> {
        Self::checked(rows, cols, Elements::Blocks { storage, bytes })
    }

    /// A weight in 4-bit codes; blocks of `block` elements run over the flattened matrix.
    pub fn four_bit(
        kind: FourBit,
        block: usize,
        rows: usize,
        cols: usize,
        codes: HostBytes,
        scales: HostScales,
    ) -> Result<Self> {
        Self::checked(rows, cols, Elements::FourBit { kind, block, codes, scales })
    }

    /// A weight in 8-bit codes; `scales` holds one f32 for each row.
    pub fn int8(rows: usize, cols: usize, codes: HostBytes, scales: HostBytes) -> Result<Self> {
        Self::checked(rows, cols, Elements::Int8 { codes, scales })
    }

    /// A weight that we quantized.
    pub fn quantized(weight: QuantizedWeight) -> Result<Self> {
        let ((rows, cols), scheme) = (weight.dims(), weight.scheme());
        let (codes, scales) = weight.into_parts();
        let codes = HostBytes::from_vec(codes);
        match (scheme, scales) {
            (Scheme::Int8, OwnedScales::Plain(absmax)) => {
                Self::int8(rows, cols, codes, HostBytes::from_f32(absmax))
            }
            (Scheme::FourBit { kind, block, .. }, OwnedScales::Plain(absmax)) => {
                let scales = HostScales::Plain(HostBytes::from_f32(absmax));
                Self::four_bit(kind, block, rows, cols, codes, scales)
            }
            (Scheme::FourBit { kind, block, .. }, OwnedScales::Double(d)) => {
                let scales = HostScales::Double {
                    codes: HostBytes::from_vec(d.codes),
                    map: HostBytes::from_f32(dynamic::map().to_vec()),
                    nested: HostBytes::from_f32(d.nested),
                    offset: d.offset,
                };
                Self::four_bit(kind, block, rows, cols, codes, scales)
            }
            (Scheme::Int8, OwnedScales::Double(_)) => {
                Err(Error::shape("FrozenWeight::quantized", "int8 rows have plain factors"))
            }
        }
    }

    fn checked(rows: usize, cols: usize, elements: Elements) -> Result<Self> {
        elements.view(rows, cols)?;
        Ok(Self { rows, cols, place: Place::Host(elements) })
    }

    /// A weight as a candle tensor: f32 on the CPU becomes a host weight, all else stays a tensor.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self> {
        let (rows, cols) = tensor.dims2()?;
        if matches!(tensor.device(), Device::Cpu) {
            let data = tensor.to_dtype(DType::F32)?.contiguous()?;
            let bytes = HostBytes::from_f32(host(&data)?.to_vec());
            return Self::host(StorageType::F32, rows, cols, bytes);
        }
        Ok(Self { rows, cols, place: Place::Device(tensor.contiguous()?) })
    }

    /// True if both are one matrix in one place in memory.
    pub fn is_same(&self, other: &Self) -> bool {
        match (&self.place, &other.place) {
            (
                Place::Host(Elements::Blocks { bytes: a, .. }),
                Place::Host(Elements::Blocks { bytes: b, .. }),
            ) => std::ptr::eq(a.as_slice(), b.as_slice()),
            (Place::Device(a), Place::Device(b)) => a.id() == b.id(),
            _ => false,
        }
    }

    /// True if it is of quantized blocks beside which activations may be rounded.
    pub fn is_of_blocks(&self) -> bool {
        matches!(&self.place, Place::Host(Elements::Blocks { storage, .. }) if storage.is_quantized())
    }

    /// Number of rows (output features).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (input features).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that the weight takes.
    pub fn size_bytes(&self) -> usize {
        match &self.place {
            Place::Host(elements) => elements.size_bytes(),
            Place::Device(t) => t.elem_count() * t.dtype().size_in_bytes(),
        }
    }

    /// Name of the storage, for people.
    pub fn storage_name(&self) -> String {
        match &self.place {
            Place::Host(Elements::Blocks { storage, .. }) => storage.name().to_string(),
            Place::Host(Elements::FourBit { kind, block, scales, .. }) => {
                let double = matches!(scales, HostScales::Double { .. });
                Scheme::FourBit { kind: *kind, block: *block, double }.to_string()
            }
            Place::Host(Elements::Int8 { .. }) => Scheme::Int8.to_string(),
            Place::Device(t) => format!("{:?} on {:?}", t.dtype(), t.device().location()),
        }
    }

    /// The weight as the kernels take it; an error if it is on a device.
    pub fn view(&self) -> Result<WeightView<'_>> {
        match &self.place {
            Place::Host(elements) => Ok(elements.view(self.rows, self.cols)?),
            Place::Device(_) => Err(Error::NotHost(self.storage_name())),
        }
    }

    /// The whole weight as an f32 tensor on `device`. For the composed forms, merging and tests: it
    /// allocates the full matrix.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        match &self.place {
            Place::Device(t) => Ok(t.to_dtype(DType::F32)?.to_device(device)?),
            Place::Host(elements) => {
                let mut out = vec![0f32; self.rows * self.cols];
                elements.view(self.rows, self.cols)?.decode_parallel(&mut out);
                Ok(tensor_of(out, (self.rows, self.cols))?.to_device(device)?)
            }
        }
    }
}
