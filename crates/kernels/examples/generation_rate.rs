//! GB/s at which the weights of one layer's size are read by the products of generation, for each storage, with
//! activations as they are and rounded; over more memory than the caches hold, as a whole model is.
//!
//! `cargo run --release -p engobe-kernels --example generation_rate [rows of x]`

use engobe_kernels::mat::{MatMut, MatRef};
use engobe_kernels::matmul::{Activations, Part, linear_group};
use engobe_kernels::storage::{StorageType, WeightView};
use std::time::Instant;

/// `[out, in]` of the products, and bytes of weight that are walked through.
const SHAPES: [(usize, usize); 3] = [(1536, 576), (576, 1536), (4096, 1536)];
const TOTAL: usize = 200 << 20;

/// Median seconds of many runs over the whole weight.
fn median(mut run: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..7)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let m: usize = std::env::args().nth(1).map_or(1, |m| m.parse().expect("rows of x"));
    println!("{} threads, {m} rows of x", rayon::current_num_threads());
    for (rows, cols) in SHAPES {
        for storage in StorageType::ALL {
            let Some(row) = storage.row_bytes(cols) else { continue };
            let copies = TOTAL / (row * rows);
            // bytes that are all small are finite weights
            let bytes: Vec<u8> = (0..copies * row * rows).map(|i| (i * 7 % 23) as u8).collect();
            let weights: Vec<WeightView<'_>> = bytes
                .chunks_exact(row * rows)
                .map(|bytes| WeightView::new(storage, rows, cols, bytes).expect("shape"))
                .collect();
            let x: Vec<f32> = (0..m * cols).map(|i| (i % 7) as f32 - 3.0).collect();
            let x = MatRef::new(&x, m, cols);
            let mut y = vec![0f32; m * rows];
            let mut time = |activations| {
                median(|| {
                    for w in &weights {
                        let y = MatMut::new(&mut y, m, rows);
                        linear_group(x, &mut [Part { w: *w, y, accumulate: false }], activations);
                    }
                })
            };
            let (exact, rounded) = (time(Activations::Exact), time(Activations::Rounded));
            let (gb, each) = (bytes.len() as f64 / 1e9, 1e6 / copies as f64);
            println!(
                "[{rows:4}, {cols:4}] {:5}  exact {:5.1} GB/s, {:6.1} µs a product   rounded {:5.1} GB/s, {:6.1} µs",
                storage.name(),
                gb / exact,
                exact * each,
                gb / rounded,
                rounded * each
            );
        }
    }
}
