//! Decoding weights, on one thread, and quantizing them, on all. Operations: one product and one sum an element.

use crate::linear::{SCHEMES, bytes, floats, quantized, stored};
use crate::{F, FFN, WIDTH, measure};
use criterion::Criterion;
use engobe_kernels::codec::decode;
use engobe_kernels::storage::StorageType;

pub fn all(c: &mut Criterion) {
    for storage in StorageType::ALL {
        let data = bytes(storage, 1, 64 * FFN);
        let mut out = vec![0f32; 64 * FFN];
        let moved = data.len() + out.len() * F;
        measure(c, &format!("decode {storage}, one thread"), 2 * out.len(), moved, || {
            decode(storage, &data, &mut out)
        });
    }
    let data = floats(FFN, WIDTH);
    let mut out = vec![0f32; FFN * WIDTH];
    for scheme in SCHEMES {
        let weight = quantized(scheme, &data, FFN, WIDTH);
        let w = weight.view().expect("whole");
        let moved = stored(scheme, FFN, WIDTH) + out.len() * F;
        measure(c, &format!("decode {scheme}, one thread"), 2 * out.len(), moved, || {
            w.decode_rows(0..FFN, &mut out)
        });
        measure(c, &format!("quantize {scheme}"), 2 * out.len(), moved, || {
            drop(quantized(scheme, &data, FFN, WIDTH))
        });
    }
}
