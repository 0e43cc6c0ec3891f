//! NF4, FP4, int8 and double quantization against bitsandbytes.
//! The golden file is made by `golden/bitsandbytes_blocks.py`, which also describes it.

use engobe_kernels::codec::{self, FourBit, dynamic};
use engobe_kernels::dropout::mix;
use engobe_kernels::quantize::{OwnedScales, QuantizedWeight, Scheme};
use engobe_kernels::storage::StorageType;
use half::{bf16, f16};

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        taken
    }

    fn byte(&mut self) -> u8 {
        self.take(1)[0]
    }

    fn word(&mut self) -> usize {
        u32::from_le_bytes(self.take(4).try_into().expect("4 bytes")) as usize
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        let bytes = self.take(4 * n).chunks_exact(4);
        bytes.map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
    }

    fn hash(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().expect("8 bytes"))
    }
}

/// A tensor as the script makes it.
#[derive(Debug)]
struct Tensor {
    kind: u8,
    dtype: u8,
    form: u8,
    rows: usize,
    cols: usize,
    block: usize,
    seed: u64,
}

impl Tensor {
    fn read(r: &mut Reader<'_>) -> Self {
        let (kind, dtype, form) = (r.byte(), r.byte(), r.byte());
        let (rows, cols, block, seed) = (r.word(), r.word(), r.word(), r.word() as u64);
        Self { kind, dtype, form, rows, cols, block, seed }
    }

    fn element(&self, i: usize) -> f32 {
        let z = mix(self.seed, i as u64);
        let total: i64 = [0, 16, 32, 48].map(|shift| (z >> shift & 0xffff) as i64).iter().sum();
        let value = (total - 131070) as f32 / 2f32.powi(18);
        match self.form {
            1 if i % 97 == 5 => value * 64.0,
            2 => value / 2f32.powi(40),
            3 if (i / 64).is_multiple_of(2) => 0.0,
            _ => value,
        }
    }

    fn source(&self) -> (StorageType, Vec<u8>) {
        let elements = (0..self.rows * self.cols).map(|i| self.element(i));
        match self.dtype {
            0 => (StorageType::F32, elements.flat_map(f32::to_le_bytes).collect()),
            1 => (StorageType::BF16, elements.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect()),
            _ => (StorageType::F16, elements.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect()),
        }
    }

    fn quantized(&self, scheme: Scheme) -> QuantizedWeight {
        let (storage, bytes) = self.source();
        QuantizedWeight::new(scheme, storage, self.rows, self.cols, &bytes, &|_| ()).expect("finite")
    }

    fn four_bit(&self, double: bool) -> QuantizedWeight {
        let kind = FourBit::ALL[self.kind as usize];
        self.quantized(Scheme::FourBit { kind, block: self.block, double })
    }
}

fn hash_of(weight: &QuantizedWeight) -> u64 {
    let (rows, cols) = weight.dims();
    let mut out = vec![0f32; rows * cols];
    weight.view().expect("whole").decode_rows(0..rows, &mut out);
    let bytes = out.iter().flat_map(|x| x.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

fn same_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert_eq!(f.to_bits(), e.to_bits(), "{what}: {i} is {f}, expected {e}");
    }
}

#[test]
fn codes_and_factors_are_those_of_bitsandbytes() {
    let file = include_bytes!("golden/bitsandbytes_blocks.bin");
    let mut r = Reader(file.strip_prefix(b"EGBNBQ01").expect("magic"));
    same_bits("dynamic map", dynamic::map(), &r.floats(256));
    let mut seen = [0; 3];
    let mut double_codes = (0, 0);
    while !r.0.is_empty() {
        let tensor = Tensor::read(&mut r);
        seen[tensor.kind as usize] += 1;
        let n = tensor.rows * tensor.cols;
        let what = format!("{tensor:?}");
        if tensor.kind == 2 {
            let (codes, scales) = tensor.quantized(Scheme::Int8).into_parts();
            assert_eq!(codes, r.take(n), "{what}");
            let OwnedScales::Plain(scales) = scales else { panic!("rows have plain factors") };
            same_bits(&what, &scales, &r.floats(tensor.rows));
            continue;
        }
        let blocks = n.div_ceil(tensor.block);
        let weight = tensor.four_bit(false);
        let expected = r.take(n.div_ceil(2));
        let (codes, scales) = weight.clone().into_parts();
        assert_eq!(codes, expected, "{what}");
        let OwnedScales::Plain(scales) = scales else { panic!("asked for plain factors") };
        same_bits(&what, &scales, &r.floats(blocks));
        assert_eq!(hash_of(&weight), r.hash(), "{what}: dequantized");
        let (codes, scales) = tensor.four_bit(true).into_parts();
        assert_eq!(codes, expected, "{what}");
        let OwnedScales::Double(mine) = scales else { panic!("asked for double quantization") };
        let theirs = codec::DoubleQuantized {
            codes: r.take(blocks).to_vec(),
            nested: r.floats(blocks.div_ceil(codec::NESTED_BLOCK)),
            offset: r.floats(1)[0],
        };
        let _ = r.hash();
        compare_double(&what, &mine, &theirs, &mut double_codes);
    }
    assert!(seen.iter().all(|n| *n >= 30), "{seen:?}");
    let (differ, of) = double_codes;
    assert!(of > 2000 && differ * 50 < of, "{differ} of {of} codes of factors differ");
}

/// PyTorch sums the mean in its own order, and bitsandbytes' search on the CPU is approximate: codes may differ by one.
/// Below some 1e-5 of the largest number, where entries of the map lie closer than that search resolves, and where
/// all that the mean leaves is its own rounding, values are compared instead.
fn compare_double(
    what: &str,
    mine: &codec::DoubleQuantized,
    theirs: &codec::DoubleQuantized,
    count: &mut (usize, usize),
) {
    let size = mine.offset.abs().max(f32::MIN_POSITIVE);
    assert!((mine.offset - theirs.offset).abs() <= 2e-7 * size, "{what}: mean");
    for (i, (a, b)) in mine.codes.iter().zip(&theirs.codes).enumerate() {
        let (na, nb) = (mine.nested[i / codec::NESTED_BLOCK], theirs.nested[i / codec::NESTED_BLOCK]);
        assert!((na - nb).abs() <= 4e-7 * size, "{what}: nested factor {na}, expected {nb}");
        let value = |code: u8, nested: f32| dynamic::map()[code as usize] * nested;
        if (value(*a, na) - value(*b, nb)).abs() <= (3e-5 * nb).max(1e-6 * size) {
            count.1 += 1;
            continue;
        }
        assert!(a.abs_diff(*b) <= 1, "{what}: factor {i} is code {a}, expected {b}");
        count.0 += 1;
        count.1 += 1;
    }
}
