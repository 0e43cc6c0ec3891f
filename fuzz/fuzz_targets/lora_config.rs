#![no_main]
//! cargo +nightly fuzz run lora_config
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(config) = engobe_formats::peft::LoraConfig::parse("fuzz".as_ref(), bytes) {
        // what is accepted is written and read back
        let text = config.to_json();
        assert!(engobe_formats::peft::LoraConfig::parse("fuzz".as_ref(), text.as_bytes()).is_ok());
    }
});
