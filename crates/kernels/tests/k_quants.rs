//! Q4_K, Q5_K and Q6_K encoded as ggml does, bit for bit. `golden/k_quant_blocks.py` made the golden file.

use engobe_kernels::codec::{decode, encode, encode_parallel};
use engobe_kernels::storage::StorageType;
use proptest::prelude::*;

fn golden() -> Vec<(StorageType, Vec<u8>, Vec<f32>)> {
    let mut rest = include_bytes!("golden/k_quant_blocks.bin").strip_prefix(b"EGKQUANT").expect("magic");
    let mut take = |n: usize| {
        let (taken, left) = rest.split_at(n);
        rest = left;
        (taken.to_vec(), left.is_empty())
    };
    let word = |b: Vec<u8>| u32::from_le_bytes(b.try_into().expect("4 bytes")) as usize;
    let mut records = Vec::new();
    loop {
        let storage = match take(1).0[0] {
            12 => StorageType::Q4_K,
            13 => StorageType::Q5_K,
            14 => StorageType::Q6_K,
            other => panic!("type {other}"),
        };
        let (bytes, elements) = (word(take(4).0), word(take(4).0));
        let bytes = take(bytes).0;
        let (values, at_end) = take(4 * elements);
        let values =
            values.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect();
        records.push((storage, bytes, values));
        if at_end {
            return records;
        }
    }
}

#[test]
fn blocks_are_those_of_ggml() {
    let golden = golden();
    assert_eq!(golden.len(), 3);
    for (storage, expected, values) in golden {
        let mut out = vec![0xaa];
        encode(storage, &values, &mut out).unwrap();
        let size = storage.block_bytes();
        for (i, (found, expected)) in out[1..].chunks(size).zip(expected.chunks(size)).enumerate() {
            assert_eq!(found, expected, "{storage} block {i}");
        }
        assert_eq!(out.len(), expected.len() + 1);
        assert_eq!(encode_parallel(storage, &values).unwrap(), expected);
    }
}

#[test]
fn many_blocks_in_parallel_are_those_of_one_thread() {
    let (storage, expected, values) = golden().remove(0);
    // beyond two parallel chunks of 65536 elements
    let times = 140_000 / values.len() + 1;
    assert_eq!(encode_parallel(storage, &values.repeat(times)).unwrap(), expected.repeat(times));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    /// What is stored lies near what was given: by less than a level of the sub-block's range, and half of one of
    /// the rounding of its scale and minimum to 6 (8) bits of the block's largest.
    #[test]
    fn decoded_blocks_are_near(values in prop::collection::vec(-1.0f32..1.0, 256)) {
        for (storage, levels) in [(StorageType::Q4_K, 15.0), (StorageType::Q5_K, 31.0), (StorageType::Q6_K, 31.0)] {
            let mut bytes = Vec::new();
            encode(storage, &values, &mut bytes).unwrap();
            let mut out = vec![0f32; 256];
            decode(storage, &bytes, &mut out);
            for (x, y) in values.iter().zip(&out) {
                prop_assert!((x - y).abs() < 2.0 * (1.0 / levels + 1.5 / 63.0), "{} {} {}", storage, x, y);
            }
        }
    }

    #[test]
    fn any_numbers_are_encoded_without_a_panic(bits in prop::collection::vec(any::<u32>(), 256)) {
        let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        for storage in [StorageType::Q4_K, StorageType::Q5_K, StorageType::Q6_K] {
            let mut bytes = Vec::new();
            encode(storage, &values, &mut bytes).unwrap();
            prop_assert_eq!(bytes.len(), storage.block_bytes());
        }
    }
}
