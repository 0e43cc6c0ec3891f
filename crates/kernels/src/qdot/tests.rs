//! Every backend that this CPU has, over every storage: against the scalar reference, bit for bit where numbers are
//! whole, and against the product with unrounded activations.

use super::*;
use crate::codec::decode_reference;
use crate::dropout::mix;
use crate::mat::{MatMut, MatRef};
use crate::matmul::SharedMat;
use half::f16;

pub(super) const QUANTIZED: [StorageType; 10] = [
    StorageType::Q4_0,
    StorageType::Q4_1,
    StorageType::Q5_0,
    StorageType::Q5_1,
    StorageType::Q8_0,
    StorageType::Q2_K,
    StorageType::Q3_K,
    StorageType::Q4_K,
    StorageType::Q5_K,
    StorageType::Q6_K,
];

pub(super) fn float(seed: u64, i: usize) -> f32 {
    (mix(seed, i as u64) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// A weight of random codes; `scale(i)` gives the f16 scales, the first, second, .. of all blocks.
pub(super) fn weight(
    storage: StorageType,
    rows: usize,
    cols: usize,
    seed: u64,
    scale: impl Fn(usize) -> f32,
) -> Vec<u8> {
    let size = storage.row_bytes(cols).unwrap() * rows;
    let mut bytes: Vec<u8> = (0..size).map(|i| mix(seed, i as u64) as u8).collect();
    let places: &[usize] = match storage {
        StorageType::Q4_1 | StorageType::Q5_1 | StorageType::Q4_K | StorageType::Q5_K => &[0, 2],
        StorageType::Q2_K => &[80, 82],
        StorageType::Q3_K => &[108],
        StorageType::Q6_K => &[208],
        _ => &[0],
    };
    let mut n = 0;
    for block in bytes.chunks_exact_mut(storage.block_bytes()) {
        for at in places {
            block[*at..at + 2].copy_from_slice(&f16::from_f32(scale(n)).to_le_bytes());
            n += 1;
        }
    }
    bytes
}

fn product(backend: Backend, x: &Rounded, w: WeightView<'_>) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.rows * w.rows()];
    let mut mat = MatMut::new(&mut y, x.rows, w.rows());
    let shared = SharedMat::new(&mut mat);
    // SAFETY: nobody else has y.
    unsafe { rows(backend, x, w, 0..w.rows(), &shared, false) };
    y
}

/// Shapes with one and several blocks, an odd number of them, and every way to take rows of x together.
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 3, 32), (1, 5, 96), (2, 4, 64), (3, 2, 160), (4, 7, 512), (7, 3, 768)];

fn shapes(storage: StorageType) -> impl Iterator<Item = (usize, usize, usize)> {
    SHAPES.into_iter().map(move |(m, n, cols)| (m, n, cols.next_multiple_of(storage.block_len())))
}

/// With whole activations and scales of 1, everything below 2²⁴ is exact in f32: any wrong code, bit or lane shows.
#[test]
fn whole_numbers_are_exact() {
    for storage in QUANTIZED {
        for (m, n, cols) in shapes(storage) {
            let mut bytes = weight(storage, n, cols, 1, |i| if i % 3 == 0 { 2.0 } else { 1.0 });
            if storage == StorageType::Q6_K {
                // full scales would leave 24 bits
                bytes
                    .chunks_mut(210)
                    .for_each(|b| b[192..208].iter_mut().for_each(|s| *s = (*s as i8 / 8) as u8));
            }
            let w = WeightView::new(storage, n, cols, &bytes).unwrap();
            // each block has an extreme of ±127, so its scale is ±1
            let whole = |i: usize| match i % 32 {
                5 => 127.0f32.copysign(float(2, i)),
                _ => (float(3, i) * 126.0).round(),
            };
            let x: Vec<f32> = (0..m * cols).map(whole).collect();
            let rounding = Rounding::beside(storage).unwrap();
            let x = Rounded::new(MatRef::new(&x, m, cols), rounding);
            for backend in Backend::all() {
                let y = product(backend, &x, w);
                for i in 0..m {
                    for j in 0..n {
                        let (expected, _) = reference::dot(storage, w.row(j), &x, i);
                        assert!(expected.abs() < f64::from(1 << 24), "{expected} is no test");
                        let found = f64::from(y[i * n + j]);
                        assert_eq!(found, expected, "{backend:?} {storage} [{m}, {n}, {cols}] ({i}, {j})");
                    }
                }
            }
        }
    }
}

#[test]
fn any_numbers_are_the_references_but_for_rounding() {
    for storage in QUANTIZED {
        for (m, n, cols) in shapes(storage) {
            let bytes = weight(storage, n, cols, 4, |i| float(5, i));
            let w = WeightView::new(storage, n, cols, &bytes).unwrap();
            let x: Vec<f32> = (0..m * cols).map(|i| float(6, i) * 3.0).collect();
            let x = Rounded::new(MatRef::new(&x, m, cols), Rounding::beside(storage).unwrap());
            for backend in Backend::all() {
                let y = product(backend, &x, w);
                for i in 0..m {
                    for j in 0..n {
                        let (expected, sizes) = reference::dot(storage, w.row(j), &x, i);
                        // sums of cols terms in f32 (Higham 3.1); terms with unsigned codes are up to twice (Q3_K:
                        // up to eight times) those of the signed ones
                        let allowed = 8.0 * (cols as f64 + 8.0) * 2f64.powi(-24) * sizes;
                        let found = f64::from(y[i * n + j]);
                        assert!(
                            (found - expected).abs() <= allowed,
                            "{backend:?} {storage} ({i}, {j}): {found} {expected} ± {allowed}"
                        );
                    }
                }
            }
        }
    }
}

/// The rounding of activations is all that parts the result from the product in f32.
#[test]
fn rounded_activations_cost_half_a_step_each() {
    for storage in QUANTIZED {
        let (m, n, cols) = (2, 40, 1536);
        let bytes = weight(storage, n, cols, 7, |i| float(8, i) * 0.01);
        let w = WeightView::new(storage, n, cols, &bytes).unwrap();
        let plain: Vec<f32> = (0..m * cols).map(|i| float(9, i)).collect();
        let rounding = Rounding::beside(storage).unwrap();
        let x = Rounded::new(MatRef::new(&plain, m, cols), rounding);
        let y = product(Backend::best(), &x, w);
        let mut decoded = vec![0f32; n * cols];
        decode_reference(storage, &bytes, &mut decoded);
        for i in 0..m {
            for j in 0..n {
                let (mut exact, mut allowed) = (0f64, 0f64);
                for c in 0..cols {
                    let (w, x) = (f64::from(decoded[j * cols + c]), f64::from(plain[i * cols + c]));
                    exact += w * x;
                    // activations are below 1: a step is at most 1/127; its half, and f16's share (2⁻¹¹) of 127
                    // steps; Q4_1's and Q5_1's s adds as much times a minimum no larger than 0.01 + |w|
                    allowed += (w.abs() * 2.0 + 0.01) * (0.5 + 127.0 / 2048.0) / 127.0;
                }
                let found = f64::from(y[i * n + j]);
                assert!(
                    (found - exact).abs() <= allowed,
                    "{storage} ({i}, {j}): {found} {exact} ± {allowed}"
                );
            }
        }
    }
}

#[test]
fn results_are_added_where_asked() {
    let bytes = weight(StorageType::Q8_0, 3, 64, 1, |_| 0.5);
    let w = WeightView::new(StorageType::Q8_0, 3, 64, &bytes).unwrap();
    let x: Vec<f32> = (0..128).map(|i| float(2, i)).collect();
    let x = Rounded::new(MatRef::new(&x, 2, 64), Rounding::By32);
    let set = product(Backend::best(), &x, w);
    let mut y: Vec<f32> = vec![1.0; 6];
    let mut mat = MatMut::new(&mut y, 2, 3);
    let shared = SharedMat::new(&mut mat);
    // SAFETY: nobody else has y.
    unsafe { rows(Backend::best(), &x, w, 1..3, &shared, true) };
    let expected: Vec<f32> =
        set.iter().enumerate().map(|(i, v)| if i % 3 == 0 { 1.0 } else { 1.0 + v }).collect();
    assert_eq!(y, expected);
}
