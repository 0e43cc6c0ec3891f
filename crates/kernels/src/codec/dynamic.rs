//! The signed dynamic map of 8-bit numbers (Dettmers 2016), and its blocks.
//!
//! Besides 0 and 1 the map holds, for i = 0..7, the numbers ±10^(i-6)·mᵢⱼ with mᵢⱼ the 2^i midpoints of as many equal
//! parts of 0.1..1: small numbers have a coarse mantissa, large ones a fine one. In bitsandbytes it is called
//! `create_dynamic_map`. An array is quantized in blocks: D = max|x|, code = the entry nearest to x / D.

use std::sync::OnceLock;

/// Decimal exponents.
const EXPONENTS: u32 = 7;

/// The 256 numbers, ascending.
pub fn map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut numbers = vec![0.0, 1.0];
        for i in 0..EXPONENTS {
            let scale = 10f64.powi(i as i32 - EXPONENTS as i32 + 1) as f32;
            let edges = linspace(0.1, 1.0, (1 << i) + 1);
            for pair in edges.windows(2) {
                let number = scale * ((pair[0] + pair[1]) / 2.0);
                numbers.extend([number, -number]);
            }
        }
        numbers.sort_by(f32::total_cmp);
        let mut map = [0.0; 256];
        map.copy_from_slice(&numbers);
        map
    })
}

/// `torch.linspace` in f32: fused steps from the start in the first half, from the end in the second.
fn linspace(start: f32, end: f32, n: usize) -> Vec<f32> {
    let step = (end - start) / (n - 1) as f32;
    let at = |i: usize| match i < n / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((n - 1 - i) as f32, end),
    };
    (0..n).map(at).collect()
}

/// Midpoints of neighbours in the map.
fn middles() -> &'static [f32; 255] {
    static MIDDLES: OnceLock<[f32; 255]> = OnceLock::new();
    MIDDLES.get_or_init(|| std::array::from_fn(|i| (map()[i] + map()[i + 1]) / 2.0))
}

/// Quantizes `x` in blocks of `block` elements; the last may be shorter. Elements must be finite.
///
/// Panics unless `codes` is as long as `x` and `absmax` has one number for each block.
pub fn encode_blocks(block: usize, x: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    assert_eq!((codes.len(), absmax.len()), (x.len(), x.len().div_ceil(block)));
    let middles = middles();
    for ((x, codes), absmax) in x.chunks(block).zip(codes.chunks_mut(block)).zip(absmax) {
        *absmax = x.iter().fold(0f32, |most, x| most.max(x.abs()));
        let factor = 1.0 / absmax.max(1e-38);
        for (x, code) in x.iter().zip(codes) {
            *code = middles.partition_point(|m| x * factor > *m) as u8;
        }
    }
}

/// `out[i] = map[codes[i]] · absmax[i / block]`. Panics unless the lengths fit.
pub fn decode_blocks(block: usize, codes: &[u8], absmax: &[f32], out: &mut [f32]) {
    assert_eq!((out.len(), absmax.len()), (codes.len(), codes.len().div_ceil(block)));
    let map = map();
    for ((codes, out), absmax) in codes.chunks(block).zip(out.chunks_mut(block)).zip(absmax) {
        for (code, out) in codes.iter().zip(out) {
            *out = map[*code as usize] * absmax;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_ascends_and_holds_its_ends() {
        assert!(map().windows(2).all(|w| w[0] < w[1]));
        assert_eq!((map()[127], map()[255]), (0.0, 1.0));
    }

    #[test]
    fn entries_come_back() {
        let x: Vec<f32> = map().iter().map(|m| m * 3.0).collect();
        let (mut codes, mut absmax) = (vec![0; 256], vec![0.0; 1]);
        encode_blocks(256, &x, &mut codes, &mut absmax);
        assert_eq!(codes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(absmax, [3.0]);
        let mut out = vec![0.0; 256];
        decode_blocks(256, &codes, &absmax, &mut out);
        for (a, b) in out.iter().zip(&x) {
            assert_eq!(a, b);
        }
    }

    #[test]
    fn a_short_last_block_has_its_own_factor() {
        let x: Vec<f32> = (0..100).map(|i| if i < 64 { i as f32 } else { -0.5 }).collect();
        let (mut codes, mut absmax) = (vec![0; 100], vec![0.0; 2]);
        encode_blocks(64, &x, &mut codes, &mut absmax);
        assert_eq!(absmax, [63.0, 0.5]);
        let mut out = vec![0.0; 100];
        decode_blocks(64, &codes, &absmax, &mut out);
        // the lowest entry is -0.993: the map has no -1
        assert!(out[64..].iter().all(|v| (v + 0.5).abs() < 0.004), "{out:?}");
    }
}
