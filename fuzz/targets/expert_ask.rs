//! See `shoal_fuzz::expert_ask`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shoal_fuzz::expert_ask(data));
