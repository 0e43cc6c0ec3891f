//! What this machine can do: the peak of its multiply-add units, its memory's bandwidth, and the `gemm` crate on
//! the products of one LoRA step of SmolLM2-135M. The bench holds engobe's steps against these numbers.
//!
//! `cargo run --release -p engobe-kernels --example machine_rate -- [--threads N] [--tokens N] [--labels N] [--json]`

mod bandwidth;
mod fma;
mod step;

use std::time::Instant;

/// What was asked for.
struct Args {
    threads: usize,
    /// tokens of the step
    tokens: usize,
    /// labelled ones
    labels: usize,
    json: bool,
}

fn args() -> Result<Args, String> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut args = Args { threads: cores, tokens: 512, labels: 511, json: false };
    let mut given = std::env::args().skip(1);
    while let Some(flag) = given.next() {
        let mut number = || {
            let value = given.next().unwrap_or_default();
            value.parse().ok().filter(|n| *n > 0).ok_or(format!("{flag} {value}: expected a number above 0"))
        };
        match flag.as_str() {
            "--threads" => args.threads = number()?,
            "--tokens" => args.tokens = number()?,
            "--labels" => args.labels = number()?,
            "--json" => args.json = true,
            _ => return Err(format!("{flag}: expected --threads, --tokens, --labels or --json")),
        }
    }
    Ok(args)
}

/// Median seconds of `runs` runs after one that doesn't count.
fn median_seconds(runs: usize, mut run: impl FnMut()) -> f64 {
    run();
    let time = |()| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    let mut seconds: Vec<f64> = std::iter::repeat_n((), runs).map(time).collect();
    seconds.sort_by(f64::total_cmp);
    seconds[runs / 2]
}

fn main() {
    let args = args().unwrap_or_else(|wrong| {
        eprintln!("machine_rate: {wrong}");
        std::process::exit(2);
    });
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads).build().expect("threads");
    let (isa, one, all) = fma::peak(&pool);
    let (read, copy) = bandwidth::gb_per_second(&pool);
    let gemm = pool.install(|| step::gflops(args.tokens, args.labels));
    if args.json {
        println!(
            "{{\"threads\":{},\"isa\":\"{isa}\",\"fma_gflops_one\":{one:.1},\"fma_gflops_all\":{all:.1},\
             \"memory_read_gbps\":{read:.2},\"memory_copy_gbps\":{copy:.2},\"gemm_gflops\":{:.1},\
             \"gemm_linear_gflops\":{:.1},\"gemm_input_grad_gflops\":{:.1},\"gemm_head_gflops\":{:.1}}}",
            args.threads, gemm.all, gemm.forward, gemm.input_grad, gemm.head
        );
        return;
    }
    println!("multiply-add peak ({isa}): {one:.0} GFLOP/s on one thread, {all:.0} on {}", args.threads);
    println!("memory: {read:.1} GB/s read, {copy:.1} GB/s copied (read and written)");
    println!(
        "gemm crate, products of a step of {} tokens: {:.0} GFLOP/s (linear layers {:.0}, input gradients {:.0}, head {:.0})",
        args.tokens, gemm.all, gemm.forward, gemm.input_grad, gemm.head
    );
}
