//! AVX2: two registers each.

use super::Lanes;
use std::arch::x86_64::*;

/// Needs avx2, fma and f16c.
pub(crate) struct Avx2;

impl Avx2 {
    /// True if this CPU has what is needed.
    pub fn is_here() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }
}

#[inline(always)]
unsafe fn load(p: *const u8) -> __m256i {
    // SAFETY: as for `Lanes`.
    unsafe { _mm256_loadu_si256(p.cast()) }
}

#[inline(always)]
unsafe fn low_nibbles(x: __m256i) -> __m256i {
    // SAFETY: as for `Lanes`.
    unsafe { _mm256_and_si256(x, _mm256_set1_epi8(15)) }
}

/// (16 bytes' low nibbles, their high nibbles)
#[inline(always)]
unsafe fn nibbles(p: *const u8) -> __m256i {
    // SAFETY: as for `Lanes`.
    unsafe {
        let x = _mm_loadu_si128(p.cast());
        low_nibbles(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(x), _mm_srli_epi16::<4>(x)))
    }
}

/// `value` in every byte i for which bit i of `mask` is set.
#[inline(always)]
unsafe fn where_set(mask: u32, value: i8) -> __m256i {
    // SAFETY: as for `Lanes`.
    unsafe {
        // byte i takes the mask's byte i / 8, and keeps its bit i % 8
        let spread =
            _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
        let bits = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
        let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(mask as i32), spread);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bits), bits);
        _mm256_and_si256(set, _mm256_set1_epi8(value))
    }
}

/// Sums of four products; two products and their sum fit 16 bits, since u is below 128 (or at most 128 times 127).
#[inline(always)]
unsafe fn products(u: __m256i, a: __m256i) -> __m256i {
    // SAFETY: as for `Lanes`.
    unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(u, a), _mm256_set1_epi16(1)) }
}

// SAFETY (every block below): what `Lanes` asks of its callers.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx2 {
    narrow_lanes!();

    type Bytes = [__m256i; 2];
    type Ints = [__m256i; 2];
    type Floats = [__m256; 2];
    /// sixteen-bit factors, twice in each lane
    type Factors = [__m256i; 2];

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> [__m256i; 2] {
        unsafe { [load(p), load(p.add(32))] }
    }

    #[inline(always)]
    unsafe fn two(a: *const u8, b: *const u8) -> [__m256i; 2] {
        unsafe { [load(a), load(b)] }
    }

    #[inline(always)]
    unsafe fn nibbles16(a: *const u8, b: *const u8) -> [__m256i; 2] {
        unsafe { [nibbles(a), nibbles(b)] }
    }

    #[inline(always)]
    unsafe fn nibbles32(p: *const u8) -> [__m256i; 2] {
        unsafe {
            let x = load(p);
            [low_nibbles(x), low_nibbles(_mm256_srli_epi16::<4>(x))]
        }
    }

    #[inline(always)]
    unsafe fn low(b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { [low_nibbles(b[0]), low_nibbles(b[1])] }
    }

    #[inline(always)]
    unsafe fn high(b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { [low_nibbles(_mm256_srli_epi16::<4>(b[0])), low_nibbles(_mm256_srli_epi16::<4>(b[1]))] }
    }

    #[inline(always)]
    unsafe fn bit_pairs<const SHIFT: u32>(p: *const u8) -> [__m256i; 2] {
        unsafe {
            let (x, three) = (load(p), _mm256_set1_epi8(3));
            let shift = |by: u32| _mm_cvtsi32_si128(by as i32);
            [
                _mm256_and_si256(_mm256_srl_epi16(x, shift(SHIFT)), three),
                _mm256_and_si256(_mm256_srl_epi16(x, shift(SHIFT + 2)), three),
            ]
        }
    }

    #[inline(always)]
    unsafe fn add_shifted4(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            [
                _mm256_or_si256(a[0], _mm256_slli_epi16::<4>(b[0])),
                _mm256_or_si256(a[1], _mm256_slli_epi16::<4>(b[1])),
            ]
        }
    }

    #[inline(always)]
    unsafe fn add_where<const VALUE: i8>(b: [__m256i; 2], mask: u64) -> [__m256i; 2] {
        unsafe {
            [
                _mm256_add_epi8(b[0], where_set(mask as u32, VALUE)),
                _mm256_add_epi8(b[1], where_set((mask >> 32) as u32, VALUE)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn add_where_bits<const VALUE: i8, const BIT: u32>(b: [__m256i; 2], p: *const u8) -> [__m256i; 2] {
        unsafe {
            let x = load(p);
            let add = |b: __m256i, bit: u32| {
                let bit = _mm256_set1_epi8(1u8.wrapping_shl(bit) as i8);
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(x, bit), bit);
                _mm256_add_epi8(b, _mm256_and_si256(set, _mm256_set1_epi8(VALUE)))
            };
            [add(b[0], BIT), add(b[1], BIT + 1)]
        }
    }

    #[inline(always)]
    unsafe fn dot(u: [__m256i; 2], a: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { [products(u[0], a[0]), products(u[1], a[1])] }
    }

    #[inline(always)]
    unsafe fn dot_signed(w: [__m256i; 2], a: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            let part = |w, a| products(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
            [part(w[0], a[0]), part(w[1], a[1])]
        }
    }

    #[inline(always)]
    unsafe fn add_dot(
        sum: [__m256i; 2],
        u: [__m256i; 2],
        a: [__m256i; 2],
        factors: [__m256i; 2],
    ) -> [__m256i; 2] {
        unsafe {
            let part = |s, u, a, f| _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(u, a), f));
            [part(sum[0], u[0], a[0], factors[0]), part(sum[1], u[1], a[1], factors[1])]
        }
    }

    #[inline(always)]
    unsafe fn factors<const J: usize>(f: __m128i) -> [__m256i; 2] {
        unsafe {
            let eights = |first: i8| {
                let lanes = _mm_unpacklo_epi64(_mm_set1_epi8(first), _mm_set1_epi8(first + 1));
                _mm256_cvtepi8_epi16(_mm_shuffle_epi8(f, lanes))
            };
            [eights(4 * J as i8), eights(4 * J as i8 + 2)]
        }
    }

    #[inline(always)]
    unsafe fn zero_ints() -> [__m256i; 2] {
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    unsafe fn zero_floats() -> [__m256; 2] {
        unsafe { [_mm256_setzero_ps(); 2] }
    }

    #[inline(always)]
    unsafe fn add_scaled(sum: [__m256; 2], ints: [__m256i; 2], factor: [__m256; 2]) -> [__m256; 2] {
        unsafe {
            [
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints[0]), factor[0], sum[0]),
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints[1]), factor[1], sum[1]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    unsafe fn floats(p: *const f32) -> [__m256; 2] {
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }

    #[inline(always)]
    unsafe fn floats_of_bf16(p: *const u8) -> [__m256; 2] {
        unsafe {
            let half = |p: *const u8| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            };
            [half(p), half(p.add(16))]
        }
    }

    #[inline(always)]
    unsafe fn floats_of_f16(p: *const u8) -> [__m256; 2] {
        unsafe {
            [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast()))]
        }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: [__m256; 2], a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], sum[0]), _mm256_fmadd_ps(a[1], b[1], sum[1])] }
    }

    #[inline(always)]
    unsafe fn store(x: [__m256; 2], p: *mut f32) {
        unsafe {
            _mm256_storeu_ps(p, x[0]);
            _mm256_storeu_ps(p.add(8), x[1]);
        }
    }

    #[inline(always)]
    unsafe fn total(x: [__m256; 2]) -> f32 {
        unsafe {
            let x = _mm256_add_ps(x[0], x[1]);
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }
    }

    #[inline(always)]
    unsafe fn spread(q: __m128) -> [__m256; 2] {
        unsafe { [_mm256_broadcastss_ps(q), _mm256_broadcastss_ps(_mm_movehl_ps(q, q))] }
    }
}
