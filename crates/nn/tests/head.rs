//! An output head with everything on it that adapters can put there.

use candle_core::{DType, Device, Tensor};
use engobe_autograd::ops::{self, LinearSpec, LowRank, OutputScale};
use engobe_autograd::{Gradients, Param, Tape, Var, host};
use engobe_nn::{FrozenWeight, Linear, LinearAdapter, Result};
use std::sync::Arc;

fn numbers(seed: usize, shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    let data: Vec<f32> = (0..n).map(|i| ((i * 7 + 3) as f32 * 0.61 + seed as f32).sin()).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// Two deltas, one with a bias, and factors on both sides.
#[derive(Debug)]
struct Everything {
    params: Vec<Param>,
    covers_bias: bool,
}

impl LinearAdapter for Everything {
    fn extend(&self, tape: &mut Tape<'_>, spec: &mut LinearSpec) -> Result<()> {
        let p: Vec<Var> = self.params.iter().map(|p| tape.param(p)).collect();
        for (a, b, bias) in [(&p[0], &p[1], Some(&p[2])), (&p[3], &p[4], None)] {
            let (a, b, b_bias) = (a.clone(), b.clone(), bias.cloned());
            spec.low_rank.push(LowRank { a, b, b_bias, scale: 0.7, dropout: 0.0 });
        }
        spec.scale_input(tape, p[5].clone())?;
        spec.output_scale = Some(OutputScale { gain: p[6].clone(), covers_bias: self.covers_bias });
        Ok(())
    }
}

const SHAPES: [(&str, &[usize]); 7] = [
    ("a", &[2, 6]),
    ("b", &[9, 2]),
    ("b_bias", &[9]),
    ("a2", &[1, 6]),
    ("b2", &[9, 1]),
    ("input", &[6]),
    ("gain", &[9]),
];

/// The loss of the head is that of the layer's logits, and its gradients are those of finite differences.
#[test]
fn a_head_is_the_layer() {
    const STEP: f64 = 1e-2;
    for covers_bias in [false, true] {
        let new =
            |(i, (name, shape)): (usize, &(&str, &[usize]))| Param::new(*name, &numbers(i, shape)).unwrap();
        let params: Vec<Param> = SHAPES.iter().enumerate().map(new).collect();
        let weight = FrozenWeight::from_tensor(&numbers(20, &[9, 6])).unwrap();
        let mut layer = Linear::new("lm_head", weight, Some(numbers(21, &[9])));
        layer.attach(Arc::new(Everything { params: params.clone(), covers_bias }));
        let hidden = Param::new("hidden", &numbers(30, &[4, 6])).unwrap();
        let targets: Arc<[u32]> = Arc::from([0u32, 8, 3, 3]);
        let loss = |tape: &mut Tape<'_>| -> Var {
            let x = tape.param(&hidden);
            let (x, head) = layer.head(tape, &x).unwrap();
            ops::head_loss(tape, &x, head, targets.clone()).unwrap().loss
        };
        let value = || f64::from(loss(&mut Tape::inference()).scalar().unwrap());
        let logits = layer.forward(&mut Tape::inference(), &Var::constant(hidden.tensor().clone())).unwrap();
        let logits = logits.into_tensor().to_vec2::<f32>().unwrap();
        let direct = logits.iter().zip(targets.iter()).map(|(row, target)| {
            let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
            sum.ln() - f64::from(row[*target as usize])
        });
        let direct: f64 = direct.sum();
        assert!((value() - direct).abs() < 1e-5 * direct, "{} {direct}", value()); // f32 sums of six products
        let mut tape = Tape::new();
        let y = loss(&mut tape);
        let mut grads = Gradients::new();
        tape.backward(&y, Tensor::ones(1, DType::F32, &Device::Cpu).unwrap(), &mut grads).unwrap();
        for p in params.iter().chain([&hidden]) {
            let grad = host(&grads.get(p).unwrap().contiguous().unwrap()).unwrap().to_vec();
            for (i, grad) in grad.iter().enumerate() {
                let at = |step: f64| {
                    p.update_host(|v| v[i] += step as f32).unwrap();
                    let value = value();
                    p.update_host(|v| v[i] -= step as f32).unwrap();
                    value
                };
                let numeric = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                // curvature gives O(STEP²), rounding 1e-7·loss/STEP
                assert!((f64::from(*grad) - numeric).abs() < 5e-3, "{}[{i}]: {grad} {numeric}", p.name());
            }
        }
    }
}
