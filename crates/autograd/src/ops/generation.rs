//! Linear layers on a tape for generation: nothing is recorded, products with quantized weights may round their
//! activations, and with few tokens layers that share an input are one parallel region.

use crate::ops::linear::{Borrowed, preset};
use crate::ops::{LinearSpec, LowRank};
use crate::{Activations, Result, Var, host, tensor_of, uninit};
use candle_core::Tensor;
use engobe_kernels::elementwise;
use engobe_kernels::mat::{MatMut, MatRef};
use engobe_kernels::matmul::{self, Part};

/// `ops::linear_group` without a record. Shapes were checked.
pub(super) fn linear_group(
    x: &Tensor,
    specs: &[LinearSpec],
    residual: Option<&Tensor>,
    activations: Activations,
) -> Result<Vec<Var>> {
    let (n, width) = x.dims2()?;
    let xs = host(x)?;
    let x = MatRef::new(&xs, n, width);
    let weights = specs.iter().map(|spec| Borrowed::of(&spec.weight)).collect::<Result<Vec<_>>>()?;
    let mut outs: Vec<(Vec<f32>, bool)> = Vec::with_capacity(specs.len());
    for (spec, weight) in specs.iter().zip(&weights) {
        let mut y = uninit(n * weight.view().rows());
        let accumulate = preset(spec, residual, &mut y)?;
        outs.push((y, accumulate));
    }
    let mut parts: Vec<Part<'_, '_>> = weights
        .iter()
        .zip(&mut outs)
        .map(|(weight, (y, accumulate))| {
            let w = weight.view();
            Part { w, y: MatMut::new(y, n, w.rows()), accumulate: *accumulate }
        })
        .collect();
    matmul::linear_group(x, &mut parts, activations);
    for (spec, (y, _)) in specs.iter().zip(&mut outs) {
        for low_rank in &spec.low_rank {
            add_low_rank(x, low_rank, y)?;
        }
    }
    specs
        .iter()
        .zip(outs)
        .map(|(spec, (y, _))| Ok(Var::constant(tensor_of(y, (n, spec.weight.dims()?.0))?)))
        .collect()
}

/// `y += s·x·Aᵀ·Bᵀ`.
fn add_low_rank(x: MatRef<'_>, low_rank: &LowRank, y: &mut [f32]) -> Result<()> {
    let (a, b) = (Borrowed::var(&low_rank.a)?, Borrowed::var(&low_rank.b)?);
    let (r, out) = (a.view().rows(), b.view().rows());
    let mut u = uninit(x.rows * r);
    matmul::linear(x, a.view(), &mut MatMut::new(&mut u, x.rows, r), false);
    elementwise::scale(&mut u, low_rank.scale);
    matmul::linear(MatRef::new(&u, x.rows, r), b.view(), &mut MatMut::new(y, x.rows, out), true);
    Ok(())
}
