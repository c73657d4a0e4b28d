//! See `shoal_fuzz::ask`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shoal_fuzz::ask(data));
