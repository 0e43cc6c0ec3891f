//! Linear layers on a tape for generation: nothing is recorded, products with quantized weights may round their
//! activations, and with few tokens layers that share an input are one parallel region.

use crate::ops::{LinearSpec, LowRank, Matrix};
use crate::{Activations, Host, Result, Var, host, tensor_of, uninit};
use candle_core::Tensor;
use engobe_kernels::elementwise;
use engobe_kernels::mat::{MatMut, MatRef};
use engobe_kernels::matmul::{self, Part};
use engobe_kernels::storage::WeightView;

/// A matrix, borrowed for the kernels.
enum Held<'a> {
    Frozen(WeightView<'a>),
    Trained(Host<'a>, usize, usize),
}

impl<'a> Held<'a> {
    fn new(matrix: &'a Matrix) -> Result<Self> {
        match matrix {
            Matrix::Frozen(w) => Ok(Self::Frozen(w.view()?)),
            Matrix::Trained(v) => Self::tensor(v),
        }
    }

    fn tensor(v: &'a Var) -> Result<Self> {
        let (rows, cols) = v.tensor().dims2()?;
        Ok(Self::Trained(host(v.tensor())?, rows, cols))
    }

    fn view(&self) -> WeightView<'_> {
        match self {
            Self::Frozen(view) => *view,
            Self::Trained(data, rows, cols) => WeightView::f32(data, *rows, *cols),
        }
    }
}

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
    let weights = specs.iter().map(|spec| Held::new(&spec.weight)).collect::<Result<Vec<_>>>()?;
    let mut outs: Vec<Vec<f32>> = Vec::with_capacity(specs.len());
    for (spec, weight) in specs.iter().zip(&weights) {
        let out = weight.view().rows();
        let mut y = uninit(n * out);
        if let Some(residual) = residual {
            y.copy_from_slice(&host(residual)?);
        }
        if let Some(bias) = &spec.bias {
            let bias = host(bias.tensor())?;
            for row in y.chunks_exact_mut(out) {
                match residual {
                    Some(_) => elementwise::add_assign(row, &bias),
                    None => row.copy_from_slice(&bias),
                }
            }
        }
        outs.push(y);
    }
    let parts = specs.iter().zip(&weights).zip(&mut outs);
    let mut parts: Vec<Part<'_, '_>> = parts
        .map(|((spec, weight), y)| {
            let w = weight.view();
            Part { w, y: MatMut::new(y, n, w.rows()), accumulate: residual.is_some() || spec.bias.is_some() }
        })
        .collect();
    matmul::linear_group(x, &mut parts, activations);
    for (spec, y) in specs.iter().zip(&mut outs) {
        for low_rank in &spec.low_rank {
            add_low_rank(x, low_rank, y)?;
        }
    }
    specs
        .iter()
        .zip(outs)
        .map(|(spec, y)| Ok(Var::constant(tensor_of(y, (n, spec.weight.dims()?.0))?)))
        .collect()
}

/// `y += s·(x·Aᵀ·Bᵀ + bias)`.
fn add_low_rank(x: MatRef<'_>, low_rank: &LowRank, y: &mut [f32]) -> Result<()> {
    let (a, b) = (Held::tensor(&low_rank.a)?, Held::tensor(&low_rank.b)?);
    let (r, out) = (a.view().rows(), b.view().rows());
    let mut u = uninit(x.rows * r);
    matmul::linear(x, a.view(), &mut MatMut::new(&mut u, x.rows, r), false);
    elementwise::scale(&mut u, low_rank.scale);
    matmul::linear(MatRef::new(&u, x.rows, r), b.view(), &mut MatMut::new(y, x.rows, out), true);
    if let Some(bias) = &low_rank.b_bias {
        let bias = host(bias.tensor())?;
        y.chunks_exact_mut(out).for_each(|row| elementwise::axpy(low_rank.scale, &bias, row));
    }
    Ok(())
}
