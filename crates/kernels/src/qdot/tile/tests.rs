//! The tiles against the scalar reference: bit for bit where numbers are whole, within rounding elsewhere.

use super::super::tests::{QUANTIZED, float, weight};
use super::super::{Rounded, Rounding, reference};
use super::*;
use crate::mat::{MatMut, MatRef};

/// Rows of x and W, and columns: one and several tiles and panels, with rests, and an odd number of blocks.
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 32), (5, 16, 96), (7, 33, 64), (13, 31, 160), (6, 65, 512), (200, 40, 768)];

fn product(x: &Rounded, w: WeightView<'_>, y: &mut [f32], accumulate: bool) {
    let mut mat = MatMut::new(y, x.rows, w.rows());
    run(&[Product { x, w, y: SharedMat::new(&mut mat), accumulate }]);
}

fn check(storage: StorageType, scale: impl Fn(usize) -> f32, x: impl Fn(usize) -> f32, whole: bool) {
    for (m, n, cols) in SHAPES {
        let cols = cols.next_multiple_of(storage.block_len());
        let mut bytes = weight(storage, n, cols, 11, &scale);
        if whole && storage == StorageType::Q6_K {
            // full scales would leave 24 bits
            let blocks = bytes.chunks_mut(210);
            blocks.for_each(|b| b[192..208].iter_mut().for_each(|s| *s = (*s as i8 / 8) as u8));
        }
        let w = WeightView::new(storage, n, cols, &bytes).unwrap();
        let x: Vec<f32> = (0..m * cols).map(&x).collect();
        let x = Rounded::new(MatRef::new(&x, m, cols), Rounding::beside(storage).unwrap());
        let mut y = vec![f32::NAN; m * n];
        product(&x, w, &mut y, false);
        let mut added = vec![1.0; m * n];
        product(&x, w, &mut added, true);
        for i in 0..m {
            for j in 0..n {
                let (expected, sizes) = reference::dot(storage, w.row(j), &x, i);
                let found = f64::from(y[i * n + j]);
                // as for the products of few rows
                let allowed = if whole { 0.0 } else { 8.0 * (cols as f64 + 8.0) * 2f64.powi(-24) * sizes };
                assert!(
                    (found - expected).abs() <= allowed,
                    "{storage} [{m}, {n}, {cols}] ({i}, {j}): {found} {expected} ± {allowed}"
                );
                assert_eq!(added[i * n + j], 1.0 + y[i * n + j]);
            }
        }
    }
}

#[test]
fn whole_numbers_are_exact() {
    if !is_here() {
        eprintln!("skipped: no AVX-512 here");
        return;
    }
    for storage in QUANTIZED {
        let whole = |i: usize| match i % 32 {
            5 => 127.0f32.copysign(float(2, i)),
            _ => (float(3, i) * 126.0).round(),
        };
        check(storage, |i| if i % 3 == 0 { 2.0 } else { 1.0 }, whole, true);
    }
}

#[test]
fn any_numbers_are_the_references_but_for_rounding() {
    if !is_here() {
        eprintln!("skipped: no AVX-512 here");
        return;
    }
    for storage in QUANTIZED {
        check(storage, |i| float(5, i), |i| float(6, i) * 3.0, false);
    }
}

#[test]
fn neither_threads_nor_neighbours_change_a_bit() {
    if !is_here() {
        eprintln!("skipped: no AVX-512 here");
        return;
    }
    let bytes = weight(StorageType::Q4_K, 70, 512, 1, |i| float(2, i));
    let w = WeightView::new(StorageType::Q4_K, 70, 512, &bytes).unwrap();
    let data: Vec<f32> = (0..300 * 512).map(|i| float(3, i)).collect();
    let rounded = |m: usize| Rounded::new(MatRef::new(&data[..m * 512], m, 512), Rounding::By256);
    let run = |threads: usize, m: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut y = vec![0.0; m * 70];
            product(&rounded(m), w, &mut y, false);
            y
        })
    };
    let one = run(1, 300);
    assert!(one == run(2, 300) && one == run(9, 300));
    assert!(run(2, 7) == one[..7 * 70]);
}
