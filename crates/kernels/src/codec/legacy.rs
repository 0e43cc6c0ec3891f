//! ggml's first block formats: 32 elements that share one f16 scale d, and in the `_1` forms one f16 minimum m.
//!
//! | storage | bytes in order                     | element                     |
//! |---------|------------------------------------|-----------------------------|
//! | Q4_0    | d, qs\[16\]                        | d · (q - 8),  q in 0..16    |
//! | Q4_1    | d, m, qs\[16\]                     | d · q + m,    q in 0..16    |
//! | Q5_0    | d, qh (u32), qs\[16\]              | d · (q - 16), q in 0..32    |
//! | Q5_1    | d, m, qh (u32), qs\[16\]           | d · q + m,    q in 0..32    |
//! | Q8_0    | d, qs\[32\] (i8)                   | d · q                       |
//!
//! Element i < 16 takes the low nibble of qs\[i\], element i >= 16 the high nibble of qs\[i - 16\]; in the
//! 5-bit forms bit i of qh is the fifth bit. Everything is little-endian.

use super::scale_at;
use super::simd::{multiversion, one_block_at_a_time};

multiversion!(pub(super) fn q4_0(bytes: &[u8], out: &mut [f32]) = q4_0_body);
multiversion!(pub(super) fn q4_1(bytes: &[u8], out: &mut [f32]) = q4_1_body);
multiversion!(pub(super) fn q5_0(bytes: &[u8], out: &mut [f32]) = q5_0_body);
multiversion!(pub(super) fn q5_1(bytes: &[u8], out: &mut [f32]) = q5_1_body);
multiversion!(pub(super) fn q8_0(bytes: &[u8], out: &mut [f32]) = q8_0_body);

/// Sixteen bytes of a block from `at` on.
#[inline(always)]
fn sixteen(block: &[u8], at: usize) -> &[u8; 16] {
    block[at..].first_chunk().expect("inside the block")
}

/// The two halves of a block's elements: LLVM vectorises two loops of 16 well, one of 32 over nibbles badly.
#[inline(always)]
fn halves(out: &mut [f32; 32]) -> (&mut [f32; 16], &mut [f32; 16]) {
    let (low, high) = out.as_chunks_mut::<16>().0.split_at_mut(1);
    (&mut low[0], &mut high[0])
}

/// Decodes the nibbles at `at` by `element`.
#[inline(always)]
fn nibbles(block: &[u8], at: usize, out: &mut [f32; 32], element: impl Fn(i32) -> f32) {
    let qs = sixteen(block, at);
    let (low, high) = halves(out);
    for i in 0..16 {
        low[i] = element((qs[i] & 15) as i32);
    }
    for i in 0..16 {
        high[i] = element((qs[i] >> 4) as i32);
    }
}

/// Decodes the fifth bits at `at` and the nibbles behind them by `element`.
#[inline(always)]
fn five_bits(block: &[u8], at: usize, out: &mut [f32; 32], element: impl Fn(i32) -> f32) {
    let fifth = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let qs = sixteen(block, at + 4);
    let (low, high) = halves(out);
    for i in 0..16 {
        low[i] = element((qs[i] & 15) as i32 | (((fifth >> i) & 1) << 4) as i32);
    }
    for i in 0..16 {
        high[i] = element((qs[i] >> 4) as i32 | (((fifth >> (16 + i)) & 1) << 4) as i32);
    }
}

#[inline(always)]
fn q4_0_body(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        one_block_at_a_time();
        let d = scale_at(block, 0);
        nibbles(block, 2, out, |q| d * (q - 8) as f32);
    }
}

#[inline(always)]
fn q4_1_body(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<20>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        one_block_at_a_time();
        let (d, m) = (scale_at(block, 0), scale_at(block, 2));
        nibbles(block, 4, out, |q| d * q as f32 + m);
    }
}

#[inline(always)]
fn q5_0_body(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<22>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        one_block_at_a_time();
        let d = scale_at(block, 0);
        five_bits(block, 2, out, |q| d * (q - 16) as f32);
    }
}

#[inline(always)]
fn q5_1_body(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<24>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        one_block_at_a_time();
        let (d, m) = (scale_at(block, 0), scale_at(block, 2));
        five_bits(block, 4, out, |q| d * q as f32 + m);
    }
}

#[inline(always)]
fn q8_0_body(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<34>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        one_block_at_a_time();
        let d = scale_at(block, 0);
        for i in 0..32 {
            out[i] = d * (block[2 + i] as i8) as f32;
        }
    }
}

/// Element `i` of one block, read off the table above.
pub(super) mod reference {
    use half::f16;

    fn half_at(block: &[u8], at: usize) -> f32 {
        f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
    }

    fn nibble(block: &[u8], at: usize, i: usize) -> i32 {
        let byte = block[at + i % 16];
        (if i < 16 { byte & 15 } else { byte >> 4 }) as i32
    }

    fn fifth_bit(block: &[u8], at: usize, i: usize) -> i32 {
        (block[at + i / 8] >> (i % 8) & 1) as i32 * 16
    }

    pub fn q4_0(block: &[u8], i: usize) -> f32 {
        half_at(block, 0) * (nibble(block, 2, i) - 8) as f32
    }

    pub fn q4_1(block: &[u8], i: usize) -> f32 {
        half_at(block, 0) * nibble(block, 4, i) as f32 + half_at(block, 2)
    }

    pub fn q5_0(block: &[u8], i: usize) -> f32 {
        half_at(block, 0) * (nibble(block, 6, i) + fifth_bit(block, 2, i) - 16) as f32
    }

    pub fn q5_1(block: &[u8], i: usize) -> f32 {
        half_at(block, 0) * (nibble(block, 8, i) + fifth_bit(block, 4, i)) as f32 + half_at(block, 2)
    }

    pub fn q8_0(block: &[u8], i: usize) -> f32 {
        half_at(block, 0) * (block[2 + i] as i8) as f32
    }
}
