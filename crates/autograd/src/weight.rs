//! Weights that are never trained, in whatever storage they came.

use crate::{Error, Result, host, tensor_of};
use candle_core::{DType, Device, Tensor};
use engobe_kernels::codec;
use engobe_kernels::storage::{StorageType, WeightView};
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
    Host { storage: StorageType, bytes: HostBytes },
    Device(Tensor),
}

impl fmt::Debug for FrozenWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrozenWeight [{}, {}] {}", self.rows, self.cols, self.storage_name())
    }
}

impl FrozenWeight {
    /// A weight in host memory, in any storage.
    pub fn host(storage: StorageType, rows: usize, cols: usize, bytes: HostBytes) -> Result<Self> {
        WeightView::new(storage, rows, cols, bytes.as_slice())?;
        Ok(Self { rows, cols, place: Place::Host { storage, bytes } })
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
            Place::Host { bytes, .. } => bytes.as_slice().len(),
            Place::Device(t) => t.elem_count() * t.dtype().size_in_bytes(),
        }
    }

    /// Name of the storage, for people.
    pub fn storage_name(&self) -> String {
        match &self.place {
            Place::Host { storage, .. } => storage.name().to_string(),
            Place::Device(t) => format!("{:?} on {:?}", t.dtype(), t.device().location()),
        }
    }

    /// The weight as the kernels take it; an error if it is on a device.
    pub fn view(&self) -> Result<WeightView<'_>> {
        match &self.place {
            Place::Host { storage, bytes } => {
                Ok(WeightView::new(*storage, self.rows, self.cols, bytes.as_slice())?)
            }
            Place::Device(_) => Err(Error::NotHost(self.storage_name())),
        }
    }

    /// The whole weight as an f32 tensor on `device`. For the composed forms, merging and tests: it
    /// allocates the full matrix.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        match &self.place {
            Place::Device(t) => Ok(t.to_dtype(DType::F32)?.to_device(device)?),
            Place::Host { storage, bytes } => {
                let mut out = vec![0f32; self.rows * self.cols];
                codec::decode(*storage, bytes.as_slice(), &mut out);
                Ok(tensor_of(out, (self.rows, self.cols))?.to_device(device)?)
            }
        }
    }
}
