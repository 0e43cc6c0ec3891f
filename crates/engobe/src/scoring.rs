//! Loss and exact match over rows.

use crate::workbench::Bench;
use anyhow::Result;
use engobe_data::{Loader, LoaderOptions, MicroBatch, Prompt, Sample};
use engobe_infer::complete_all;
use std::sync::Arc;

/// Rows in bins, for evaluation: no order, no seed, and no row is cut.
pub fn eval_batches(samples: &[Sample]) -> Vec<MicroBatch> {
    const TOKENS: usize = 512;
    let longest = samples.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    if longest == 0 {
        return Vec::new();
    }
    let options = LoaderOptions {
        batch_size: 1,
        max_seq_len: longest.max(TOKENS),
        packing: true,
        shuffle: false,
        seed: 0,
        lead: 0,
    };
    Loader::new(Arc::new(samples.to_vec()), options).epoch()
}

/// Greedy continuations of prompts as text, without the token that ends them.
pub fn complete(
    bench: &Bench,
    prompts: &[Prompt],
    max_new_tokens: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<String>> {
    let ids: Vec<Vec<u32>> = prompts.iter().map(|p| p.ids.clone()).collect();
    continuations(bench, &ids, &vec![max_new_tokens; ids.len()], progress)
}

/// Continuations, and how many of them are exactly the row's completion (white space at the ends aside).
pub fn exact_matches(
    bench: &Bench,
    prompts: &[Prompt],
    max_new_tokens: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<(Vec<String>, usize)> {
    // what runs on far beyond the completion's length cannot match any more
    const MARGIN: usize = 16;
    let tokenizer = bench.need_tokenizer()?;
    let mut most = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let expected = tokenizer.encode(&prompt.completion, false)?.len();
        most.push(max_new_tokens.min(expected + MARGIN));
    }
    let ids: Vec<Vec<u32>> = prompts.iter().map(|p| p.ids.clone()).collect();
    let texts = continuations(bench, &ids, &most, progress)?;
    let hits = texts.iter().zip(prompts).filter(|(text, p)| text.trim() == p.completion.trim()).count();
    Ok((texts, hits))
}

fn continuations(
    bench: &Bench,
    prompts: &[Vec<u32>],
    max_new_tokens: &[usize],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<String>> {
    let tokenizer = bench.need_tokenizer()?;
    let (model, end) = (bench.model.as_ref(), bench.end_ids()?);
    let outputs = complete_all(model, prompts, max_new_tokens, &end, bench.activations, progress)?;
    outputs.iter().map(|ids| Ok(tokenizer.decode(ids, true)?)).collect()
}
