//! NF4 and FP4: sixteen levels, and one factor for each block of the flattened tensor.
//!
//! Dettmers et al. 2023 (QLoRA), in the form of bitsandbytes. With x the elements of a block (64 unless said
//! otherwise; the last block may be shorter) and L the sixteen levels, all within -1..=1:
//!
//! ```text
//! absmax = max|x|        code = the level nearest to x / absmax        x̃ = L[code]·absmax
//! ```
//!
//! NF4's levels are quantiles of a normal distribution; FP4's are floats of one sign, two exponent and one mantissa
//! bit, divided by the largest. Blocks run over the tensor as it lies in memory, so they may begin and end inside a
//! row. Element 2i is the high nibble of byte i, element 2i + 1 the low one.
//!
//! Rounding follows bitsandbytes' CPU path operation by operation, so that codes are equal bit for bit: whole blocks
//! are multiplied with 1 / absmax, a last partial one is divided by it; a number between two levels takes the upper
//! one if it lies *above* their midpoint. (Its CUDA path differs in numbers that lie on a midpoint.)

use super::scales::BlockScales;
use super::simd::multiversion;
use crate::storage::StorageError;

/// Which sixteen levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FourBit {
    /// quantiles of a normal distribution
    Nf4,
    /// 4-bit floats
    Fp4,
}

/// Quantiles, as bitsandbytes lists them.
#[allow(clippy::excessive_precision)] // its digits
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// In the order of their bits; 0 has two codes.
const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

/// FP4's codes by level, lowest first. Of the two zeros, 0 takes what is not above zero and 8 what is.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];
const NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

const NF4_MIDPOINTS: [f32; 15] = midpoints(&NF4, &NF4_ORDER);
const FP4_MIDPOINTS: [f32; 15] = midpoints(&FP4, &FP4_ORDER);

const fn midpoints(levels: &[f32; 16], order: &[u8; 16]) -> [f32; 15] {
    let mut middles = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        middles[i] = (levels[order[i] as usize] + levels[order[i + 1] as usize]) / 2.0;
        i += 1;
    }
    middles
}

impl FourBit {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// The name that people and bitsandbytes use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// Level of each code.
    pub const fn levels(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// Midpoints between levels, and the codes that they part, both ascending.
    const fn search(self) -> (&'static [f32; 15], &'static [u8; 16]) {
        match self {
            Self::Nf4 => (&NF4_MIDPOINTS, &NF4_ORDER),
            Self::Fp4 => (&FP4_MIDPOINTS, &FP4_ORDER),
        }
    }
}

/// True for the block sizes that bitsandbytes knows: powers of two from 32 to 4096.
pub const fn is_block_size(block: usize) -> bool {
    block.is_power_of_two() && 32 <= block && block <= 4096
}

/// Smallest factor that is divided by: a block of zeros would give NaN otherwise.
const LEAST_ABSMAX: f32 = 1e-38;

/// Quantizes a stretch of a flattened tensor that begins at a block.
///
/// Only the tensor's last stretch may end inside a block. Elements must be finite (others give codes without
/// meaning). Panics unless `codes` has one byte for two elements and `absmax` one number for each block.
pub fn encode_four_bit(kind: FourBit, block: usize, x: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    assert!(is_block_size(block), "block size {block}");
    assert_eq!((codes.len(), absmax.len()), (x.len().div_ceil(2), x.len().div_ceil(block)));
    let (middles, order) = kind.search();
    let zero = order[position(middles, 0.0) as usize];
    let mut positions = vec![0u8; block];
    let blocks = x.chunks(block).zip(codes.chunks_mut(block / 2)).zip(absmax);
    for ((x, codes), absmax) in blocks {
        let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
        if x.len() == block {
            *absmax = most;
            positions_of_products(middles, x, 1.0 / most.max(LEAST_ABSMAX), &mut positions);
        } else {
            *absmax = most.max(LEAST_ABSMAX);
            for (x, out) in x.iter().zip(&mut positions) {
                *out = position(middles, (x / *absmax).clamp(-1.0, 1.0));
            }
        }
        let (pairs, rest) = positions[..x.len()].as_chunks::<2>();
        for ([high, low], byte) in pairs.iter().zip(codes.iter_mut()) {
            *byte = order[*high as usize] << 4 | order[*low as usize];
        }
        if let ([last], Some(byte)) = (rest, codes.last_mut()) {
            // an odd last element is paired with 0
            *byte = order[*last as usize] << 4 | zero;
        }
    }
}

/// Of the levels in ascending order, which is nearest: as many as there are midpoints below x.
#[inline(always)]
fn position(middles: &[f32; 15], x: f32) -> u8 {
    middles.iter().map(|m| i32::from(x > *m)).sum::<i32>() as u8
}

multiversion! {
    /// [`position`] of every `x · factor`, kept within -1..=1.
    fn positions_of_products(middles: &[f32; 15], x: &[f32], factor: f32, out: &mut [u8])
        = positions_of_products_body
}

#[inline(always)]
fn positions_of_products_body(middles: &[f32; 15], x: &[f32], factor: f32, out: &mut [u8]) {
    for (x, out) in x.iter().zip(out) {
        *out = position(middles, (x * factor).clamp(-1.0, 1.0));
    }
}

/// The codes of a flattened tensor and their factors, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct FourBitView<'a> {
    kind: FourBit,
    block: usize,
    elements: usize,
    codes: &'a [u8],
    scales: BlockScales<'a>,
}

impl<'a> FourBitView<'a> {
    /// Checks that codes and factors are those of `elements` elements in blocks of `block`.
    ///
    /// # Errors
    /// A block size that bitsandbytes does not know; too few or too many bytes.
    pub fn new(
        kind: FourBit,
        block: usize,
        elements: usize,
        codes: &'a [u8],
        scales: BlockScales<'a>,
    ) -> Result<Self, StorageError> {
        if !is_block_size(block) {
            return Err(StorageError::BlockSize { block });
        }
        StorageError::check("4-bit codes", codes.len(), elements.div_ceil(2))?;
        scales.check(elements.div_ceil(block))?;
        Ok(Self { kind, block, elements, codes, scales })
    }

    /// Which levels.
    pub fn kind(&self) -> FourBit {
        self.kind
    }

    /// Elements that share a factor.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The packed codes.
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// The factors.
    pub fn scales(&self) -> BlockScales<'a> {
        self.scales
    }

    /// Element `i` of the flattened tensor, by the definition: what [`FourBitView::decode`] is tested against.
    pub fn element(&self, i: usize) -> f32 {
        let byte = self.codes[i / 2];
        let code = if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
        self.kind.levels()[code as usize] * self.scales.get(i / self.block)
    }

    /// Decodes elements `start..start + out.len()` of the flattened tensor. Panics if they reach past its end.
    pub fn decode(&self, start: usize, out: &mut [f32]) {
        assert!(start + out.len() <= self.elements, "elements past the end of a 4-bit tensor");
        #[cfg(target_arch = "x86_64")]
        {
            if super::simd::has_avx512() {
                // SAFETY: the CPU has the features that `avx512` is compiled for.
                return unsafe { avx512(self, start, out) };
            }
            if super::simd::has_avx2() {
                // SAFETY: the CPU has AVX2.
                return unsafe { avx2(self, start, out) };
            }
        }
        portable(self, start, out);
    }

    /// Walks through the blocks of a stretch. `run` decodes an even number of elements, or an odd number at the end,
    /// from a high nibble on; it gets the levels times the block's factor, which is how every version multiplies.
    #[inline(always)]
    fn walk(&self, start: usize, out: &mut [f32], run: impl Fn(&[f32; 16], &[u8], &mut [f32])) {
        let end = start + out.len();
        let shift = self.block.trailing_zeros();
        let mut i = start;
        while i < end {
            let block = i >> shift;
            let stop = end.min((block + 1) << shift);
            let scale = self.scales.get(block);
            let levels = self.kind.levels().map(|level| level * scale);
            if !i.is_multiple_of(2) {
                out[i - start] = levels[(self.codes[i / 2] & 15) as usize];
                i += 1;
            }
            if i < stop {
                run(&levels, &self.codes[i / 2..stop.div_ceil(2)], &mut out[i - start..stop - start]);
            }
            i = stop;
        }
    }
}

fn portable(view: &FourBitView<'_>, start: usize, out: &mut [f32]) {
    view.walk(start, out, pairs);
}

/// Two elements a byte; an odd last one is a high nibble.
#[inline(always)]
fn pairs(levels: &[f32; 16], codes: &[u8], out: &mut [f32]) {
    let (pairs, rest) = out.as_chunks_mut::<2>();
    for (pair, byte) in pairs.iter_mut().zip(codes) {
        *pair = [levels[(byte >> 4) as usize], levels[(byte & 15) as usize]];
    }
    if let ([last], Some(byte)) = (rest, codes.last()) {
        *last = levels[(byte >> 4) as usize];
    }
}

/// Sixteen elements at a time: eight bytes are spread over sixteen lanes, each lane is shifted to its nibble, and one
/// permutation of the sixteen products looks them all up (it reads the low four bits of a lane only).
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
fn avx512(view: &FourBitView<'_>, start: usize, out: &mut [f32]) {
    use std::arch::x86_64::*;
    // even lanes take the high nibble
    let shifts = _mm512_set1_epi64(4);
    view.walk(start, out, |levels, codes, out| {
        // SAFETY: sixteen readable floats.
        let table = unsafe { _mm512_loadu_ps(levels.as_ptr()) };
        let (groups, rest) = out.as_chunks_mut::<16>();
        let (bytes, rest_bytes) = codes.split_at(groups.len() * 8);
        for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<8>().0) {
            let bytes = _mm_cvtsi64_si128(i64::from_le_bytes(*bytes));
            let wide = _mm512_cvtepu8_epi64(bytes);
            let both = _mm512_or_si512(wide, _mm512_slli_epi64::<32>(wide));
            let looked_up = _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shifts), table);
            // SAFETY: sixteen writable floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), looked_up) };
        }
        pairs(levels, rest_bytes, rest);
    });
}

/// Eight elements at a time, as [`avx512`]; the table is two registers, chosen between by the nibble's highest bit.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(view: &FourBitView<'_>, start: usize, out: &mut [f32]) {
    use std::arch::x86_64::*;
    let shifts = _mm256_set1_epi64x(4);
    view.walk(start, out, |levels, codes, out| {
        // SAFETY: eight readable floats each.
        let (low, high) =
            unsafe { (_mm256_loadu_ps(levels.as_ptr()), _mm256_loadu_ps(levels.as_ptr().add(8))) };
        let (groups, rest) = out.as_chunks_mut::<8>();
        let (bytes, rest_bytes) = codes.split_at(groups.len() * 4);
        for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<4>().0) {
            let wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(i32::from_le_bytes(*bytes)));
            let both = _mm256_or_si256(wide, _mm256_slli_epi64::<32>(wide));
            let nibbles = _mm256_srlv_epi32(both, shifts);
            // bit 3 to the sign, which is what the blend looks at
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(nibbles));
            let (a, b) = (_mm256_permutevar8x32_ps(low, nibbles), _mm256_permutevar8x32_ps(high, nibbles));
            // SAFETY: eight writable floats.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_blendv_ps(a, b, upper)) };
        }
        pairs(levels, rest_bytes, rest);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::scales::F32s;
    use crate::dropout::mix;
    use proptest::prelude::*;

    fn bytes(n: usize, seed: u64) -> Vec<u8> {
        (0..n as u64).map(|i| mix(seed, i) as u8).collect()
    }

    fn floats(n: usize, seed: u64) -> Vec<f32> {
        (0..n as u64).map(|i| (mix(seed, i) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn le(x: &[f32]) -> Vec<u8> {
        x.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn every_version_decodes_as_the_definition_says() {
        for kind in FourBit::ALL {
            for block in [32, 64, 512] {
                let n = 1301;
                let codes = bytes(n / 2 + 1, 1);
                let scales = le(&floats(n.div_ceil(block), 2));
                let scales = BlockScales::Plain(F32s::new(&scales).unwrap());
                let view = FourBitView::new(kind, block, n, &codes, scales).unwrap();
                for (start, len) in [(0, n), (1, n - 1), (31, 65), (64, 128), (63, 1), (640, 17), (n, 0)] {
                    let expected: Vec<u32> =
                        (start..start + len).map(|i| view.element(i).to_bits()).collect();
                    let check = |name: &str, out: &[f32]| {
                        let found: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                        assert_eq!(found, expected, "{name} {kind:?} block {block} {start}..+{len}");
                    };
                    let mut out = vec![f32::NAN; len];
                    portable(&view, start, &mut out);
                    check("portable", &out);
                    #[cfg(target_arch = "x86_64")]
                    {
                        if crate::codec::simd::has_avx512() {
                            out.fill(f32::NAN);
                            // SAFETY: the CPU has the features.
                            unsafe { avx512(&view, start, &mut out) };
                            check("avx512", &out);
                        }
                        if crate::codec::simd::has_avx2() {
                            out.fill(f32::NAN);
                            // SAFETY: the CPU has the features.
                            unsafe { avx2(&view, start, &mut out) };
                            check("avx2", &out);
                        }
                    }
                    out.fill(f32::NAN);
                    view.decode(start, &mut out);
                    check("chosen", &out);
                }
            }
        }
    }

    #[test]
    fn levels_stay_what_they_are() {
        for kind in FourBit::ALL {
            // a block that holds every level, so its absmax is 1
            let x: Vec<f32> = kind.levels().repeat(4);
            let (mut codes, mut absmax) = ([0u8; 32], [0f32; 1]);
            encode_four_bit(kind, 64, &x, &mut codes, &mut absmax);
            let scales = le(&absmax);
            let scales = BlockScales::Plain(F32s::new(&scales).unwrap());
            let view = FourBitView::new(kind, 64, 64, &codes, scales).unwrap();
            let mut out = [0f32; 64];
            view.decode(0, &mut out);
            assert_eq!(out.to_vec(), x);
        }
    }

    #[test]
    fn a_block_of_zeros_decodes_to_zeros() {
        for kind in FourBit::ALL {
            for n in [64, 65, 100] {
                let (mut codes, mut absmax) = (vec![0u8; n / 2 + n % 2], vec![9f32; n.div_ceil(64)]);
                encode_four_bit(kind, 64, &vec![0.0; n], &mut codes, &mut absmax);
                let scales = le(&absmax);
                let scales = BlockScales::Plain(F32s::new(&scales).unwrap());
                let view = FourBitView::new(kind, 64, n, &codes, scales).unwrap();
                let mut out = vec![1f32; n];
                view.decode(0, &mut out);
                assert!(out.iter().all(|x| *x == 0.0), "{out:?}");
            }
        }
    }

    #[test]
    fn unfit_sizes_are_said() {
        let scales = le(&[1.0; 2]);
        let scales = BlockScales::Plain(F32s::new(&scales).unwrap());
        for (block, elements, codes, part) in [
            (48, 128, 64, "block size 48"),
            (16, 32, 16, "block size 16"),
            (64, 128, 63, "4-bit codes"),
            (64, 192, 96, "factors"),
            (128, 128, 64, "factors"),
        ] {
            let codes = vec![0; codes];
            let error = FourBitView::new(FourBit::Nf4, block, elements, &codes, scales).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    proptest! {
        /// No level is nearer to x / absmax than the one that is chosen, up to the rounding of the quotient.
        #[test]
        fn the_nearest_level_is_chosen(
            kind in prop::sample::select(FourBit::ALL.to_vec()),
            block in prop::sample::select(vec![32usize, 64, 128, 256]),
            n in 1usize..700,
            exponent in -20i32..20,
            seed: u64,
        ) {
            let x: Vec<f32> = floats(n, seed).iter().map(|x| x * 2f32.powi(exponent)).collect();
            let (mut codes, mut absmax) = (vec![0u8; n.div_ceil(2)], vec![0f32; n.div_ceil(block)]);
            encode_four_bit(kind, block, &x, &mut codes, &mut absmax);
            let scales = le(&absmax);
            let scales = BlockScales::Plain(F32s::new(&scales).unwrap());
            let view = FourBitView::new(kind, block, n, &codes, scales).unwrap();
            for (i, x) in x.iter().enumerate() {
                let most = absmax[i / block];
                let error = (view.element(i) - x).abs();
                let best = kind.levels().iter().map(|l| (l * most - x).abs()).fold(f32::INFINITY, f32::min);
                prop_assert!(error <= best + most * 1e-6, "{i}: {x} became {}", view.element(i));
            }
        }
    }
}
