//! Blocks that run again, values kept in 16 bits, and what is refused.

use crate::support::*;

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

/// A block that runs again from its input in 16 bits: near the gradients of f32, and the same bits each time.
#[test]
fn a_block_may_be_kept_in_16_bits() {
    let (x, a, b) = (param("x", 62, &[9, 6]), param("a", 63, &[2, 6]), param("b", 64, &[6, 2]));
    let (norm, weight) = (param("norm", 66, &[6]), frozen(65, 6, 6));
    let build = |half: Option<Half>, checkpointing: bool| {
        let mut tape = Tape::new().checkpointing(checkpointing).half(half).dropout_seed(3);
        let mut y = tape.param(&x);
        for _ in 0..3 {
            let (a, b, norm, weight) = (&a, &b, &norm, &weight);
            let block = move |tape: &mut Tape<'_>, xs: &[Var]| {
                let low_rank =
                    LowRank { a: tape.param(a), b: tape.param(b), b_bias: None, scale: 0.5, dropout: 0.3 };
                let spec = LinearSpec { low_rank: vec![low_rank], ..LinearSpec::plain(weight.clone()) };
                let norm = tape.param(norm);
                let z = ops::rms_norm(tape, &xs[0], &norm, 1e-5)?;
                ops::linear_residual(tape, &z, spec, &xs[0])
            };
            y = tape.block(&[y], block).unwrap();
        }
        let loss = weigh(&mut tape, &[y]).unwrap();
        let mut grads = Gradients::new();
        let value = loss.scalar().unwrap();
        let one = Tensor::ones(1, candle_core::DType::F32, &Device::Cpu).unwrap();
        tape.backward(&loss, one, &mut grads).unwrap();
        (value, [&x, &a, &b, &norm].map(|p| values(grads.get(p).unwrap())))
    };
    let (_, exact) = build(None, false);
    for (half, tolerance) in HALVES {
        let (loss, plain) = build(Some(half), false);
        let (loss_again, again) = build(Some(half), true);
        assert_eq!(loss, loss_again, "checkpointing changes the value");
        let (_, repeated) = build(Some(half), true);
        for (i, exact) in exact.iter().enumerate() {
            for found in [&plain, &again] {
                close(&found[i], exact, tolerance, &format!("{half:?} of parameter {i}"));
                assert_ne!(&found[i], exact, "{half:?} changed nothing");
            }
        }
        assert_eq!(again, repeated);
    }
}

#[test]
fn what_has_no_place_in_f16_is_an_error() {
    let large = param("x", 67, &[2, 8]);
    large.update_host(|x| x[3] = -7e4).unwrap();
    let weight = Var::constant(tensor(68, &[8]));
    let norm = |half| {
        let mut tape = Tape::new().half(half);
        let x = tape.param(&large);
        ops::rms_norm(&mut tape, &x, &weight, 1e-5)
    };
    let error = norm(Some(Half::F16)).unwrap_err();
    assert!(matches!(error, Error::OutOfRange(_)), "{error}");
    assert!(error.to_string().contains("70000") && error.to_string().contains("bf16"), "{error}");
    assert!(norm(Some(Half::BF16)).is_ok() && norm(None).is_ok());
    // nothing is kept where nothing is recorded
    let mut tape = Tape::inference().half(Some(Half::F16));
    let x = tape.param(&large);
    assert!(ops::rms_norm(&mut tape, &x, &weight, 1e-5).is_ok());
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
    for targets in [
        RowTargets::Classes(Arc::from([0u32, 4])),
        RowTargets::Classes(Arc::from([0u32])),
        RowTargets::Sets(Arc::from([0f32; 7])),
    ] {
        assert!(ops::row_loss(&mut tape, &x, targets).is_err());
    }
    assert!(ops::segment_mean(&mut tape, &x, Arc::from(std::slice::from_ref(&(1..3)))).is_err());
    assert!(ops::segment_mean(&mut tape, &x, Arc::from(std::slice::from_ref(&(1..1)))).is_err());
}
