//! Decoding weights, on one thread. Operations: one product and one sum an element.

use crate::linear::bytes;
use crate::{F, FFN, measure};
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
}
