//! The `gemm` crate on the products of one LoRA step of the SmolLM2-135M shape: every frozen linear layer forward
//! (`x·Wᵀ`) and back (`dy·W`), and the head. Each layer has weights of its own, so that they come from memory as they
//! do in a step.

use gemm::Parallelism;
use std::hint::black_box;
use std::time::Instant;

const LAYERS: usize = 30;
/// `[out, in]` of q, k, v, o, gate, up and down.
const LINEARS: [(usize, usize); 7] =
    [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)];
const WIDTH: usize = 576;
const VOCAB: usize = 49152;
/// Rows of the embedding in one product of the head. The whole `[tokens, vocabulary]` product would write
/// 100 MB of logits that no step keeps, and is slower.
const HEAD_ROWS: usize = 1024;
/// Passes after the first, of which the median counts.
const PASSES: usize = 3;

/// GFLOP/s.
pub struct Rates {
    /// of the whole pass
    pub all: f64,
    /// of the linear layers forward
    pub forward: f64,
    /// of the gradients of their inputs
    pub input_grad: f64,
    /// of the head, both ways
    pub head: f64,
}

/// Small numbers without a pattern; none is zero or subnormal.
fn numbers(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 16_777_216.0 - 0.499_9).collect()
}

/// A matrix `[rows, cols]` as gemm wants it: data, and how far rows and columns are apart.
struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols);
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    fn t(self) -> Self {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        Self { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// `c = a·b`, or `c += a·b`. Returns its floating-point operations.
fn product(a: Mat<'_>, b: Mat<'_>, c: &mut [f32], add: bool) -> f64 {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert!(b.rows == k && c.len() >= m * n);
    // SAFETY: `Mat::new` checked that a and b lie inside their slices, whichever way they are read, and c is long
    // enough for m rows of n.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            if add { 1.0 } else { 0.0 },
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
    (2 * m * k * n) as f64
}

/// Operations and seconds of a part of the pass.
#[derive(Clone, Copy, Default)]
struct Part {
    flops: f64,
    seconds: f64,
}

impl Part {
    fn time(&mut self, run: impl FnOnce() -> f64) {
        let start = Instant::now();
        self.flops += run();
        self.seconds += start.elapsed().as_secs_f64();
    }

    fn rate(self) -> f64 {
        self.flops / self.seconds / 1e9
    }
}

/// Rates on rayon's current pool.
pub fn gflops(tokens: usize, labels: usize) -> Rates {
    let layer: usize = LINEARS.iter().map(|(o, i)| o * i).sum();
    let (weights, embedding) = (numbers(LAYERS * layer), numbers(VOCAB * WIDTH));
    let widest = LINEARS.iter().map(|(o, i)| *o.max(i)).max().unwrap_or(0);
    let input = numbers(tokens * widest);
    let mut output = vec![0f32; tokens.max(labels) * widest.max(HEAD_ROWS)];
    let mut hidden_grad = vec![0f32; labels * WIDTH];
    let mut pass = || {
        let (mut forward, mut input_grad, mut head) = (Part::default(), Part::default(), Part::default());
        for weights in weights.chunks_exact(layer) {
            let mut rest = weights;
            for (o, i) in LINEARS {
                let (w, after) = rest.split_at(o * i);
                rest = after;
                forward
                    .time(|| product(Mat::new(&input, tokens, i), Mat::new(w, o, i).t(), &mut output, false));
            }
        }
        head.time(|| {
            let hidden = || Mat::new(&input, labels, WIDTH);
            let blocks = embedding.chunks(HEAD_ROWS * WIDTH);
            blocks.fold(0.0, |flops, block| {
                let w = || Mat::new(block, block.len() / WIDTH, WIDTH);
                let logits = product(hidden(), w().t(), &mut output, false);
                let grad = Mat::new(&output, labels, block.len() / WIDTH);
                flops + logits + product(grad, w(), &mut hidden_grad, true)
            })
        });
        for weights in weights.chunks_exact(layer).rev() {
            let mut rest = weights;
            for (o, i) in LINEARS {
                let (w, after) = rest.split_at(o * i);
                rest = after;
                input_grad
                    .time(|| product(Mat::new(&input, tokens, o), Mat::new(w, o, i), &mut output, false));
            }
        }
        black_box((&mut output, &mut hidden_grad));
        [forward, input_grad, head]
    };
    pass();
    let mut passes: Vec<[Part; 3]> = (0..PASSES).map(|_| pass()).collect();
    let seconds = |parts: &[Part; 3]| parts.iter().map(|p| p.seconds).sum::<f64>();
    passes.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    let parts = passes[PASSES / 2];
    let all = Part { flops: parts.iter().map(|p| p.flops).sum(), seconds: seconds(&parts) };
    let [forward, input_grad, head] = parts;
    Rates { all: all.rate(), forward: forward.rate(), input_grad: input_grad.rate(), head: head.rate() }
}
