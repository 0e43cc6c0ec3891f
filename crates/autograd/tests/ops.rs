//! Every op, in both forms, against finite differences and against its other form.
//!
//! A case is a scalar function of parameters. Its loss is a fixed random weighting of the op's outputs, so
//! that no gradient can cancel. Central differences with step h err by O(h²) from curvature and by about
//! 1e-7·|loss|/h from rounding in f32; with h = 1e-2 and outputs of order one both stay below 1e-3 of the
//! gradients' scale, hence the tolerance of 1e-2 of the largest gradient.

use candle_core::{Device, Tensor};
use engobe_autograd::ops::{self, Head, LinearSpec, LowRank, Matrix, OutputScale, RopeSpec};
use engobe_autograd::{FrozenWeight, Gradients, Param, Result, Tape, Var};
use engobe_kernels::activation::Activation;
use engobe_kernels::attention::{AttentionShape, Segment};
use engobe_kernels::codec::FourBit;
use engobe_kernels::quantize::{QuantizedWeight, Scheme};
use engobe_kernels::rope::RopeTable;
use engobe_kernels::storage::StorageType;
use std::sync::Arc;

const STEP: f32 = 1e-2;

fn randn(seed: u64, n: usize) -> Vec<f32> {
    let unit = |i: u64| (engobe_kernels::dropout::mix(seed, i) >> 40) as f32 / (1u64 << 24) as f32;
    // the sum of four uniform numbers is near enough to normal here
    (0..n as u64).map(|i| (0..4).map(|j| unit(4 * i + j)).sum::<f32>() - 2.0).collect()
}

fn tensor(seed: u64, shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    Tensor::from_vec(randn(seed, n), shape, &Device::Cpu).unwrap()
}

fn param(name: &str, seed: u64, shape: &[usize]) -> Param {
    Param::new(name, &tensor(seed, shape)).unwrap()
}

/// Weighted sum of `vars`, as a loss; the weights are the gradient that each var receives.
fn weigh<'m>(tape: &mut Tape<'m>, vars: &[Var]) -> Result<Var> {
    let mut total = 0f64;
    let mut slots = Vec::new();
    let mut weights = Vec::new();
    for (i, v) in vars.iter().enumerate() {
        let w = tensor(900 + i as u64, v.tensor().dims());
        total += f64::from((v.tensor() * &w)?.sum_all()?.to_scalar::<f32>()?);
        slots.push(v.slot());
        weights.push(w);
    }
    let value = Tensor::from_vec(vec![total as f32], 1, &Device::Cpu)?;
    let inputs = slots.clone();
    Ok(tape.record1(&inputs, value, move |dy, sink| {
        let scale = f64::from(dy.to_vec1::<f32>()?[0]);
        for (slot, w) in slots.into_iter().zip(weights) {
            sink.add(slot, (w * scale)?)?;
        }
        Ok(())
    }))
}

type Case<'a> = &'a dyn for<'m> Fn(&mut Tape<'m>) -> Result<Var>;

fn loss_of(case: Case<'_>, composed: bool) -> f64 {
    let mut tape = Tape::inference().composed(composed).dropout_seed(5);
    f64::from(case(&mut tape).unwrap().scalar().unwrap())
}

fn gradients_of(case: Case<'_>, composed: bool, checkpointing: bool) -> (f64, Gradients) {
    let mut tape = Tape::new().composed(composed).checkpointing(checkpointing).dropout_seed(5);
    let loss = case(&mut tape).unwrap();
    let value = f64::from(loss.scalar().unwrap());
    let mut grads = Gradients::new();
    tape.backward(&loss, Tensor::ones(1, candle_core::DType::F32, &Device::Cpu).unwrap(), &mut grads)
        .unwrap();
    (value, grads)
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let scale = b.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!((x - y).abs() <= tolerance * scale, "{what}[{i}]: {x} and {y}, scale {scale}");
    }
}

/// Both forms: finite differences; fast against composed; checkpointed against plain.
fn check(params: &[&Param], case: Case<'_>) {
    let (fast, fast_grads) = gradients_of(case, false, false);
    let (composed, composed_grads) = gradients_of(case, true, false);
    assert!((fast - composed).abs() <= 1e-4 * fast.abs().max(1.0), "forward: {fast} and {composed}");
    assert!((fast - loss_of(case, false)).abs() <= 1e-6 * fast.abs().max(1.0), "recording changes the value");
    let (again, again_grads) = gradients_of(case, false, true);
    assert_eq!(fast, again, "checkpointing changes the value");
    for p in params {
        let name = p.name();
        let analytic = values(fast_grads.get(p).unwrap_or_else(|| panic!("no gradient for {name}")));
        close(&values(composed_grads.get(p).unwrap()), &analytic, 1e-4, &format!("composed {name}"));
        assert_eq!(values(again_grads.get(p).unwrap()), analytic, "checkpointed {name}");
        let original = values(p.tensor());
        let mut numeric = Vec::new();
        for i in 0..original.len() {
            let at = |delta: f32| {
                let mut moved = original.clone();
                moved[i] += delta;
                p.set(&Tensor::from_vec(moved, p.tensor().dims(), &Device::Cpu).unwrap()).unwrap();
                loss_of(case, false)
            };
            numeric.push(((at(STEP) - at(-STEP)) / (2.0 * f64::from(STEP))) as f32);
        }
        p.set(&Tensor::from_vec(original, p.tensor().dims(), &Device::Cpu).unwrap()).unwrap();
        close(&analytic, &numeric, 1e-2, &format!("finite differences of {name}"));
    }
}

fn frozen(seed: u64, rows: usize, cols: usize) -> Matrix {
    Matrix::Frozen(FrozenWeight::from_tensor(&tensor(seed, &[rows, cols])).unwrap())
}

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
    for (causal, keys) in [(true, 0), (false, 0), (false, 2)] {
        let shape = AttentionShape::new(4, 2, 4, 0.5, causal);
        let (q, k, v) = (param("q", 11, &[7, 16]), param("k", 12, &[9, 8]), param("v", 13, &[9, 8]));
        let segments: Arc<[Segment]> =
            Arc::from([Segment { q: 0..3, kv: 0..3 + keys }, Segment { q: 3..7, kv: 3 + keys..7 + keys }]);
        let (distances, zero) = engobe_kernels::attention::RelativeBias::needed(&shape, &segments);
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

/// A group of three layers: two with deltas on the same input (one with a bias), one trained.
#[test]
fn linear_group() {
    for dropout in [0.0, 0.3] {
        let x = param("x", 20, &[4, 6]);
        let (a1, b1) = (param("a1", 21, &[2, 6]), param("b1", 22, &[5, 2]));
        let (a2, b2) = (param("a2", 23, &[3, 6]), param("b2", 24, &[3, 3]));
        let bb = param("b2.bias", 25, &[3]);
        let (w, bias) = (param("w", 26, &[4, 6]), param("bias", 27, &[4]));
        check(&[&x, &a1, &b1, &a2, &b2, &bb, &w, &bias], &|tape| {
            let x = tape.param(&x);
            let low_rank = |a: &Param, b: &Param, bias: Option<&Param>, tape: &mut Tape<'_>| LowRank {
                a: tape.param(a),
                b: tape.param(b),
                b_bias: bias.map(|p| tape.param(p)),
                scale: 1.5,
                dropout,
            };
            let first = low_rank(&a1, &b1, None, tape);
            let second = low_rank(&a2, &b2, Some(&bb), tape);
            let specs = vec![
                LinearSpec::new(frozen(28, 5, 6), None, vec![first]),
                LinearSpec::new(frozen(29, 3, 6), None, vec![second]),
                LinearSpec::new(Matrix::Trained(tape.param(&w)), Some(tape.param(&bias)), vec![]),
            ];
            let ys = ops::linear_group(tape, &x, specs)?;
            weigh(tape, &ys)
        });
    }
}

/// A layer behind an op whose output is made again in the backward, with a residual, and enough rows for the tiled
/// products.
#[test]
fn linear_residual_behind_recomputed_inputs() {
    let (g, u, w) = (param("gate", 33, &[9, 6]), param("up", 34, &[9, 6]), param("norm", 35, &[6]));
    let (a, b, bias) = (param("a", 36, &[2, 6]), param("b", 37, &[4, 2]), param("bias", 38, &[4]));
    let r = param("residual", 39, &[9, 4]);
    check(&[&g, &u, &w, &a, &b, &bias, &r], &|tape| {
        let (g, u, w, r) = (tape.param(&g), tape.param(&u), tape.param(&w), tape.param(&r));
        let low_rank =
            LowRank { a: tape.param(&a), b: tape.param(&b), b_bias: None, scale: 0.5, dropout: 0.0 };
        let spec = LinearSpec::new(frozen(45, 4, 6), Some(tape.param(&bias)), vec![low_rank]);
        let gated = ops::gated(tape, Activation::Silu, &g, &u)?;
        let first = ops::linear_residual(tape, &gated, spec.clone(), &r)?;
        let normed = ops::rms_norm(tape, &g, &w, 1e-5)?;
        let second = ops::linear_residual(tape, &normed, spec, &first)?;
        weigh(tape, &[second])
    });
}

/// Factors on inputs and outputs, beside layers without any, and at the end of a sub-layer.
#[test]
fn linear_with_factors() {
    for (dropout, covers_bias) in [(0.0, false), (0.3, true)] {
        let (x, g, l) = (param("x", 100, &[5, 6]), param("g", 101, &[4]), param("l", 102, &[6]));
        let (a, b, bias) = (param("a", 103, &[2, 6]), param("b", 104, &[4, 2]), param("bias", 105, &[4]));
        let (gate, r) = (param("gate", 106, &[5, 6]), param("residual", 107, &[5, 4]));
        check(&[&x, &g, &l, &a, &b, &bias, &gate, &r], &|tape| {
            let (x, gate, r) = (tape.param(&x), tape.param(&gate), tape.param(&r));
            let spec = |tape: &mut Tape<'_>, seed: u64| {
                let (a, b) = (tape.param(&a), tape.param(&b));
                let low_rank = LowRank { a, b, b_bias: None, scale: 0.5, dropout };
                LinearSpec::new(frozen(seed, 4, 6), Some(tape.param(&bias)), vec![low_rank])
            };
            let mut out = spec(tape, 110);
            out.output_scale = Some(OutputScale { gain: tape.param(&g), covers_bias });
            let mut input = spec(tape, 111);
            let factors = tape.param(&l);
            input.scale_input(tape, factors.clone())?;
            let mut both = LinearSpec { output_scale: out.output_scale.clone(), ..input.clone() };
            both.scale_input(tape, factors)?;
            let plain = spec(tape, 112);
            let mut ys = ops::linear_group(tape, &x, vec![out.clone(), plain, input.clone(), both.clone()])?;
            // behind an input that is made again in the backward
            let gated = ops::gated(tape, Activation::Silu, &gate, &x)?;
            for spec in [out, input] {
                ys.push(ops::linear_residual(tape, &gated, spec, &r)?);
            }
            ys.push(ops::linear_residual_last(tape, &gated, both, &r)?);
            weigh(tape, &ys)
        });
    }
}

#[test]
fn factors_on_rows_and_matrices_side_by_side() {
    let (x, y, g) = (param("x", 113, &[3, 4]), param("y", 114, &[3, 2]), param("g", 115, &[3, 1]));
    check(&[&x, &y, &g], &|tape| {
        let (x, y, g) = (tape.param(&x), tape.param(&y), tape.param(&g));
        let both = ops::concat_columns(tape, &[x.clone(), y, x])?;
        let scaled = ops::scale_rows(tape, &both, &g)?;
        weigh(tape, &[both, scaled])
    });
}

/// On a tape for generation, factors give what they give in evaluation.
#[test]
fn generation_has_the_factors_too() {
    let x = Var::constant(tensor(120, &[2, 6]));
    let out = |mut tape: Tape<'_>| {
        let mut spec = LinearSpec::new(frozen(121, 4, 6), Some(Var::constant(tensor(122, &[4]))), vec![]);
        spec.input_scale = Some(Var::constant(tensor(123, &[6])));
        let gain = Var::constant(tensor(124, &[4]));
        spec.output_scale = Some(OutputScale { gain, covers_bias: false });
        let residual = Var::constant(tensor(125, &[2, 4]));
        values(ops::linear_residual(&mut tape, &x, spec, &residual).unwrap().tensor())
    };
    let exact = engobe_autograd::Activations::Exact;
    close(&out(Tape::generation(exact)), &out(Tape::inference()), 1e-6, "generation");
}

/// The last product of a block is left out when the block runs again; gradients are the same bits.
#[test]
fn a_block_may_leave_out_its_output() {
    let (x, a, b) = (param("x", 62, &[9, 6]), param("a", 63, &[2, 6]), param("b", 64, &[6, 2]));
    let weight = frozen(65, 6, 6);
    let build = |checkpointing: bool| {
        let mut tape = Tape::new().checkpointing(checkpointing);
        let start = tape.param(&x);
        let (a, b, weight) = (&a, &b, &weight);
        let y = tape
            .block(&[start], move |tape, xs| {
                let low_rank =
                    LowRank { a: tape.param(a), b: tape.param(b), b_bias: None, scale: 0.5, dropout: 0.0 };
                let spec = LinearSpec::new(weight.clone(), None, vec![low_rank]);
                let y = ops::linear_residual(tape, &xs[0], spec.clone(), &xs[0])?;
                let z = ops::linear_residual_last(tape, &y, spec, &y)?;
                let all_zero = values(z.tensor()).iter().all(|v| *v == 0.0);
                assert_eq!(all_zero, tape.is_second_run(), "left out in the second run only");
                Ok(z)
            })
            .unwrap();
        let loss = weigh(&mut tape, &[y]).unwrap();
        let mut grads = Gradients::new();
        tape.backward(&loss, Tensor::ones(1, candle_core::DType::F32, &Device::Cpu).unwrap(), &mut grads)
            .unwrap();
        [&x, a, b].map(|p| values(grads.get(p).unwrap()))
    };
    assert_eq!(build(false), build(true));
}

/// One output of a group may go unused.
#[test]
fn linear_group_with_an_unused_output() {
    let x = param("x", 30, &[3, 4]);
    check(&[&x], &|tape| {
        let x = tape.param(&x);
        let specs = vec![LinearSpec::plain(frozen(31, 2, 4)), LinearSpec::plain(frozen(32, 5, 4))];
        let ys = ops::linear_group(tape, &x, specs)?;
        weigh(tape, &ys[1..])
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

fn quantized(scheme: Scheme, seed: u64, rows: usize, cols: usize) -> FrozenWeight {
    let bytes: Vec<u8> = randn(seed, rows * cols).iter().flat_map(|x| x.to_le_bytes()).collect();
    let weight = QuantizedWeight::new(scheme, StorageType::F32, rows, cols, &bytes, &|_| ()).unwrap();
    FrozenWeight::quantized(weight).unwrap()
}

/// Weights with factors beside their codes, as a linear layer, an embedding and a head; 20 columns straddle blocks.
#[test]
fn quantized_weights_in_every_place() {
    let block = |kind, double| Scheme::FourBit { kind, block: 32, double };
    for (scheme, name) in [
        (block(FourBit::Nf4, false), "NF4/32"),
        (block(FourBit::Nf4, true), "NF4/32+dq"),
        (block(FourBit::Fp4, false), "FP4/32"),
        (Scheme::Int8, "INT8"),
    ] {
        let w = quantized(scheme, 62, 20, 20);
        assert_eq!(w.storage_name(), name);
        assert!(w.size_bytes() < 20 * 20 * 4);
        let head = Matrix::Frozen(quantized(scheme, 63, 9, 20));
        let (x, a, b) = (param("x", 64, &[7, 20]), param("a", 65, &[2, 20]), param("b", 66, &[20, 2]));
        check(&[&x, &a, &b], &|tape| {
            let ids: Arc<[u32]> = Arc::from([3u32, 0, 8, 8, 1, 2, 4]);
            let rows = ops::embedding(tape, &head, ids.clone(), &Device::Cpu)?;
            let x = tape.param(&x);
            let x = ops::add(tape, &x, &rows)?;
            let low_rank =
                LowRank { a: tape.param(&a), b: tape.param(&b), b_bias: None, scale: 0.1, dropout: 0.0 };
            let spec = LinearSpec::new(Matrix::Frozen(w.clone()), None, vec![low_rank]);
            let y = ops::linear(tape, &x, spec)?;
            let head = Head { weight: head.clone(), bias: None, low_rank: None, soft_cap: None };
            Ok(ops::head_loss(tape, &y, head, ids)?.loss)
        });
    }
}

/// Blocks: parameters inside, an input from outside, dropout masks that must come out the same twice.
#[test]
fn a_block_recomputes_to_the_same_bits() {
    let (x, w) = (param("x", 60, &[3, 4]), param("w", 61, &[4, 4]));
    let build = |checkpointing: bool| {
        let mut tape = Tape::new().checkpointing(checkpointing).dropout_seed(3);
        let start = tape.param(&x);
        let mut y = start;
        for _ in 0..3 {
            let w = &w;
            y = tape
                .block(&[y], move |tape, xs| {
                    let weight = Matrix::Trained(tape.param(w));
                    let z = ops::linear(tape, &xs[0], LinearSpec::plain(weight))?;
                    let z = ops::drop_out(tape, &z, 0.5)?;
                    ops::add(tape, &z, &xs[0])
                })
                .unwrap();
        }
        let loss = weigh(&mut tape, &[y]).unwrap();
        let mut grads = Gradients::new();
        let one = Tensor::ones(1, candle_core::DType::F32, &Device::Cpu).unwrap();
        let value = loss.scalar().unwrap();
        tape.backward(&loss, one, &mut grads).unwrap();
        (value, values(grads.get(&x).unwrap()), values(grads.get(&w).unwrap()))
    };
    assert_eq!(build(false), build(true));
}

#[test]
fn untracked_inputs_record_nothing() {
    let mut tape = Tape::new();
    let x = Var::constant(tensor(70, &[2, 4]));
    let y = ops::linear(&mut tape, &x, LinearSpec::plain(frozen(71, 3, 4))).unwrap();
    let z = ops::gated(&mut tape, Activation::Silu, &y, &y).unwrap();
    assert!(!z.is_tracked());
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let mut tape = Tape::new();
    let x = Var::constant(tensor(80, &[2, 4]));
    let y = Var::constant(tensor(81, &[2, 5]));
    assert!(ops::add(&mut tape, &x, &y).is_err());
    assert!(ops::gated(&mut tape, Activation::Silu, &x, &y).is_err());
    assert!(ops::rms_norm(&mut tape, &x, &y, 1e-5).is_err());
    assert!(ops::linear(&mut tape, &y, LinearSpec::plain(frozen(82, 3, 4))).is_err());
    assert!(ops::select_rows(&mut tape, &x, Arc::from([1u32, 0])).is_err());
    assert!(ops::select_rows(&mut tape, &x, Arc::from([2u32])).is_err());
    assert!(ops::embedding(&mut tape, &frozen(83, 3, 4), Arc::from([3u32]), &Device::Cpu).is_err());
    let shape = AttentionShape::new(2, 2, 2, 1.0, true);
    let segments: Arc<[Segment]> = Arc::from([Segment { q: 0..1, kv: 0..2 }]);
    assert!(ops::attention(&mut tape, &x, &x, &x, shape, segments).is_err());
    let head = Head { weight: frozen(84, 3, 4), bias: None, low_rank: None, soft_cap: None };
    assert!(ops::head_loss(&mut tape, &x, head, Arc::from([0u32, 3])).is_err());
}
