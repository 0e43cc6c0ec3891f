//! Many rows of x: prompts, and many sequences side by side.
//!
//! A task unpacks [`ROWS`] rows of W into two panels of 16, whose codes lie as the inner loops read them, and lets
//! tiles of 6 rows of x and 32 of W run along the columns:
//!
//! ```text
//! panel   line l: the codes of columns 4l..4l + 4 of row 0, of row 1, .. of row 15 (64 bytes)
//!         block b: d of the 16 rows, and m of the 16 rows
//! tile    per block b: int[i, r] = Σ_l x[i, 4l..4l + 4]·line l[r]        sums[i, r] += (d[b, r]·e[i, b])·int[i, r]
//! ```
//!
//! with e the activations' scales. One instruction multiplies 64 codes, four for each of the 16 sums in a register,
//! and no sum across lanes is needed. A weight's element is read from memory and unpacked once a task.
//!
//! Blocks are those that share a scale: 32 elements, or 16 in Q2_K, Q3_K and Q6_K. Codes are unsigned; an offset o
//! of theirs is taken off exactly, the integer sum starting from -o·Σq; a minimum adds m[b, r]·s[i, b] in floats.
//!
//! Each element of the result is one chain of sums in the order of the blocks, so it depends neither on the tiles nor
//! on who computes them. Only for AVX-512: AVX2 multiplies bytes hardly faster than floats.

mod avx512;

use super::{Rounded, Rounding};
use crate::matmul::SharedMat;
use crate::storage::{StorageType, WeightView};
use crate::team;

/// Rows of W in a task: two panels.
const ROWS: usize = 32;
/// Rows of x in a task, at least, where tasks are cut to give all threads work: unpacking is repeated for each.
const LEAST: usize = 96;

/// How blocks of a storage are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    /// elements of a block
    len: usize,
    /// o
    offset: i16,
    /// blocks have minima
    minimum: bool,
}

impl Kind {
    fn of(storage: StorageType) -> Self {
        let (len, offset, minimum) = match storage {
            StorageType::Q4_0 => (32, 8, false),
            StorageType::Q4_1 | StorageType::Q5_1 | StorageType::Q4_K | StorageType::Q5_K => (32, 0, true),
            StorageType::Q5_0 => (32, 16, false),
            StorageType::Q8_0 => (32, 128, false),
            StorageType::Q2_K => (16, 0, true),
            StorageType::Q3_K => (16, 4, false),
            StorageType::Q6_K => (16, 32, false),
            StorageType::F32 | StorageType::F16 | StorageType::BF16 => (1, 0, false),
        };
        Self { len, offset, minimum }
    }
}

/// What the tiles need to know of the blocks of x, beside codes, for one kind of weight.
struct Scales {
    kind: Kind,
    rounding: Rounding,
    /// of each row and block: e, and s or the bits of -o·Σq
    pairs: Vec<[f32; 2]>,
}

impl Scales {
    fn new(x: &Rounded, kind: Kind) -> Self {
        let blocks = x.cols / kind.len;
        let second = |e: f32, s: f32, sum: i16| match kind.minimum {
            true => [e, s],
            false => [e, f32::from_bits((-i32::from(kind.offset) * i32::from(sum)) as u32)],
        };
        let mut pairs = Vec::with_capacity(x.rows * blocks);
        for i in 0..x.rows {
            for b in 0..blocks {
                pairs.push(match x.rounding {
                    Rounding::By32 => {
                        let scale = x.minimum_scales[i * (blocks + 1) + b];
                        second(scale.d, scale.sum, x.sums[i * blocks + b])
                    }
                    Rounding::By256 => {
                        let e = x.block_scales[(i * blocks + b) / (256 / kind.len)];
                        let each = kind.len / 16;
                        let sum = x.sums[(i * blocks + b) * each..][..each].iter().sum();
                        second(e, e * f32::from(sum), sum)
                    }
                });
            }
        }
        Self { kind, rounding: x.rounding, pairs }
    }
}

/// One product.
pub(crate) struct Product<'a, 'b> {
    pub x: &'a Rounded,
    pub w: WeightView<'a>,
    pub y: SharedMat<'b>,
    pub accumulate: bool,
}

/// True if this CPU has what [`run`] needs.
pub(crate) fn is_here() -> bool {
    crate::lanes::Avx512::is_here()
}

/// `y (+)= x·wᵀ` for all products, as one parallel region.
///
/// Panics unless the CPU has AVX-512, each x is rounded as its weight's storage needs it, and shapes fit.
pub(crate) fn run(products: &[Product<'_, '_>]) {
    assert!(is_here());
    let mut scales: Vec<Scales> = Vec::new();
    let mut jobs = Vec::with_capacity(products.len());
    for p in products {
        assert_eq!(
            Rounding::beside(p.w.block_storage()),
            Some(p.x.rounding),
            "{} weight",
            p.w.block_storage()
        );
        assert!(p.x.cols == p.w.cols() && p.y.dims() == (p.x.rows, p.w.rows()), "shapes");
        let kind = Kind::of(p.w.block_storage());
        let known = scales.iter().position(|s| s.kind == kind && s.rounding == p.x.rounding);
        jobs.push(known.unwrap_or(scales.len()));
        if known.is_none() {
            scales.push(Scales::new(p.x, kind));
        }
    }
    let panels: usize = products.iter().map(|p| p.w.rows().div_ceil(ROWS)).sum();
    let rows = products.iter().map(|p| p.x.rows).max().unwrap_or(0);
    let cuts = (4 * rayon::current_num_threads()).div_ceil(panels.max(1)).clamp(1, (rows / LEAST).max(1));
    let height = rows.div_ceil(cuts).next_multiple_of(6).max(1);
    // numbers of tasks: the cuts of a pair of panels one behind the other
    team::split(panels * cuts, 1, &|tasks| {
        for task in tasks {
            let (mut panel, cut) = (task / cuts, task % cuts);
            for (p, scales_at) in products.iter().zip(&jobs) {
                let here = p.w.rows().div_ceil(ROWS);
                if panel >= here {
                    panel -= here;
                    continue;
                }
                let first = panel * ROWS;
                let of_w = first..p.w.rows().min(first + ROWS);
                let of_x = (cut * height).min(p.x.rows)..((cut + 1) * height).min(p.x.rows);
                // SAFETY: the CPU has AVX-512; the tasks' parts of y do not overlap.
                unsafe { avx512::task(p, &scales[*scales_at], of_w, of_x) };
                break;
            }
        }
    });
}

#[cfg(test)]
mod tests;
