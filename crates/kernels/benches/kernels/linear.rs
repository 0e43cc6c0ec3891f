//! The frozen linear layer in every storage: many rows (training), and one (decoding).

use crate::{F, FFN, TOKENS, WIDTH, measure, numbers};
use criterion::Criterion;
use engobe_kernels::codec::FourBit;
use engobe_kernels::mat::{MatMut, MatRef};
use engobe_kernels::matmul::{linear, linear_input_grad};
use engobe_kernels::quantize::{QuantizedWeight, Scheme};
use engobe_kernels::storage::{StorageType, WeightView};

/// Codes with factors beside them.
pub const SCHEMES: [Scheme; 4] = [
    Scheme::FourBit { kind: FourBit::Nf4, block: 64, double: false },
    Scheme::FourBit { kind: FourBit::Nf4, block: 64, double: true },
    Scheme::FourBit { kind: FourBit::Fp4, block: 64, double: false },
    Scheme::Int8,
];

/// Bytes that are a weight of small finite numbers in any storage.
pub fn bytes(storage: StorageType, rows: usize, cols: usize) -> Vec<u8> {
    let size = storage.row_bytes(cols).expect("whole blocks") * rows;
    (0..size).map(|i| (i * 7 % 23) as u8).collect()
}

/// A weight `[rows, cols]`, quantized by us.
pub fn quantized(scheme: Scheme, floats: &[u8], rows: usize, cols: usize) -> QuantizedWeight {
    QuantizedWeight::new(scheme, StorageType::F32, rows, cols, floats, &|_| ()).expect("finite")
}

/// Bytes of codes and factors.
pub fn stored(scheme: Scheme, rows: usize, cols: usize) -> usize {
    let n = rows * cols;
    match scheme {
        Scheme::FourBit { block, double, .. } => n / 2 + n / block * if double { 1 } else { F },
        Scheme::Int8 => n + rows * F,
    }
}

/// The bytes of numbers without a pattern.
pub fn floats(rows: usize, cols: usize) -> Vec<u8> {
    numbers(rows * cols).into_iter().flat_map(f32::to_le_bytes).collect()
}

pub fn all(c: &mut Criterion) {
    for storage in StorageType::ALL {
        // 256-blocks do not fit rows of 576: down_proj's rows of 1536 stand for them
        let (rows, cols) =
            if WIDTH.is_multiple_of(storage.block_len()) { (FFN, WIDTH) } else { (WIDTH, FFN) };
        let data = bytes(storage, rows, cols);
        of(c, &storage.to_string(), WeightView::new(storage, rows, cols, &data).expect("shape"), data.len());
    }
    let data = floats(FFN, WIDTH);
    for scheme in SCHEMES {
        let weight = quantized(scheme, &data, FFN, WIDTH);
        of(c, &scheme.to_string(), weight.view().expect("whole"), stored(scheme, FFN, WIDTH));
    }
}

/// One weight, which takes `size` bytes.
fn of(c: &mut Criterion, storage: &str, w: WeightView, size: usize) {
    let (rows, cols) = (w.rows(), w.cols());
    for m in [TOKENS, 1] {
        let (x, dy) = (numbers(m * cols), numbers(m * rows));
        let (mut y, mut dx) = (vec![0f32; m * rows], vec![0f32; m * cols]);
        let (flops, moved) = (2 * m * rows * cols, size + m * (rows + cols) * F);
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
