//! The head with cross entropy: loss alone, and loss with the gradient of the hidden states.

use crate::{F, TOKENS, VOCAB, WIDTH, measure, numbers};
use criterion::Criterion;
use engobe_kernels::cross_entropy::{Head, TokenStats, cross_entropy};
use engobe_kernels::embedding::gather;
use engobe_kernels::storage::WeightView;

pub fn all(c: &mut Criterion) {
    let table = numbers(VOCAB * WIDTH);
    let weight = WeightView::f32(&table, VOCAB, WIDTH);
    let hidden = numbers(TOKENS * WIDTH);
    let targets: Vec<u32> = (0..TOKENS as u32).map(|i| i * 7919 % VOCAB as u32).collect();
    let mut stats = vec![TokenStats::default(); TOKENS];
    let mut grad = vec![0f32; TOKENS * WIDTH];
    let product = 2 * TOKENS * WIDTH * VOCAB;
    let moved = (table.len() + 2 * hidden.len()) * F;
    measure(c, "cross_entropy", product, moved, || {
        cross_entropy(&hidden, &Head::plain(weight), &targets, &mut stats, None, None);
    });
    measure(c, "cross_entropy with gradient", 2 * product, moved, || {
        cross_entropy(&hidden, &Head::plain(weight), &targets, &mut stats, None, Some(&mut grad));
    });
    measure(c, "embedding", 0, 2 * grad.len() * F, || gather(weight, &targets, &mut grad));
}
