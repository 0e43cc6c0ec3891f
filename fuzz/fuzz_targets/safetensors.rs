#![no_main]
//! cargo +nightly fuzz run safetensors
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok((entries, _)) = engobe_formats::safetensors_file::parse(bytes) {
        assert!(entries.iter().all(|(_, _, _, range)| range.end <= bytes.len()));
    }
});
