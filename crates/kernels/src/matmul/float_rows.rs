//! Rows of f32, bf16 and f16 weights times a few rows of x, for generation: one pass over the weight as it is
//! stored, sixteen elements at a time (`lanes.rs`).
//!
//! Four vectors of sums for each row of x keep enough multiply-adds in flight to read at the memory's speed. Their
//! order depends on the shapes alone; whether products are rounded before they are added depends on the CPU.

use super::disjoint::SharedMat;
use crate::codec;
use crate::lanes::{Backend, Lanes, by_backend};
use crate::mat::MatRef;
use crate::storage::{StorageType, WeightView};
use std::ops::Range;

/// Vectors of sums for each row of x.
const CHAINS: usize = 4;

/// `y[i, j] (+)= x[i]·w[j]` for the rows j of `w` in `rows`.
///
/// # Safety
/// `w` is of plain floats, x's columns are next to each other, shapes fit, and nobody else uses these columns of `y`
/// meanwhile.
pub(super) unsafe fn rows(
    backend: Backend,
    x: MatRef<'_>,
    w: WeightView<'_>,
    rows: Range<usize>,
    y: &SharedMat<'_>,
    accumulate: bool,
) {
    debug_assert!(!w.block_storage().is_quantized() && x.col_stride == 1 && x.cols == w.cols());
    let task = Task { x, w, y, accumulate };
    // SAFETY: passed on.
    unsafe {
        match w.block_storage() {
            StorageType::BF16 => over::<Bf16>(backend, &task, rows),
            StorageType::F16 => over::<F16>(backend, &task, rows),
            _ => over::<F32>(backend, &task, rows),
        }
    }
}

struct Task<'a, 'b> {
    x: MatRef<'a>,
    w: WeightView<'a>,
    y: &'a SharedMat<'b>,
    accumulate: bool,
}

/// How sixteen elements are loaded.
trait Float {
    const BYTES: usize;
    /// # Safety
    /// Sixteen readable elements at `p`; else as for [`Lanes`].
    unsafe fn load<L: Lanes>(p: *const u8) -> L::Floats;
}

struct F32;
struct F16;
struct Bf16;

impl Float for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const u8) -> L::Floats {
        // SAFETY: passed on; loads need no alignment.
        unsafe { L::floats(p.cast()) }
    }
}

impl Float for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const u8) -> L::Floats {
        // SAFETY: passed on.
        unsafe { L::floats_of_f16(p) }
    }
}

impl Float for Bf16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const u8) -> L::Floats {
        // SAFETY: passed on.
        unsafe { L::floats_of_bf16(p) }
    }
}

by_backend!(
    /// # Safety
    /// As for [`rows`].
    unsafe fn over<F: Float>(task: &Task<'_, '_>, rows: Range<usize>) = run
);

/// # Safety
/// As for [`rows`] and [`Lanes`].
#[inline(always)]
unsafe fn run<L: Lanes, F: Float>(task: &Task<'_, '_>, rows: Range<usize>) {
    let mut first = 0;
    while first < task.x.rows {
        // SAFETY: passed on.
        unsafe {
            first += match task.x.rows - first {
                1 => pass::<L, F, 1>(task, rows.clone(), first),
                2 | 3 => pass::<L, F, 2>(task, rows.clone(), first),
                _ => pass::<L, F, 4>(task, rows.clone(), first),
            };
        }
    }
}

/// Rows `first..first + M` of x times the weight's rows; M.
///
/// # Safety
/// As for [`rows`] and [`Lanes`].
#[inline(always)]
unsafe fn pass<L: Lanes, F: Float, const M: usize>(
    task: &Task<'_, '_>,
    rows: Range<usize>,
    first: usize,
) -> usize {
    let cols = task.w.cols();
    let mut x = [&task.x.data[..0]; M];
    for (i, x) in x.iter_mut().enumerate() {
        *x = &task.x.data[(first + i) * task.x.row_stride..][..cols];
    }
    for r in rows {
        let w = &task.w.bytes()[r * cols * F::BYTES..][..cols * F::BYTES];
        // SAFETY: places below `cols` of w's row and of each row of x; column r of y is ours.
        unsafe {
            let sums = row::<L, F, M>(task.w.block_storage(), w, &x);
            for (i, sum) in sums.into_iter().enumerate() {
                task.y.put(first + i, r, sum, task.accumulate);
            }
        }
    }
    M
}

/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn row<L: Lanes, F: Float, const M: usize>(
    storage: StorageType,
    w: &[u8],
    x: &[&[f32]; M],
) -> [f32; M] {
    let cols = x[0].len();
    // SAFETY: places below `cols`.
    unsafe {
        let mut sums = [[L::zero_floats(); CHAINS]; M];
        let mut at = 0;
        while at + 16 * CHAINS <= cols {
            for chain in 0..CHAINS {
                let c = at + 16 * chain;
                let w = F::load::<L>(w.as_ptr().add(c * F::BYTES));
                for (sums, x) in sums.iter_mut().zip(x) {
                    sums[chain] = L::multiply_add(sums[chain], w, L::floats(x.as_ptr().add(c)));
                }
            }
            at += 16 * CHAINS;
        }
        while at + 16 <= cols {
            let w = F::load::<L>(w.as_ptr().add(at * F::BYTES));
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[0] = L::multiply_add(sums[0], w, L::floats(x.as_ptr().add(at)));
            }
            at += 16;
        }
        let mut rest = [0f32; 16];
        if at < cols {
            codec::decode(storage, &w[at * F::BYTES..], &mut rest[..cols - at]);
        }
        let mut out = [0f32; M];
        for ((out, sums), x) in out.iter_mut().zip(&sums).zip(x) {
            let one = L::splat(1.0);
            let a = L::multiply_add(sums[0], sums[1], one);
            let b = L::multiply_add(sums[2], sums[3], one);
            *out = L::total(L::multiply_add(a, b, one));
            *out += x[at..].iter().zip(&rest).map(|(x, w)| x * w).sum::<f32>();
        }
        out
    }
}
