//! Memory's bandwidth over buffers that no cache holds.

use crate::median_seconds;
use rayon::ThreadPool;
use rayon::prelude::*;
use std::hint::black_box;

/// Elements of a buffer: 512 MiB.
const LEN: usize = 1 << 27;
/// Elements that a thread takes at a time.
const CHUNK: usize = 1 << 20;
const RUNS: usize = 5;

/// (read, copied) GB/s of all threads. A copy counts what is read and what is written, as STREAM does.
pub fn gb_per_second(pool: &ThreadPool) -> (f64, f64) {
    let source = vec![1f32; LEN];
    let mut target = vec![0f32; LEN];
    let gb = (LEN * size_of::<f32>()) as f64 / 1e9;
    pool.install(|| {
        let read = median_seconds(RUNS, || {
            black_box(source.par_chunks(CHUNK).map(sum).sum::<f32>());
        });
        let copy = median_seconds(RUNS, || {
            target
                .par_chunks_mut(CHUNK)
                .zip(source.par_chunks(CHUNK))
                .for_each(|(t, s)| t.copy_from_slice(s));
            black_box(&mut target);
        });
        (gb / read, 2.0 * gb / copy)
    })
}

/// Sums in independent lanes, so that additions never hold up the loads.
fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 64];
    for block in x.as_chunks::<64>().0 {
        for (lane, v) in lanes.iter_mut().zip(block) {
            *lane += v;
        }
    }
    lanes.iter().sum()
}
