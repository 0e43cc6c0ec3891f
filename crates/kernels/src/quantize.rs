//! Weights quantized by us: from stored floats to codes and factors, in parallel and in small pieces.
//!
//! The source is decoded a piece at a time, so that beside the result no more than a piece for each thread exists in
//! f32. Pieces are whole blocks (or rows), so the result does not depend on how the work is shared out.

use crate::codec::{
    self, BlockScales, DoubleQuantized, DoubleScales, F32s, FourBit, double_quantize, dynamic,
    encode_four_bit, encode_int8,
};
use crate::storage::{StorageError, StorageType, WeightView};
use rayon::prelude::*;
use std::fmt;
use std::ops::Range;

/// What a weight is quantized to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// 4-bit levels in blocks
    FourBit {
        /// which levels
        kind: FourBit,
        /// elements in a block
        block: usize,
        /// quantize the blocks' factors too
        double: bool,
    },
    /// 8-bit integers, a factor for each row
    Int8,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FourBit { kind, block, double } => {
                f.write_str(match kind {
                    FourBit::Nf4 => "NF4",
                    FourBit::Fp4 => "FP4",
                })?;
                if *block != 64 {
                    write!(f, "/{block}")?;
                }
                f.write_str(if *double { "+dq" } else { "" })
            }
            Self::Int8 => f.write_str("INT8"),
        }
    }
}

/// Why a weight could not be quantized.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QuantizeError {
    /// The bytes, or the block size, do not fit.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The weight is quantized already.
    #[error("is quantized already ({storage})")]
    AlreadyQuantized {
        /// its form
        storage: StorageType,
    },
    /// An element is NaN or infinite.
    #[error("holds NaN or infinity")]
    NotFinite,
    /// int8 goes through f16, as bitsandbytes does.
    #[error("holds a number beyond the range of f16 (65504), through which int8 weights go")]
    BeyondF16,
}

/// Factors of blocks, owned.
#[derive(Clone, Debug, PartialEq)]
pub enum OwnedScales {
    /// as they are
    Plain(Vec<f32>),
    /// quantized; the map is [`dynamic::map`]
    Double(DoubleQuantized),
}

/// A matrix in codes with factors beside them, owned.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedWeight {
    scheme: Scheme,
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    scales: OwnedScales,
}

/// Elements in a piece: a whole number of blocks of every size.
const PIECE: usize = 1 << 16;

impl QuantizedWeight {
    /// Quantizes the matrix `[rows, cols]` that `bytes` hold as floats, on rayon's current pool. `done` is told which
    /// bytes are not needed any more, so that a caller can let go of mapped pages.
    ///
    /// # Errors
    /// A source that is quantized already or not finite; sizes that do not fit; see [`QuantizeError`].
    pub fn new(
        scheme: Scheme,
        storage: StorageType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        done: &(dyn Fn(Range<usize>) + Sync),
    ) -> Result<Self, QuantizeError> {
        if storage.is_quantized() {
            return Err(QuantizeError::AlreadyQuantized { storage });
        }
        WeightView::new(storage, rows, cols, bytes)?;
        let source = Source { storage, bytes, done };
        let n = rows * cols;
        let (codes, scales) = match scheme {
            Scheme::FourBit { kind, block, double } => {
                if !codec::is_block_size(block) {
                    return Err(StorageError::BlockSize { block }.into());
                }
                let (mut codes, mut absmax) = (vec![0; n.div_ceil(2)], vec![0.0; n.div_ceil(block)]);
                let parts = codes.par_chunks_mut(PIECE / 2).zip(absmax.par_chunks_mut(PIECE / block));
                parts.enumerate().try_for_each(|(i, (codes, absmax))| {
                    source.piece(i * PIECE..n.min((i + 1) * PIECE), |x| {
                        encode_four_bit(kind, block, x, codes, absmax);
                    })
                })?;
                let scales = match double {
                    true => OwnedScales::Double(double_quantize(&absmax)),
                    false => OwnedScales::Plain(absmax),
                };
                (codes, scales)
            }
            Scheme::Int8 => {
                let (mut codes, mut absmax) = (vec![0; n], vec![0.0; rows]);
                let height = (PIECE / cols.max(1)).max(1);
                let parts = codes.par_chunks_mut((height * cols).max(1)).zip(absmax.par_chunks_mut(height));
                parts.enumerate().try_for_each(|(i, (codes, absmax))| {
                    let start = i * height * cols;
                    source.piece(start..start + codes.len(), |x| encode_int8(x, cols, codes, absmax))
                })?;
                if absmax.iter().any(|a| a.is_infinite()) {
                    return Err(QuantizeError::BeyondF16);
                }
                (codes, OwnedScales::Plain(absmax))
            }
        };
        Ok(Self { scheme, rows, cols, codes, scales })
    }

    /// What it was quantized to.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Codes and factors, taken out.
    pub fn into_parts(self) -> (Vec<u8>, OwnedScales) {
        (self.codes, self.scales)
    }

    /// The weight as the products take it.
    ///
    /// # Errors
    /// None: the parts fit by construction.
    pub fn view(&self) -> Result<WeightView<'_>, StorageError> {
        let floats = |x| F32s::over(x);
        match (self.scheme, &self.scales) {
            (Scheme::FourBit { kind, block, .. }, scales) => {
                let scales = match scales {
                    OwnedScales::Plain(absmax) => BlockScales::Plain(floats(absmax)),
                    OwnedScales::Double(d) => BlockScales::Double(DoubleScales {
                        codes: &d.codes,
                        map: floats(dynamic::map()),
                        nested: floats(&d.nested),
                        offset: d.offset,
                    }),
                };
                WeightView::four_bit(kind, block, self.rows, self.cols, &self.codes, scales)
            }
            (Scheme::Int8, OwnedScales::Plain(absmax)) => {
                WeightView::int8(self.rows, self.cols, &self.codes, floats(absmax))
            }
            (Scheme::Int8, OwnedScales::Double(d)) => {
                Err(StorageError::Count { what: "row factors", expected: self.rows, found: d.codes.len() })
            }
        }
    }
}

/// Where the floats come from.
struct Source<'a> {
    storage: StorageType,
    bytes: &'a [u8],
    done: &'a (dyn Fn(Range<usize>) + Sync),
}

impl Source<'_> {
    /// Runs `f` on the elements `range` in f32.
    fn piece(&self, range: Range<usize>, f: impl FnOnce(&[f32])) -> Result<(), QuantizeError> {
        let size = self.storage.block_bytes();
        let bytes = range.start * size..range.end * size;
        let mut x = vec![0f32; range.len()];
        codec::decode(self.storage, &self.bytes[bytes.clone()], &mut x);
        (self.done)(bytes);
        if !x.iter().fold(true, |good, x| good & x.is_finite()) {
            return Err(QuantizeError::NotFinite);
        }
        f(&x);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dropout::mix;
    use std::sync::Mutex;

    fn source(n: usize) -> Vec<u8> {
        let at = |i: u64| (mix(5, i) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        (0..n as u64).flat_map(|i| half::bf16::from_f32(at(i)).to_le_bytes()).collect()
    }

    const SCHEMES: [Scheme; 4] = [
        Scheme::FourBit { kind: FourBit::Nf4, block: 64, double: true },
        Scheme::FourBit { kind: FourBit::Fp4, block: 32, double: false },
        Scheme::FourBit { kind: FourBit::Nf4, block: 4096, double: false },
        Scheme::Int8,
    ];

    #[test]
    fn pieces_and_threads_do_not_show() {
        // several pieces, and a last one that is no whole block
        let (rows, cols) = (1000, 177);
        let bytes = source(rows * cols);
        for scheme in SCHEMES {
            let seen = Mutex::new(Vec::new());
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let done = |range: Range<usize>| seen.lock().unwrap().push(range);
                pool.install(|| QuantizedWeight::new(scheme, StorageType::BF16, rows, cols, &bytes, &done))
                    .unwrap()
            };
            let one = run(1);
            let mut told = std::mem::take(&mut *seen.lock().unwrap());
            told.sort_by_key(|r| r.start);
            assert_eq!((told[0].start, told.last().unwrap().end), (0, bytes.len()), "{scheme}");
            assert!(told.len() > 1 && told.windows(2).all(|w| w[0].end == w[1].start), "{scheme}: {told:?}");
            assert_eq!(one, run(3), "{scheme}");
            let mut all = vec![0f32; rows * cols];
            one.view().unwrap().decode_rows(0..rows, &mut all);
            let mut plain = vec![0f32; rows * cols];
            codec::decode(StorageType::BF16, &bytes, &mut plain);
            let error = all.iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // half of the widest gap between levels (FP4: 1/6 of absmax <= 1)
            assert!(error < 0.17, "{scheme}: {error}");
        }
    }

    #[test]
    fn what_cannot_be_quantized_is_said() {
        let nothing = |_| ();
        for scheme in SCHEMES {
            let bytes = [f32::NAN, 1.0, 2.0, 3.0].map(f32::to_le_bytes).concat();
            let run = |storage, bytes: &[u8]| QuantizedWeight::new(scheme, storage, 2, 2, bytes, &nothing);
            assert_eq!(run(StorageType::F32, &bytes).unwrap_err(), QuantizeError::NotFinite);
            assert!(matches!(run(StorageType::F32, &bytes[4..]), Err(QuantizeError::Storage(_))));
            let storage = StorageType::Q4_1;
            let found = QuantizedWeight::new(scheme, storage, 1, 32, &[0; 20], &nothing).unwrap_err();
            assert_eq!(found, QuantizeError::AlreadyQuantized { storage });
        }
        let big = [1e5f32, 1.0].map(f32::to_le_bytes).concat();
        let found = QuantizedWeight::new(Scheme::Int8, StorageType::F32, 1, 2, &big, &nothing);
        assert_eq!(found.unwrap_err(), QuantizeError::BeyondF16);
        let odd = Scheme::FourBit { kind: FourBit::Nf4, block: 60, double: false };
        let found = QuantizedWeight::new(odd, StorageType::F32, 1, 2, &big, &nothing).unwrap_err();
        assert!(found.to_string().contains("block size 60"), "{found}");
    }

    #[test]
    fn names_say_what_it_is() {
        let names: Vec<String> = SCHEMES.iter().map(Scheme::to_string).collect();
        assert_eq!(names, ["NF4+dq", "FP4/32", "NF4/4096", "INT8"]);
    }
}
