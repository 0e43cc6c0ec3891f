//! Sizes of memory as people write them.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A limit on memory, in bytes: `16GB`, `12GiB`, `8000MB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MemoryLimit(pub u64);

/// What is not a size of memory.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no size of memory; write 16GB, 12GiB or 8000MB")]
pub struct NoSize(String);

/// Longer units first: `GiB` ends in `B` too.
const UNITS: [(&str, u64); 9] = [
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("b", 1),
];

impl FromStr for MemoryLimit {
    type Err = NoSize;

    fn from_str(text: &str) -> Result<Self, NoSize> {
        let no = || NoSize(text.to_string());
        let lower = text.trim().to_ascii_lowercase();
        let (unit, bytes) = UNITS.iter().find(|(unit, _)| lower.ends_with(unit)).ok_or_else(no)?;
        let number: f64 = lower[..lower.len() - unit.len()].trim().parse().map_err(|_| no())?;
        let size = number * *bytes as f64;
        if !(size.is_finite() && (1.0..9e18).contains(&size)) {
            return Err(no());
        }
        Ok(Self(size as u64))
    }
}

impl TryFrom<String> for MemoryLimit {
    type Error = NoSize;

    fn try_from(text: String) -> Result<Self, NoSize> {
        text.parse()
    }
}

impl From<MemoryLimit> for String {
    fn from(limit: MemoryLimit) -> Self {
        format!("{}B", limit.0)
    }
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&super::resident::bytes_text(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for (text, bytes) in [
            ("16GB", 16_000_000_000),
            ("12GiB", 12 << 30),
            ("8000MB", 8_000_000_000),
            ("1.5 gb", 1_500_000_000),
            ("512kib", 512 << 10),
            ("7B", 7),
        ] {
            let limit: MemoryLimit = text.parse().unwrap();
            assert_eq!(limit.0, bytes, "{text}");
            assert_eq!(String::from(limit).parse(), Ok(limit));
        }
        for text in ["", "16", "GB", "-1GB", "1e30GB", "nanGB", "16 G B", "0GB", "16XB"] {
            assert!(text.parse::<MemoryLimit>().is_err(), "{text}");
        }
    }
}
