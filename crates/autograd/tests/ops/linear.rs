//! Linear layers, alone and in groups, with deltas and factors, over every kind of weight.

use crate::support::*;

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
        let flat = ops::flatten(tape, &scaled)?;
        weigh(tape, &[both, scaled, flat])
    });
}

#[test]
fn columns_looked_up_and_rows_replaced() {
    let (a, x, by) = (param("a", 130, &[3, 5]), param("x", 131, &[4, 3]), param("by", 132, &[2, 3]));
    check(&[&a, &x, &by], &|tape| {
        let (a, x, by) = (tape.param(&a), tape.param(&x), tape.param(&by));
        let rows = ops::select_columns(tape, &a, Arc::from([4u32, 0, 4, 2]))?;
        let sum = ops::add(tape, &rows, &x)?;
        let replaced = ops::replace_rows(tape, &sum, &by, Arc::from([(0u32, 1u32), (3, 1), (2, 0)]))?;
        let same = ops::replace_rows(tape, &sum, &by, Arc::from([]))?;
        weigh(tape, &[replaced, same])
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
