//! How the numbers of a frozen weight lie in memory.

use std::fmt;

/// The storage of a tensor's elements: plain floats, or ggml's quantized blocks as they lie in a GGUF file.
///
/// Names follow ggml. Block layouts: `ggml-common.h` of llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)]
pub enum StorageType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl StorageType {
    /// All storages, for tables and tests.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// Elements in one block (1 for plain floats).
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// True for block-quantized storages.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Bytes of a row of `cols` elements; `None` if `cols` is not a whole number of blocks or overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// ggml's name of the type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
        }
    }
}

impl fmt::Display for StorageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is wrong with a weight that was handed in.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StorageError {
    /// The row length is not a whole number of blocks.
    #[error("rows of {cols} elements are not whole {storage} blocks of {}", storage.block_len())]
    PartialBlock {
        /// storage asked for
        storage: StorageType,
        /// row length
        cols: usize,
    },
    /// The byte count does not fit the shape.
    #[error("{storage} weight [{rows}, {cols}] needs {expected} bytes, found {found}")]
    Length {
        /// storage asked for
        storage: StorageType,
        /// rows
        rows: usize,
        /// columns
        cols: usize,
        /// bytes that the shape needs
        expected: usize,
        /// bytes handed in
        found: usize,
    },
}

/// A row-major weight `[rows, cols]` in any storage, borrowed. Bytes need no alignment.
#[derive(Clone, Copy, Debug)]
pub struct WeightView<'a> {
    storage: StorageType,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

impl<'a> WeightView<'a> {
    /// Checks that `bytes` is exactly `rows` rows of `cols` elements.
    pub fn new(
        storage: StorageType,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
    ) -> Result<Self, StorageError> {
        let row = storage.row_bytes(cols).ok_or(StorageError::PartialBlock { storage, cols })?;
        let expected = row.saturating_mul(rows);
        if expected != bytes.len() {
            return Err(StorageError::Length { storage, rows, cols, expected, found: bytes.len() });
        }
        Ok(Self { storage, rows, cols, bytes })
    }

    /// An f32 weight over a slice. Panics unless `data.len() == rows * cols`.
    pub fn f32(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self { storage: StorageType::F32, rows, cols, bytes: bytemuck::cast_slice(data) }
    }

    /// Storage of the elements.
    pub fn storage(&self) -> StorageType {
        self.storage
    }

    /// Number of rows (output features of a linear layer).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (input features of a linear layer).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes of row `i`.
    pub fn row(&self, i: usize) -> &'a [u8] {
        let n = self.bytes.len() / self.rows.max(1);
        &self.bytes[i * n..(i + 1) * n]
    }

    /// The elements as f32 if they are stored so and the bytes are aligned.
    pub fn as_f32(&self) -> Option<&'a [f32]> {
        (self.storage == StorageType::F32).then(|| bytemuck::try_cast_slice(self.bytes).ok()).flatten()
    }
}
