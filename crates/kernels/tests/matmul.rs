//! Products against sums in f64, over odd shapes, strides and all storages; and their independence of threads.

use engobe_kernels::codec::{FourBit, decode_reference};
use engobe_kernels::mat::{MatMut, MatRef};
use engobe_kernels::matmul::{Job, Right, Term, linear, linear_input_grad, run, sgemm_serial};
use engobe_kernels::quantize::{QuantizedWeight, Scheme};
use engobe_kernels::storage::{Elements, StorageType, WeightView};
use proptest::prelude::*;

/// Numbers in -1..1 from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    /// A weight of random bytes whose scales are finite and below 1.
    fn weight(&mut self, storage: StorageType, rows: usize, cols: usize) -> Vec<u8> {
        let size = storage.row_bytes(cols).expect("whole blocks") * rows;
        let mut bytes: Vec<u8> = (0..size).map(|_| self.bits() as u8).collect();
        let scales: &[usize] = match storage {
            StorageType::F32 => {
                return self.floats(rows * cols).iter().flat_map(|x| x.to_le_bytes()).collect();
            }
            StorageType::BF16 => {
                let f = self.floats(rows * cols);
                return f.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
            }
            StorageType::F16 | StorageType::Q4_0 | StorageType::Q5_0 | StorageType::Q8_0 => &[0],
            StorageType::Q4_1 | StorageType::Q5_1 | StorageType::Q4_K | StorageType::Q5_K => &[0, 2],
            StorageType::Q2_K => &[80, 82],
            StorageType::Q3_K => &[108],
            StorageType::Q6_K => &[208],
        };
        for block in bytes.chunks_exact_mut(storage.block_bytes()) {
            for &at in scales {
                block[at..at + 2].copy_from_slice(&half::f16::from_f32(self.float()).to_le_bytes());
            }
        }
        bytes
    }
}

/// `c = alpha·a·b`, or `c += alpha·a·b`, as a parallel job.
fn product(alpha: f32, a: MatRef, b: MatRef, accumulate: bool, c: &mut MatMut) {
    run(&[Job::new(c, accumulate, vec![Term { a, b: Right::Dense(b), scale: alpha }])]);
}

/// A row-major matrix with `gap` foreign elements behind each row.
struct Padded {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    gap: usize,
}

const FOREIGN: f32 = 12345.0;

impl Padded {
    fn new(rows: usize, cols: usize, gap: usize, mut element: impl FnMut() -> f32) -> Self {
        let width = cols + gap;
        let data = (0..rows * width).map(|i| if i % width < cols { element() } else { FOREIGN }).collect();
        Self { data, rows, cols, gap }
    }

    fn view(&self) -> MatRef<'_> {
        MatRef::strided(&self.data, self.rows, self.cols, self.cols + self.gap)
    }

    fn view_mut(&mut self) -> MatMut<'_> {
        MatMut::strided(&mut self.data, self.rows, self.cols, self.cols + self.gap)
    }

    fn at(&self, i: usize, j: usize) -> f32 {
        self.data[i * (self.cols + self.gap) + j]
    }

    fn assert_gaps_untouched(&self) {
        let width = self.cols + self.gap;
        assert!(self.data.iter().enumerate().all(|(i, &x)| i % width < self.cols || x == FOREIGN));
    }
}

fn at(m: MatRef, i: usize, j: usize) -> f64 {
    m.data[i * m.row_stride + j * m.col_stride] as f64
}

/// `found = old + alpha·a·b` within the bound of a sum in f32.
///
/// Every order of summing k products in f32 is within k·2^-24·Σ|a||b| of the true sum to first order (Higham,
/// "Accuracy and Stability of Numerical Algorithms", 3.1); alpha and the old value round three times more.
fn assert_product(what: &str, alpha: f32, a: MatRef, b: MatRef, old: Option<&Padded>, found: &Padded) {
    let unit = (a.cols + 4) as f64 * 2f64.powi(-24);
    for i in 0..a.rows {
        for j in 0..b.cols {
            let before = old.map_or(0.0, |old| old.at(i, j) as f64);
            let (mut sum, mut size) = (0.0, 0.0);
            for k in 0..a.cols {
                let product = at(a, i, k) * at(b, k, j);
                sum += product;
                size += product.abs();
            }
            let expected = before + alpha as f64 * sum;
            let allowed = unit * (before.abs() + alpha.abs() as f64 * size) + f64::MIN_POSITIVE;
            let found = found.at(i, j) as f64;
            assert!(
                (found - expected).abs() <= allowed,
                "{what}: ({i}, {j}) is {found}, expected {expected} ± {allowed}"
            );
        }
    }
    found.assert_gaps_untouched();
}

/// Both products with one weight, set and added.
fn check_weight(storage: StorageType, m: usize, rows: usize, cols: usize, gap: usize, seed: u64) {
    let mut random = Random(seed);
    let bytes = random.weight(storage, rows, cols);
    let w = WeightView::new(storage, rows, cols, &bytes).expect("shape");
    let mut plain = vec![0f32; rows * cols];
    decode_reference(storage, &bytes, &mut plain);
    check_products(storage.name(), w, &plain, m, gap, random);
}

/// The same for codes with factors beside them.
fn check_scheme(scheme: Scheme, m: usize, rows: usize, cols: usize, gap: usize, seed: u64) {
    let mut random = Random(seed);
    let floats: Vec<u8> = random.floats(rows * cols).iter().flat_map(|x| x.to_le_bytes()).collect();
    let weight =
        QuantizedWeight::new(scheme, StorageType::F32, rows, cols, &floats, &|_| ()).expect("finite");
    let w = weight.view().expect("whole");
    let element = |i: usize| match w.elements() {
        Elements::FourBit(view) => view.element(i),
        Elements::Int8(view) => view.element(i / cols, i % cols),
        Elements::Blocks { .. } => panic!("a quantized weight is codes"),
    };
    let plain: Vec<f32> = (0..rows * cols).map(element).collect();
    check_products(&scheme.to_string(), w, &plain, m, gap, random);
}

fn check_products(name: &str, w: WeightView, plain: &[f32], m: usize, gap: usize, mut random: Random) {
    let (rows, cols) = (w.rows(), w.cols());
    let what = format!("{name} m={m} [{rows}, {cols}]");
    let plain = MatRef::new(plain, rows, cols);

    let x = Padded::new(m, cols, gap, || random.float());
    let dy = Padded::new(m, rows, gap, || random.float());
    // NaN: if the old output were read, it would show.
    let mut y = Padded::new(m, rows, gap, || f32::NAN);
    linear(x.view(), w, &mut y.view_mut(), false);
    assert_product(&format!("{what} forward"), 1.0, x.view(), plain.t(), None, &y);
    let mut dx = Padded::new(m, cols, gap, || f32::NAN);
    linear_input_grad(dy.view(), w, &mut dx.view_mut(), false);
    assert_product(&format!("{what} input grad"), 1.0, dy.view(), plain, None, &dx);

    let old = Padded::new(m, rows, gap, || random.float());
    y.data.copy_from_slice(&old.data);
    linear(x.view(), w, &mut y.view_mut(), true);
    assert_product(&format!("{what} forward, added"), 1.0, x.view(), plain.t(), Some(&old), &y);
    let old = Padded::new(m, cols, gap, || random.float());
    dx.data.copy_from_slice(&old.data);
    linear_input_grad(dy.view(), w, &mut dx.view_mut(), true);
    assert_product(&format!("{what} input grad, added"), 1.0, dy.view(), plain, Some(&old), &dx);
}

#[test]
fn every_storage_over_odd_shapes() {
    for storage in StorageType::ALL {
        let block = storage.block_len();
        for (i, m) in [1, 2, 3, 4, 5, 17, 128].into_iter().enumerate() {
            // 97 is one more than a task's block of columns; 1100 and 600 are more than one slice deep.
            for (rows, cols) in [(1, 1), (97, 33), (50, 1100), (600, 65)] {
                let cols = usize::next_multiple_of(cols, block);
                check_weight(storage, m, rows, cols, i % 3, (m * rows + cols) as u64);
            }
        }
    }
}

/// Blocks that end with rows, and blocks that straddle them; an odd number of elements.
const SCHEMES: [Scheme; 5] = [
    Scheme::FourBit { kind: FourBit::Nf4, block: 64, double: false },
    Scheme::FourBit { kind: FourBit::Nf4, block: 64, double: true },
    Scheme::FourBit { kind: FourBit::Fp4, block: 32, double: false },
    Scheme::FourBit { kind: FourBit::Fp4, block: 1024, double: true },
    Scheme::Int8,
];

#[test]
fn every_scheme_over_odd_shapes() {
    for scheme in SCHEMES {
        for (i, m) in [1, 2, 4, 5, 17, 128].into_iter().enumerate() {
            for (rows, cols) in [(1, 1), (97, 33), (50, 1100), (600, 65), (100, 256)] {
                check_scheme(scheme, m, rows, cols, i % 3, (m * rows + cols) as u64);
            }
        }
    }
}

#[test]
fn unaligned_f32_weight() {
    let mut random = Random(5);
    for (m, rows, cols) in [(1, 9, 40), (20, 9, 40)] {
        let bytes = random.weight(StorageType::F32, rows, cols);
        let mut shifted = vec![0u8; bytes.len() + 4];
        let start = (0..4).find(|i| (shifted.as_ptr() as usize + i) % 4 == 1).expect("one in four");
        shifted[start..start + bytes.len()].copy_from_slice(&bytes);
        let w = WeightView::new(StorageType::F32, rows, cols, &shifted[start..start + bytes.len()])
            .expect("shape");
        assert!(w.as_f32().is_none());
        let plain: Vec<f32> = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("4"))).collect();
        let plain = MatRef::new(&plain, rows, cols);
        let x = Padded::new(m, cols, 0, || random.float());
        let mut y = Padded::new(m, rows, 0, || f32::NAN);
        linear(x.view(), w, &mut y.view_mut(), false);
        assert_product("unaligned forward", 1.0, x.view(), plain.t(), None, &y);
        let mut dx = Padded::new(m, cols, 0, || f32::NAN);
        linear_input_grad(y.view(), w, &mut dx.view_mut(), false);
        assert_product("unaligned input grad", 1.0, y.view(), plain, None, &dx);
    }
}

#[test]
fn x_may_be_a_transposed_view() {
    let mut random = Random(6);
    let bytes = random.weight(StorageType::Q8_0, 40, 64);
    let w = WeightView::new(StorageType::Q8_0, 40, 64, &bytes).expect("shape");
    let mut plain = vec![0f32; 40 * 64];
    decode_reference(StorageType::Q8_0, &bytes, &mut plain);
    for m in [1, 3, 30] {
        let xt = Padded::new(64, m, 1, || random.float());
        let mut y = Padded::new(m, 40, 0, || f32::NAN);
        linear(xt.view().t(), w, &mut y.view_mut(), false);
        assert_product("transposed", 1.0, xt.view().t(), MatRef::new(&plain, 40, 64).t(), None, &y);
    }
}

#[test]
fn empty_sizes() {
    for (m, rows, cols) in [(0, 3, 32), (6, 0, 32), (6, 3, 0), (2, 3, 0), (2, 0, 32)] {
        let bytes = Random(7).weight(StorageType::Q4_0, rows, cols);
        let w = WeightView::new(StorageType::Q4_0, rows, cols, &bytes).expect("shape");
        let (x, dy) = (vec![1f32; m * cols], vec![1f32; m * rows]);
        let (mut y, mut dx) = (vec![f32::NAN; m * rows], vec![f32::NAN; m * cols]);
        linear(MatRef::new(&x, m, cols), w, &mut MatMut::new(&mut y, m, rows), false);
        linear_input_grad(MatRef::new(&dy, m, rows), w, &mut MatMut::new(&mut dx, m, cols), false);
        if cols == 0 {
            assert!(y.iter().all(|&y| y == 0.0), "an empty sum is 0");
        }
        if rows == 0 {
            assert!(dx.iter().all(|&dx| dx == 0.0), "an empty sum is 0");
        }
        dx.fill(3.0);
        linear_input_grad(MatRef::new(&dy, m, rows), w, &mut MatMut::new(&mut dx, m, cols), true);
        if rows == 0 {
            assert!(dx.iter().all(|&dx| dx == 3.0), "adding an empty sum changes nothing");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("pool");
        pool.install(|| {
            let mut all = Vec::new();
            let mut random = Random(8);
            for storage in StorageType::ALL {
                for (m, rows, cols) in [(1, 300, 1536), (3, 300, 1536), (33, 600, 1280), (130, 200, 768)] {
                    let bytes = random.weight(storage, rows, cols);
                    let w = WeightView::new(storage, rows, cols, &bytes).expect("shape");
                    let (x, dy) = (random.floats(m * cols), random.floats(m * rows));
                    let (mut y, mut dx) = (vec![0f32; m * rows], vec![0f32; m * cols]);
                    linear(MatRef::new(&x, m, cols), w, &mut MatMut::new(&mut y, m, rows), false);
                    linear_input_grad(
                        MatRef::new(&dy, m, rows),
                        w,
                        &mut MatMut::new(&mut dx, m, cols),
                        false,
                    );
                    all.extend(y.iter().chain(&dx).map(|x| x.to_bits()));
                }
            }
            for (m, k, n) in
                [(1, 700, 400), (16, 1200, 900), (300, 1030, 200), (512, 16, 576), (16, 512, 576)]
            {
                let (a, b) = (random.floats(m * k), random.floats(k * n));
                let mut c = vec![0f32; m * n];
                let (a, b) = (MatRef::new(&a, m, k), MatRef::new(&b, k, n));
                product(1.5, a, b, false, &mut MatMut::new(&mut c, m, n));
                all.extend(c.iter().map(|x| x.to_bits()));
            }
            all
        })
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert!(one == run(threads), "1 and {threads} threads differ");
    }
}

#[test]
#[should_panic(expected = "past its data")]
fn a_matrix_past_its_data_is_refused() {
    let data = [0f32; 6];
    let a = MatRef { data: &data, rows: 3, cols: 3, row_stride: 3, col_stride: 1 };
    product(1.0, a, a, false, &mut MatMut::new(&mut [0f32; 9], 3, 3));
}

#[test]
#[should_panic(expected = "overlap")]
fn overlapping_output_rows_are_refused() {
    let data = [0f32; 9];
    let a = MatRef::new(&data, 3, 3);
    let mut out = [0f32; 9];
    let mut c = MatMut { data: &mut out, rows: 3, cols: 3, row_stride: 2 };
    product(1.0, a, a, false, &mut c);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn linear_over_any_shape(
        storage in prop::sample::select(StorageType::ALL.to_vec()),
        m in 1usize..40,
        rows in 1usize..230,
        cols in 1usize..600,
        gap in 0usize..3,
        seed: u64,
    ) {
        check_weight(storage, m, rows, cols.next_multiple_of(storage.block_len()), gap, seed);
    }

    #[test]
    fn quantized_linear_over_any_shape(
        scheme in prop::sample::select(SCHEMES.to_vec()),
        m in 1usize..40,
        rows in 1usize..230,
        cols in 1usize..600,
        seed: u64,
    ) {
        check_scheme(scheme, m, rows, cols, 1, seed);
    }

    #[test]
    fn dense_products_over_any_shape(
        (m, k, n) in (1usize..70, 0usize..300, 1usize..70),
        (transpose_a, transpose_b, serial) in any::<(bool, bool, bool)>(),
        beta in prop::sample::select(vec![0f32, 1.0]),
        gap in 0usize..3,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let mut mat = |transpose: bool, rows, cols| {
            let (rows, cols) = if transpose { (cols, rows) } else { (rows, cols) };
            Padded::new(rows, cols, gap, || random.float())
        };
        let (a, b) = (mat(transpose_a, m, k), mat(transpose_b, k, n));
        let a = if transpose_a { a.view().t() } else { a.view() };
        let b = if transpose_b { b.view().t() } else { b.view() };
        let old = Padded::new(m, n, gap, || if beta == 0.0 { f32::NAN } else { random.float() });
        let mut c = Padded { data: old.data.clone(), ..old };
        if serial {
            sgemm_serial(-0.75, a, b, beta, &mut c.view_mut());
        } else {
            product(-0.75, a, b, beta != 0.0, &mut c.view_mut());
        }
        assert_product("dense", -0.75, a, b, (beta != 0.0).then_some(&old), &c);
    }
}
