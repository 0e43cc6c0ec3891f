//! How a GGUF file keeps what a Hugging Face directory keeps otherwise: rows in another order, weights shifted by one.

/// What llama.cpp's converter does to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// nothing
    AsIs,
    /// rows of each of so many heads reordered, for ggml's rope of neighbours
    Permuted {
        /// heads
        heads: usize,
    },
    /// rows that were query, key and value head by head are all queries, all keys, all values
    Ungrouped {
        /// heads
        heads: usize,
    },
    /// one was added to every element
    PlusOne,
}

impl Stored {
    /// True if rows lie in another order.
    pub fn reorders(self) -> bool {
        matches!(self, Self::Permuted { .. } | Self::Ungrouped { .. })
    }

    /// Rows of a GGUF tensor in Hugging Face's order. `data` is `rows` rows of equal length.
    pub fn rows_from_gguf<T: Copy>(self, data: &[T], rows: usize) -> Vec<T> {
        match self {
            Self::Permuted { heads } => unpermute_rows(data, rows, heads),
            Self::Ungrouped { heads } => {
                let head = rows / (3 * heads.max(1));
                reorder(data, rows, 3 * heads, |i| {
                    let (h, part, at) = (i / (3 * head), i / head % 3, i % head);
                    (part * heads + h) * head + at
                })
            }
            Self::AsIs | Self::PlusOne => data.to_vec(),
        }
    }

    /// Rows of a Hugging Face tensor in the order of a GGUF file: what [`Stored::rows_from_gguf`] undoes.
    pub fn rows_to_gguf<T: Copy>(self, data: &[T], rows: usize) -> Vec<T> {
        match self {
            Self::Permuted { heads } => permute_rows(data, rows, heads),
            Self::Ungrouped { heads } => {
                let head = rows / (3 * heads.max(1));
                reorder(data, rows, 3 * heads, |i| {
                    let (part, h, at) = (i / (heads * head), i / head % heads, i % head);
                    (h * 3 + part) * head + at
                })
            }
            Self::AsIs | Self::PlusOne => data.to_vec(),
        }
    }

    /// The values of a GGUF tensor, rows and all.
    pub fn values_from_gguf(self, data: &[f32], rows: usize) -> Vec<f32> {
        match self {
            Self::PlusOne => data.iter().map(|v| v - 1.0).collect(),
            other => other.rows_from_gguf(data, rows),
        }
    }

    /// The values for a GGUF file, rows and all.
    pub fn values_to_gguf(self, data: &[f32], rows: usize) -> Vec<f32> {
        match self {
            Self::PlusOne => data.iter().map(|v| v + 1.0).collect(),
            other => other.rows_to_gguf(data, rows),
        }
    }
}

/// Undoes the converter's reordering of q and k rows (`permute` in llama.cpp's `convert_hf_to_gguf.py`),
/// which turns Hugging Face's pairs (i, i + half) of each head into neighbours (2i, 2i + 1). `data` is `rows` rows
/// of equal length.
///
/// Row `h·d + 2i + s` of the file is row `h·d + s·d/2 + i` in Hugging Face's order, d being the head's size.
pub fn unpermute_rows<T: Copy>(data: &[T], rows: usize, heads: usize) -> Vec<T> {
    within_heads(data, rows, heads, |within, half| 2 * (within % half) + within / half)
}

/// The converter's reordering of q and k rows: what [`unpermute_rows`] undoes.
pub fn permute_rows<T: Copy>(data: &[T], rows: usize, heads: usize) -> Vec<T> {
    within_heads(data, rows, heads, |within, half| within / 2 + within % 2 * half)
}

/// Row i of a head is row `from(i, half)` of the same head, half of a head's rows being `half`.
fn within_heads<T: Copy>(
    data: &[T],
    rows: usize,
    heads: usize,
    from: impl Fn(usize, usize) -> usize,
) -> Vec<T> {
    let head = rows / heads.max(1);
    if head < 2 || !head.is_multiple_of(2) {
        return data.to_vec();
    }
    reorder(data, rows, heads, |i| i / head * head + from(i % head, head / 2))
}

/// Rows in another order: row i is row `from(i)`. What is no whole number of `parts` stays as it is.
fn reorder<T: Copy>(data: &[T], rows: usize, parts: usize, from: impl Fn(usize) -> usize) -> Vec<T> {
    if rows == 0 || parts == 0 || !rows.is_multiple_of(parts) || !data.len().is_multiple_of(rows) {
        return data.to_vec();
    }
    let width = data.len() / rows;
    let mut out = Vec::with_capacity(data.len());
    for i in 0..rows {
        out.extend_from_slice(&data[from(i) * width..][..width]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpermute_is_the_inverse_of_the_converter() {
        // one byte a row; two heads of four: the converter stores (0,2,1,3) of each head
        let stored = [0u8, 2, 1, 3, 4, 6, 5, 7];
        assert_eq!(unpermute_rows(&stored, 8, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(permute_rows(&[0u8, 1, 2, 3, 4, 5, 6, 7], 8, 2), stored);
        let wide: Vec<u16> = (0..72).collect();
        assert_eq!(unpermute_rows(&permute_rows(&wide, 24, 4), 24, 4), wide);
        // what is no whole number of heads is left alone
        assert_eq!(permute_rows(&[1u8, 2, 3], 3, 2), [1, 2, 3]);
    }

    #[test]
    fn grouped_rows_go_there_and_back() {
        // two heads of two: q, q, k, k, v, v of the first, then of the second
        let stored = Stored::Ungrouped { heads: 2 };
        let grouped: Vec<u8> = (0..12).collect();
        let apart = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11];
        assert_eq!(stored.rows_to_gguf(&grouped, 12), apart);
        assert_eq!(stored.rows_from_gguf(&apart, 12), grouped);
        let wide: Vec<u16> = (0..180).collect();
        let stored = Stored::Ungrouped { heads: 5 };
        assert_eq!(stored.rows_from_gguf(&stored.rows_to_gguf(&wide, 30), 30), wide);
        assert_eq!(stored.rows_to_gguf(&[1u8, 2], 2), [1, 2]);
    }

    #[test]
    fn shifted_weights_go_there_and_back() {
        assert_eq!(Stored::PlusOne.values_to_gguf(&[0.5, -1.0], 2), [1.5, 0.0]);
        assert_eq!(Stored::PlusOne.values_from_gguf(&[1.5, 0.0], 2), [0.5, -1.0]);
        assert!(!Stored::PlusOne.reorders());
    }
}
