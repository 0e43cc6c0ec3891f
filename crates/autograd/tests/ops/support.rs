//! Cases, and what is asked of each.

pub use candle_core::{Device, Tensor};
pub use engobe_autograd::ops::{self, Head, LinearSpec, LowRank, Matrix, OutputScale, RopeSpec, RowTargets};
pub use engobe_autograd::{Error, FrozenWeight, Gradients, Half, Param, Result, Tape, Var};
pub use engobe_kernels::activation::Activation;
pub use engobe_kernels::attention::{AttentionShape, RelativeBias, Segment};
pub use engobe_kernels::codec::FourBit;
pub use engobe_kernels::quantize::{QuantizedWeight, Scheme};
pub use engobe_kernels::rope::RopeTable;
pub use engobe_kernels::storage::StorageType;
pub use std::sync::Arc;

pub const STEP: f32 = 1e-2;

/// Types that values are kept in, and how far gradients may then be off. Each kept value, and each factor of a delta, is
/// off by half a unit in its last place, 2^-9 or 2^-12 of itself; a gradient is a sum of products of two or three of them
/// whose errors are independent, and is measured by the largest one, so a few such units are the most to expect.
pub const HALVES: [(Half, f32); 2] = [(Half::BF16, 8.0 / 512.0), (Half::F16, 8.0 / 4096.0)];

pub fn randn(seed: u64, n: usize) -> Vec<f32> {
    let unit = |i: u64| (engobe_kernels::dropout::mix(seed, i) >> 40) as f32 / (1u64 << 24) as f32;
    // the sum of four uniform numbers is near enough to normal here
    (0..n as u64).map(|i| (0..4).map(|j| unit(4 * i + j)).sum::<f32>() - 2.0).collect()
}

pub fn tensor(seed: u64, shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    Tensor::from_vec(randn(seed, n), shape, &Device::Cpu).unwrap()
}

pub fn param(name: &str, seed: u64, shape: &[usize]) -> Param {
    Param::new(name, &tensor(seed, shape)).unwrap()
}

/// Weighted sum of `vars`, as a loss; the weights are the gradient that each var receives.
pub fn weigh<'m>(tape: &mut Tape<'m>, vars: &[Var]) -> Result<Var> {
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

pub type Case<'a> = &'a dyn for<'m> Fn(&mut Tape<'m>) -> Result<Var>;

pub fn loss_of(case: Case<'_>, composed: bool) -> f64 {
    let mut tape = Tape::inference().composed(composed).dropout_seed(5);
    f64::from(case(&mut tape).unwrap().scalar().unwrap())
}

pub fn gradients_of(case: Case<'_>, composed: bool, checkpointing: bool) -> (f64, Gradients) {
    gradients_on(Tape::new().composed(composed).checkpointing(checkpointing), case)
}

pub fn gradients_on<'m>(tape: Tape<'m>, case: Case<'_>) -> (f64, Gradients) {
    let mut tape = tape.dropout_seed(5);
    let loss = case(&mut tape).unwrap();
    let value = f64::from(loss.scalar().unwrap());
    let mut grads = Gradients::new();
    tape.backward(&loss, Tensor::ones(1, candle_core::DType::F32, &Device::Cpu).unwrap(), &mut grads)
        .unwrap();
    (value, grads)
}

pub fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

pub fn close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let scale = b.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!((x - y).abs() <= tolerance * scale, "{what}[{i}]: {x} and {y}, scale {scale}");
    }
}

/// Both forms: finite differences; fast against composed; checkpointed against plain.
pub fn check(params: &[&Param], case: Case<'_>) {
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
        for (half, tolerance) in HALVES {
            for composed in [false, true] {
                let (_, grads) = gradients_on(Tape::new().composed(composed).half(Some(half)), case);
                let found = values(grads.get(p).unwrap());
                let what = format!("{half:?} of {name}");
                close(&found, &analytic, tolerance, &what);
                close(&found, &numeric, 1e-2 + tolerance, &format!("finite differences, {what}"));
            }
        }
    }
}

pub fn frozen(seed: u64, rows: usize, cols: usize) -> Matrix {
    Matrix::Frozen(FrozenWeight::from_tensor(&tensor(seed, &[rows, cols])).unwrap())
}

pub fn quantized(scheme: Scheme, seed: u64, rows: usize, cols: usize) -> FrozenWeight {
    let bytes: Vec<u8> = randn(seed, rows * cols).iter().flat_map(|x| x.to_le_bytes()).collect();
    let weight = QuantizedWeight::new(scheme, StorageType::F32, rows, cols, &bytes, &|_| ()).unwrap();
    FrozenWeight::quantized(weight).unwrap()
}
