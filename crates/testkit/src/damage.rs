//! Files that went wrong: what a test of a parser damages, at random.

use proptest::prelude::*;
use proptest::sample::Index;

/// A change to a file.
#[derive(Clone, Debug)]
pub enum Damage {
    /// another byte
    Byte(Index, u8),
    /// its end is missing
    Cut(Index),
    /// eight bytes that may be a length or an offset
    Number(Index, u64),
    /// another digit in a JSON header or configuration
    Digit(Index, u8),
}

/// One to three changes.
pub fn damages() -> impl Strategy<Value = Vec<Damage>> {
    let at = any::<Index>;
    let large = prop_oneof![any::<u64>(), Just(u64::MAX), Just(0), Just(1 << 60), Just(1 << 31)];
    let one = prop_oneof![
        (at(), any::<u8>()).prop_map(|(i, b)| Damage::Byte(i, b)),
        at().prop_map(Damage::Cut),
        (at(), large).prop_map(|(i, n)| Damage::Number(i, n)),
        (at(), b'0'..=b'9').prop_map(|(i, d)| Damage::Digit(i, d)),
    ];
    prop::collection::vec(one, 1..4)
}

/// `bytes` after all these changes.
pub fn damaged(mut bytes: Vec<u8>, all: &[Damage]) -> Vec<u8> {
    for damage in all {
        if bytes.is_empty() {
            break;
        }
        match damage {
            Damage::Byte(i, b) => *i.get_mut(&mut bytes) = *b,
            Damage::Cut(i) => bytes.truncate(i.index(bytes.len())),
            Damage::Number(i, n) => {
                let at = i.index(bytes.len());
                let end = bytes.len().min(at + 8);
                bytes[at..end].copy_from_slice(&n.to_le_bytes()[..end - at]);
            }
            Damage::Digit(i, d) => {
                let digits: Vec<usize> =
                    (0..bytes.len().min(8192)).filter(|at| bytes[*at].is_ascii_digit()).collect();
                if !digits.is_empty() {
                    bytes[*i.get(&digits)] = *d;
                }
            }
        }
    }
    bytes
}
