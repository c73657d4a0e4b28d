//! See `shoal_fuzz::give`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shoal_fuzz::give(data));
