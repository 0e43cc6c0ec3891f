//! From f32 to ggml's Q4_K, Q5_K and Q6_K, by the searches of `quantize_row_q4_K_ref` and its siblings.
//!
//! **Q4_K, Q5_K.** A sub-block x of 32 is approximated by s·q - n with whole q in 0..=N (N = 15 or 31) and s, n >= 0.
//! Each candidate step i divides the range into N + r + 0.1·i parts, which fixes q; for fixed q the best s and
//! m = -n minimise E = Σ w(s·q + m - x)². With W = Σw, X = Σwx, L = Σwq, Q = Σwq², P = Σwqx, setting both
//! derivatives to zero gives
//!
//! ```text
//! D = W·Q - L²        s = (W·P - X·L) / D        m = (Q·X - L·P) / D
//! ```
//!
//! or, where m would be positive, m = 0 and s = P/Q. The step with the least E wins. Weights are
//! w = rms(x) + |x|, so that large elements err less. The eight s and n are then rounded to 6 bits under one f16
//! each, and q is chosen again for what they became.
//!
//! **Q6_K.** A sub-block of 16 is approximated by s·q, q in -32..32, with w = x² and s = Σwqx / Σwq² for each of
//! 19 candidate steps; the largest (Σwqx)² / Σwq² has the least error. Scales are rounded to 8 bits under one f16.
//!
//! Sums run in ggml's order, each rounded on its own, so that blocks equal ggml's bit for bit. Layouts: `kquants.rs`.

use half::f16;

/// ggml takes a sub-block of smaller scales for zeros.
const NOTHING: f32 = 1e-15;

/// Appends Q4_K blocks.
pub(super) fn q4_k(x: &[f32], out: &mut Vec<u8>) {
    let search = Search { most: 15, first: -1.0, steps: 20 };
    for x in x.as_chunks::<256>().0 {
        let block = with_minimum(x, search);
        push_header(&block, out);
        for pair in block.levels.as_chunks::<64>().0 {
            out.extend((0..32).map(|l| pair[l] | pair[32 + l] << 4));
        }
    }
}

/// Appends Q5_K blocks.
pub(super) fn q5_k(x: &[f32], out: &mut Vec<u8>) {
    let search = Search { most: 31, first: -0.5, steps: 15 };
    for x in x.as_chunks::<256>().0 {
        let block = with_minimum(x, search);
        push_header(&block, out);
        let fifth = |l: usize| (0..8).fold(0, |bits, g| bits | block.levels[32 * g + l] >> 4 << g);
        out.extend((0..32).map(fifth));
        for pair in block.levels.as_chunks::<64>().0 {
            out.extend((0..32).map(|l| pair[l] & 15 | (pair[32 + l] & 15) << 4));
        }
    }
}

/// Appends Q6_K blocks.
pub(super) fn q6_k(x: &[f32], out: &mut Vec<u8>) {
    for x in x.as_chunks::<256>().0 {
        let (d, scales, levels) = around_zero(x);
        for half in levels.as_chunks::<128>().0 {
            out.extend((0..64).map(|l| half[l] & 15 | (half[64 + l] & 15) << 4));
        }
        for half in levels.as_chunks::<128>().0 {
            let high = |l: usize| (0..4).fold(0, |bits, r| bits | half[32 * r + l] >> 4 << (2 * r));
            out.extend((0..32).map(high));
        }
        out.extend(scales.map(|s| s as u8));
        out.extend(d.to_le_bytes());
    }
}

/// ggml's `nearest_int`: halves to even.
fn nearest(x: f32) -> i32 {
    x.round_ties_even() as i32
}

/// How Q4_K and Q5_K look for scale and minimum.
#[derive(Clone, Copy)]
struct Search {
    /// highest level
    most: u8,
    /// parts that the first candidate adds to `most`
    first: f32,
    /// candidates beside the first, each a tenth of a part on
    steps: usize,
}

/// A block of Q4_K or Q5_K before it is packed.
struct Block {
    d: f16,
    dmin: f16,
    scales: [u8; 8],
    mins: [u8; 8],
    levels: [u8; 256],
}

fn with_minimum(x: &[f32; 256], search: Search) -> Block {
    let mut levels = [0u8; 256];
    let (mut scales, mut mins) = ([0f32; 8], [0f32; 8]);
    let parts = x.as_chunks::<32>().0.iter().zip(levels.as_chunks_mut::<32>().0);
    for (g, (x, levels)) in parts.enumerate() {
        (scales[g], mins[g]) = sub_block(x, search, levels);
    }
    let largest = |values: &[f32; 8]| values.iter().fold(0f32, |most, v| if *v > most { *v } else { most });
    let (max_scale, max_min) = (largest(&scales), largest(&mins));
    let six_bits = |value: f32, largest: f32| {
        let inverse = if largest > 0.0 { 63.0 / largest } else { 0.0 };
        nearest(inverse * value).clamp(0, 63) as u8
    };
    let scales = scales.map(|s| six_bits(s, max_scale));
    let mins = mins.map(|m| six_bits(m, max_min));
    let (d, dmin) = (f16::from_f32(max_scale / 63.0), f16::from_f32(max_min / 63.0));
    let parts = x.as_chunks::<32>().0.iter().zip(levels.as_chunks_mut::<32>().0);
    for (g, (x, levels)) in parts.enumerate() {
        let scale = d.to_f32() * f32::from(scales[g]);
        if scale == 0.0 {
            continue; // the levels of the search stay; nothing reads them
        }
        let min = dmin.to_f32() * f32::from(mins[g]);
        for (level, x) in levels.iter_mut().zip(x) {
            *level = nearest((x + min) / scale).clamp(0, i32::from(search.most)) as u8;
        }
    }
    Block { d, dmin, scales, mins, levels }
}

/// Scale and minimum (as a positive number to be subtracted) of 32 elements, and their levels.
fn sub_block(x: &[f32; 32], search: Search, best: &mut [u8; 32]) -> (f32, f32) {
    let squares = x.iter().fold(0f32, |sum, x| sum + x * x);
    let rms = (squares / 32.0).sqrt();
    let weights = x.map(|x| rms + x.abs());
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (x, w) in x.iter().zip(&weights).skip(1) {
        min = if *x < min { *x } else { min };
        max = if *x > max { *x } else { max };
        sum_w += w;
        sum_x += w * x;
    }
    min = if min > 0.0 { 0.0 } else { min };
    if max == min {
        *best = [0; 32];
        return (0.0, -min);
    }
    let most = f32::from(search.most);
    let levels_at = |inverse: f32, low: f32| {
        x.map(|x| nearest(inverse * (x - low)).clamp(0, i32::from(search.most)) as u8)
    };
    let error = |levels: &[u8; 32], scale: f32, low: f32| {
        let each = levels.iter().zip(x).zip(&weights);
        each.fold(0f32, |sum, ((level, x), w)| {
            let diff = scale * f32::from(*level) + low - x;
            sum + w * (diff * diff)
        })
    };
    let low = min;
    let inverse = most / (max - low);
    let mut scale = 1.0 / inverse;
    *best = levels_at(inverse, low);
    let mut least = error(best, scale, low);
    for step in 0..=search.steps {
        // the range begins at the minimum that is best so far, as in ggml
        let inverse = (search.first + 0.1 * step as f32 + most) / (max - min);
        let levels = levels_at(inverse, min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0f32, 0f32, 0f32);
        for ((level, x), w) in levels.iter().zip(x).zip(&weights) {
            let l = f32::from(*level);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        // (a NaN is not above zero)
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut this_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if this_min > 0.0 {
                this_min = 0.0;
                this_scale = sum_xl / sum_l2;
            }
            let this_error = error(&levels, this_scale, this_min);
            if this_error < least {
                *best = levels;
                (least, scale, min) = (this_error, this_scale, this_min);
            }
        }
    }
    (scale, -min)
}

/// d, dmin and the packed scales and minima, as Q4_K and Q5_K begin.
fn push_header(block: &Block, out: &mut Vec<u8>) {
    out.extend(block.d.to_le_bytes());
    out.extend(block.dmin.to_le_bytes());
    let (s, n) = (&block.scales, &block.mins);
    out.extend((0..4).map(|g| s[g] | s[4 + g] >> 4 << 6));
    out.extend((0..4).map(|g| n[g] | n[4 + g] >> 4 << 6));
    out.extend((4..8).map(|g| s[g] & 15 | (n[g] & 15) << 4));
}

/// d, scales and levels (0..64) of a Q6_K block.
fn around_zero(x: &[f32; 256]) -> (f16, [i8; 16], [u8; 256]) {
    let mut levels = [0u8; 256];
    let mut scales = [0f32; 16];
    let (mut largest, mut max_scale) = (0f32, 0f32);
    let parts = x.as_chunks::<16>().0.iter().zip(levels.as_chunks_mut::<16>().0);
    for (j, (x, levels)) in parts.enumerate() {
        scales[j] = signed_scale(x, levels);
        if scales[j].abs() > largest {
            (largest, max_scale) = (scales[j].abs(), scales[j]);
        }
    }
    // (a NaN among the scales leaves `largest` as it was)
    if largest < NOTHING {
        return (f16::ZERO, [0; 16], [0; 256]);
    }
    let inverse = -128.0 / max_scale;
    let d = f16::from_f32(1.0 / inverse);
    let scales = scales.map(|s| nearest(inverse * s).clamp(-128, 127) as i8);
    let parts = x.as_chunks::<16>().0.iter().zip(levels.as_chunks_mut::<16>().0);
    for (j, (x, levels)) in parts.enumerate() {
        let scale = d.to_f32() * f32::from(scales[j]);
        if scale == 0.0 {
            continue;
        }
        for (level, x) in levels.iter_mut().zip(x) {
            *level = (nearest(x / scale).clamp(-32, 31) + 32) as u8;
        }
    }
    (d, scales, levels)
}

/// The scale of 16 elements, and their levels (0..64).
fn signed_scale(x: &[f32; 16], best: &mut [u8; 16]) -> f32 {
    let largest = x.iter().fold(0f32, |best, &x| if x.abs() > best.abs() { x } else { best });
    if largest.abs() < NOTHING {
        *best = [0; 16];
        return 0.0;
    }
    let levels_at = |inverse: f32| x.map(|x| nearest(inverse * x).clamp(-32, 31));
    let sums = |levels: &[i32; 16]| {
        levels.iter().zip(x).fold((0f32, 0f32), |(xl, l2), (level, x)| {
            let (w, l) = (x * x, *level as f32);
            (xl + w * x * l, l2 + w * l * l)
        })
    };
    let stored = |levels: [i32; 16]| levels.map(|l| (l + 32) as u8);
    let levels = levels_at(-32.0 / largest);
    *best = stored(levels);
    let (sum_xl, sum_l2) = sums(&levels);
    let mut scale = if sum_l2 != 0.0 { sum_xl / sum_l2 } else { 0.0 };
    let mut most = scale * sum_xl;
    for step in (-9..=9).filter(|step| *step != 0) {
        let levels = levels_at(-(32.0 + 0.1 * step as f32) / largest);
        let (sum_xl, sum_l2) = sums(&levels);
        if sum_l2 > 0.0 && sum_xl * sum_xl > most * sum_l2 {
            *best = stored(levels);
            scale = sum_xl / sum_l2;
            most = scale * sum_xl;
        }
    }
    scale
}
