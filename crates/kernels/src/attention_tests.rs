//! Attention against its definition in f64, and finite differences.

use super::*;
use crate::test_numbers::numbers;

/// Straight from the definition, in f64.
fn reference(
    shape: &AttentionShape,
    segments: &[Segment],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    bias: Option<RelativeBias<'_>>,
) -> Vec<f64> {
    let AttentionShape { heads, kv_heads, head_dim: hd, scale, causal, window, soft_cap } = *shape;
    let mut out = vec![0f64; q.len()];
    for s in segments {
        for (i, qi) in s.q.clone().enumerate() {
            for h in 0..heads {
                let g = h / (heads / kv_heads);
                let before =
                    if causal || window.is_some() { s.kv.len().saturating_sub(s.q.len()) } else { 0 };
                let at_key = before + i;
                let sees =
                    |j: usize| (!causal || j <= at_key) && window.is_none_or(|w| j.abs_diff(at_key) < w);
                let keys: Vec<usize> = (0..s.kv.len()).filter(|j| sees(*j)).collect();
                let at = |buffer: &[f32], j: usize, c: usize| {
                    f64::from(buffer[(s.kv.start + j) * kv_heads * hd + g * hd + c])
                };
                let score = |j: usize| -> f64 {
                    let raw = (0..hd)
                        .map(|c| f64::from(q[qi * heads * hd + h * hd + c]) * at(k, j, c))
                        .sum::<f64>()
                        * f64::from(scale);
                    let capped = soft_cap.map_or(raw, |cap| f64::from(cap) * (raw / f64::from(cap)).tanh());
                    let value = |b: RelativeBias| {
                        let distances = b.table.len() / heads;
                        f64::from(b.table[h * distances + b.zero + j - at_key])
                    };
                    capped + bias.map_or(0.0, value)
                };
                let weights: Vec<f64> = keys.iter().map(|j| score(*j).exp()).collect();
                let total: f64 = weights.iter().sum();
                for c in 0..hd {
                    let sum = keys.iter().zip(&weights).map(|(j, w)| w / total * at(v, *j, c)).sum();
                    out[qi * heads * hd + h * hd + c] = sum;
                }
            }
        }
    }
    out
}

fn segment(q: Range<usize>, kv: Range<usize>) -> Segment {
    Segment { q, kv }
}

#[test]
fn forward_agrees_with_the_definition() {
    let extras = [(None, None), (Some(1), None), (Some(9), Some(0.5)), (Some(100), None), (None, Some(0.3))];
    for (causal, (window, soft_cap)) in [true, false].into_iter().flat_map(|c| extras.map(|e| (c, e))) {
        for (heads, kv_heads, hd) in [(1, 1, 8), (4, 2, 16), (9, 3, 64)] {
            let plain = AttentionShape::new(heads, kv_heads, hd, 0.2, causal);
            let shape = AttentionShape { window, soft_cap, ..plain };
            let segments = [segment(0..70, 0..70), segment(70..71, 70..71), segment(71..80, 71..230)];
            let (q, k, v) = (
                numbers(1, 80 * heads * hd),
                numbers(2, 230 * kv_heads * hd),
                numbers(3, 230 * kv_heads * hd),
            );
            let (distances, zero) = RelativeBias::needed(&shape, &segments);
            let table = numbers(4, heads * distances);
            for bias in [None, Some(RelativeBias { table: &table, zero })] {
                let mut out = vec![0.0; q.len()];
                attention(&shape, &segments, &q, &k, &v, bias, &mut out, None);
                for (a, b) in out.iter().zip(reference(&shape, &segments, &q, &k, &v, bias)) {
                    assert!((f64::from(*a) - b).abs() < 1e-5, "{a} {b}"); // means of numbers below 1
                }
            }
        }
    }
}

#[test]
fn backward_agrees_with_finite_differences() {
    for (window, soft_cap) in [(None, None), (Some(20), None), (None, Some(0.7)), (Some(5), Some(0.7))] {
        for causal in [true, false] {
            let plain = AttentionShape::new(4, 2, 8, 0.4, causal);
            backward_of(&AttentionShape { window, soft_cap, ..plain });
        }
    }
}

fn backward_of(shape: &AttentionShape) {
    let segments = [segment(0..160, 0..160), segment(160..163, 160..168)];
    let (q, k, v, dout) =
        (numbers(1, 163 * 32), numbers(2, 173 * 16), numbers(3, 173 * 16), numbers(4, 163 * 32));
    let (distances, zero) = RelativeBias::needed(shape, &segments);
    let table = numbers(5, 4 * distances);
    fn bias(table: &[f32], zero: usize) -> Option<RelativeBias<'_>> {
        Some(RelativeBias { table, zero })
    }
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; 4 * 163]);
    attention(shape, &segments, &q, &k, &v, bias(&table, zero), &mut out, Some(&mut lse));
    let like = |x: &[f32]| vec![9.0; x.len()];
    let (mut dq, mut dk, mut dv, mut db) = (like(&q), like(&k), like(&v), like(&table));
    attention_backward(
        shape,
        &segments,
        &q,
        &k,
        &v,
        bias(&table, zero),
        &out,
        &lse,
        &dout,
        &mut dq,
        &mut dk,
        &mut dv,
        Some(&mut db),
    );
    let loss = |[q, k, v, table]: &[Vec<f32>; 4]| -> f64 {
        let out = reference(shape, &segments, q, k, v, bias(table, zero));
        out.iter().zip(&dout).map(|(o, g)| o * f64::from(*g)).sum()
    };
    let h = 1e-3f32;
    for which in 0..4 {
        let grads = [&dq, &dk, &dv, &db][which];
        for i in (0..grads.len()).step_by(211) {
            let moved = |delta: f32| {
                let mut parts = [q.clone(), k.clone(), v.clone(), table.clone()];
                parts[which][i] += delta;
                loss(&parts)
            };
            let slope = (moved(h) - moved(-h)) / (2.0 * f64::from(h));
            let got = f64::from(grads[i]);
            // the step's own rounding in f32 is 1e-4 of it
            assert!((slope - got).abs() < 1e-3 * slope.abs().max(0.1), "{which} {i}: {slope} {got}");
        }
    }
    assert!(dk[168 * 16..].iter().all(|v| *v == 0.0), "keys that nobody sees");
}

#[test]
fn threads_do_not_change_a_bit() {
    let shape = AttentionShape::new(6, 2, 16, 0.25, true);
    let segments = [segment(0..100, 0..100), segment(100..130, 100..130)];
    let (q, k, v) = (numbers(1, 130 * 96), numbers(2, 130 * 32), numbers(3, 130 * 32));
    let (distances, zero) = RelativeBias::needed(&shape, &segments);
    let table = numbers(4, 6 * distances);
    let bias = Some(RelativeBias { table: &table, zero });
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; 6 * 130]);
            attention(&shape, &segments, &q, &k, &v, bias, &mut out, Some(&mut lse));
            let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            let mut db = vec![0.0; table.len()];
            attention_backward(
                &shape,
                &segments,
                &q,
                &k,
                &v,
                bias,
                &out,
                &lse,
                &q,
                &mut dq,
                &mut dk,
                &mut dv,
                Some(&mut db),
            );
            (out, dq, dk, dv, db)
        })
    };
    assert_eq!(run(1), run(2));
}
