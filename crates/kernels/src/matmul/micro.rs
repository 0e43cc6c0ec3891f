//! The innermost loops of every matrix product: a few rows of C times up to [`NR`] columns, held in registers.
//!
//! ```text
//! c[i, j] (+)= Σ_k a[i, k]·b[k, j]      i < MR, j < width ≤ 64
//! ```
//!
//! One step of k loads a row of b (contiguous), broadcasts MR elements of a (any strides) and does MR·V fused
//! multiply-adds of a vector each. With AVX-512 that is 6 rows of 4 vectors: 24 sums in registers, 10 loads for 24
//! multiply-adds, so that loads never hold them up. Narrow products (the rank of a LoRA) take more rows instead, to
//! keep enough independent sums in flight.
//!
//! Each element of c is one chain of multiply-adds in the order of k, whatever the shape of the tile around it.
//! So neither the way in which a product is cut into tiles nor the instruction set changes a bit (the portable
//! version, which has no fused multiply-add, apart).

/// Columns of a panel of b, and the most columns of one tile.
pub(crate) const NR: usize = 64;

/// A tile of C and what is multiplied into it.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// element (0, 0) of a
    pub a: *const f32,
    /// distance of two rows of a
    pub a_row: usize,
    /// distance of two columns of a
    pub a_col: usize,
    /// element (0, 0) of b; each of the k rows has `width` rounded up to 16 readable elements
    pub b: *const f32,
    /// distance of two rows of b
    pub b_row: usize,
    /// length of the inner dimension
    pub k: usize,
    /// element (0, 0) of c
    pub c: *mut f32,
    /// distance of two rows of c
    pub c_row: usize,
    /// rows of c
    pub rows: usize,
    /// columns of c, at most [`NR`]
    pub width: usize,
    /// add to c; otherwise c is not read
    pub accumulate: bool,
}

/// A version of the inner loops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Portable,
}

impl Isa {
    /// The best version for this CPU.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            return Self::Neon;
        }
        #[allow(unreachable_code)]
        Self::Portable
    }

    /// Every version that this CPU can run.
    #[cfg(test)]
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f") {
                all.push(Self::Avx512);
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.push(Self::Neon);
        all
    }
}

/// Computes a tile of any number of rows.
///
/// # Safety
///
/// The CPU must have what `isa` needs. Every element of a, b and c that [`Tile`] names must be readable, c writable
/// by nobody else, and `width` at most [`NR`].
#[inline]
pub(crate) unsafe fn run(isa: Isa, tile: &Tile) {
    debug_assert!(tile.width <= NR);
    if tile.width == 0 || tile.rows == 0 {
        return;
    }
    // SAFETY: passed on from the caller.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::avx512(tile),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::avx2(tile),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::run(tile),
            Isa::Portable => portable(tile),
        }
    }
}

impl Tile {
    /// The rows from `start` on, at most `rows` of them.
    ///
    /// # Safety
    /// `start` must be at most the tile's number of rows.
    unsafe fn rows_from(&self, start: usize, rows: usize) -> Self {
        // SAFETY: inside the tile, as the caller promises.
        unsafe {
            Self {
                a: self.a.add(start * self.a_row),
                c: self.c.add(start * self.c_row),
                rows: rows.min(self.rows - start),
                ..*self
            }
        }
    }

    /// The columns from `start` on, at most `width` of them.
    ///
    /// # Safety
    /// `start` must be at most the tile's width.
    #[allow(dead_code)] // the widest registers take all columns at once
    unsafe fn columns_from(&self, start: usize, width: usize) -> Self {
        // SAFETY: inside the tile, as the caller promises.
        unsafe {
            Self { b: self.b.add(start), c: self.c.add(start), width: width.min(self.width - start), ..*self }
        }
    }
}

/// Calls `$kernel::<MR, $v>` for blocks of at most `$most` rows of `$tile`; MR is a constant in each call.
macro_rules! by_rows {
    ($tile:expr, $kernel:ident, $v:literal, $most:literal, [$($mr:literal)*]) => {{
        let tile: &Tile = $tile;
        let mut at = 0;
        while at < tile.rows {
            let part = tile.rows_from(at, $most);
            match part.rows {
                $($mr => $kernel::<$mr, $v>(&part),)*
                _ => {}
            }
            at += $most;
        }
    }};
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Tile;
    use std::arch::x86_64::*;

    /// # Safety
    /// As [`super::run`]; the CPU has AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(tile: &Tile) {
        // SAFETY: parts of the tile that the caller vouches for.
        unsafe {
            match tile.width.div_ceil(16) {
                1 => by_rows!(tile, kernel512, 1, 12, [1 2 3 4 5 6 7 8 9 10 11 12]),
                2 => by_rows!(tile, kernel512, 2, 12, [1 2 3 4 5 6 7 8 9 10 11 12]),
                3 => by_rows!(tile, kernel512, 3, 8, [1 2 3 4 5 6 7 8]),
                _ => by_rows!(tile, kernel512, 4, 6, [1 2 3 4 5 6]),
            }
        }
    }

    /// # Safety
    /// As [`super::run`]; `tile.rows` is MR and `tile.width` at most 16·V.
    #[target_feature(enable = "avx512f")]
    unsafe fn kernel512<const MR: usize, const V: usize>(tile: &Tile) {
        let mut sums = [[_mm512_setzero_ps(); V]; MR];
        let (mut a, mut b) = (tile.a, tile.b);
        // SAFETY: the caller vouches for k rows of b and k columns of a; lanes of c beyond `width` are masked out.
        unsafe {
            for _ in 0..tile.k {
                let row: [__m512; V] = std::array::from_fn(|v| _mm512_loadu_ps(b.add(16 * v)));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(i * tile.a_row));
                    for (sum, b) in sums.iter_mut().zip(row) {
                        *sum = _mm512_fmadd_ps(x, b, *sum);
                    }
                }
                a = a.wrapping_add(tile.a_col);
                b = b.wrapping_add(tile.b_row);
            }
            let tail = tile.width - 16 * (V - 1);
            let last: __mmask16 = if tail >= 16 { !0 } else { (1 << tail) - 1 };
            for (i, sums) in sums.iter().enumerate() {
                let c = tile.c.add(i * tile.c_row);
                for (v, sum) in sums.iter().enumerate() {
                    let mask = if v + 1 == V { last } else { !0 };
                    let c = c.add(16 * v);
                    let sum = match tile.accumulate {
                        true => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, c), *sum),
                        false => *sum,
                    };
                    _mm512_mask_storeu_ps(c, mask, sum);
                }
            }
        }
    }

    /// # Safety
    /// As [`super::run`]; the CPU has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(tile: &Tile) {
        // SAFETY: parts of the tile that the caller vouches for.
        unsafe {
            for start in (0..tile.width).step_by(16) {
                let part = tile.columns_from(start, 16);
                match part.width.div_ceil(8) {
                    1 => by_rows!(&part, kernel256, 1, 8, [1 2 3 4 5 6 7 8]),
                    _ => by_rows!(&part, kernel256, 2, 6, [1 2 3 4 5 6]),
                }
            }
        }
    }

    /// # Safety
    /// As [`super::run`]; `tile.rows` is MR and `tile.width` at most 8·V.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn kernel256<const MR: usize, const V: usize>(tile: &Tile) {
        let mut sums = [[_mm256_setzero_ps(); V]; MR];
        let (mut a, mut b) = (tile.a, tile.b);
        // SAFETY: the caller vouches for k rows of b and k columns of a; lanes of c beyond `width` are masked out.
        unsafe {
            for _ in 0..tile.k {
                let row: [__m256; V] = std::array::from_fn(|v| _mm256_loadu_ps(b.add(8 * v)));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*a.add(i * tile.a_row));
                    for (sum, b) in sums.iter_mut().zip(row) {
                        *sum = _mm256_fmadd_ps(x, b, *sum);
                    }
                }
                a = a.wrapping_add(tile.a_col);
                b = b.wrapping_add(tile.b_row);
            }
            let tail = (tile.width - 8 * (V - 1)).min(8) as i32;
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let last = _mm256_cmpgt_epi32(_mm256_set1_epi32(tail), lanes);
            for (i, sums) in sums.iter().enumerate() {
                let c = tile.c.add(i * tile.c_row);
                for (v, sum) in sums.iter().enumerate() {
                    let mask = if v + 1 == V { last } else { _mm256_set1_epi32(-1) };
                    let c = c.add(8 * v);
                    let sum = match tile.accumulate {
                        true => _mm256_add_ps(_mm256_maskload_ps(c, mask), *sum),
                        false => *sum,
                    };
                    _mm256_maskstore_ps(c, mask, sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::Tile;
    use std::arch::aarch64::*;

    /// # Safety
    /// As [`super::run`].
    #[target_feature(enable = "neon")]
    pub unsafe fn run(tile: &Tile) {
        // SAFETY: parts of the tile that the caller vouches for.
        unsafe {
            for start in (0..tile.width).step_by(16) {
                let part = tile.columns_from(start, 16);
                by_rows!(&part, kernel, 4, 6, [1 2 3 4 5 6]);
            }
        }
    }

    /// # Safety
    /// As [`super::run`]; `tile.rows` is MR and `tile.width` at most 4·V.
    #[target_feature(enable = "neon")]
    unsafe fn kernel<const MR: usize, const V: usize>(tile: &Tile) {
        let mut sums = [[vdupq_n_f32(0.0); V]; MR];
        let (mut a, mut b) = (tile.a, tile.b);
        // SAFETY: the caller vouches for k rows of b and k columns of a; only `width` lanes of c are touched.
        unsafe {
            for _ in 0..tile.k {
                let row: [float32x4_t; V] = std::array::from_fn(|v| vld1q_f32(b.add(4 * v)));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = vdupq_n_f32(*a.add(i * tile.a_row));
                    for (sum, b) in sums.iter_mut().zip(row) {
                        *sum = vfmaq_f32(*sum, x, b);
                    }
                }
                a = a.wrapping_add(tile.a_col);
                b = b.wrapping_add(tile.b_row);
            }
            for (i, sums) in sums.iter().enumerate() {
                let mut lanes = [0f32; 16];
                for (v, sum) in sums.iter().enumerate() {
                    vst1q_f32(lanes.as_mut_ptr().add(4 * v), *sum);
                }
                let c = tile.c.add(i * tile.c_row);
                for (j, sum) in lanes.iter().enumerate().take(tile.width) {
                    *c.add(j) = if tile.accumulate { *c.add(j) + sum } else { *sum };
                }
            }
        }
    }
}

/// # Safety
/// As [`run`].
unsafe fn portable(tile: &Tile) {
    // SAFETY: every access is inside what the caller vouches for.
    unsafe {
        for i in 0..tile.rows {
            for start in (0..tile.width).step_by(16) {
                let width = (tile.width - start).min(16);
                let mut sums = [0f32; 16];
                for k in 0..tile.k {
                    let x = *tile.a.add(i * tile.a_row + k * tile.a_col);
                    let b = tile.b.add(k * tile.b_row + start);
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum += x * *b.add(j);
                    }
                }
                let c = tile.c.add(i * tile.c_row + start);
                for (j, sum) in sums.iter().enumerate().take(width) {
                    *c.add(j) = if tile.accumulate { *c.add(j) + sum } else { *sum };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_numbers::numbers;

    /// c of a product with the given strides, on one version.
    fn product(isa: Isa, rows: usize, width: usize, k: usize, turned: bool, accumulate: bool) -> Vec<f32> {
        let (a, b) = (numbers(1, rows * k), numbers(2, k * NR + NR));
        let mut c = numbers(3, rows * NR);
        let (a_row, a_col) = if turned { (1, rows) } else { (k, 1) };
        let tile = Tile {
            a: a.as_ptr(),
            a_row,
            a_col,
            b: b.as_ptr(),
            b_row: NR,
            k,
            c: c.as_mut_ptr(),
            c_row: NR,
            rows,
            width,
            accumulate,
        };
        // SAFETY: the buffers hold `rows` by `k`, `k` by NR and `rows` by NR elements.
        unsafe { run(isa, &tile) };
        c
    }

    /// The definition, in f64.
    fn reference(rows: usize, width: usize, k: usize, turned: bool, accumulate: bool) -> Vec<f64> {
        let (a, b) = (numbers(1, rows * k), numbers(2, k * NR + NR));
        let mut c: Vec<f64> = numbers(3, rows * NR).into_iter().map(f64::from).collect();
        for i in 0..rows {
            for j in 0..width {
                let a = |p: usize| f64::from(if turned { a[p * rows + i] } else { a[i * k + p] });
                let sum: f64 = (0..k).map(|p| a(p) * f64::from(b[p * NR + j])).sum();
                c[i * NR + j] = sum + if accumulate { c[i * NR + j] } else { 0.0 };
            }
        }
        c
    }

    #[test]
    fn every_version_and_shape_agrees_with_the_definition() {
        for isa in Isa::all() {
            for rows in [1, 2, 5, 6, 7, 13, 25] {
                for width in [1, 7, 8, 9, 16, 17, 31, 32, 40, 48, 50, 63, 64] {
                    for (k, turned, accumulate) in [(1, false, false), (37, true, true), (64, false, true)] {
                        let got = product(isa, rows, width, k, turned, accumulate);
                        let exact = reference(rows, width, k, turned, accumulate);
                        for (got, exact) in got.iter().zip(&exact) {
                            // at most 65 roundings of sums below 65 in 24 bits
                            let close = (f64::from(*got) - exact).abs() < 65.0 * 65.0 / f64::from(1u32 << 24);
                            assert!(close, "{isa:?} {rows}x{width}x{k}: {got} {exact}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn vector_versions_give_the_same_bits() {
        let vector: Vec<Isa> = Isa::all().into_iter().filter(|i| *i != Isa::Portable).collect();
        for pair in vector.windows(2) {
            for (rows, width) in [(13, 64), (7, 23)] {
                let of = |isa| product(isa, rows, width, 100, false, true);
                assert_eq!(of(pair[0]), of(pair[1]), "{pair:?}");
            }
        }
    }
}
