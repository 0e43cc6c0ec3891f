//! How much memory the process holds.

pub use engobe_train::memory::resident::{bytes_text, peak_resident_bytes, resident_bytes};
