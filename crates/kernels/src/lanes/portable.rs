//! Arrays: for every CPU. On AArch64 the same code is also compiled for its dot-product instructions, which LLVM
//! then finds.

use super::Lanes;
use crate::codec::f16_to_f32;

/// Needs nothing.
pub(crate) struct Portable;

#[inline(always)]
unsafe fn f16_at(p: *const u8) -> f32 {
    // SAFETY: two readable bytes, as for `Lanes`.
    f16_to_f32(u16::from_le_bytes(unsafe { p.cast::<[u8; 2]>().read() }))
}

/// `f` of each byte's number.
#[inline(always)]
fn each(f: impl Fn(usize) -> u8) -> [u8; 64] {
    let mut out = [0; 64];
    for (i, out) in out.iter_mut().enumerate() {
        *out = f(i);
    }
    out
}

/// The sums of four neighbours' products.
#[inline(always)]
fn products(w: impl Fn(usize) -> i16, a: &[u8; 64]) -> [i32; 16] {
    let mut sums = [0; 16];
    for (k, sum) in sums.iter_mut().enumerate() {
        for i in 4 * k..4 * k + 4 {
            *sum += i32::from(w(i)) * i32::from(a[i] as i8);
        }
    }
    sums
}

// SAFETY (every block below): pointers are readable, as `Lanes` asks.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Portable {
    type Bytes = [u8; 64];
    type Ints = [i32; 16];
    type Floats = [f32; 16];
    type Quad = [f32; 4];
    type Factors = [i32; 16];

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> [u8; 64] {
        unsafe { p.cast::<[u8; 64]>().read() }
    }

    #[inline(always)]
    unsafe fn two(a: *const u8, b: *const u8) -> [u8; 64] {
        let (a, b) = unsafe { (a.cast::<[u8; 32]>().read(), b.cast::<[u8; 32]>().read()) };
        each(|i| if i < 32 { a[i] } else { b[i - 32] })
    }

    #[inline(always)]
    unsafe fn nibbles16(a: *const u8, b: *const u8) -> [u8; 64] {
        let (a, b) = unsafe { (a.cast::<[u8; 16]>().read(), b.cast::<[u8; 16]>().read()) };
        let mut out = [0; 64];
        for i in 0..16 {
            (out[i], out[16 + i]) = (a[i] & 15, a[i] >> 4);
            (out[32 + i], out[48 + i]) = (b[i] & 15, b[i] >> 4);
        }
        out
    }

    #[inline(always)]
    unsafe fn nibbles32(p: *const u8) -> [u8; 64] {
        let p = unsafe { p.cast::<[u8; 32]>().read() };
        let mut out = [0; 64];
        for i in 0..32 {
            (out[i], out[32 + i]) = (p[i] & 15, p[i] >> 4);
        }
        out
    }

    #[inline(always)]
    unsafe fn low(b: [u8; 64]) -> [u8; 64] {
        b.map(|b| b & 15)
    }

    #[inline(always)]
    unsafe fn high(b: [u8; 64]) -> [u8; 64] {
        b.map(|b| b >> 4)
    }

    #[inline(always)]
    unsafe fn bit_pairs<const SHIFT: u32>(p: *const u8) -> [u8; 64] {
        let p = unsafe { p.cast::<[u8; 32]>().read() };
        let mut out = [0; 64];
        for i in 0..32 {
            (out[i], out[32 + i]) = (p[i] >> SHIFT & 3, p[i] >> (SHIFT + 2) & 3);
        }
        out
    }

    #[inline(always)]
    unsafe fn add_shifted4(a: [u8; 64], b: [u8; 64]) -> [u8; 64] {
        each(|i| a[i] + (b[i] << 4))
    }

    #[inline(always)]
    unsafe fn add_where<const VALUE: i8>(b: [u8; 64], mask: u64) -> [u8; 64] {
        each(|i| b[i].wrapping_add((mask >> i & 1) as u8 * VALUE as u8))
    }

    #[inline(always)]
    unsafe fn add_where_bits<const VALUE: i8, const BIT: u32>(b: [u8; 64], p: *const u8) -> [u8; 64] {
        let p = unsafe { p.cast::<[u8; 32]>().read() };
        let mut out = b;
        for i in 0..32 {
            out[i] = b[i].wrapping_add((p[i] >> BIT & 1) * VALUE as u8);
            out[32 + i] = b[32 + i].wrapping_add((p[i] >> (BIT + 1) & 1) * VALUE as u8);
        }
        out
    }

    #[inline(always)]
    unsafe fn dot(u: [u8; 64], a: [u8; 64]) -> [i32; 16] {
        products(|i| i16::from(u[i]), &a)
    }

    #[inline(always)]
    unsafe fn dot_signed(w: [u8; 64], a: [u8; 64]) -> [i32; 16] {
        products(|i| i16::from(w[i] as i8), &a)
    }

    #[inline(always)]
    unsafe fn add_dot(sum: [i32; 16], u: [u8; 64], a: [u8; 64], factors: [i32; 16]) -> [i32; 16] {
        let dots = unsafe { Self::dot(u, a) };
        std::array::from_fn(|k| sum[k] + dots[k] * factors[k])
    }

    #[inline(always)]
    unsafe fn factors2(f: [i16; 2]) -> [i32; 16] {
        std::array::from_fn(|k| i32::from(f[k / 8]))
    }

    #[inline(always)]
    unsafe fn factors4(f: [i16; 4]) -> [i32; 16] {
        std::array::from_fn(|k| i32::from(f[k / 4]))
    }

    #[inline(always)]
    unsafe fn zero_ints() -> [i32; 16] {
        [0; 16]
    }

    #[inline(always)]
    unsafe fn zero_floats() -> [f32; 16] {
        [0.0; 16]
    }

    #[inline(always)]
    unsafe fn add_scaled(sum: [f32; 16], ints: [i32; 16], factor: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|k| sum[k] + ints[k] as f32 * factor[k])
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 16] {
        [x; 16]
    }

    #[inline(always)]
    unsafe fn floats(p: *const f32) -> [f32; 16] {
        unsafe { p.cast::<[f32; 16]>().read() }
    }

    #[inline(always)]
    unsafe fn floats_of_bf16(p: *const u8) -> [f32; 16] {
        let bytes = unsafe { p.cast::<[[u8; 2]; 16]>().read() };
        bytes.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
    }

    #[inline(always)]
    unsafe fn floats_of_f16(p: *const u8) -> [f32; 16] {
        let bytes = unsafe { p.cast::<[[u8; 2]; 16]>().read() };
        bytes.map(|b| f16_to_f32(u16::from_le_bytes(b)))
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: [f32; 16], a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|k| sum[k] + a[k] * b[k])
    }

    #[inline(always)]
    unsafe fn store(x: [f32; 16], p: *mut f32) {
        unsafe { p.cast::<[f32; 16]>().write(x) }
    }

    #[inline(always)]
    unsafe fn total(x: [f32; 16]) -> f32 {
        let mut x = x;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] += x[i + half];
            }
        }
        x[0]
    }

    #[inline(always)]
    unsafe fn zero_quad() -> [f32; 4] {
        [0.0; 4]
    }

    #[inline(always)]
    unsafe fn scales(a: *const u8, b: *const u8, y: *const f32) -> [f32; 4] {
        unsafe {
            let (a, b, y) = (f16_at(a), f16_at(b), y.cast::<[f32; 4]>().read());
            [a * y[0], a * y[1], b * y[2], b * y[3]]
        }
    }

    #[inline(always)]
    unsafe fn scales_and_minima(a: *const u8, b: *const u8, y: *const f32) -> [f32; 4] {
        unsafe {
            let y = y.cast::<[f32; 4]>().read();
            [f16_at(a) * y[0], f16_at(a.add(2)) * y[1], f16_at(b) * y[2], f16_at(b.add(2)) * y[3]]
        }
    }

    #[inline(always)]
    unsafe fn add_quads(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn spread(q: [f32; 4]) -> [f32; 16] {
        std::array::from_fn(|k| q[k / 8 * 2])
    }

    #[inline(always)]
    unsafe fn odd_sum(q: [f32; 4]) -> f32 {
        q[1] + q[3]
    }
}
