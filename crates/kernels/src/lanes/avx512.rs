//! AVX-512 with VNNI: one register each.

use super::Lanes;
use std::arch::x86_64::*;

/// Needs avx512f, avx512bw, avx512vl, avx512vnni, avx2, fma and f16c.
pub(crate) struct Avx512;

impl Avx512 {
    /// True if this CPU has what is needed.
    pub fn is_here() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }
}

/// The 32 bytes at `p`, twice.
#[inline(always)]
unsafe fn twice(p: *const u8) -> __m512i {
    // SAFETY: as for `Lanes`.
    unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast())) }
}

/// Lane numbers 0, 0, 0, 0, 1, ..
const FOURS: [i32; 16] = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3];
/// Lane number 0 eight times, then 2.
const EVEN: [i32; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2];

// SAFETY (every block below): what `Lanes` asks of its callers.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx512 {
    narrow_lanes!();

    type Bytes = __m512i;
    type Ints = __m512i;
    type Floats = __m512;
    type Factors = __m512i;

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn two(a: *const u8, b: *const u8) -> __m512i {
        unsafe {
            let a = _mm512_castsi256_si512(_mm256_loadu_si256(a.cast()));
            _mm512_inserti64x4::<1>(a, _mm256_loadu_si256(b.cast()))
        }
    }

    #[inline(always)]
    unsafe fn nibbles16(a: *const u8, b: *const u8) -> __m512i {
        unsafe {
            let a = _mm256_broadcastsi128_si256(_mm_loadu_si128(a.cast()));
            let b = _mm256_broadcastsi128_si256(_mm_loadu_si128(b.cast()));
            let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
            let shifts = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
            _mm512_and_si512(_mm512_srlv_epi64(both, shifts), _mm512_set1_epi8(15))
        }
    }

    #[inline(always)]
    unsafe fn nibbles32(p: *const u8) -> __m512i {
        unsafe {
            let shifts = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
            _mm512_and_si512(_mm512_srlv_epi64(twice(p), shifts), _mm512_set1_epi8(15))
        }
    }

    #[inline(always)]
    unsafe fn low(b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(b, _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    unsafe fn high(b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(b), _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    unsafe fn bit_pairs<const SHIFT: u32>(p: *const u8) -> __m512i {
        unsafe {
            let (lo, hi) = (i64::from(SHIFT), i64::from(SHIFT) + 2);
            let shifts = _mm512_set_epi64(hi, hi, hi, hi, lo, lo, lo, lo);
            _mm512_and_si512(_mm512_srlv_epi64(twice(p), shifts), _mm512_set1_epi8(3))
        }
    }

    #[inline(always)]
    unsafe fn add_shifted4(a: __m512i, b: __m512i) -> __m512i {
        // no bit crosses a byte, since b is below 16
        unsafe { _mm512_or_si512(a, _mm512_slli_epi16::<4>(b)) }
    }

    #[inline(always)]
    unsafe fn add_where<const VALUE: i8>(b: __m512i, mask: u64) -> __m512i {
        unsafe { _mm512_mask_add_epi8(b, mask, b, _mm512_set1_epi8(VALUE)) }
    }

    #[inline(always)]
    unsafe fn add_where_bits<const VALUE: i8, const BIT: u32>(b: __m512i, p: *const u8) -> __m512i {
        unsafe {
            let (lo, hi) = (
                _mm256_set1_epi8(1u8.wrapping_shl(BIT) as i8),
                _mm256_set1_epi8(1u8.wrapping_shl(BIT + 1) as i8),
            );
            let bits = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lo), hi);
            Self::add_where::<VALUE>(b, _mm512_test_epi8_mask(twice(p), bits))
        }
    }

    #[inline(always)]
    unsafe fn dot(u: __m512i, a: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(_mm512_setzero_si512(), u, a) }
    }

    #[inline(always)]
    unsafe fn dot_signed(w: __m512i, a: __m512i) -> __m512i {
        // |w| times a with w's sign
        unsafe {
            let a = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(w), _mm512_setzero_si512(), a);
            Self::dot(_mm512_abs_epi8(w), a)
        }
    }

    #[inline(always)]
    unsafe fn add_dot(sum: __m512i, u: __m512i, a: __m512i, factors: __m512i) -> __m512i {
        // a product of a dot (below 2¹⁷) and a factor (below 2⁷) in the low 16 bits would not do
        unsafe { _mm512_add_epi32(sum, _mm512_mullo_epi32(Self::dot(u, a), factors)) }
    }

    #[inline(always)]
    unsafe fn factors<const J: usize>(f: __m128i) -> __m512i {
        unsafe {
            let lanes =
                _mm512_add_epi32(_mm512_loadu_si512(FOURS.as_ptr().cast()), _mm512_set1_epi32(4 * J as i32));
            _mm512_permutexvar_epi32(lanes, _mm512_cvtepi8_epi32(f))
        }
    }

    #[inline(always)]
    unsafe fn zero_ints() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn zero_floats() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn add_scaled(sum: __m512, ints: __m512i, factor: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), factor, sum) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn floats(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn floats_of_bf16(p: *const u8) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn floats_of_f16(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }

    #[inline(always)]
    unsafe fn store(x: __m512, p: *mut f32) {
        unsafe { _mm512_storeu_ps(p, x) }
    }

    #[inline(always)]
    unsafe fn total(x: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(x) }
    }

    #[inline(always)]
    unsafe fn spread(q: __m128) -> __m512 {
        unsafe { _mm512_permutexvar_ps(_mm512_loadu_si512(EVEN.as_ptr().cast()), _mm512_castps128_ps512(q)) }
    }
}
