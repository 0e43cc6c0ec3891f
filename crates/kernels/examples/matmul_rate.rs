//! GFLOP/s of the frozen linear on SmolLM2-135M's shapes, for each storage, against the plain dense product;
//! then decoding alone and the one-row product of generation.
//!
//! `cargo run --release -p engobe-kernels --example matmul_rate [m]`

use engobe_kernels::codec::FourBit;
use engobe_kernels::mat::{MatMut, MatRef};
use engobe_kernels::matmul::{linear, linear_input_grad};
use engobe_kernels::quantize::{QuantizedWeight, Scheme};
use engobe_kernels::storage::{StorageType, WeightView};
use std::time::Instant;

const SHAPES: [(usize, usize); 3] = [(576, 576), (1536, 576), (576, 1536)];

/// Fastest of many runs, in seconds: what the machine can do when nobody disturbs it.
fn best(mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed().as_secs_f64() < 0.4 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// Blocks whose bytes are all small: any such bytes are a finite weight.
fn weight(storage: StorageType, rows: usize, cols: usize) -> Vec<u8> {
    let size = storage.row_bytes(cols).expect("whole blocks") * rows;
    (0..size).map(|i| (i * 7 % 23) as u8).collect()
}

/// Codes with factors beside them.
const SCHEMES: [Scheme; 4] = [
    Scheme::FourBit { kind: FourBit::Nf4, block: 64, double: false },
    Scheme::FourBit { kind: FourBit::Nf4, block: 64, double: true },
    Scheme::FourBit { kind: FourBit::Fp4, block: 64, double: false },
    Scheme::Int8,
];

fn main() {
    let m: usize = std::env::args().nth(1).map_or(512, |m| m.parse().expect("m"));
    println!("{} threads, m = {m}", rayon::current_num_threads());
    for (rows, cols) in SHAPES {
        for storage in StorageType::ALL {
            if cols.is_multiple_of(storage.block_len()) {
                let bytes = weight(storage, rows, cols);
                let w = WeightView::new(storage, rows, cols, &bytes).expect("shape");
                measure(storage.name(), w, m);
            }
        }
        let floats = vec![0.25f32; rows * cols];
        let bytes: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
        for scheme in SCHEMES {
            let make = || QuantizedWeight::new(scheme, StorageType::F32, rows, cols, &bytes, &|_| ());
            let seconds = best(|| drop(make()));
            let w = make().expect("finite");
            measure(&scheme.to_string(), w.view().expect("whole"), m);
            println!("{:50} quantize {:6.2} Gelem/s", "", (rows * cols) as f64 / seconds / 1e9);
        }
    }
}

fn measure(name: &str, w: WeightView, m: usize) {
    let (rows, cols) = (w.rows(), w.cols());
    let x = vec![0.5f32; m * cols];
    let dy = vec![0.5f32; m * rows];
    let (mut y, mut dx) = (vec![0f32; m * rows], vec![0f32; m * cols]);
    let mut out = vec![0f32; rows * cols];
    let flops = 2.0 * (m * rows * cols) as f64;
    let forward = best(|| linear(MatRef::new(&x, m, cols), w, &mut MatMut::new(&mut y, m, rows), false));
    let backward =
        best(|| linear_input_grad(MatRef::new(&dy, m, rows), w, &mut MatMut::new(&mut dx, m, cols), false));
    let one = best(|| linear(MatRef::new(&x, 1, cols), w, &mut MatMut::new(&mut y, 1, rows), false));
    let decode = best(|| w.decode_rows(0..rows, &mut out));
    println!(
        "[{rows:4}, {cols:4}] {name:6}  forward {:6.1} GFLOP/s  input grad {:6.1} GFLOP/s  one row {:6.1} GB/s  decode {:6.2} Gelem/s a thread",
        flops / forward / 1e9,
        flops / backward / 1e9,
        w.bytes().len() as f64 / one / 1e9,
        (rows * cols) as f64 / decode / 1e9,
    );
}
