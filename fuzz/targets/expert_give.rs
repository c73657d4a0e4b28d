//! See `shoal_fuzz::expert_give`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shoal_fuzz::expert_give(data));
