//! Tensors as they lie in files.

use crate::mmap::MappedFile;
use crate::{Error, Result};
use engobe_kernels::storage::StorageType;
use std::ops::Range;
use std::sync::Arc;

/// Type of a tensor's elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// one that we compute with
    Storage(StorageType),
    /// bytes: codes of quantized weights
    U8,
    /// signed bytes: codes of quantized weights
    I8,
    /// any other, by name
    Other(String),
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Storage(s) => s.fmt(f),
            Self::U8 => f.write_str("U8"),
            Self::I8 => f.write_str("I8"),
            Self::Other(name) => f.write_str(name),
        }
    }
}

impl From<StorageType> for Dtype {
    fn from(storage: StorageType) -> Self {
        Self::Storage(storage)
    }
}

impl Dtype {
    /// Bytes that a tensor of this shape takes; `None` if rows are not whole blocks, the size overflows, or is not
    /// known.
    pub fn bytes_of(&self, shape: &[usize]) -> Option<usize> {
        match self {
            Self::Storage(storage) => bytes_of(*storage, shape),
            Self::U8 | Self::I8 => shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)),
            Self::Other(_) => None,
        }
    }
}

/// A tensor in a mapped file. The range has been checked against the file and, for types that we compute
/// with, against the shape.
#[derive(Clone, Debug)]
pub struct TensorView {
    /// name in the file
    pub name: String,
    /// shape, outermost first (a GGUF file lists it the other way round)
    pub shape: Vec<usize>,
    /// type of the elements
    pub dtype: Dtype,
    /// the file
    pub file: Arc<MappedFile>,
    /// bytes within the file
    pub range: Range<usize>,
}

impl TensorView {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &(*self.file).as_ref()[self.range.clone()]
    }

    /// Lets go of pages of the map that hold `part` of the bytes: they no longer count as memory of this process, and
    /// are read from the file again when they are needed. Panics if `part` reaches past the tensor.
    pub fn release(&self, part: Range<usize>) {
        assert!(part.start <= part.end && part.end <= self.range.len());
        self.file.release(self.range.start + part.start..self.range.start + part.end);
    }

    /// The storage, or an error that names the tensor if we cannot compute with it.
    pub fn storage(&self) -> Result<StorageType> {
        match &self.dtype {
            Dtype::Storage(s) => Ok(*s),
            other => Err(Error::UnsupportedType {
                path: self.file.path().to_path_buf(),
                tensor: self.name.clone(),
                dtype: other.to_string(),
            }),
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Bytes that a tensor of this shape needs; `None` if rows are not whole blocks or the size overflows.
pub(crate) fn bytes_of(storage: StorageType, shape: &[usize]) -> Option<usize> {
    let cols = shape.last().copied().unwrap_or(1);
    let rows = shape.iter().rev().skip(1).try_fold(1usize, |n, d| n.checked_mul(*d))?;
    storage.row_bytes(cols)?.checked_mul(rows)
}
