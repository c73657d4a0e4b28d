//! See `shoal_fuzz::advert`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shoal_fuzz::advert(data));
