#![no_main]
//! cargo +nightly fuzz run gguf
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = engobe_formats::gguf::parse(bytes) {
        assert!(header.tensors.iter().all(|t| t.range.end <= bytes.len()));
    }
});
