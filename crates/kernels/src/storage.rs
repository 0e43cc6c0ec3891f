//! How the numbers of a frozen weight lie in memory.

use crate::codec::{self, BlockScales, F32s, FourBit, FourBitView, Int8View};
use rayon::prelude::*;
use std::fmt;
use std::ops::Range;

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
    /// 4-bit blocks of a size that bitsandbytes does not know.
    #[error("block size {block}; expected a power of two from 32 to 4096")]
    BlockSize {
        /// size asked for
        block: usize,
    },
    /// An array beside the codes, or the codes themselves, has another length than the shape says.
    #[error("{found} {what}, expected {expected}")]
    Count {
        /// the array
        what: &'static str,
        /// length by the shape
        expected: usize,
        /// its length
        found: usize,
    },
}

impl StorageError {
    /// An error unless an array has the expected length.
    pub(crate) fn check(what: &'static str, found: usize, expected: usize) -> Result<(), Self> {
        if found == expected { Ok(()) } else { Err(Self::Count { what, expected, found }) }
    }
}

/// The elements of a weight.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// blocks that hold all that is needed to decode them, or plain floats; bytes need no alignment
    Blocks {
        /// their form
        storage: StorageType,
        /// whole rows of them
        bytes: &'a [u8],
    },
    /// NF4 or FP4 codes, with factors beside them
    FourBit(FourBitView<'a>),
    /// 8-bit codes, with factors of the rows beside them
    Int8(Int8View<'a>),
}

/// A row-major weight `[rows, cols]` in any storage, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct WeightView<'a> {
    rows: usize,
    cols: usize,
    elements: Elements<'a>,
}

impl<'a> WeightView<'a> {
    /// Checks that `bytes` is exactly `rows` rows of `cols` elements.
    ///
    /// # Errors
    /// Rows that are not whole blocks; too few or too many bytes.
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
        Ok(Self { rows, cols, elements: Elements::Blocks { storage, bytes } })
    }

    /// A weight in 4-bit codes; blocks of `block` run over the flattened matrix.
    ///
    /// # Errors
    /// An unknown block size; too few or too many codes or factors.
    pub fn four_bit(
        kind: FourBit,
        block: usize,
        rows: usize,
        cols: usize,
        codes: &'a [u8],
        scales: BlockScales<'a>,
    ) -> Result<Self, StorageError> {
        let view = FourBitView::new(kind, block, rows.saturating_mul(cols), codes, scales)?;
        Ok(Self { rows, cols, elements: Elements::FourBit(view) })
    }

    /// A weight in 8-bit codes, with one factor for each row.
    ///
    /// # Errors
    /// Too few or too many codes or factors.
    pub fn int8(rows: usize, cols: usize, codes: &'a [u8], scales: F32s<'a>) -> Result<Self, StorageError> {
        Ok(Self { rows, cols, elements: Elements::Int8(Int8View::new(rows, cols, codes, scales)?) })
    }

    /// An f32 weight over a slice. Panics unless `data.len() == rows * cols`.
    pub fn f32(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        let bytes = bytemuck::cast_slice(data);
        Self { rows, cols, elements: Elements::Blocks { storage: StorageType::F32, bytes } }
    }

    /// Number of rows (output features of a linear layer).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (input features of a linear layer).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The elements as they lie.
    pub fn elements(&self) -> Elements<'a> {
        self.elements
    }

    /// Form of the elements if they are blocks or plain floats; `None` for codes with factors beside them.
    pub fn storage(&self) -> Option<StorageType> {
        match self.elements {
            Elements::Blocks { storage, .. } => Some(storage),
            Elements::FourBit(_) | Elements::Int8(_) => None,
        }
    }

    /// Form of the elements. Panics if they are codes with factors beside them.
    pub(crate) fn block_storage(&self) -> StorageType {
        self.storage().expect("a weight of blocks or plain floats")
    }

    /// Bytes of the elements, without the factors beside them.
    pub fn bytes(&self) -> &'a [u8] {
        match self.elements {
            Elements::Blocks { bytes, .. } => bytes,
            Elements::FourBit(view) => view.codes(),
            Elements::Int8(view) => view.codes(),
        }
    }

    /// Bytes of row `i`. Panics if the elements are codes with factors beside them.
    pub(crate) fn row(&self, i: usize) -> &'a [u8] {
        let n = self.block_storage().row_bytes(self.cols).expect("whole blocks");
        &self.bytes()[i * n..(i + 1) * n]
    }

    /// Columns at which a row may be cut for [`WeightView::decode_row`].
    pub fn column_step(&self) -> usize {
        self.storage().map_or(1, StorageType::block_len)
    }

    /// Decodes `out.len()` elements of row `row` from column `start` on; both must be multiples of
    /// [`WeightView::column_step`]. Panics if they are not, or reach past the row.
    pub fn decode_row(&self, row: usize, start: usize, out: &mut [f32]) {
        assert!(start + out.len() <= self.cols, "columns past the end of a row");
        match &self.elements {
            Elements::Blocks { storage, bytes } => {
                let n = bytes.len() / self.rows.max(1);
                codec::decode_range(&bytes[row * n..(row + 1) * n], *storage, start, out);
            }
            Elements::FourBit(view) => view.decode(row * self.cols + start, out),
            Elements::Int8(view) => view.decode(row, start, out),
        }
    }

    /// Decodes whole rows into `out`, `[rows.len(), cols]`. Panics if it has another size.
    pub fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * self.cols);
        match &self.elements {
            Elements::Blocks { storage, bytes } => {
                let n = bytes.len() / self.rows.max(1);
                codec::decode(*storage, &bytes[rows.start * n..rows.end * n], out);
            }
            Elements::FourBit(view) => view.decode(rows.start * self.cols, out),
            Elements::Int8(view) => {
                for (row, out) in rows.zip(out.chunks_exact_mut(self.cols.max(1))) {
                    view.decode(row, 0, out);
                }
            }
        }
    }

    /// All elements into `out`, on rayon's current pool. Panics if it has another size.
    pub fn decode_parallel(&self, out: &mut [f32]) {
        /// elements of a task
        const CHUNK: usize = 1 << 16;
        assert_eq!(out.len(), self.rows * self.cols);
        let height = (CHUNK / self.cols.max(1)).max(1);
        out.par_chunks_mut((height * self.cols).max(1)).enumerate().for_each(|(i, out)| {
            self.decode_rows(i * height..self.rows.min((i + 1) * height), out);
        });
    }

    /// The elements as f32 if they are stored so and the bytes are aligned.
    pub fn as_f32(&self) -> Option<&'a [f32]> {
        match self.elements {
            Elements::Blocks { storage: StorageType::F32, bytes } => bytemuck::try_cast_slice(bytes).ok(),
            _ => None,
        }
    }
}
