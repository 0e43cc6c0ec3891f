//! Panels and tiles with AVX-512 VNNI.

use super::super::blocks32::{self, Blocks32};
use super::super::blocks256::{self, Blocks256};
use super::{Product, ROWS, Scales};
use crate::codec::f16_to_f32;
use crate::lanes::Avx512;
use crate::storage::StorageType;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

/// Rows of a panel.
const HEIGHT: usize = 16;

/// The codes of four columns of sixteen rows.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; 64]);

/// Sixteen rows of W, unpacked.
#[derive(Default)]
struct Panel {
    lines: Vec<Line>,
    scales: Vec<[f32; HEIGHT]>,
    minima: Vec<[f32; HEIGHT]>,
}

impl Panel {
    /// Makes room for rows of `cols` elements in blocks of `len`.
    fn resize(&mut self, cols: usize, len: usize) {
        // whole groups of 16 lines, as they are unpacked
        self.lines.resize(cols.div_ceil(64) * 16, Line([0; 64]));
        self.scales.resize(cols / len, [0.0; HEIGHT]);
        self.minima.resize(cols / len, [0.0; HEIGHT]);
    }
}

thread_local! {
    /// The panels being worked on, kept between calls.
    static PANELS: Cell<[Panel; 2]> = Cell::default();
}

/// Rows `of_w` of the weight (at most [`ROWS`]) times rows `of_x` of the activations.
///
/// # Safety
/// The CPU has AVX-512 with VNNI; shapes and storages fit, as `run` checks; nobody else uses this part of y.
pub(super) unsafe fn task(p: &Product<'_, '_>, scales: &Scales, of_w: Range<usize>, of_x: Range<usize>) {
    let mut panels = PANELS.take();
    let kind = scales.kind;
    for (i, panel) in panels.iter_mut().enumerate() {
        panel.resize(p.w.cols(), kind.len);
        // rows behind the last are the last once more, and are not stored
        let rows = std::array::from_fn(|r| p.w.row((of_w.start + i * HEIGHT + r).min(of_w.end - 1)).as_ptr());
        // SAFETY: whole rows of `w`.
        unsafe { unpack(p.w.block_storage(), p.w.cols(), &rows, panel) };
    }
    let tiles = Tiles { p, scales, panels: &panels, of_w };
    // SAFETY: passed on.
    unsafe {
        match (kind.len, kind.minimum) {
            (16, false) => tiles.run::<4, false>(of_x),
            (16, true) => tiles.run::<4, true>(of_x),
            (_, false) => tiles.run::<8, false>(of_x),
            (_, true) => tiles.run::<8, true>(of_x),
        }
    }
    PANELS.set(panels);
}

/// Unpacks sixteen rows.
///
/// # Safety
/// Each of `rows` is a row of `cols` elements; the CPU has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn unpack(storage: StorageType, cols: usize, rows: &[*const u8; HEIGHT], panel: &mut Panel) {
    // SAFETY: passed on.
    unsafe {
        match storage {
            StorageType::Q4_0 => unpack32::<blocks32::Q4_0>(cols, rows, panel),
            StorageType::Q4_1 => unpack32::<blocks32::Q4_1>(cols, rows, panel),
            StorageType::Q5_0 => unpack32::<blocks32::Q5_0>(cols, rows, panel),
            StorageType::Q5_1 => unpack32::<blocks32::Q5_1>(cols, rows, panel),
            StorageType::Q8_0 => unpack32::<blocks32::Q8_0>(cols, rows, panel),
            StorageType::Q2_K => unpack256::<blocks256::Q2K>(cols, rows, panel),
            StorageType::Q3_K => unpack256::<blocks256::Q3K>(cols, rows, panel),
            StorageType::Q4_K => unpack256::<blocks256::Q4K>(cols, rows, panel),
            StorageType::Q5_K => unpack256::<blocks256::Q5K>(cols, rows, panel),
            StorageType::Q6_K => unpack256::<blocks256::Q6K>(cols, rows, panel),
            StorageType::F32 | StorageType::F16 | StorageType::BF16 => {}
        }
    }
}

/// # Safety
/// As for [`unpack`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn unpack32<B: Blocks32>(cols: usize, rows: &[*const u8; HEIGHT], panel: &mut Panel) {
    let blocks = cols / 32;
    // SAFETY: block numbers stay below `blocks`.
    unsafe {
        for (pair, lines) in panel.lines.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (a, b) = (2 * pair, (2 * pair + 1).min(blocks - 1));
            let mut codes = [_mm512_setzero_si512(); HEIGHT];
            for (codes, row) in codes.iter_mut().zip(rows) {
                *codes = B::codes::<Avx512>(row.add(a * B::BYTES), row.add(b * B::BYTES));
                if B::SIGNED {
                    *codes = _mm512_xor_si512(*codes, _mm512_set1_epi8(-128)); // + 128
                }
            }
            transpose(&codes, lines);
        }
        for block in 0..blocks {
            for (r, row) in rows.iter().enumerate() {
                let p = row.add(block * B::BYTES);
                let half = |at| f16_to_f32(p.add(at).cast::<u16>().read_unaligned());
                panel.scales[block][r] = half(0);
                if B::MINIMUM {
                    panel.minima[block][r] = half(2);
                }
            }
        }
    }
}

/// # Safety
/// As for [`unpack`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn unpack256<B: Blocks256>(cols: usize, rows: &[*const u8; HEIGHT], panel: &mut Panel) {
    let each = if B::SIXTEENS { 16 } else { 8 };
    // SAFETY: block numbers stay below `cols / 256`.
    unsafe {
        for block in 0..cols / 256 {
            for quarter in 0..4 {
                let mut codes = [_mm512_setzero_si512(); HEIGHT];
                for (codes, row) in codes.iter_mut().zip(rows) {
                    let p = row.add(block * B::BYTES);
                    *codes = match quarter {
                        0 => B::codes::<Avx512, 0>(p),
                        1 => B::codes::<Avx512, 1>(p),
                        2 => B::codes::<Avx512, 2>(p),
                        _ => B::codes::<Avx512, 3>(p),
                    };
                }
                transpose(
                    &codes,
                    (&mut panel.lines[(block * 4 + quarter) * 16..][..16]).try_into().expect("16"),
                );
            }
            for (r, row) in rows.iter().enumerate() {
                let header = B::header(row.add(block * B::BYTES));
                for j in 0..each {
                    let at = j * 16 / each;
                    panel.scales[block * each + j][r] = header.d * f32::from(header.scales[at]);
                    panel.minima[block * each + j][r] = header.second_factor * f32::from(header.seconds[at]);
                }
            }
        }
    }
}

/// Writes element j of row r of `rows` (sixteen u32 each) as element r of line j.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn transpose(rows: &[__m512i; 16], lines: &mut [Line; 16]) {
    // SAFETY: arithmetic in registers, and stores into `lines`.
    unsafe {
        let mut a = [_mm512_setzero_si512(); 16];
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        // b[4k + c]: in lane l, elements 4l + c of rows 4k..4k + 4
        let mut b = a;
        for k in 0..4 {
            b[4 * k] = _mm512_unpacklo_epi64(a[4 * k], a[4 * k + 2]);
            b[4 * k + 1] = _mm512_unpackhi_epi64(a[4 * k], a[4 * k + 2]);
            b[4 * k + 2] = _mm512_unpacklo_epi64(a[4 * k + 1], a[4 * k + 3]);
            b[4 * k + 3] = _mm512_unpackhi_epi64(a[4 * k + 1], a[4 * k + 3]);
        }
        for c in 0..4 {
            let halves = |hi: bool| {
                let pick = |x, y| {
                    if hi { _mm512_shuffle_i32x4::<0xee>(x, y) } else { _mm512_shuffle_i32x4::<0x44>(x, y) }
                };
                (pick(b[c], b[4 + c]), pick(b[8 + c], b[12 + c]))
            };
            let ((x0, y0), (x1, y1)) = (halves(false), halves(true));
            let mut put = |line: usize, v| _mm512_store_si512(lines[line].0.as_mut_ptr().cast(), v);
            put(c, _mm512_shuffle_i32x4::<0x88>(x0, y0));
            put(4 + c, _mm512_shuffle_i32x4::<0xdd>(x0, y0));
            put(8 + c, _mm512_shuffle_i32x4::<0x88>(x1, y1));
            put(12 + c, _mm512_shuffle_i32x4::<0xdd>(x1, y1));
        }
    }
}

/// The tiles of a task.
struct Tiles<'a> {
    p: &'a Product<'a, 'a>,
    scales: &'a Scales,
    panels: &'a [Panel; 2],
    of_w: Range<usize>,
}

impl Tiles<'_> {
    /// # Safety
    /// As for [`task`]; blocks have 4·LINES elements, and minima if MINIMUM.
    unsafe fn run<const LINES: usize, const MINIMUM: bool>(&self, of_x: Range<usize>) {
        let mut i = of_x.start;
        while i < of_x.end {
            // SAFETY: passed on.
            unsafe {
                let step = match of_x.end - i {
                    6.. => {
                        self.tile::<6, LINES, MINIMUM>(i);
                        6
                    }
                    4.. => {
                        self.tile::<4, LINES, MINIMUM>(i);
                        4
                    }
                    2.. => {
                        self.tile::<2, LINES, MINIMUM>(i);
                        2
                    }
                    _ => {
                        self.tile::<1, LINES, MINIMUM>(i);
                        1
                    }
                };
                i += step;
            }
        }
    }

    /// Rows `first..first + M` of x times both panels.
    ///
    /// # Safety
    /// As for [`Tiles::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn tile<const M: usize, const LINES: usize, const MINIMUM: bool>(&self, first: usize) {
        let x = self.p.x;
        let [p0, p1] = self.panels;
        let blocks = p0.scales.len();
        let codes = x.codes[first * x.stride..].as_ptr();
        let pairs = self.scales.pairs[first * blocks..][..M * blocks].as_ptr();
        let (lines0, lines1) = (p0.lines.as_ptr(), p1.lines.as_ptr());
        // SAFETY: rows first.. + M of x, blocks of the panels: all checked above or by `run`.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; M];
            for b in 0..blocks {
                let mut ints = [[_mm512_setzero_si512(); 2]; M];
                if !MINIMUM {
                    for (i, ints) in ints.iter_mut().enumerate() {
                        let start = (*pairs.add(i * blocks + b))[1].to_bits();
                        *ints = [_mm512_set1_epi32(start as i32); 2];
                    }
                }
                for l in 0..LINES {
                    let line = b * LINES + l;
                    let w0 = _mm512_load_si512(lines0.add(line).cast());
                    let w1 = _mm512_load_si512(lines1.add(line).cast());
                    for (i, ints) in ints.iter_mut().enumerate() {
                        let four = codes.add(i * x.stride + 4 * line).cast::<i32>().read_unaligned();
                        let four = _mm512_set1_epi32(four);
                        ints[0] = _mm512_dpbusd_epi32(ints[0], w0, four);
                        ints[1] = _mm512_dpbusd_epi32(ints[1], w1, four);
                    }
                }
                let d = [load(&p0.scales[b]), load(&p1.scales[b])];
                for i in 0..M {
                    let e = _mm512_set1_ps((*pairs.add(i * blocks + b))[0]);
                    for (k, d) in d.iter().enumerate() {
                        let product = _mm512_cvtepi32_ps(ints[i][k]);
                        sums[i][k] = _mm512_fmadd_ps(product, _mm512_mul_ps(*d, e), sums[i][k]);
                    }
                }
                if MINIMUM {
                    let m = [load(&p0.minima[b]), load(&p1.minima[b])];
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let s = _mm512_set1_ps((*pairs.add(i * blocks + b))[1]);
                        for (sum, m) in sums.iter_mut().zip(m) {
                            *sum = _mm512_fmadd_ps(m, s, *sum);
                        }
                    }
                }
            }
            let height = self.of_w.len();
            for (i, sums) in sums.iter().enumerate() {
                for (k, sum) in sums.iter().enumerate() {
                    let rows = height.saturating_sub(k * HEIGHT).min(HEIGHT);
                    if rows > 0 {
                        let mask = (1u32 << rows).wrapping_sub(1) as __mmask16;
                        let at = self.p.y.pointer(first + i, self.of_w.start + k * HEIGHT);
                        let old = _mm512_maskz_loadu_ps(if self.p.accumulate { mask } else { 0 }, at);
                        _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(old, *sum));
                    }
                }
            }
        }
    }
}

/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn load(x: &[f32; 16]) -> __m512 {
    // SAFETY: sixteen floats.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

const _: () = assert!(ROWS == 2 * HEIGHT && size_of::<Line>() == 64);
