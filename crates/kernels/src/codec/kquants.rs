//! ggml's k-quants: 256 elements that share one or two f16 scales, in sub-blocks with small integer scales.
//!
//! | storage | bytes in order                                  | sub-block | element                       |
//! |---------|-------------------------------------------------|-----------|-------------------------------|
//! | Q2_K    | scales\[16\], qs\[64\], d, dmin                 | 16        | (d·s)·q - dmin·n, q in 0..4   |
//! | Q3_K    | hmask\[32\], qs\[64\], scales\[12\], d          | 16        | (d·s)·q, q in -4..4           |
//! | Q4_K    | d, dmin, scales\[12\], qs\[128\]                | 32        | (d·s)·q - dmin·n, q in 0..16  |
//! | Q5_K    | d, dmin, scales\[12\], qh\[32\], qs\[128\]      | 32        | (d·s)·q - dmin·n, q in 0..32  |
//! | Q6_K    | ql\[128\], qh\[64\], scales\[16\] (i8), d       | 16        | (d·s)·q, q in -32..32         |
//!
//! Write element e = 32·g + l, with g in 0..8 and l in 0..32.
//!
//! - Q2_K: q is bits 2·(g%4).. of qs\[32·(g/4) + l\]; s and n are the low and high nibble of scales\[e/16\].
//! - Q3_K: low bits as Q2_K's; 4 is subtracted where bit g of hmask\[l\] is *not* set. Scale j in 0..16 is
//!   6 bits less 32: low four from nibble j/8 of scales\[j%8\], high two from bits 2·(j/4).. of scales\[8 + j%4\].
//! - Q4_K, Q5_K: low four bits are nibble g%2 of qs\[32·(g/2) + l\]; Q5_K's fifth is bit g of qh\[l\]. Scale and
//!   minimum g are 6 bits each: for g < 4 the low bits of scales\[g\] and scales\[4 + g\]; for g >= 4, with
//!   c = scales\[4 + g\], s = c%16 and n = c/16, topped by bits 6 and 7 of scales\[g - 4\] and scales\[g\].
//! - Q6_K, with half h = g/4 and r = g%4: low four bits are nibble r/2 of ql\[64·h + 32·(r%2) + l\], high two
//!   are bits 2·r.. of qh\[32·h + l\]; 32 is subtracted.

use super::scale_at;
use super::simd::{multiversion, one_block_at_a_time};

multiversion!(pub(super) fn q2_k(bytes: &[u8], out: &mut [f32]) = q2_k_body);
multiversion!(pub(super) fn q3_k(bytes: &[u8], out: &mut [f32]) = q3_k_body);
multiversion!(pub(super) fn q4_k(bytes: &[u8], out: &mut [f32]) = q4_k_body);
multiversion!(pub(super) fn q5_k(bytes: &[u8], out: &mut [f32]) = q5_k_body);
multiversion!(pub(super) fn q6_k(bytes: &[u8], out: &mut [f32]) = q6_k_body);

/// `N` bytes of a block from `at` on; the lengths are constants, so no check is left in the loop.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("inside the block")
}

#[inline(always)]
fn q2_k_body(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<84>().0.iter().zip(out.as_chunks_mut::<256>().0) {
        one_block_at_a_time();
        let scales = part::<16>(block, 0);
        let (d, dmin) = (scale_at(block, 80), scale_at(block, 82));
        for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            one_block_at_a_time();
            let qs = part::<32>(block, 16 + 32 * (g / 4));
            let shift = 2 * (g % 4);
            for (j, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let s = scales[2 * g + j];
                let (dl, ml) = (d * (s & 15) as f32, dmin * (s >> 4) as f32);
                for l in 0..16 {
                    out[l] = dl * (qs[16 * j + l] >> shift & 3) as f32 - ml;
                }
            }
        }
    }
}

/// Q3_K's sixteen signed scales.
#[inline(always)]
pub(crate) fn q3_scales(packed: &[u8; 12]) -> [i16; 16] {
    std::array::from_fn(|j| {
        let low = packed[j % 8] >> (4 * (j / 8)) & 15;
        let high = packed[8 + j % 4] >> (2 * (j / 4)) & 3;
        i16::from(low | high << 4) - 32
    })
}

#[inline(always)]
fn q3_k_body(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<110>().0.iter().zip(out.as_chunks_mut::<256>().0) {
        one_block_at_a_time();
        let hmask = part::<32>(block, 0);
        let scales = q3_scales(part::<12>(block, 96));
        let d = scale_at(block, 108);
        for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            one_block_at_a_time();
            let qs = part::<32>(block, 32 + 32 * (g / 4));
            let shift = 2 * (g % 4);
            for (j, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let dl = d * f32::from(scales[2 * g + j]);
                for l in 0..16 {
                    let low = (qs[16 * j + l] >> shift & 3) as i8;
                    let high = (hmask[16 * j + l] >> g & 1) as i8;
                    out[l] = dl * (low + 4 * high - 4) as f32;
                }
            }
        }
    }
}

/// Scale and minimum of sub-block `g` of Q4_K and Q5_K.
#[inline(always)]
fn scale_and_min(packed: &[u8; 12], g: usize) -> (u8, u8) {
    if g < 4 {
        (packed[g] & 63, packed[4 + g] & 63)
    } else {
        let both = packed[4 + g];
        (both & 15 | packed[g - 4] >> 6 << 4, both >> 4 | packed[g] >> 6 << 4)
    }
}

/// All scales and minima of Q4_K and Q5_K: [`scale_and_min`] of every g, four at a time.
#[inline(always)]
pub(crate) fn scales_and_minima(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let word = |i: usize| u32::from_le_bytes([packed[i], packed[i + 1], packed[i + 2], packed[i + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let both = |first: u32, last: u32| (u64::from(first) | u64::from(last) << 32).to_le_bytes();
    let scales = both(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030);
    let minima = both(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030);
    (scales, minima)
}

#[inline(always)]
fn q4_k_body(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<144>().0.iter().zip(out.as_chunks_mut::<256>().0) {
        one_block_at_a_time();
        let (d, dmin) = (scale_at(block, 0), scale_at(block, 2));
        let scales = part::<12>(block, 4);
        for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            one_block_at_a_time();
            let (s, n) = scale_and_min(scales, g);
            let (dl, ml) = (d * s as f32, dmin * n as f32);
            let qs = part::<32>(block, 16 + 32 * (g / 2));
            let shift = 4 * (g % 2);
            for l in 0..32 {
                out[l] = dl * (qs[l] >> shift & 15) as f32 - ml;
            }
        }
    }
}

#[inline(always)]
fn q5_k_body(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<176>().0.iter().zip(out.as_chunks_mut::<256>().0) {
        one_block_at_a_time();
        let (d, dmin) = (scale_at(block, 0), scale_at(block, 2));
        let scales = part::<12>(block, 4);
        let qh = part::<32>(block, 16);
        for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            one_block_at_a_time();
            let (s, n) = scale_and_min(scales, g);
            let (dl, ml) = (d * s as f32, dmin * n as f32);
            let qs = part::<32>(block, 48 + 32 * (g / 2));
            let shift = 4 * (g % 2);
            for l in 0..32 {
                out[l] = dl * (qs[l] >> shift & 15 | (qh[l] >> g & 1) << 4) as f32 - ml;
            }
        }
    }
}

#[inline(always)]
fn q6_k_body(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<210>().0.iter().zip(out.as_chunks_mut::<256>().0) {
        one_block_at_a_time();
        let scales = part::<16>(block, 192);
        let d = scale_at(block, 208);
        for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            one_block_at_a_time();
            let (h, r) = (g / 4, g % 4);
            let ql = part::<32>(block, 64 * h + 32 * (r % 2));
            let qh = part::<32>(block, 128 + 32 * h);
            for (j, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let dl = d * (scales[2 * g + j] as i8) as f32;
                for l in 0..16 {
                    let q = ql[16 * j + l] >> (4 * (r / 2)) & 15 | (qh[16 * j + l] >> (2 * r) & 3) << 4;
                    out[l] = dl * (q as i8 - 32) as f32;
                }
            }
        }
    }
}

/// Element `e` of one block, read off the text above.
pub(super) mod reference {
    use half::f16;

    fn half_at(block: &[u8], at: usize) -> f32 {
        f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
    }

    /// `count` bits of `byte` from bit `from` on.
    fn bits(byte: u8, from: usize, count: usize) -> i32 {
        (byte as i32 >> from) & ((1 << count) - 1)
    }

    pub fn q2_k(block: &[u8], e: usize) -> f32 {
        let (g, l) = (e / 32, e % 32);
        let q = bits(block[16 + 32 * (g / 4) + l], 2 * (g % 4), 2);
        let scale = block[e / 16];
        half_at(block, 80) * bits(scale, 0, 4) as f32 * q as f32
            - half_at(block, 82) * bits(scale, 4, 4) as f32
    }

    pub fn q3_k(block: &[u8], e: usize) -> f32 {
        let (g, l, j) = (e / 32, e % 32, e / 16);
        let low = bits(block[32 + 32 * (g / 4) + l], 2 * (g % 4), 2);
        let q = if bits(block[l], g, 1) == 1 { low } else { low - 4 };
        let scales = &block[96..108];
        let s = bits(scales[j % 8], 4 * (j / 8), 4) + 16 * bits(scales[8 + j % 4], 2 * (j / 4), 2) - 32;
        half_at(block, 108) * s as f32 * q as f32
    }

    fn six_bit_pair(scales: &[u8], g: usize) -> (f32, f32) {
        let (s, n) = if g < 4 {
            (bits(scales[g], 0, 6), bits(scales[4 + g], 0, 6))
        } else {
            let c = scales[4 + g];
            (bits(c, 0, 4) + 16 * bits(scales[g - 4], 6, 2), bits(c, 4, 4) + 16 * bits(scales[g], 6, 2))
        };
        (s as f32, n as f32)
    }

    pub fn q4_k(block: &[u8], e: usize) -> f32 {
        let (g, l) = (e / 32, e % 32);
        let (s, n) = six_bit_pair(&block[4..16], g);
        let q = bits(block[16 + 32 * (g / 2) + l], 4 * (g % 2), 4);
        half_at(block, 0) * s * q as f32 - half_at(block, 2) * n
    }

    pub fn q5_k(block: &[u8], e: usize) -> f32 {
        let (g, l) = (e / 32, e % 32);
        let (s, n) = six_bit_pair(&block[4..16], g);
        let q = bits(block[48 + 32 * (g / 2) + l], 4 * (g % 2), 4) + 16 * bits(block[16 + l], g, 1);
        half_at(block, 0) * s * q as f32 - half_at(block, 2) * n
    }

    pub fn q6_k(block: &[u8], e: usize) -> f32 {
        let (g, l) = (e / 32, e % 32);
        let (h, r) = (g / 4, g % 4);
        let low = bits(block[64 * h + 32 * (r % 2) + l], 4 * (r / 2), 4);
        let q = low + 16 * bits(block[128 + 32 * h + l], 2 * r, 2) - 32;
        half_at(block, 208) * (block[192 + e / 16] as i8) as f32 * q as f32
    }
}
