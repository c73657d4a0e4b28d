//! See `shoal_fuzz::fetch`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shoal_fuzz::fetch(data));
