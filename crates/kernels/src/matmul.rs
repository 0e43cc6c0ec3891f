//! Matrix products: dense, and with a frozen weight in any storage.
//!
//! A linear layer with weight W `[rows, cols]` (`[out_features, in_features]`) has
//!
//! - forward `y = x·Wᵀ`: y\[i, r\] = Σ_c x\[i, c\]·W\[r, c\] ([`linear`]);
//! - gradient of its input `dx = dy·W`: dx\[i, c\] = Σ_r dy\[i, r\]·W\[r, c\] ([`linear_input_grad`]).
//!
//! W is frozen: its own gradient is never formed, and a stored weight is never decoded whole. There are three ways:
//!
//! - many rows of x, as in training: sums of products with several terms and outputs, as one parallel job (`product.rs`,
//!   [`run`]). Panels of W are decoded and packed for a task (`pack.rs`), stay in its core's L2 cache, and meet x where it
//!   lies in register tiles (`micro.rs`);
//! - a few rows, as in generating a token: each row of W is decoded, or taken as it is stored, and dotted (`few_rows.rs`,
//!   `float_rows.rs`);
//! - many rows in inference over quantized weights: activations rounded to 8 bits, integer tiles ([`linear_group`]).
//!
//! How sums are split depends on the shapes alone, so results do not depend on the number of threads.

mod dense;
mod disjoint;
mod few_rows;
mod float_rows;
pub(crate) mod micro;
pub(crate) mod pack;
mod product;

use crate::mat::{MatMut, MatRef};
#[cfg(target_arch = "x86_64")]
use crate::qdot::tile;
use crate::qdot::{Rounded, Rounding};
use crate::storage::WeightView;

pub use dense::sgemm_serial;
pub(crate) use disjoint::SharedMat;
pub use pack::Right;
pub use product::{Job, Term, run, run_serial};

/// True if `x` has so few rows that [`linear`] takes the way that reads the weight once and multiplies at once.
pub fn few(x: &MatRef) -> bool {
    few_rows::applies(x)
}

/// `y[m, rows] = x[m, cols]·wᵀ`, or `y += x·wᵀ` if `accumulate`; otherwise `y` is not read.
///
/// Panics if the shapes do not fit.
pub fn linear(x: MatRef, w: WeightView, y: &mut MatMut, accumulate: bool) {
    assert_eq!((x.rows, x.cols), (y.rows, w.cols()), "linear: x against y's rows and w's columns");
    assert_eq!(y.cols, w.rows(), "linear: y's columns against w's rows");
    if few_rows::applies(&x) {
        let y = MatMut::strided(y.data, y.rows, y.cols, y.row_stride);
        few_rows::linear(x, &mut [Part { w, y, accumulate }], &[], false);
    } else {
        run(&[Job::new(y, accumulate, vec![Term::new(x, Right::WeightT(w))])]);
    }
}

/// One product of [`linear_group`].
#[derive(Debug)]
pub struct Part<'a, 'b> {
    /// `[rows, cols]`
    pub w: WeightView<'a>,
    /// `[m, rows]`
    pub y: MatMut<'b>,
    /// y is added to
    pub accumulate: bool,
}

/// How activations go into products with quantized weights. Plain floats always take them as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// rounded to 8 bits per block, as llama.cpp does (`qdot.rs`)
    #[default]
    Rounded,
    /// as they are
    Exact,
}

/// [`linear`] of one x with several weights, for inference; with few rows of x all products are one parallel
/// region.
///
/// Panics if the shapes do not fit.
pub fn linear_group(x: MatRef, parts: &mut [Part<'_, '_>], activations: Activations) {
    for part in parts.iter() {
        assert_eq!((x.rows, x.cols), (part.y.rows, part.w.cols()), "linear_group: x against y and w");
        assert_eq!(part.y.cols, part.w.rows(), "linear_group: y's columns against w's rows");
    }
    let mut rounded: Vec<Rounded> = Vec::new();
    if x.col_stride == 1 && activations == Activations::Rounded {
        for part in parts.iter() {
            if let Some(rounding) = part.w.storage().and_then(Rounding::beside)
                && !rounded.iter().any(|r| r.rounding() == rounding)
            {
                rounded.push(Rounded::new(x, rounding));
            }
        }
    }
    if few_rows::applies(&x) {
        return few_rows::linear(x, parts, &rounded, true);
    }
    many_rows(x, parts, &rounded);
}

/// [`linear_group`] of many rows: integer tiles where the CPU has them, else products in f32 over what the rounded
/// activations stand for.
fn many_rows(x: MatRef, parts: &mut [Part<'_, '_>], rounded: &[Rounded]) {
    let beside = |w: WeightView| {
        rounded.iter().position(|r| Some(r.rounding()) == w.storage().and_then(Rounding::beside))
    };
    #[cfg(target_arch = "x86_64")]
    if tile::is_here() {
        let (whole, plain): (Vec<_>, Vec<_>) = parts.iter_mut().partition(|p| beside(p.w).is_some());
        let products = whole.into_iter().filter_map(|p| {
            let x = &rounded[beside(p.w)?];
            Some(tile::Product { x, w: p.w, y: SharedMat::new(&mut p.y), accumulate: p.accumulate })
        });
        tile::run(&products.collect::<Vec<_>>());
        let jobs = plain
            .into_iter()
            .map(|p| Job::new(&mut p.y, p.accumulate, vec![Term::new(x, Right::WeightT(p.w))]));
        return run(&jobs.collect::<Vec<_>>());
    }
    let values: Vec<Vec<f32>> = rounded.iter().map(Rounded::values).collect();
    let jobs = parts.iter_mut().map(|p| {
        let x = beside(p.w).map_or(x, |i| MatRef::new(&values[i], x.rows, x.cols));
        Job::new(&mut p.y, p.accumulate, vec![Term::new(x, Right::WeightT(p.w))])
    });
    run(&jobs.collect::<Vec<_>>());
}

/// `dx[m, cols] = dy[m, rows]·w`, or `dx += dy·w` if `accumulate`; otherwise `dx` is not read.
///
/// Panics if the shapes do not fit.
pub fn linear_input_grad(dy: MatRef, w: WeightView, dx: &mut MatMut, accumulate: bool) {
    assert_eq!(
        (dy.rows, dy.cols),
        (dx.rows, w.rows()),
        "linear_input_grad: dy against dx's rows and w's rows"
    );
    assert_eq!(dx.cols, w.cols(), "linear_input_grad: dx's columns against w's columns");
    run(&[Job::new(dx, accumulate, vec![Term::new(dy, Right::Weight(w))])]);
}
