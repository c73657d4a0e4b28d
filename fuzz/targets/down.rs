//! See `shoal_fuzz::down`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shoal_fuzz::down(data));
