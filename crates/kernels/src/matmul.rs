//! Matrix products: dense, and with a frozen weight in any storage.
//!
//! A linear layer with weight W `[rows, cols]` (`[out_features, in_features]`) has
//!
//! - forward `y = x·Wᵀ`: y\[i, r\] = Σ_c x\[i, c\]·W\[r, c\] ([`linear`]);
//! - gradient of its input `dx = dy·W`: dx\[i, c\] = Σ_r dy\[i, r\]·W\[r, c\] ([`linear_input_grad`]).
//!
//! W is frozen: its own gradient is never formed. A stored weight is never decoded whole: tiles of it are
//! decoded into scratch that stays in a core's L2 cache and fed to the dense product (`tiled.rs`). In the
//! forward product f32 goes that way too: one thread packing the whole of W first, as the gemm crate does,
//! costs up to a quarter of the rate of the copied tiles (`examples/matmul_rate.rs` measures it all). With very few rows of x, as when generating, each row of W is decoded once and dotted (`few_rows.rs`).
//!
//! How sums are split depends on the shapes alone, so results do not depend on the number of threads.

mod dense;
mod disjoint;
mod few_rows;
pub(crate) mod micro;
pub(crate) mod pack;
mod product;

use crate::mat::{MatMut, MatRef};
use crate::storage::WeightView;

pub use dense::{sgemm, sgemm_serial};
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
        few_rows::linear(x, w, y, accumulate);
    } else {
        run(&[Job::new(y, accumulate, vec![Term::new(x, Right::WeightT(w))])]);
    }
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
