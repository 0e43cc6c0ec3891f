//! Rows of k-quants times activations rounded by 256.
//!
//! A weight of sub-block j is d·s_j·(u - o) with unsigned codes u, integer scales s and an offset o (4 for Q3_K, 32
//! for Q6_K), or d·s_j·u - dmin·n_j. With activations e·q and q's sums p_j over the sub-blocks, a row's dot product
//! is, over its blocks of 256,
//!
//! ```text
//! Σ d·e·(Σ_j s_j·Σ u·q - o·Σ_j s_j·p_j)        or        Σ d·e·Σ_j s_j·Σ u·q - dmin·e·Σ_j n_j·p_j
//! ```
//!
//! All sums inside a block are exact integers: at most 256·63·127·128 < 2²⁸. Layouts: `codec/kquants.rs`.

use super::rounded::Rounded;
use crate::codec::{f16_to_f32, kquants};
use crate::lanes::Lanes;

/// A row of activations, as the kernels walk along it.
#[derive(Clone, Copy)]
pub(super) struct Activations256 {
    codes: *const i8,
    scales: *const f32,
    sums: *const [i16; 16],
}

/// What a block says about its sub-blocks.
pub(super) struct Header {
    /// d
    pub d: f32,
    /// factor of Σ second·p: -dmin, or -o·d
    pub second_factor: f32,
    /// s of each 16 elements
    pub scales: [i16; 16],
    /// n (or s again) of each 16 elements
    pub seconds: [i16; 16],
}

/// One of the storages.
pub(super) trait Blocks256 {
    /// Bytes of a block.
    const BYTES: usize;
    /// Sub-blocks have 16 elements, not 32.
    const SIXTEENS: bool;

    /// Scales of the block at `p`.
    ///
    /// # Safety
    /// A readable block.
    unsafe fn header(p: *const u8) -> Header;

    /// Codes of elements 64·J..64·J + 64 of the block at `p`.
    ///
    /// # Safety
    /// A readable block; else as for [`Lanes`].
    unsafe fn codes<L: Lanes, const J: usize>(p: *const u8) -> L::Bytes;
}

/// The f16 at `p`.
#[inline(always)]
unsafe fn half(p: *const u8) -> f32 {
    // SAFETY: two readable bytes.
    f16_to_f32(u16::from_le_bytes(unsafe { p.cast::<[u8; 2]>().read() }))
}

pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

impl Blocks256 for Q2K {
    const BYTES: usize = 84;
    const SIXTEENS: bool = true;

    #[inline(always)]
    unsafe fn header(p: *const u8) -> Header {
        // SAFETY: scales at 0..16, d and dmin at 80..84.
        let (packed, d, dmin) = unsafe { (p.cast::<[u8; 16]>().read(), half(p.add(80)), half(p.add(82))) };
        let scales = packed.map(|b| i16::from(b & 15));
        Header { d, second_factor: -dmin, scales, seconds: packed.map(|b| i16::from(b >> 4)) }
    }

    #[inline(always)]
    unsafe fn codes<L: Lanes, const J: usize>(p: *const u8) -> L::Bytes {
        // SAFETY: qs at 16..80.
        unsafe { two_bits::<L, J>(p.add(16)) }
    }
}

/// Two-bit codes of elements 64·J.. from the 64 bytes at `qs`, laid out as Q2_K's and Q3_K's.
#[inline(always)]
unsafe fn two_bits<L: Lanes, const J: usize>(qs: *const u8) -> L::Bytes {
    // SAFETY: 64 readable bytes.
    unsafe {
        let qs = qs.add(32 * (J / 2));
        if J.is_multiple_of(2) { L::bit_pairs::<0>(qs) } else { L::bit_pairs::<4>(qs) }
    }
}

/// `codes`, plus VALUE where bit 2·J (first half) or 2·J + 1 of the 32 bytes at `p` is set.
#[inline(always)]
unsafe fn with_high_bits<L: Lanes, const VALUE: i8, const J: usize>(
    codes: L::Bytes,
    p: *const u8,
) -> L::Bytes {
    // SAFETY: 32 readable bytes.
    unsafe {
        match J {
            0 => L::add_where_bits::<VALUE, 0>(codes, p),
            1 => L::add_where_bits::<VALUE, 2>(codes, p),
            2 => L::add_where_bits::<VALUE, 4>(codes, p),
            _ => L::add_where_bits::<VALUE, 6>(codes, p),
        }
    }
}

impl Blocks256 for Q3K {
    const BYTES: usize = 110;
    const SIXTEENS: bool = true;

    #[inline(always)]
    unsafe fn header(p: *const u8) -> Header {
        // SAFETY: scales at 96..108, d at 108.
        let (packed, d) = unsafe { (p.add(96).cast::<[u8; 12]>().read(), half(p.add(108))) };
        let scales = kquants::q3_scales(&packed);
        Header { d, second_factor: -4.0 * d, scales, seconds: scales }
    }

    #[inline(always)]
    unsafe fn codes<L: Lanes, const J: usize>(p: *const u8) -> L::Bytes {
        // SAFETY: hmask at 0..32, qs at 32..96.
        unsafe { with_high_bits::<L, 4, J>(two_bits::<L, J>(p.add(32)), p) }
    }
}

/// Q4_K's and Q5_K's header.
#[inline(always)]
unsafe fn six_bit_header(p: *const u8) -> Header {
    // SAFETY: d, dmin and scales at 0..16.
    let (d, dmin, packed) = unsafe { (half(p), half(p.add(2)), p.add(4).cast::<[u8; 12]>().read()) };
    let (s, n) = kquants::scales_and_minima(&packed);
    let twice = |x: [u8; 8]| std::array::from_fn(|i| i16::from(x[i / 2]));
    Header { d, second_factor: -dmin, scales: twice(s), seconds: twice(n) }
}

impl Blocks256 for Q4K {
    const BYTES: usize = 144;
    const SIXTEENS: bool = false;

    #[inline(always)]
    unsafe fn header(p: *const u8) -> Header {
        // SAFETY: a readable block.
        unsafe { six_bit_header(p) }
    }

    #[inline(always)]
    unsafe fn codes<L: Lanes, const J: usize>(p: *const u8) -> L::Bytes {
        // SAFETY: qs at 16..144.
        unsafe { L::nibbles32(p.add(16 + 32 * J)) }
    }
}

impl Blocks256 for Q5K {
    const BYTES: usize = 176;
    const SIXTEENS: bool = false;

    #[inline(always)]
    unsafe fn header(p: *const u8) -> Header {
        // SAFETY: a readable block.
        unsafe { six_bit_header(p) }
    }

    #[inline(always)]
    unsafe fn codes<L: Lanes, const J: usize>(p: *const u8) -> L::Bytes {
        // SAFETY: qh at 16..48, qs at 48..176.
        unsafe { with_high_bits::<L, 16, J>(L::nibbles32(p.add(48 + 32 * J)), p.add(16)) }
    }
}

impl Blocks256 for Q6K {
    const BYTES: usize = 210;
    const SIXTEENS: bool = true;

    #[inline(always)]
    unsafe fn header(p: *const u8) -> Header {
        // SAFETY: scales at 192..208, d at 208.
        let (packed, d) = unsafe { (p.add(192).cast::<[i8; 16]>().read(), half(p.add(208))) };
        let scales = packed.map(i16::from);
        Header { d, second_factor: -32.0 * d, scales, seconds: scales }
    }

    #[inline(always)]
    unsafe fn codes<L: Lanes, const J: usize>(p: *const u8) -> L::Bytes {
        // SAFETY: ql at 0..128, qh at 128..192.
        unsafe {
            let (ql, qh) = (L::bytes(p.add(64 * (J / 2))), p.add(128 + 32 * (J / 2)));
            if J.is_multiple_of(2) {
                L::add_shifted4(L::low(ql), L::bit_pairs::<0>(qh))
            } else {
                L::add_shifted4(L::high(ql), L::bit_pairs::<4>(qh))
            }
        }
    }
}

/// Rows `first..first + M` of the activations.
pub(super) fn activations<const M: usize>(x: &Rounded, first: usize) -> [Activations256; M] {
    let blocks = x.cols / 256;
    std::array::from_fn(|i| {
        let at = (first + i) * blocks;
        Activations256 {
            codes: x.codes[(first + i) * x.stride..][..x.cols].as_ptr(),
            scales: x.block_scales[at..at + blocks].as_ptr(),
            sums: x.sums[at * 16..(at + blocks) * 16].as_ptr().cast(),
        }
    })
}

/// Adds the part of elements 64·J.. to the integer sums of a block.
#[inline(always)]
unsafe fn quarter<L: Lanes, B: Blocks256, const J: usize, const M: usize>(
    p: *const u8,
    header: &Header,
    codes: [*const i8; M],
    sums: &mut [L::Ints; M],
) {
    // SAFETY: a readable block of the weight, and of each row of activations.
    unsafe {
        let s = &header.scales;
        let factors = if B::SIXTEENS {
            L::factors4([s[4 * J], s[4 * J + 1], s[4 * J + 2], s[4 * J + 3]])
        } else {
            L::factors2([s[4 * J], s[4 * J + 2]])
        };
        let u = B::codes::<L, J>(p);
        for i in 0..M {
            sums[i] = L::add_dot(sums[i], u, L::bytes(codes[i].add(64 * J).cast()), factors);
        }
    }
}

/// One row of the weight times M rows of activations.
///
/// # Safety
/// `row` holds `blocks` readable blocks, each of `x` as many; else as for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn row<L: Lanes, B: Blocks256, const M: usize>(
    row: *const u8,
    blocks: usize,
    x: &[Activations256; M],
) -> [f32; M] {
    // SAFETY: block numbers stay below `blocks`.
    unsafe {
        let (mut totals, mut seconds) = ([L::zero_floats(); M], [0f32; M]);
        for block in 0..blocks {
            let p = row.add(block * B::BYTES);
            let header = B::header(p);
            let mut codes = [std::ptr::null(); M];
            for i in 0..M {
                codes[i] = x[i].codes.add(block * 256);
            }
            let mut sums = [L::zero_ints(); M];
            quarter::<L, B, 0, M>(p, &header, codes, &mut sums);
            quarter::<L, B, 1, M>(p, &header, codes, &mut sums);
            quarter::<L, B, 2, M>(p, &header, codes, &mut sums);
            quarter::<L, B, 3, M>(p, &header, codes, &mut sums);
            for i in 0..M {
                let e = *x[i].scales.add(block);
                totals[i] = L::add_scaled(totals[i], sums[i], L::splat(header.d * e));
                let mut second = 0i32;
                for (n, p) in header.seconds.iter().zip(&*x[i].sums.add(block)) {
                    second += i32::from(*n) * i32::from(*p);
                }
                seconds[i] += header.second_factor * e * second as f32;
            }
        }
        let mut out = [0f32; M];
        for i in 0..M {
            out[i] = L::total(totals[i]) + seconds[i];
        }
        out
    }
}
