//! Every op, in both forms, against finite differences and against its other form.
//!
//! A case is a scalar function of parameters. Its loss is a fixed random weighting of the op's outputs, so
//! that no gradient can cancel. Central differences with step h err by O(h²) from curvature and by about
//! 1e-7·|loss|/h from rounding in f32; with h = 1e-2 and outputs of order one both stay below 1e-3 of the
//! gradients' scale, hence the tolerance of 1e-2 of the largest gradient.

mod blocks;
mod linear;
mod support;

use support::*;

#[test]
fn add_and_scale() {
    let (a, b) = (param("a", 1, &[3, 4]), param("b", 2, &[3, 4]));
    check(&[&a, &b], &|tape| {
        let (a, b) = (tape.param(&a), tape.param(&b));
        let sum = ops::add(tape, &a, &b)?;
        let sum = ops::scale(tape, &sum, 0.7)?;
        // a is used twice: gradients must add up without touching each other
        let twice = ops::add(tape, &sum, &a)?;
        weigh(tape, &[twice, sum])
    });
}

#[test]
fn rms_norm() {
    let (x, w) = (param("x", 3, &[3, 8]), param("w", 4, &[8]));
    check(&[&x, &w], &|tape| {
        let (x, w) = (tape.param(&x), tape.param(&w));
        let y = ops::rms_norm(tape, &x, &w, 1e-5)?;
        weigh(tape, &[y])
    });
}

#[test]
fn layer_norm() {
    let (x, w, b) = (param("x", 3, &[3, 8]), param("w", 4, &[8]), param("b", 5, &[8]));
    check(&[&x, &w, &b], &|tape| {
        let (x, w, b) = (tape.param(&x), tape.param(&w), tape.param(&b));
        let y = ops::layer_norm(tape, &x, &w, Some(&b), 1e-5)?;
        let plain = ops::layer_norm(tape, &x, &w, None, 1e-5)?;
        weigh(tape, &[y, plain])
    });
}

#[test]
fn activations_alone_and_gated() {
    let (g, u) = (param("gate", 5, &[3, 5]), param("up", 6, &[3, 5]));
    for f in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Tanh] {
        check(&[&g, &u], &|tape| {
            let (g, u) = (tape.param(&g), tape.param(&u));
            let y = ops::gated(tape, f, &g, &u)?;
            let z = ops::activate(tape, f, &u)?;
            weigh(tape, &[y, z])
        });
    }
}

#[test]
fn rope_partial_and_whole() {
    for half in [2usize, 4] {
        let x = param("x", 7, &[4, 16]);
        let freqs: Vec<f32> = (0..half).map(|i| 10f32.powf(-(i as f32) / half as f32)).collect();
        let spec = RopeSpec {
            table: Arc::new(RopeTable::new(&freqs, 1.1, 16)),
            positions: Arc::from([0u32, 1, 2, 9]),
        };
        check(&[&x], &|tape| {
            let x = tape.param(&x);
            let y = ops::rope(tape, &x, &spec, 8)?;
            weigh(tape, &[y])
        });
    }
}

#[test]
fn select_rows_and_dropout() {
    let x = param("x", 8, &[5, 4]);
    check(&[&x], &|tape| {
        let x = tape.param(&x);
        let dropped = ops::drop_out(tape, &x, 0.4)?;
        let y = ops::select_rows(tape, &dropped, Arc::from([0u32, 2, 4]))?;
        weigh(tape, &[y])
    });
}

#[test]
fn rows_inserted_before_between_and_behind() {
    let (x, rows) = (param("x", 8, &[5, 4]), param("rows", 9, &[2, 4]));
    for at in [vec![0, 2, 5], vec![3], vec![0], vec![]] {
        let params: &[&Param] = if at.is_empty() { &[&x] } else { &[&x, &rows] };
        let at: Arc<[usize]> = at.into();
        check(params, &|tape| {
            let (x, rows) = (tape.param(&x), tape.param(&rows));
            let y = tape.block(&[x, rows], {
                let at = at.clone();
                move |tape, v| ops::insert_rows(tape, &v[0], &v[1], at.clone())
            })?;
            weigh(tape, &[y])
        });
    }
}

#[test]
fn lstm_both_ways() {
    let (h, steps) = (3, 5);
    let gates = [param("gates", 10, &[steps, 4 * h]), param("gates back", 11, &[steps, 4 * h])];
    let recurrent = [param("u", 12, &[4 * h, h]), param("u back", 13, &[4 * h, h])];
    check(&[&gates[0], &gates[1], &recurrent[0], &recurrent[1]], &|tape| {
        let g = [tape.param(&gates[0]), tape.param(&gates[1])];
        let u = [tape.param(&recurrent[0]), tape.param(&recurrent[1])];
        let y = ops::lstm(tape, [&g[0], &g[1]], [&u[0], &u[1]])?;
        weigh(tape, &[y])
    });
}

#[test]
fn embedding_trained_and_frozen() {
    let w = param("w", 9, &[6, 4]);
    check(&[&w], &|tape| {
        let trained = Matrix::Trained(tape.param(&w));
        let ids: Arc<[u32]> = Arc::from([1u32, 3, 1, 5]);
        let y = ops::embedding(tape, &trained, ids.clone(), &Device::Cpu)?;
        let z = ops::embedding(tape, &frozen(10, 6, 4), ids, &Device::Cpu)?;
        assert!(!z.is_tracked());
        let sum = ops::add(tape, &y, &z)?;
        weigh(tape, &[sum])
    });
}

#[test]
fn split_columns_and_reshape() {
    for groups in [1, 2] {
        let x = param("x", 6, &[3, 10]);
        check(&[&x], &|tape| {
            let x = tape.param(&x);
            let [a, b] = ops::split_columns(tape, &x, groups, [10 / groups - 3, 3])?;
            let b = ops::reshape(tape, &b, (9 * groups, 1))?;
            weigh(tape, &[a, b])
        });
        // an output that nothing reads has no gradient
        check(&[&x], &|tape| {
            let x = tape.param(&x);
            let [_, b] = ops::split_columns(tape, &x, groups, [10 / groups - 3, 3])?;
            weigh(tape, &[b])
        });
    }
}

#[test]
fn attention_grouped_packed_causal_and_not() {
    let extras = [(None, None), (Some(2), None), (Some(2), Some(0.8))];
    for (causal, (window, soft_cap)) in [true, false].into_iter().flat_map(|c| extras.map(|e| (c, e))) {
        let shape = AttentionShape { window, soft_cap, ..AttentionShape::new(4, 2, 4, 0.5, causal) };
        let (q, k, v) = (param("q", 11, &[7, 16]), param("k", 12, &[7, 8]), param("v", 13, &[7, 8]));
        let segment = |r: std::ops::Range<usize>| Segment { q: r.clone(), kv: r };
        let segments: Arc<[Segment]> = Arc::from([segment(0..3), segment(3..4), segment(4..7)]);
        check(&[&q, &k, &v], &|tape| {
            let (q, k, v) = (tape.param(&q), tape.param(&k), tape.param(&v));
            let y = ops::attention(tape, &q, &k, &v, shape, segments.clone())?;
            weigh(tape, &[y])
        });
    }
}

#[test]
fn attention_with_a_bias_by_distance() {
    let extras =
        [(true, 0, None), (false, 0, None), (false, 2, None), (true, 0, Some(0.8)), (false, 0, Some(0.8))];
    for (causal, keys, soft_cap) in extras {
        let shape = AttentionShape { soft_cap, ..AttentionShape::new(4, 2, 4, 0.5, causal) };
        let (q, k, v) = (param("q", 11, &[7, 16]), param("k", 12, &[9, 8]), param("v", 13, &[9, 8]));
        let segments: Arc<[Segment]> =
            Arc::from([Segment { q: 0..3, kv: 0..3 + keys }, Segment { q: 3..7, kv: 3 + keys..7 + keys }]);
        let (distances, zero) = RelativeBias::needed(&shape, &segments);
        let table = param("table", 17, &[distances, 4]);
        check(&[&q, &k, &v, &table], &|tape| {
            let (q, k, v, table) = (tape.param(&q), tape.param(&k), tape.param(&v), tape.param(&table));
            let bias = ops::ScoreBias { table: ops::transpose(tape, &table)?, zero };
            let y = ops::biased_attention(tape, &q, &k, &v, shape, segments.clone(), Some(&bias))?;
            weigh(tape, &[y])
        });
        let mut tape = Tape::inference();
        let (q, k, v) = (tape.param(&q), tape.param(&k), tape.param(&v));
        let short = ops::ScoreBias { table: Var::constant(tensor(1, &[4, distances - 1])), zero };
        assert!(ops::biased_attention(&mut tape, &q, &k, &v, shape, segments, Some(&short)).is_err());
    }
}

#[test]
fn disentangled_attention() {
    let shape = AttentionShape::new(2, 2, 4, 0.4, false);
    let [q, k, v] = [("q", 11), ("k", 12), ("v", 13)].map(|(name, seed)| param(name, seed, &[6, 8]));
    let (keys, queries) = (param("keys", 14, &[5, 8]), param("queries", 15, &[5, 8]));
    let segment = |r: std::ops::Range<usize>| Segment { q: r.clone(), kv: r };
    let segments: Arc<[Segment]> = Arc::from([segment(0..4), segment(4..6)]);
    let rows: Arc<[u32]> = Arc::from([0u32, 0, 1, 2, 3, 4, 4]);
    for (c2p, p2c) in [(true, true), (true, false), (false, true)] {
        let mut params = vec![&q, &k, &v];
        params.extend(c2p.then_some(&keys));
        params.extend(p2c.then_some(&queries));
        check(&params, &|tape| {
            let (q, k, v) = (tape.param(&q), tape.param(&k), tape.param(&v));
            let terms = ops::PositionTerms {
                keys: c2p.then(|| tape.param(&keys)),
                queries: p2c.then(|| tape.param(&queries)),
                rows: rows.clone(),
                zero: 3,
            };
            let y = ops::disentangled_attention(tape, &q, &k, &v, shape, segments.clone(), &terms)?;
            weigh(tape, &[y])
        });
    }
    let mut tape = Tape::inference();
    let q = tape.param(&q);
    // distance 3 of the first segment has no row
    let short = ops::PositionTerms { keys: None, queries: None, rows, zero: 2 };
    assert!(ops::disentangled_attention(&mut tape, &q, &q, &q, shape, segments, &short).is_err());
}

#[test]
fn neighbours_within_segments() {
    let x = param("x", 16, &[5, 3]);
    let segment = |r: std::ops::Range<usize>| Segment { q: r.clone(), kv: r };
    let segments: Arc<[Segment]> = Arc::from([segment(0..2), segment(2..5)]);
    check(&[&x], &|tape| {
        let x = tape.param(&x);
        let y = ops::neighbours(tape, &x, segments.clone(), 3)?;
        assert_eq!(y.tensor().dims(), [5, 9]);
        weigh(tape, &[y])
    });
}

#[test]
fn attention_over_longer_keys() {
    let shape = AttentionShape::new(2, 1, 4, 0.5, true);
    let (q, k, v) = (param("q", 14, &[2, 8]), param("k", 15, &[5, 4]), param("v", 16, &[5, 4]));
    let segments: Arc<[Segment]> = Arc::from([Segment { q: 0..2, kv: 0..5 }]);
    check(&[&q, &k, &v], &|tape| {
        let (q, k, v) = (tape.param(&q), tape.param(&k), tape.param(&v));
        let y = ops::attention(tape, &q, &k, &v, shape, segments.clone())?;
        weigh(tape, &[y])
    });
}

#[test]
fn head_loss_frozen() {
    let h = param("hidden", 40, &[4, 6]);
    for soft_cap in [None, Some(1.2)] {
        check(&[&h], &|tape| {
            let h = tape.param(&h);
            let head = Head { weight: frozen(41, 9, 6), bias: None, low_rank: None, soft_cap };
            Ok(ops::head_loss(tape, &h, head, Arc::from([0u32, 8, 3, 3]))?.loss)
        });
    }
}

#[test]
fn head_loss_trained_with_delta() {
    let h = param("hidden", 50, &[4, 6]);
    let (w, bias) = (param("w", 51, &[9, 6]), param("bias", 52, &[9]));
    let (u, b) = (param("u", 53, &[4, 2]), param("b", 54, &[9, 2]));
    for soft_cap in [None, Some(1.2)] {
        check(&[&h, &w, &bias, &u, &b], &|tape| {
            let h = tape.param(&h);
            let head = Head {
                weight: Matrix::Trained(tape.param(&w)),
                bias: Some(tape.param(&bias)),
                low_rank: Some((tape.param(&u), tape.param(&b))),
                soft_cap,
            };
            Ok(ops::head_loss(tape, &h, head, Arc::from([0u32, 8, 3, 3]))?.loss)
        });
    }
}

#[test]
fn losses_of_rows() {
    let z = param("logits", 55, &[4, 3]);
    let sets: Vec<f32> = (0..12).map(|i| f32::from(i % 3 == 1)).collect();
    for targets in [
        RowTargets::Classes(Arc::from([0u32, 2, 2, 1])),
        RowTargets::Sets(sets.into()),
        RowTargets::Values(randn(56, 12).into()),
    ] {
        check(&[&z], &|tape| {
            let z = tape.param(&z);
            ops::row_loss(tape, &z, targets.clone())
        });
    }
}

#[test]
fn means_of_segments() {
    let x = param("x", 57, &[6, 4]);
    check(&[&x], &|tape| {
        let x = tape.param(&x);
        // the fourth row is in none of them
        let y = ops::segment_mean(tape, &x, Arc::from([0..2, 2..3, 4..6]))?;
        weigh(tape, &[y])
    });
}
