//! The frozen linear layer in several storages: many rows (training), and few (decoding).

use crate::{F, FFN, TOKENS, WIDTH, measure, numbers};
use criterion::Criterion;
use engobe_kernels::mat::{MatMut, MatRef};
use engobe_kernels::matmul::{linear, linear_input_grad};
use engobe_kernels::storage::{StorageType, WeightView};

const STORAGES: [StorageType; 6] = [
    StorageType::F32,
    StorageType::BF16,
    StorageType::F16,
    StorageType::Q4_1,
    StorageType::Q8_0,
    StorageType::Q4_K,
];

/// Bytes that are a weight of small finite numbers in any storage.
pub fn bytes(storage: StorageType, rows: usize, cols: usize) -> Vec<u8> {
    let size = storage.row_bytes(cols).expect("whole blocks") * rows;
    (0..size).map(|i| (i * 7 % 23) as u8).collect()
}

pub fn all(c: &mut Criterion) {
    for storage in STORAGES {
        // 256-blocks do not fit rows of 576: down_proj's rows of 1536 stand for them
        let (rows, cols) =
            if WIDTH.is_multiple_of(storage.block_len()) { (FFN, WIDTH) } else { (WIDTH, FFN) };
        let data = bytes(storage, rows, cols);
        let w = WeightView::new(storage, rows, cols, &data).expect("shape");
        for m in [TOKENS, 1] {
            let (x, dy) = (numbers(m * cols), numbers(m * rows));
            let (mut y, mut dx) = (vec![0f32; m * rows], vec![0f32; m * cols]);
            let (flops, moved) = (2 * m * rows * cols, data.len() + m * (rows + cols) * F);
            let shape = format!("{storage} {m}x{cols}->{rows}");
            measure(c, &format!("linear {shape}"), flops, moved, || {
                linear(MatRef::new(&x, m, cols), w, &mut MatMut::new(&mut y, m, rows), false);
            });
            if m > 1 {
                measure(c, &format!("linear_input_grad {shape}"), flops, moved, || {
                    let mut dx = MatMut::new(&mut dx, m, cols);
                    linear_input_grad(MatRef::new(&dy, m, rows), w, &mut dx, false);
                });
            }
        }
    }
}
