//! Both passes against the definition in f64 and its derivatives.

use super::*;
use crate::codec;
use crate::dropout::mix;
use crate::test_numbers::numbers;

struct Case {
    n: usize,
    d: usize,
    vocab: usize,
    r: usize,
    h: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    u: Vec<f32>,
    b: Vec<f32>,
    targets: Vec<u32>,
    soft_cap: Option<f32>,
}

impl Case {
    fn new(n: usize, d: usize, vocab: usize, r: usize) -> Self {
        Self {
            n,
            d,
            vocab,
            r,
            h: numbers(1, n * d),
            w: numbers(2, vocab * d),
            bias: numbers(3, vocab),
            u: numbers(4, n * r),
            b: numbers(5, vocab * r),
            targets: (0..n as u64).map(|i| (mix(6, i) % vocab as u64) as u32).collect(),
            soft_cap: None,
        }
    }

    fn low_rank(&self) -> HeadLowRank<'_> {
        HeadLowRank { a_out: &self.u, b: &self.b, r: self.r }
    }

    /// Losses and dZ, `[n]` and `[n, vocab]`.
    fn reference(&self, full: bool) -> (Vec<f64>, Vec<f64>) {
        let (mut losses, mut dz) = (Vec::new(), Vec::new());
        let f = f64::from;
        for i in 0..self.n {
            let logit = |v: usize| -> f64 {
                let base: f64 =
                    (0..self.d).map(|c| f(self.h[i * self.d + c]) * f(self.w[v * self.d + c])).sum();
                let delta: f64 =
                    (0..self.r).map(|c| f(self.u[i * self.r + c]) * f(self.b[v * self.r + c])).sum();
                let z = if full { base + f(self.bias[v]) + delta } else { base };
                self.soft_cap.map_or(z, |cap| f(cap) * (z / f(cap)).tanh())
            };
            let z: Vec<f64> = (0..self.vocab).map(logit).collect();
            let total: f64 = z.iter().map(|z| z.exp()).sum();
            let target = self.targets[i] as usize;
            losses.push(total.ln() - z[target]);
            let slope = |z: f64| self.soft_cap.map_or(1.0, |cap| 1.0 - (z / f(cap)).powi(2));
            let hit = |v: usize| f64::from(u8::from(v == target));
            dz.extend(z.iter().enumerate().map(|(v, z)| (z.exp() / total - hit(v)) * slope(*z)));
        }
        (losses, dz)
    }

    /// dZ·M for M `[vocab, k]`.
    fn times(&self, dz: &[f64], m: &[f32], k: usize) -> Vec<f64> {
        let cell = |i: usize, c: usize| -> f64 {
            (0..self.vocab).map(|v| dz[i * self.vocab + v] * f64::from(m[v * k + c])).sum()
        };
        (0..self.n * k).map(|at| cell(at / k, at % k)).collect()
    }

    /// dZᵀ·M for M `[n, k]`.
    fn transposed_times(&self, dz: &[f64], m: &[f32], k: usize) -> Vec<f64> {
        let cell = |v: usize, c: usize| -> f64 {
            (0..self.n).map(|i| dz[i * self.vocab + v] * f64::from(m[i * k + c])).sum()
        };
        (0..self.vocab * k).map(|at| cell(at / k, at % k)).collect()
    }
}

/// Sums of up to 1500 probabilities times numbers below 1, in f32.
fn close(got: &[f32], exact: &[f64], what: &str) {
    assert_eq!(got.len(), exact.len());
    for (i, (a, b)) in got.iter().zip(exact).enumerate() {
        assert!((f64::from(*a) - b).abs() < 2e-5 * b.abs().max(1.0), "{what}[{i}] {a} {b}");
    }
}

#[test]
fn loss_and_gradient_in_one_pass() {
    let sizes = [(1, 3, 2), (7, 16, 513), (530, 8, 700), (5, 64, 6000)];
    for ((n, d, vocab), soft_cap) in sizes.into_iter().flat_map(|s| [(s, None), (s, Some(1.5))]) {
        let case = Case { soft_cap, ..Case::new(n, d, vocab, 1) };
        let (losses, dz) = case.reference(false);
        let mut stats = vec![TokenStats::default(); n];
        let mut dh = vec![9.0; n * d];
        let head = Head { soft_cap, ..Head::plain(WeightView::f32(&case.w, vocab, d)) };
        cross_entropy(&case.h, &head, &case.targets, &mut stats, None, Some(&mut dh));
        close(&stats.iter().map(|s| s.loss).collect::<Vec<_>>(), &losses, "loss");
        close(&dh, &case.times(&dz, &case.w, d), "d_hidden");
    }
}

#[test]
fn every_gradient_of_a_trained_head() {
    for soft_cap in [None, Some(2.0)] {
        every_gradient_of(&Case { soft_cap, ..Case::new(9, 12, 1100, 3) });
    }
}

fn every_gradient_of(case: &Case) {
    let (losses, dz) = case.reference(true);
    let w = WeightView::f32(&case.w, case.vocab, case.d);
    let mut stats = vec![TokenStats::default(); case.n];
    let mut lse = vec![0.0; case.n];
    let (bias, low_rank) = (Some(case.bias.as_slice()), Some(case.low_rank()));
    let head = Head { weight: w, bias, low_rank, soft_cap: case.soft_cap };
    cross_entropy(&case.h, &head, &case.targets, &mut stats, Some(&mut lse), None);
    close(&stats.iter().map(|s| s.loss).collect::<Vec<_>>(), &losses, "loss");
    let half: Vec<f64> = dz.iter().map(|v| v * 0.5).collect();
    let (mut dh, mut du) = (vec![9.0; case.h.len()], vec![9.0; case.u.len()]);
    let (mut dw, mut dbias, mut db) =
        (vec![0.0; case.w.len()], vec![0.0; case.vocab], vec![0.0; case.b.len()]);
    cross_entropy_backward(
        &case.h,
        &head,
        &case.targets,
        &lse,
        0.5,
        Some(&mut dh),
        Some(&mut dw),
        Some(&mut dbias),
        Some(&mut du),
        Some(&mut db),
    );
    close(&dh, &case.times(&half, &case.w, case.d), "d_hidden");
    close(&du, &case.times(&half, &case.b, case.r), "d_u");
    close(&dw, &case.transposed_times(&half, &case.h, case.d), "d_weight");
    close(&db, &case.transposed_times(&half, &case.u, case.r), "d_b");
    close(&dbias, &case.transposed_times(&half, &vec![1.0; case.n], 1), "d_bias");
}

#[test]
fn a_stored_head_gives_what_its_f32_copy_gives() {
    use crate::storage::StorageType;
    let case = Case::new(6, 64, 600, 1);
    for storage in [StorageType::BF16, StorageType::Q8_0, StorageType::Q4_1] {
        let mut bytes = Vec::new();
        codec::encode(storage, &case.w, &mut bytes).unwrap();
        let mut wide = vec![0.0; case.w.len()];
        codec::decode(storage, &bytes, &mut wide);
        let run = |w: WeightView<'_>| {
            let mut stats = vec![TokenStats::default(); case.n];
            let mut dh = vec![0.0; case.h.len()];
            cross_entropy(&case.h, &Head::plain(w), &case.targets, &mut stats, None, Some(&mut dh));
            (stats, dh)
        };
        let stored = run(WeightView::new(storage, case.vocab, case.d, &bytes).unwrap());
        assert_eq!(stored, run(WeightView::f32(&wide, case.vocab, case.d)));
    }
}

#[test]
fn hits_are_counted_and_ties_go_to_the_lowest_id() {
    let (d, vocab) = (1, 3);
    let w = [2.0f32, 2.0, 1.0];
    let mut stats = vec![TokenStats::default(); 2];
    let view = WeightView::f32(&w, vocab, d);
    cross_entropy(&[1.0, 1.0], &Head::plain(view), &[0, 1], &mut stats, None, None);
    assert!(stats[0].correct && !stats[1].correct);
}

#[test]
fn nan_reaches_the_loss() {
    let w = [1.0f32, f32::NAN, 0.5];
    let mut stats = vec![TokenStats::default()];
    cross_entropy(&[1.0], &Head::plain(WeightView::f32(&w, 3, 1)), &[0], &mut stats, None, None);
    assert!(stats[0].loss.is_nan());
}

#[test]
fn threads_do_not_change_a_bit() {
    let case = Case::new(40, 24, 5000, 1);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut stats = vec![TokenStats::default(); case.n];
            let mut dh = vec![0.0; case.h.len()];
            let w = WeightView::f32(&case.w, case.vocab, case.d);
            cross_entropy(&case.h, &Head::plain(w), &case.targets, &mut stats, None, Some(&mut dh));
            (stats, dh)
        })
    };
    assert_eq!(run(1), run(2));
}
