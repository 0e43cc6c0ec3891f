//! 64 bytes of codes, or sixteen floats, at a time, on whatever registers the CPU has.
//!
//! The kernels of generation are written once over [`Lanes`]; a value of `Bytes` is 64 bytes, one of `Ints` sixteen
//! i32, one of `Floats` sixteen f32, in one AVX-512 register, two of AVX2, or an array. Lane k of a dot product is the
//! sum over the bytes 4k..4k + 4, in every implementation, so integers agree exactly.

/// What the kernels need of a CPU.
///
/// # Safety
///
/// Every function may be called only on a CPU with the features that the implementation names, inside a function
/// compiled for them; pointers must be readable for as many bytes as each function says.
pub(crate) trait Lanes {
    type Bytes: Copy;
    type Ints: Copy;
    type Floats: Copy;
    /// four f32
    type Quad: Copy;
    /// integer factors of the sixteen lanes
    type Factors: Copy;
    /// sixteen i8
    type Small: Copy;
    /// eight f32
    type Eight: Copy;

    /// 64 bytes from `p`.
    unsafe fn bytes(p: *const u8) -> Self::Bytes;
    /// 32 bytes from `a`, then 32 from `b`.
    unsafe fn two(a: *const u8, b: *const u8) -> Self::Bytes;
    /// The low nibbles of the 16 bytes at `a`, their high nibbles, and so for `b`.
    unsafe fn nibbles16(a: *const u8, b: *const u8) -> Self::Bytes;
    /// The low nibbles of the 32 bytes at `p`, then their high nibbles.
    unsafe fn nibbles32(p: *const u8) -> Self::Bytes;
    /// The low nibbles of `b`'s bytes.
    unsafe fn low(b: Self::Bytes) -> Self::Bytes;
    /// The high nibbles of `b`'s bytes.
    unsafe fn high(b: Self::Bytes) -> Self::Bytes;
    /// Bits `SHIFT`, `SHIFT + 1` of the 32 bytes at `p`, then bits `SHIFT + 2`, `SHIFT + 3`.
    unsafe fn bit_pairs<const SHIFT: u32>(p: *const u8) -> Self::Bytes;
    /// `a + (b << 4)`, for bytes of b below 16.
    unsafe fn add_shifted4(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// `b`, plus `VALUE` where bit i of `mask` is set.
    unsafe fn add_where<const VALUE: i8>(b: Self::Bytes, mask: u64) -> Self::Bytes;
    /// `b`, plus `VALUE` in its first half where bit `BIT` of the 32 bytes at `p` is set, in its second where bit
    /// `BIT + 1` is.
    unsafe fn add_where_bits<const VALUE: i8, const BIT: u32>(b: Self::Bytes, p: *const u8) -> Self::Bytes;

    /// Unsigned codes below 128 times signed ones.
    unsafe fn dot(u: Self::Bytes, a: Self::Bytes) -> Self::Ints;
    /// Signed codes times signed ones; those of `a` are above -128.
    unsafe fn dot_signed(w: Self::Bytes, a: Self::Bytes) -> Self::Ints;
    /// `sum + factor·dot(u, a)`.
    unsafe fn add_dot(sum: Self::Ints, u: Self::Bytes, a: Self::Bytes, factors: Self::Factors) -> Self::Ints;
    /// Factors of the lanes 4·i..4·i + 4: element 4·J + i of `f`.
    unsafe fn factors<const J: usize>(f: Self::Small) -> Self::Factors;

    /// The f16 at `p`.
    unsafe fn half(p: *const u8) -> f32;
    /// Sixteen i8 from `p`.
    unsafe fn small(p: *const u8) -> Self::Small;
    /// The bytes of two words, from the lowest.
    unsafe fn small_of(words: [u64; 2]) -> Self::Small;
    /// Each byte of a word twice, from the lowest.
    unsafe fn small_twice(word: u64) -> Self::Small;
    /// The low nibbles.
    unsafe fn small_low(x: Self::Small) -> Self::Small;
    /// The high nibbles.
    unsafe fn small_high(x: Self::Small) -> Self::Small;
    /// `x - VALUE`.
    unsafe fn small_minus<const VALUE: i8>(x: Self::Small) -> Self::Small;
    /// The elements.
    unsafe fn small_elements(x: Self::Small) -> [i8; 16];
    unsafe fn zero_eight() -> Self::Eight;
    /// `sum + factor·(n ⊙ p)`, neighbours 2i and 2i + 1 in lane i; each two products are added exactly.
    unsafe fn add_products(sum: Self::Eight, n: Self::Small, p: *const [i16; 16], factor: f32)
    -> Self::Eight;
    /// The sum of all lanes.
    unsafe fn total_eight(x: Self::Eight) -> f32;

    unsafe fn zero_ints() -> Self::Ints;
    unsafe fn zero_floats() -> Self::Floats;
    /// `sum + ints·factor`.
    unsafe fn add_scaled(sum: Self::Floats, ints: Self::Ints, factor: Self::Floats) -> Self::Floats;
    unsafe fn splat(x: f32) -> Self::Floats;
    /// Sixteen floats from `p`.
    unsafe fn floats(p: *const f32) -> Self::Floats;
    /// Sixteen bf16 from `p`, widened.
    unsafe fn floats_of_bf16(p: *const u8) -> Self::Floats;
    /// Sixteen f16 from `p`, widened.
    unsafe fn floats_of_f16(p: *const u8) -> Self::Floats;
    /// `sum + a·b`, rounded once where the CPU can.
    unsafe fn multiply_add(sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// Writes sixteen floats to `p`.
    unsafe fn store(x: Self::Floats, p: *mut f32);
    /// The sum of all lanes.
    unsafe fn total(x: Self::Floats) -> f32;

    unsafe fn zero_quad() -> Self::Quad;
    /// The four floats at `y` times `[f16 at a, again, f16 at b, again]`.
    unsafe fn scales(a: *const u8, b: *const u8, y: *const f32) -> Self::Quad;
    /// The four floats at `y` times `[f16 at a, f16 at a + 2, f16 at b, f16 at b + 2]`.
    unsafe fn scales_and_minima(a: *const u8, b: *const u8, y: *const f32) -> Self::Quad;
    unsafe fn add_quads(a: Self::Quad, b: Self::Quad) -> Self::Quad;
    /// Element 0 in the first eight lanes, element 2 in the others.
    unsafe fn spread(q: Self::Quad) -> Self::Floats;
    /// Elements 1 + 3.
    unsafe fn odd_sum(q: Self::Quad) -> f32;
}

/// An implementation of [`Lanes`], and what the code around it is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    DotProduct,
    Portable,
}

impl Backend {
    /// All that this CPU has, the best first.
    pub fn all() -> impl Iterator<Item = Self> {
        [
            #[cfg(target_arch = "x86_64")]
            Avx512::is_here().then_some(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            Avx2::is_here().then_some(Self::Avx2),
            #[cfg(target_arch = "aarch64")]
            std::arch::is_aarch64_feature_detected!("dotprod").then_some(Self::DotProduct),
            Some(Self::Portable),
        ]
        .into_iter()
        .flatten()
    }

    /// The best.
    pub fn best() -> Self {
        Self::all().next().unwrap_or(Self::Portable)
    }
}

/// `by_backend!(unsafe fn name(args) = body)`: `name(backend, args)` runs `body::<L>(args)`, an inlined function over
/// [`Lanes`], compiled for that backend; `unsafe fn name<T: Bound>(args)` runs `body::<L, T>(args)`.
///
/// # Safety
/// As for `body`; the backend is one of [`Backend::all`].
macro_rules! by_backend {
    ($(#[$meta:meta])* unsafe fn $name:ident $(<$extra:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$meta])*
        unsafe fn $name $(<$extra: $bound>)? (backend: $crate::lanes::Backend, $($arg: $ty),*) {
            use $crate::lanes::Backend;
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
            unsafe fn avx512 $(<$extra: $bound>)? ($($arg: $ty),*) {
                // SAFETY: passed on; compiled for what `Avx512` needs.
                unsafe { $body::<$crate::lanes::Avx512 $(, $extra)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2 $(<$extra: $bound>)? ($($arg: $ty),*) {
                // SAFETY: passed on; compiled for what `Avx2` needs.
                unsafe { $body::<$crate::lanes::Avx2 $(, $extra)?>($($arg),*) }
            }
            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "dotprod")]
            unsafe fn dot_product $(<$extra: $bound>)? ($($arg: $ty),*) {
                // SAFETY: passed on; `Portable` needs nothing.
                unsafe { $body::<$crate::lanes::Portable $(, $extra)?>($($arg),*) }
            }
            // SAFETY: passed on; this CPU has what the backend needs.
            unsafe {
                match backend {
                    #[cfg(target_arch = "x86_64")]
                    Backend::Avx512 => avx512 $(::<$extra>)? ($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    Backend::Avx2 => avx2 $(::<$extra>)? ($($arg),*),
                    #[cfg(target_arch = "aarch64")]
                    Backend::DotProduct => dot_product $(::<$extra>)? ($($arg),*),
                    Backend::Portable => $body::<$crate::lanes::Portable $(, $extra)?>($($arg),*),
                }
            }
        }
    };
}
pub(crate) use by_backend;

/// What AVX2 and AVX-512 share, inside an `impl Lanes`: all that is narrower than 64 bytes, with the CPU's conversion of
/// f16.
#[cfg(target_arch = "x86_64")]
macro_rules! narrow_lanes {
    () => {
        type Quad = __m128;
        type Small = __m128i;
        type Eight = __m256;

        #[inline(always)]
        unsafe fn half(p: *const u8) -> f32 {
            unsafe {
                let bits = _mm_cvtsi32_si128(p.cast::<u16>().read_unaligned().into());
                _mm_cvtss_f32(_mm_cvtph_ps(bits))
            }
        }

        #[inline(always)]
        unsafe fn small(p: *const u8) -> __m128i {
            unsafe { _mm_loadu_si128(p.cast()) }
        }

        #[inline(always)]
        unsafe fn small_of(words: [u64; 2]) -> __m128i {
            unsafe { _mm_set_epi64x(words[1] as i64, words[0] as i64) }
        }

        #[inline(always)]
        unsafe fn small_twice(word: u64) -> __m128i {
            unsafe {
                let x = _mm_cvtsi64_si128(word as i64);
                _mm_unpacklo_epi8(x, x)
            }
        }

        #[inline(always)]
        unsafe fn small_low(x: __m128i) -> __m128i {
            unsafe { _mm_and_si128(x, _mm_set1_epi8(15)) }
        }

        #[inline(always)]
        unsafe fn small_high(x: __m128i) -> __m128i {
            unsafe { _mm_and_si128(_mm_srli_epi16::<4>(x), _mm_set1_epi8(15)) }
        }

        #[inline(always)]
        unsafe fn small_minus<const VALUE: i8>(x: __m128i) -> __m128i {
            unsafe { _mm_sub_epi8(x, _mm_set1_epi8(VALUE)) }
        }

        #[inline(always)]
        unsafe fn small_elements(x: __m128i) -> [i8; 16] {
            let mut out = [0; 16];
            unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), x) };
            out
        }

        #[inline(always)]
        unsafe fn zero_eight() -> __m256 {
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn add_products(sum: __m256, n: __m128i, p: *const [i16; 16], factor: f32) -> __m256 {
            unsafe {
                let pairs = _mm256_madd_epi16(_mm256_cvtepi8_epi16(n), _mm256_loadu_si256(p.cast()));
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(pairs), _mm256_set1_ps(factor), sum)
            }
        }

        #[inline(always)]
        unsafe fn total_eight(x: __m256) -> f32 {
            unsafe {
                let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
                let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
            }
        }

        #[inline(always)]
        unsafe fn zero_quad() -> __m128 {
            unsafe { _mm_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn scales(a: *const u8, b: *const u8, y: *const f32) -> __m128 {
            unsafe {
                let f16_twice = |p: *const u8| _mm_set1_epi16(p.cast::<i16>().read_unaligned());
                let both = _mm_unpacklo_epi32(f16_twice(a), f16_twice(b));
                _mm_mul_ps(_mm_cvtph_ps(both), _mm_loadu_ps(y))
            }
        }

        #[inline(always)]
        unsafe fn scales_and_minima(a: *const u8, b: *const u8, y: *const f32) -> __m128 {
            unsafe {
                let pair = |p: *const u8| _mm_cvtsi32_si128(p.cast::<i32>().read_unaligned());
                let both = _mm_unpacklo_epi32(pair(a), pair(b));
                _mm_mul_ps(_mm_cvtph_ps(both), _mm_loadu_ps(y))
            }
        }

        #[inline(always)]
        unsafe fn add_quads(a: __m128, b: __m128) -> __m128 {
            unsafe { _mm_add_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn odd_sum(q: __m128) -> f32 {
            unsafe {
                let odd = _mm_shuffle_ps::<0b11_01_11_01>(q, q);
                _mm_cvtss_f32(_mm_add_ss(odd, _mm_shuffle_ps::<1>(odd, odd)))
            }
        }
    };
}

mod portable;
pub(crate) use portable::Portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) use {avx2::Avx2, avx512::Avx512};
