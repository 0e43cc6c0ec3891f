//! AdamW whose moments are kept in 8 bits (Dettmers et al. 2022), as bitsandbytes' `AdamW8bit` does it.
//!
//! The moments of a parameter lie in blocks of [`BLOCK`] elements: a code for each element and one factor D for each
//! block. The first moment takes the signed dynamic map, the second the unsigned one ([`crate::codec::dynamic`]). A step
//! goes block by block through what a step of [`crate::adamw`] does:
//!
//! ```text
//! m = map[codes₁]·D₁      v = umap[codes₂]·D₂                      decode
//! m ← β₁m + (1-β₁)g       v ← β₂v + (1-β₂)g²                       p moves by these, before they are rounded
//! D₁ = max|m|             codes₁ = nearest entries to m / D₁       encode; likewise the second moment
//! ```
//!
//! 2.03 bytes an element instead of 8. All-zero codes with D = 0 are moments of zero, whatever the map says of code 0.
//!
//! Finding the nearest entry: entries are at least 0.7 % apart, and the upper half of a float's bits fixes it to 0.8 %
//! of the power of two below it. So a table over those 16 bits gives a code that is right or one too low, and one
//! comparison with the midpoint above it settles which (`Encoder` checks this when it is built).

use crate::adamw::AdamWStep;
use crate::codec::dynamic;
use crate::codec::simd::multiversion;
use rayon::prelude::*;
use std::sync::OnceLock;

/// Elements that share a factor.
pub const BLOCK: usize = 256;
/// Parameters with fewer elements than this keep f32 moments, as in bitsandbytes (`min_8bit_size`).
pub const LEAST_ELEMENTS: usize = 4096;
/// Blocks of a parallel part.
const PART: usize = 64;

/// A moment in 8 bits.
#[derive(Debug)]
pub struct Moment8<'a> {
    /// one code for each element
    pub codes: &'a mut [u8],
    /// one factor for each block
    pub absmax: &'a mut [f32],
}

/// Factors that a moment of `len` elements needs.
pub fn blocks(len: usize) -> usize {
    len.div_ceil(BLOCK)
}

/// One AdamW step on parameters `p` with gradients `g`, the first moment `m` and the second `v`.
///
/// Panics if lengths do not fit. Gradients must be finite.
pub fn adamw8_step(step: &AdamWStep, p: &mut [f32], g: &[f32], m: Moment8<'_>, v: Moment8<'_>) {
    assert!(p.len() == g.len() && p.len() == m.codes.len() && p.len() == v.codes.len());
    assert!(m.absmax.len() == blocks(p.len()) && v.absmax.len() == blocks(p.len()));
    let parts = p.par_chunks_mut(PART * BLOCK).zip(g.par_chunks(PART * BLOCK));
    let m = m.codes.par_chunks_mut(PART * BLOCK).zip(m.absmax.par_chunks_mut(PART));
    let v = v.codes.par_chunks_mut(PART * BLOCK).zip(v.absmax.par_chunks_mut(PART));
    parts.zip(m.zip(v)).for_each(|((p, g), ((mc, md), (vc, vd)))| part(step, p, g, mc, md, vc, vd));
}

multiversion!(fn part(
    s: &AdamWStep,
    p: &mut [f32],
    g: &[f32],
    m_codes: &mut [u8],
    m_absmax: &mut [f32],
    v_codes: &mut [u8],
    v_absmax: &mut [f32],
) = part_body);

#[inline(always)]
fn part_body(
    s: &AdamWStep,
    p: &mut [f32],
    g: &[f32],
    m_codes: &mut [u8],
    m_absmax: &mut [f32],
    v_codes: &mut [u8],
    v_absmax: &mut [f32],
) {
    let (signed, unsigned) = (Encoder::signed(), Encoder::unsigned());
    let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
    let codes = m_codes.chunks_mut(BLOCK).zip(v_codes.chunks_mut(BLOCK));
    let factors = m_absmax.iter_mut().zip(v_absmax);
    for (((p, g), (mc, vc)), (md, vd)) in p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).zip(codes).zip(factors) {
        let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
        signed.decode(mc, *md, m);
        unsigned.decode(vc, *vd, v);
        update(s, p, g, m, v);
        *md = signed.encode(m, mc);
        *vd = unsigned.encode(v, vc);
    }
}

/// The step of `crate::adamw` in the order of operations that bitsandbytes has.
#[inline(always)]
fn update(s: &AdamWStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let decay = 1.0 - s.lr * s.weight_decay;
    let (step_size, root) = (s.lr / s.bias_correction1, s.bias_correction2.sqrt());
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * s.grad_scale;
        *m = *m * s.beta1 + (1.0 - s.beta1) * g;
        *v = *v * s.beta2 + (1.0 - s.beta2) * g * g;
        *p = *p * decay - step_size * (*m / (v.sqrt() / root + s.eps));
    }
}

/// A map, and what finds the entry nearest to a number.
struct Encoder {
    map: &'static [f32; 256],
    /// midpoints of neighbours, and infinity
    middles: [f32; 256],
    /// by the upper half of a float's bits: the code of the smallest number that has them
    coarse: Box<[u8; 1 << 16]>,
}

impl Encoder {
    fn signed() -> &'static Self {
        static SIGNED: OnceLock<Encoder> = OnceLock::new();
        SIGNED.get_or_init(|| Self::new(dynamic::map()))
    }

    fn unsigned() -> &'static Self {
        static UNSIGNED: OnceLock<Encoder> = OnceLock::new();
        UNSIGNED.get_or_init(|| Self::new(dynamic::unsigned_map()))
    }

    fn new(map: &'static [f32; 256]) -> Self {
        let middles = std::array::from_fn(|i| match map.get(i + 1) {
            Some(next) => (map[i] + next) / 2.0,
            None => f32::INFINITY,
        });
        let mut coarse = Box::new([0u8; 1 << 16]);
        for (upper, code) in coarse.iter_mut().enumerate() {
            let ends = [upper << 16, upper << 16 | 0xFFFF].map(|bits| f32::from_bits(bits as u32));
            let (low, high) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
            if (-1.0..=1.0).contains(&low) {
                *code = nearest(&middles, low);
                // quotients end at 1 and an ulp or two
                let most = nearest(&middles, high.min(1.0 + 1e-6));
                assert!(most - *code <= 1, "two midpoints between {low} and {high}");
            }
        }
        Self { map, middles, coarse }
    }

    #[inline(always)]
    fn decode(&self, codes: &[u8], absmax: f32, out: &mut [f32]) {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = self.map[usize::from(*code)] * absmax;
        }
    }

    /// Writes the codes and returns the factor.
    #[inline(always)]
    fn encode(&self, x: &[f32], codes: &mut [u8]) -> f32 {
        let absmax = x.iter().fold(0f32, |most, x| most.max(x.abs()));
        let factor = 1.0 / absmax.max(1e-38);
        for (x, code) in x.iter().zip(codes) {
            // rounding must not lead past the ends, where the table holds nothing
            let x = (x * factor).clamp(-1.0, 1.0);
            let low = self.coarse[(x.to_bits() >> 16) as usize];
            *code = low + u8::from(x > self.middles[usize::from(low)]);
        }
        absmax
    }
}

/// Number of midpoints below `x`.
fn nearest(middles: &[f32; 256], x: f32) -> u8 {
    middles[..255].partition_point(|m| x > *m) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dropout::mix;

    /// The derivation's three lines, element by element, searching the whole map.
    fn reference(s: &AdamWStep, p: &mut [f32], g: &[f32], m: &mut Stored, v: &mut Stored) {
        for start in (0..p.len()).step_by(BLOCK) {
            let range = start..p.len().min(start + BLOCK);
            let decode =
                |map: &[f32; 256], x: &Stored, i: usize| map[x.codes[i] as usize] * x.absmax[start / BLOCK];
            let mut ms: Vec<f32> = range.clone().map(|i| decode(dynamic::map(), m, i)).collect();
            let mut vs: Vec<f32> = range.clone().map(|i| decode(dynamic::unsigned_map(), v, i)).collect();
            for (k, i) in range.clone().enumerate() {
                let g = g[i] * s.grad_scale;
                ms[k] = ms[k] * s.beta1 + (1.0 - s.beta1) * g;
                vs[k] = vs[k] * s.beta2 + (1.0 - s.beta2) * g * g;
                let denominator = vs[k].sqrt() / s.bias_correction2.sqrt() + s.eps;
                p[i] =
                    p[i] * (1.0 - s.lr * s.weight_decay) - s.lr / s.bias_correction1 * (ms[k] / denominator);
            }
            for (map, x, values) in [(dynamic::map(), &mut *m, &ms), (dynamic::unsigned_map(), &mut *v, &vs)]
            {
                let absmax = values.iter().fold(0f32, |a, b| a.max(b.abs()));
                x.absmax[start / BLOCK] = absmax;
                for (k, i) in range.clone().enumerate() {
                    let target = (values[k] * (1.0 / absmax.max(1e-38))).clamp(-1.0, 1.0);
                    x.codes[i] = (0..255).filter(|c| target > (map[*c] + map[c + 1]) / 2.0).count() as u8;
                }
            }
        }
    }

    #[derive(Clone, PartialEq, Debug)]
    struct Stored {
        codes: Vec<u8>,
        absmax: Vec<f32>,
    }

    impl Stored {
        fn zero(len: usize) -> Self {
            Self { codes: vec![0; len], absmax: vec![0.0; blocks(len)] }
        }
        fn parts(&mut self) -> Moment8<'_> {
            Moment8 { codes: &mut self.codes, absmax: &mut self.absmax }
        }
    }

    fn step(t: i32) -> AdamWStep {
        AdamWStep {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            bias_correction1: 1.0 - 0.9f32.powi(t),
            bias_correction2: 1.0 - 0.999f32.powi(t),
            grad_scale: 0.5,
        }
    }

    #[test]
    fn equals_the_reference_bit_for_bit() {
        for n in [1, 255, 256, 257, 4096, PART * BLOCK * 2 + 77] {
            let mut p: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut q = p.clone();
            let [mut m, mut v, mut m2, mut v2] = [0; 4].map(|_| Stored::zero(n));
            for t in 1..=5 {
                let random = |i: usize| mix(t as u64, i as u64) as i64 as f32 / i64::MAX as f32;
                // numbers of all sizes, and blocks of zeros
                let g: Vec<f32> = (0..n)
                    .map(|i| if i / 256 % 3 == 2 { 0.0 } else { random(i) * 10f32.powi(-((i % 11) as i32)) })
                    .collect();
                adamw8_step(&step(t), &mut p, &g, m.parts(), v.parts());
                reference(&step(t), &mut q, &g, &mut m2, &mut v2);
                assert_eq!((&m, &v), (&m2, &v2), "{n} elements, step {t}");
                assert_eq!(p, q);
            }
        }
    }

    #[test]
    fn the_table_finds_the_nearest_entry() {
        for encoder in [Encoder::signed(), Encoder::unsigned()] {
            // every float that is near a midpoint, and many between
            let near = |m: f32| (-3i32..=3).map(move |d| f32::from_bits(m.to_bits().wrapping_add_signed(d)));
            let all: Vec<f32> = encoder.middles[..255].iter().copied().flat_map(near).collect();
            let between = (-200_000..=200_000).map(|i| i as f32 / 200_000.0);
            for x in all.into_iter().chain(between).filter(|x| x.abs() <= 1.0) {
                let mut codes = [0u8; 2];
                // 1 first: the factor is 1
                encoder.encode(&[1.0, x], &mut codes);
                assert_eq!(codes[1], nearest(&encoder.middles, x), "{x}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let mut p = vec![1f32; 300];
        let (mut m, mut v) = (Stored::zero(300), Stored::zero(300));
        let still = AdamWStep { weight_decay: 0.0, ..step(1) };
        adamw8_step(&still, &mut p, &[0.0; 300], m.parts(), v.parts());
        assert!(p.iter().all(|p| *p == 1.0) && m.absmax == [0.0, 0.0]);
    }
}
