//! Causal attention of one layer: one row of 512 tokens, and the same tokens as four rows.

use crate::{F, HEAD_DIM, HEADS, KV_HEADS, TOKENS, measure, numbers};
use criterion::Criterion;
use engobe_kernels::attention::{AttentionShape, Segment, attention, attention_backward};

pub fn all(c: &mut Criterion) {
    let shape = AttentionShape::new(HEADS, KV_HEADS, HEAD_DIM, 0.125, true);
    let (wide, narrow) = (TOKENS * HEADS * HEAD_DIM, TOKENS * KV_HEADS * HEAD_DIM);
    let (q, k, v, dout) = (numbers(wide), numbers(narrow), numbers(narrow), numbers(wide));
    let (mut out, mut lse) = (vec![0f32; wide], vec![0f32; HEADS * TOKENS]);
    let (mut dq, mut dk, mut dv) = (vec![0f32; wide], vec![0f32; narrow], vec![0f32; narrow]);
    for rows in [1, 4] {
        let each = TOKENS / rows;
        let segments: Vec<Segment> = (0..rows)
            .map(|r| Segment { q: r * each..(r + 1) * each, kv: r * each..(r + 1) * each })
            .collect();
        // 2 products forward; 5 backward, the scores once more among them
        let pairs = rows * each * (each + 1) / 2 * HEADS;
        let product = 2 * HEAD_DIM * pairs;
        let name = format!("attention {rows}x{each}");
        let bytes = (2 * wide + 2 * narrow) * F;
        measure(c, &name, 2 * product, bytes, || {
            attention(&shape, &segments, &q, &k, &v, None, &mut out, Some(&mut lse));
        });
        let bytes = (4 * wide + 4 * narrow) * F;
        measure(c, &format!("{name} backward"), 5 * product, bytes, || {
            attention_backward(
                &shape, &segments, &q, &k, &v, None, &out, &lse, &dout, &mut dq, &mut dk, &mut dv, None,
            );
        });
    }
}
