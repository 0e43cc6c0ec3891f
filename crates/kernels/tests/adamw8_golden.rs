//! 20 steps of 8-bit AdamW beside bitsandbytes' (`golden/adamw8bit.py`).

use engobe_kernels::adamw::AdamWStep;
use engobe_kernels::adamw8::{self, Moment8};
use engobe_kernels::codec::dynamic;
use engobe_kernels::dropout::mix;

const FILE: &[u8] = include_bytes!("golden/adamw8bit.bin");

/// What is left of the file.
struct Rest(&'static [u8]);

impl Rest {
    fn bytes(&mut self, n: usize) -> &'static [u8] {
        let (head, tail) = self.0.split_at(n);
        self.0 = tail;
        head
    }
    fn floats(&mut self, n: usize) -> Vec<f32> {
        self.bytes(4 * n).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let of = |i: usize| {
        let value = ((mix(seed, i as u64) & 0xFFFF) as f32 - 32768.0) / 32768.0;
        if i % 20 == 7 { value / 1024.0 } else { value }
    };
    (0..n).map(of).collect()
}

#[test]
fn twenty_steps_follow_bitsandbytes() {
    let mut file = Rest(FILE);
    assert_eq!(file.bytes(8), b"EGAD8B01");
    let n = u32::from_le_bytes(file.bytes(4).try_into().unwrap()) as usize;
    assert_eq!(file.floats(256), dynamic::map());
    assert_eq!(file.floats(256), dynamic::unsigned_map());
    let blocks = adamw8::blocks(n);
    let mut p = numbers(0, n);
    let (mut c1, mut c2) = (vec![0u8; n], vec![0u8; n]);
    let (mut d1, mut d2) = (vec![0f32; blocks], vec![0f32; blocks]);
    for t in 1..=20 {
        let step = AdamWStep {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            bias_correction1: (1.0 - 0.9f64.powi(t)) as f32,
            bias_correction2: (1.0 - 0.999f64.powi(t)) as f32,
            grad_scale: 1.0,
        };
        let m = Moment8 { codes: &mut c1, absmax: &mut d1 };
        let v = Moment8 { codes: &mut c2, absmax: &mut d2 };
        adamw8::adamw8_step(&step, &mut p, &numbers(t as u64, n), m, v);
        if ![1, 2, 5, 20].contains(&t) {
            continue;
        }
        let expected = file.floats(n);
        for (codes, what) in [(&c1, "first"), (&c2, "second")] {
            let theirs = file.bytes(n);
            let off = codes.iter().zip(theirs).filter(|(a, b)| a != b).count();
            assert!(codes.iter().zip(theirs).all(|(a, b)| a.abs_diff(*b) <= 1), "{what} moment, step {t}");
            // products and sums are rounded in another order: moments that lie on a midpoint may take the other side
            assert!(off <= n / 200, "{what} moment, step {t}: {off} of {n} codes differ");
        }
        for (ours, theirs) in [(&d1, file.floats(blocks)), (&d2, file.floats(blocks))] {
            // a maximum that took the other side before differs by a part of a code's step
            assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() <= 2e-3 * b), "step {t}");
        }
        // where a code differs, the next step differs by about a tenth of that code's width: 0.7 % of lr
        let worst = p.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let mean = p.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / n as f64;
        assert!(worst < 2e-3 && mean < 1e-6, "step {t}: worst {worst:.1e}, mean {mean:.1e}");
    }
    assert!(file.0.is_empty());
}
