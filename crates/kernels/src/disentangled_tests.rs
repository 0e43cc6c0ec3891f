//! Disentangled attention against its definition in f64, and finite differences.

use super::*;
use crate::test_numbers::numbers;

/// q, k, v, K_r, Q_r.
type Inputs = [Vec<f32>; 5];

/// Which of both terms are there.
#[derive(Clone, Copy)]
struct Terms(bool, bool);

fn positions<'a>(x: &'a Inputs, terms: Terms, rows: &'a [u32], zero: usize) -> Positions<'a> {
    Positions { keys: terms.0.then_some(&x[3]), queries: terms.1.then_some(&x[4]), rows, zero }
}

/// Straight from the definition, in f64.
fn reference(shape: &AttentionShape, segments: &[Segment], x: &Inputs, positions: Positions) -> Vec<f64> {
    let AttentionShape { heads, head_dim: hd, scale, .. } = *shape;
    let mut out = vec![0f64; x[0].len()];
    for s in segments {
        for h in 0..heads {
            let at = |buffer: &[f32], row: usize, c: usize| f64::from(buffer[row * heads * hd + h * hd + c]);
            let product = |a: &[f32], i: usize, b: &[f32], j: usize| -> f64 {
                (0..hd).map(|c| at(a, i, c) * at(b, j, c)).sum()
            };
            for i in s.q.clone() {
                let score = |j: usize| {
                    let row = positions.rows[positions.zero + i - j] as usize;
                    let to_position = positions.keys.map_or(0.0, |t| product(&x[0], i, t, row));
                    let to_content = positions.queries.map_or(0.0, |t| product(&x[1], j, t, row));
                    f64::from(scale) * (product(&x[0], i, &x[1], j) + to_position + to_content)
                };
                let weights: Vec<f64> = s.q.clone().map(|j| score(j).exp()).collect();
                let total: f64 = weights.iter().sum();
                for c in 0..hd {
                    let sum = s.q.clone().zip(&weights).map(|(j, w)| w / total * at(&x[2], j, c)).sum();
                    out[i * heads * hd + h * hd + c] = sum;
                }
            }
        }
    }
    out
}

fn segments(lengths: &[usize]) -> Vec<Segment> {
    let mut from = 0;
    let one = |n: &usize| {
        let range = from..from + n;
        from += n;
        Segment { q: range.clone(), kv: range }
    };
    lengths.iter().map(one).collect()
}

/// Rows of distances up to `far`: each its own up to `near`, pairs of them share one beyond.
fn rows(far: usize, near: usize) -> Vec<u32> {
    let place = |d: i64| {
        let near = near as i64;
        if d.abs() <= near { d } else { d.signum() * (near + (d.abs() - near + 1) / 2) }
    };
    let far = far as i64;
    (-far..=far).map(|d| (place(d) + place(far)) as u32).collect()
}

fn inputs(tokens: usize, table_rows: usize, width: usize) -> Inputs {
    [(1, tokens), (2, tokens), (3, tokens), (4, table_rows), (5, table_rows)]
        .map(|(seed, n)| numbers(seed, n * width))
}

const ALL: [Terms; 4] = [Terms(true, true), Terms(true, false), Terms(false, true), Terms(false, false)];

#[test]
fn forward_agrees_with_the_definition() {
    for (heads, hd, lengths) in [(1, 8, vec![5]), (3, 16, vec![90, 1, 33, 64, 2, 7]), (2, 64, vec![0, 130])] {
        let (n, longest) = (lengths.iter().sum(), lengths.iter().copied().max().unwrap());
        let mut rows = rows(longest + 3, 40);
        // rows need not grow with the distance
        rows.chunks_exact_mut(5).for_each(<[u32]>::reverse);
        let table_rows = 1 + *rows.iter().max().unwrap() as usize;
        let x = inputs(n, table_rows, heads * hd);
        let shape = AttentionShape::new(heads, heads, hd, 0.2, false);
        let segments = segments(&lengths);
        for terms in ALL {
            let positions = positions(&x, terms, &rows, longest + 3);
            let mut out = vec![9.0; x[0].len()];
            disentangled(&shape, &segments, [&x[0], &x[1], &x[2]], positions, &mut out);
            for (a, b) in out.iter().zip(reference(&shape, &segments, &x, positions)) {
                assert!((f64::from(*a) - b).abs() < 1e-5, "{a} {b}"); // means of numbers below 1
            }
        }
    }
}

/// Output and all gradients.
fn run(
    shape: &AttentionShape,
    segments: &[Segment],
    x: &Inputs,
    positions: Positions,
    dout: &[f32],
) -> Vec<Vec<f32>> {
    let mut out = vec![9.0; x[0].len()];
    let qkv = [&x[0][..], &x[1], &x[2]];
    disentangled(shape, segments, qkv, positions, &mut out);
    let mut grads: Vec<Vec<f32>> = x.iter().map(|x| vec![9.0; x.len()]).collect();
    let [dq, dk, dv, dkeys, dqueries] = grads.as_mut_slice() else { unreachable!() };
    let tables = [positions.keys.map(|_| &mut dkeys[..]), positions.queries.map(|_| &mut dqueries[..])];
    disentangled_backward(shape, segments, qkv, positions, dout, [dq, dk, dv], tables);
    grads.push(out);
    grads
}

#[test]
fn backward_agrees_with_finite_differences() {
    let (heads, hd, lengths) = (2, 8, [70, 3, 1, 40, 9]);
    let shape = AttentionShape::new(heads, heads, hd, 0.3, false);
    let (n, rows, segments) = (lengths.iter().sum(), rows(70, 20), segments(&lengths));
    let table_rows = 1 + *rows.iter().max().unwrap() as usize;
    let x = inputs(n, table_rows, heads * hd);
    let dout = numbers(6, x[0].len());
    for terms in ALL {
        let grads = run(&shape, &segments, &x, positions(&x, terms, &rows, 70), &dout);
        let loss = |x: &Inputs| -> f64 {
            let out = reference(&shape, &segments, x, positions(x, terms, &rows, 70));
            out.iter().zip(&dout).map(|(o, g)| o * f64::from(*g)).sum()
        };
        let there = [true, true, true, terms.0, terms.1];
        for which in (0..5).filter(|which| there[*which]) {
            for i in (0..x[which].len()).step_by(61) {
                let moved = |delta: f32| {
                    let mut x = x.clone();
                    x[which][i] += delta;
                    loss(&x)
                };
                let h = 1e-3f32;
                let slope = (moved(h) - moved(-h)) / (2.0 * f64::from(h));
                let got = f64::from(grads[which][i]);
                // the step's own rounding in f32 is 1e-4 of it
                assert!((slope - got).abs() < 1e-3 * slope.abs().max(0.1), "{which} {i}: {slope} {got}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let shape = AttentionShape::new(1, 1, 8, 0.2, false);
    let x = inputs(6, 7, 8);
    let refused = |segments: &[Segment], rows: &[u32], zero: usize| {
        let run = || {
            let positions = positions(&x, Terms(true, false), rows, zero);
            disentangled(&shape, segments, [&x[0], &x[1], &x[2]], positions, &mut vec![0.0; x[0].len()])
        };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err()
    };
    let (two, all) = (segments(&[4, 2]), [0, 1, 2, 3, 4, 5, 6]);
    assert!(!refused(&two, &all, 3));
    assert!(refused(&two, &all, 2), "distance 4 has no row");
    assert!(refused(&two, &[0, 1, 2, 3, 4, 5, 7], 3), "row 7 of 7");
    assert!(refused(&[two[1].clone(), two[0].clone()], &all, 3), "not in order");
    assert!(refused(&segments(&[4, 3]), &all, 3), "beyond the tokens");
}

#[test]
fn threads_do_not_change_a_bit() {
    let shape = AttentionShape::new(3, 3, 16, 0.25, false);
    let (segments, rows) = (segments(&[40, 66, 3, 20, 9]), rows(66, 30));
    let x = inputs(138, 1 + *rows.iter().max().unwrap() as usize, 48);
    let in_threads = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let positions = positions(&x, Terms(true, true), &rows, 66);
        pool.install(|| run(&shape, &segments, &x, positions, &x[1]))
    };
    assert_eq!(in_threads(1), in_threads(2));
}
