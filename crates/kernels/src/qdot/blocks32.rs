//! Rows of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 times activations rounded by 32.
//!
//! A weight is d·(u - o) with unsigned codes u and an offset o (8 for Q4_0, 16 for Q5_0, 0 else), or d·u + m. With
//! activations e·q (e their scale), a row's dot product is, over its blocks,
//!
//! ```text
//! Σ d·e·Σ u·q  -  o·Σ d·e·Σq        or        Σ d·e·Σ u·q  +  Σ m·s        (s = e·Σq)
//! ```
//!
//! The sums of 32 products are exact integers. Two blocks go through at a time; lane k of the sum collects
//! (d·e)·(sum of four products), and the second terms are kept beside it. Q8_0's codes are signed.

use super::rounded::{Rounded, Scale32};
use crate::lanes::Lanes;

/// A row of activations, as the kernels walk along it.
#[derive(Clone, Copy)]
pub(super) struct Activations32 {
    codes: *const i8,
    scales: *const Scale32,
}

/// One of the storages.
pub(super) trait Blocks32 {
    /// Bytes of a block.
    const BYTES: usize;
    /// o
    const OFFSET: i32 = 0;
    /// There is an m behind d.
    const MINIMUM: bool = false;

    /// Codes are signed.
    const SIGNED: bool = false;

    /// Codes of the blocks at `a` and `b`.
    ///
    /// # Safety
    /// Two readable blocks; else as for [`Lanes`].
    unsafe fn codes<L: Lanes>(a: *const u8, b: *const u8) -> L::Bytes;
}

pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;
pub(super) struct Q8_0;

impl Blocks32 for Q4_0 {
    const BYTES: usize = 18;
    const OFFSET: i32 = 8;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(a: *const u8, b: *const u8) -> L::Bytes {
        // SAFETY: nibbles at bytes 2..18 of each block.
        unsafe { L::nibbles16(a.add(2), b.add(2)) }
    }
}

impl Blocks32 for Q4_1 {
    const BYTES: usize = 20;
    const MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(a: *const u8, b: *const u8) -> L::Bytes {
        // SAFETY: nibbles at bytes 4..20 of each block.
        unsafe { L::nibbles16(a.add(4), b.add(4)) }
    }
}

/// Nibbles at `at + 4` and fifth bits at `at` of two blocks.
#[inline(always)]
unsafe fn five_bits<L: Lanes>(a: *const u8, b: *const u8, at: usize) -> L::Bytes {
    // SAFETY: 20 readable bytes from `at` of each block.
    unsafe {
        let fifth = |p: *const u8| u64::from(u32::from_le_bytes(p.add(at).cast::<[u8; 4]>().read()));
        let mask = fifth(a) | fifth(b) << 32;
        L::add_where::<16>(L::nibbles16(a.add(at + 4), b.add(at + 4)), mask)
    }
}

impl Blocks32 for Q5_0 {
    const BYTES: usize = 22;
    const OFFSET: i32 = 16;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(a: *const u8, b: *const u8) -> L::Bytes {
        // SAFETY: bits and nibbles at bytes 2..22 of each block.
        unsafe { five_bits::<L>(a, b, 2) }
    }
}

impl Blocks32 for Q5_1 {
    const BYTES: usize = 24;
    const MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(a: *const u8, b: *const u8) -> L::Bytes {
        // SAFETY: bits and nibbles at bytes 4..24 of each block.
        unsafe { five_bits::<L>(a, b, 4) }
    }
}

impl Blocks32 for Q8_0 {
    const BYTES: usize = 34;
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn codes<L: Lanes>(a: *const u8, b: *const u8) -> L::Bytes {
        // SAFETY: codes at bytes 2..34 of each block.
        unsafe { L::two(a.add(2), b.add(2)) }
    }
}

/// Rows `rows.start..` of the activations, with the scales that `B` needs.
pub(super) fn activations<B: Blocks32, const M: usize>(x: &Rounded, first: usize) -> [Activations32; M] {
    let scales = if B::MINIMUM { &x.minimum_scales } else { &x.offset_scales };
    let blocks = x.cols / 32 + 1;
    std::array::from_fn(|i| Activations32 {
        codes: x.codes[(first + i) * x.stride..][..x.stride].as_ptr(),
        scales: scales[(first + i) * blocks..][..blocks].as_ptr(),
    })
}

/// One row of the weight times M rows of activations.
///
/// # Safety
/// `row` holds `blocks` readable blocks, each of `x` as many and a block of zeros; else as for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn row<L: Lanes, B: Blocks32, const M: usize>(
    row: *const u8,
    blocks: usize,
    x: &[Activations32; M],
) -> [f32; M] {
    // SAFETY: block numbers stay below `blocks`, or `blocks + 1` for the activations.
    unsafe {
        let (mut sums, mut seconds) = ([L::zero_floats(); M], [L::zero_quad(); M]);
        for block in (0..blocks).step_by(2) {
            let a = row.add(block * B::BYTES);
            // an odd last block stands beside itself, times the zeros behind the activations
            let b = if block + 1 < blocks { a.add(B::BYTES) } else { a };
            let w = B::codes::<L>(a, b);
            for i in 0..M {
                let q = L::bytes(x[i].codes.add(block * 32).cast());
                let dot = if B::SIGNED { L::dot_signed(w, q) } else { L::dot(w, q) };
                let y = x[i].scales.add(block).cast();
                let scales = if B::MINIMUM { L::scales_and_minima(a, b, y) } else { L::scales(a, b, y) };
                sums[i] = L::add_scaled(sums[i], dot, L::spread(scales));
                if B::MINIMUM || B::OFFSET != 0 {
                    seconds[i] = L::add_quads(seconds[i], scales);
                }
            }
        }
        let mut out = [0f32; M];
        for i in 0..M {
            out[i] = L::total(sums[i]);
            if B::MINIMUM {
                out[i] += L::odd_sum(seconds[i]);
            } else if B::OFFSET != 0 {
                out[i] -= B::OFFSET as f32 * L::odd_sum(seconds[i]);
            }
        }
        out
    }
}
