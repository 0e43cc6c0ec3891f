//! Decoding and encoding against the `gguf` Python package, bit for bit.
//! The golden file is made by `golden/gguf_blocks.py`, which also describes it; `ENGOBE_GGUF_BLOCKS` names another
//! one to check too, such as a large one made for the purpose.

use engobe_kernels::codec::{EncodeError, decode, decode_parallel, decode_range, decode_reference, encode};
use engobe_kernels::storage::StorageType;

struct Record {
    decode: bool,
    storage: StorageType,
    bytes: Vec<u8>,
    values: Vec<f32>,
}

fn golden() -> Vec<Record> {
    let mut records = read(include_bytes!("golden/gguf_blocks.bin"));
    if let Some(path) = std::env::var_os("ENGOBE_GGUF_BLOCKS") {
        records.extend(read(&std::fs::read(path).expect("ENGOBE_GGUF_BLOCKS")));
    }
    records
}

fn read(file: &[u8]) -> Vec<Record> {
    let mut rest = file.strip_prefix(b"EGBLOCK1").expect("magic");
    let mut take = |n: usize| {
        let (taken, left) = rest.split_at(n);
        rest = left;
        (taken, left.is_empty())
    };
    let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("4 bytes")) as usize;
    let mut records = Vec::new();
    loop {
        let decode = take(1).0[0] == 0;
        let name_len = take(1).0[0] as usize;
        let name = std::str::from_utf8(take(name_len).0).expect("name");
        let (bytes_len, values_len) = (word(take(4).0), word(take(4).0));
        let bytes = take(bytes_len).0.to_vec();
        let (values, at_end) = take(4 * values_len);
        let values = values.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")));
        let storage = StorageType::ALL.into_iter().find(|s| s.name() == name).expect("storage");
        records.push(Record { decode, storage, bytes, values: values.collect() });
        if at_end {
            return records;
        }
    }
}

fn assert_same_bits(storage: StorageType, what: &str, found: &[f32], expected: &[f32]) {
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert_eq!(f.to_bits(), e.to_bits(), "{storage} {what}: element {i} is {f}, expected {e}");
    }
}

#[test]
fn decoding_equals_gguf_py() {
    let mut seen = Vec::new();
    for Record { storage, bytes, values, .. } in golden().iter().filter(|r| r.decode) {
        seen.push(*storage);
        let mut out = vec![f32::NAN; values.len()];
        decode_reference(*storage, bytes, &mut out);
        assert_same_bits(*storage, "reference", &out, values);
        out.fill(f32::NAN);
        decode(*storage, bytes, &mut out);
        assert_same_bits(*storage, "fast", &out, values);
        out.fill(f32::NAN);
        decode_parallel(*storage, bytes, &mut out);
        assert_same_bits(*storage, "parallel", &out, values);
        // from one byte further on, where nothing is aligned
        let mut shifted = vec![0xff];
        shifted.extend(bytes);
        out.fill(f32::NAN);
        decode(*storage, &shifted[1..], &mut out);
        assert_same_bits(*storage, "unaligned", &out, values);
    }
    seen.truncate(StorageType::ALL.len());
    assert_eq!(seen, StorageType::ALL);
}

#[test]
fn every_range_of_blocks_decodes_alike() {
    for Record { storage, bytes, values, .. } in golden().iter().filter(|r| r.decode) {
        let len = storage.block_len();
        let blocks = values.len() / len;
        for (first, count) in [(0, blocks), (1, blocks - 1), (blocks / 2, 1), (blocks, 0), (2, 3)] {
            let mut out = vec![f32::NAN; count * len];
            decode_range(bytes, *storage, first * len, &mut out);
            assert_same_bits(*storage, "range", &out, &values[first * len..(first + count) * len]);
        }
    }
}

#[test]
fn long_tensors_decode_alike_in_parallel() {
    for Record { storage, bytes, values, .. } in golden().iter().filter(|r| r.decode) {
        // longer than two parallel chunks of 65536 elements, and not a whole number of them
        let times = 150_000 / values.len() + 1;
        let mut out = vec![f32::NAN; values.len() * times];
        decode_parallel(*storage, &bytes.repeat(times), &mut out);
        assert_same_bits(*storage, "long", &out, &values.repeat(times));
    }
}

#[test]
fn encoding_equals_gguf_py() {
    let mut seen = 0;
    for Record { storage, bytes, values, .. } in golden().iter().filter(|r| !r.decode) {
        seen += 1;
        let mut out = vec![0xaa];
        encode(*storage, values, &mut out).expect("encodable");
        for (block, (found, expected)) in
            out[1..].chunks(storage.block_bytes()).zip(bytes.chunks(storage.block_bytes())).enumerate()
        {
            assert_eq!(found, expected, "{storage} block {block}");
        }
        assert_eq!(out.len(), bytes.len() + 1, "appended, nothing more");
    }
    assert!(seen >= 7);
}

#[test]
fn what_cannot_be_encoded_is_said() {
    let mut out = Vec::new();
    let found = encode(StorageType::Q3_K, &[0.0; 256], &mut out).unwrap_err();
    assert_eq!(found, EncodeError::Unsupported { storage: StorageType::Q3_K });
    assert!(found.to_string().contains("to Q3_K"), "{found}");
    let found = encode(StorageType::Q8_0, &[0.0; 33], &mut out).unwrap_err();
    assert_eq!(found.to_string(), "33 elements are not whole Q8_0 blocks of 32");
    assert!(out.is_empty());
}

#[test]
fn encoding_unfit_numbers_does_not_panic() {
    let mut x = [1.0f32; 32];
    (x[0], x[1], x[2], x[3]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX);
    for storage in StorageType::ALL {
        let mut out = Vec::new();
        if encode(storage, &x, &mut out).is_ok() {
            assert_eq!(Some(out.len()), storage.row_bytes(32));
        }
    }
}
