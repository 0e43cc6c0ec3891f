//! The factors of 4-bit blocks: plain f32, or quantized a second time.
//!
//! Double quantization (Dettmers et al. 2023, section 3) stores the factors a of a tensor in 8 bits. With m their
//! mean over the tensor, and in blocks of 256 factors:
//!
//! ```text
//! d = a - m        D = max|d|        code = the entry of the dynamic map nearest to d / D        ã = map[code]·D + m
//! ```
//!
//! Blocks of 64 elements then cost 8/64 + 32/(64·256) = 0.127 bits an element instead of 0.5.

use super::dynamic;
use crate::storage::StorageError;

/// Factors that share one nested factor.
pub const NESTED_BLOCK: usize = 256;

/// f32 numbers as they lie in a file: little-endian, aligned to nothing.
#[derive(Clone, Copy, Debug)]
pub struct F32s<'a>(&'a [[u8; 4]]);

impl<'a> F32s<'a> {
    /// Numbers over bytes; `None` if they are no whole number of them.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        let (numbers, rest) = bytes.as_chunks::<4>();
        rest.is_empty().then_some(Self(numbers))
    }

    /// Numbers in memory.
    pub fn over(numbers: &'a [f32]) -> Self {
        Self(bytemuck::cast_slice(numbers))
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number `i`.
    #[inline(always)]
    pub fn get(&self, i: usize) -> f32 {
        f32::from_le_bytes(self.0[i])
    }

    /// All numbers.
    pub fn iter(&self) -> impl Iterator<Item = f32> + 'a {
        self.0.iter().map(|b| f32::from_le_bytes(*b))
    }
}

/// One factor for each block.
#[derive(Clone, Copy, Debug)]
pub enum BlockScales<'a> {
    /// as they are
    Plain(F32s<'a>),
    /// quantized
    Double(DoubleScales<'a>),
}

/// Factors in 8 bits.
#[derive(Clone, Copy, Debug)]
pub struct DoubleScales<'a> {
    /// one code for each block
    pub codes: &'a [u8],
    /// what the 256 codes stand for
    pub map: F32s<'a>,
    /// one factor for each [`NESTED_BLOCK`] codes
    pub nested: F32s<'a>,
    /// the mean, which was taken away
    pub offset: f32,
}

impl BlockScales<'_> {
    /// The factor of block `i`.
    #[inline(always)]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales.get(i),
            Self::Double(d) => d.map.get(d.codes[i] as usize) * d.nested.get(i / NESTED_BLOCK) + d.offset,
        }
    }

    /// Bytes that they take, the map included.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Plain(scales) => 4 * scales.len(),
            Self::Double(d) => d.codes.len() + 4 * (d.map.len() + d.nested.len()),
        }
    }

    /// An error unless there is one factor for each of `blocks` blocks.
    pub(super) fn check(&self, blocks: usize) -> Result<(), StorageError> {
        match self {
            Self::Plain(scales) => StorageError::check("block factors", scales.len(), blocks),
            Self::Double(d) => {
                StorageError::check("codes of block factors", d.codes.len(), blocks)?;
                StorageError::check("entries of the 8-bit map", d.map.len(), 256)?;
                StorageError::check("nested factors", d.nested.len(), blocks.div_ceil(NESTED_BLOCK))
            }
        }
    }
}

/// Factors that were quantized a second time.
#[derive(Clone, Debug, PartialEq)]
pub struct DoubleQuantized {
    /// one code for each block
    pub codes: Vec<u8>,
    /// one factor for each [`NESTED_BLOCK`] codes
    pub nested: Vec<f32>,
    /// the mean, which was taken away
    pub offset: f32,
}

/// Quantizes the factors of one tensor.
pub fn double_quantize(absmax: &[f32]) -> DoubleQuantized {
    // in f64: bitsandbytes' mean is that of PyTorch, whose order of summing is its own
    let sum: f64 = absmax.iter().map(|a| f64::from(*a)).sum();
    let offset = (sum / absmax.len().max(1) as f64) as f32;
    let centred: Vec<f32> = absmax.iter().map(|a| a - offset).collect();
    let (mut codes, mut nested) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(NESTED_BLOCK)]);
    dynamic::encode_blocks(NESTED_BLOCK, &centred, &mut codes, &mut nested);
    DoubleQuantized { codes, nested, offset }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dropout::mix;

    #[test]
    fn factors_come_back_within_half_a_step_of_the_map() {
        let absmax: Vec<f32> =
            (0..1000u64).map(|i| 0.1 + (mix(3, i) >> 40) as f32 / (1 << 26) as f32).collect();
        let double = double_quantize(&absmax);
        assert_eq!((double.codes.len(), double.nested.len()), (1000, 4));
        let le = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (map, nested) = (le(dynamic::map()), le(&double.nested));
        let scales = BlockScales::Double(DoubleScales {
            codes: &double.codes,
            map: F32s::new(&map).unwrap(),
            nested: F32s::new(&nested).unwrap(),
            offset: double.offset,
        });
        scales.check(1000).unwrap();
        for (i, a) in absmax.iter().enumerate() {
            // neighbours in the map are at most 1/64 apart, so nothing is further than half of that from one
            let error = (scales.get(i) - a).abs();
            assert!(error <= double.nested[i / NESTED_BLOCK] / 128.0 + 1e-7, "{i}: {a} {}", scales.get(i));
        }
        assert!(scales.check(1001).is_err());
        assert_eq!(scales.size_bytes(), 1000 + 4 * (256 + 4));
    }

    #[test]
    fn equal_factors_come_back_exactly() {
        let double = double_quantize(&[0.25; 300]);
        assert_eq!((double.offset, double.nested), (0.25, vec![0.0; 2]));
    }
}
