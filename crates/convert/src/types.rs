//! Which type a tensor of a GGUF file gets.

use engobe_kernels::storage::StorageType;
use std::fmt;
use std::str::FromStr;

/// The type that a whole model is written in, as users name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufType {
    /// as the base has it
    Keep,
    /// one storage for all matrices that can have it
    One(StorageType),
}

/// Names, and what they stand for.
const NAMES: [(&str, StorageType); 8] = [
    ("f32", StorageType::F32),
    ("f16", StorageType::F16),
    ("bf16", StorageType::BF16),
    ("q8_0", StorageType::Q8_0),
    ("q6_k", StorageType::Q6_K),
    ("q5_k", StorageType::Q5_K),
    ("q4_k", StorageType::Q4_K),
    ("q4_0", StorageType::Q4_0),
];

impl FromStr for GgufType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if name == "keep" {
            return Ok(Self::Keep);
        }
        match NAMES.iter().find(|(known, _)| *known == name) {
            Some((_, storage)) => Ok(Self::One(*storage)),
            None => Err(format!("{name}: expected keep, {}", NAMES.map(|(name, _)| name).join(", "))),
        }
    }
}

impl fmt::Display for GgufType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep => f.write_str("keep"),
            Self::One(storage) => f.write_str(&storage.name().to_lowercase()),
        }
    }
}

/// A matrix for which a type is chosen.
pub(crate) struct Matrix {
    /// elements in a row
    pub cols: usize,
    /// it is the output head, or an embedding that serves as one
    pub head: bool,
    /// the base's own type
    pub stored: StorageType,
    /// its numbers differ from the base's
    pub changed: bool,
}

impl GgufType {
    /// The storage of a matrix.
    ///
    /// A head is written with no less than 6 bits, as llama.cpp's `quantize` does: its errors go straight into the
    /// logits. Rows that are not whole blocks of a type get llama.cpp's next best one. With `keep`, a changed
    /// tensor of a type that we cannot write gets the next one that loses no more.
    pub(crate) fn storage(self, matrix: &Matrix) -> StorageType {
        let wanted = match self {
            Self::Keep if !matrix.changed => return matrix.stored,
            Self::Keep => writable(matrix.stored),
            Self::One(storage) if storage.is_quantized() && matrix.head => match storage {
                StorageType::Q8_0 => StorageType::Q8_0,
                _ => StorageType::Q6_K,
            },
            Self::One(storage) => storage,
        };
        fitting(wanted, matrix.cols)
    }
}

/// The type itself if it can be written, or the next larger one.
fn writable(storage: StorageType) -> StorageType {
    match storage {
        StorageType::Q2_K | StorageType::Q3_K => StorageType::Q4_K,
        other => other,
    }
}

/// `storage`, or llama.cpp's substitute where rows of `cols` elements are not whole blocks of it.
fn fitting(storage: StorageType, cols: usize) -> StorageType {
    if cols.is_multiple_of(storage.block_len()) {
        return storage;
    }
    let next = match storage {
        StorageType::Q4_K => StorageType::Q5_0,
        StorageType::Q5_K => StorageType::Q5_1,
        StorageType::Q6_K => StorageType::Q8_0,
        _ => StorageType::F16,
    };
    fitting(next, cols)
}

/// ggml's `general.file_type` for a file whose matrices mostly are of a storage.
pub(crate) fn file_type(storage: StorageType) -> u32 {
    match storage {
        StorageType::F32 => 0,
        StorageType::F16 => 1,
        StorageType::Q4_0 => 2,
        StorageType::Q4_1 => 3,
        StorageType::Q8_0 => 7,
        StorageType::Q5_0 => 8,
        StorageType::Q5_1 => 9,
        StorageType::Q2_K => 10,
        StorageType::Q3_K => 12,
        StorageType::Q4_K => 15,
        StorageType::Q5_K => 17,
        StorageType::Q6_K => 18,
        StorageType::BF16 => 32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use StorageType as S;

    #[test]
    fn names_are_read_and_mistakes_are_named() {
        for name in ["keep", "f32", "q4_k"] {
            assert_eq!(name.parse::<GgufType>().unwrap().to_string(), name);
        }
        let error = "q4_k_m".parse::<GgufType>().unwrap_err();
        assert!(error.contains("q4_k_m") && error.contains("q4_k, q4_0"), "{error}");
    }

    #[test]
    fn every_matrix_gets_a_type_that_it_can_have() {
        let plain = |cols| Matrix { cols, head: false, stored: S::Q3_K, changed: true };
        let head = |cols| Matrix { head: true, ..plain(cols) };
        for (wanted, matrix, expected) in [
            ("q4_k", plain(512), S::Q4_K),
            ("q4_k", plain(576), S::Q5_0),
            ("q5_k", plain(576), S::Q5_1),
            ("q4_k", plain(40), S::F16),
            ("q4_k", head(512), S::Q6_K),
            ("q4_0", head(576), S::Q8_0),
            ("q8_0", head(512), S::Q8_0),
            ("q8_0", plain(40), S::F16),
            ("bf16", head(40), S::BF16),
            ("keep", plain(512), S::Q4_K),
            ("keep", Matrix { changed: false, ..plain(512) }, S::Q3_K),
            ("keep", Matrix { stored: S::Q4_1, ..head(576) }, S::Q4_1),
        ] {
            let chosen = wanted.parse::<GgufType>().unwrap().storage(&matrix);
            assert_eq!(chosen, expected, "{wanted} {}", matrix.cols);
        }
    }
}
