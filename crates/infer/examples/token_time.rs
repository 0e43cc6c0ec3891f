//! Where the time of generation goes: seconds for a prompt, and microseconds for a token, at growing contexts.
//!
//! `cargo run --release -p engobe-infer --example token_time MODEL [tokens of prompt [threads [exact]]]`

use engobe_autograd::{Activations, Tape, Var};
use engobe_models::{LoadOptions, load_causal_lm};
use std::path::Path;
use std::time::Instant;

/// Tokens in a row whose median time is printed.
const WINDOW: usize = 100;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| args.get(i).map_or(Ok(default), |a| a.parse());
    let path = args.first().ok_or("a model is missing: a directory or a .gguf file")?;
    let (prompt, threads) = (number(1, 512)?, number(2, 0)?);
    let activations = if args.len() > 3 { Activations::Exact } else { Activations::Rounded };
    rayon::ThreadPoolBuilder::new().num_threads(threads).use_current_thread().build_global()?;
    let model = load_causal_lm(Path::new(path), &LoadOptions::default())?;
    let vocab = model.info().vocab_size as u32;
    let ids: Vec<u32> = (0..prompt as u32).map(|i| i.wrapping_mul(7919) % vocab).collect();
    for _ in 0..3 {
        let mut cache = model.new_cache(1, prompt + 3 * WINDOW, activations)?;
        let mut step = |ids: &[u32]| -> Result<(f64, f64), engobe_autograd::Error> {
            let start = Instant::now();
            let batch = cache.batch(&[(0, ids)])?;
            let mut tape = Tape::generation(activations);
            let hidden = model.hidden_states(&mut tape, &batch, Some(&mut cache))?.into_tensor();
            let last = Var::constant(hidden.narrow(0, ids.len() - 1, 1)?.copy()?);
            let body = start.elapsed().as_secs_f64();
            model.logits(&mut tape, &last)?;
            Ok((body, start.elapsed().as_secs_f64()))
        };
        let (_, seconds) = step(&ids)?;
        print!("prompt {:.0} tokens/s;", prompt as f64 / seconds);
        for _ in 0..3 {
            let times = (0..WINDOW as u32).map(|i| step(&[i])).collect::<Result<Vec<_>, _>>()?;
            let median = |mut t: Vec<f64>| {
                t.sort_by(f64::total_cmp);
                t[t.len() / 2] * 1e6
            };
            let body = median(times.iter().map(|t| t.0).collect());
            let all = median(times.iter().map(|t| t.1).collect());
            print!(" {all:.0} µs a token ({body:.0} without head)");
        }
        println!();
    }
    Ok(())
}
