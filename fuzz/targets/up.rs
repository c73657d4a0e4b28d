//! See `shoal_fuzz::up`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shoal_fuzz::up(data));
