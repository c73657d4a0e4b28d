//! See `shoal_fuzz::attach`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shoal_fuzz::attach(data));
