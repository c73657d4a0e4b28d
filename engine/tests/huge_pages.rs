//! Weights lie in huge pages. Linux only. One test, because the whole process is
//! measured.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod support;

use engine::{LlamaStage, LoadOptions, RandomShape, RandomWeights, Stage};
use support::{Model, process_bytes, tiny};

#[test]
fn weights_lie_in_huge_pages() {
    if !huge_pages_on_request() {
        eprintln!("this kernel makes no huge pages on request: not checked");
        return;
    }
    let shape = RandomShape {
        n_embd: 1024,
        n_ff: 4096,
        ..tiny("llama")
    };
    let model = Model::random_of("llama", &shape, RandomWeights::Q4KM, 1);
    let huge = || process_bytes("smaps_rollup", "AnonHugePages:");
    let resident = || process_bytes("status", "VmRSS:");
    let before = (huge(), resident());
    let options = LoadOptions {
        n_threads: 1,
        ..LoadOptions::default()
    };
    let (blueprint, source) = (&model.blueprint, &model.source);
    let layers = 0..shape.n_layer;
    let stage = LlamaStage::load(blueprint, layers, source, &options, &mut |_| ()).unwrap();
    let bytes = stage.stats().tensor_bytes;
    let (huge, resident) = (huge() - before.0, resident() - before.1);
    assert!(huge > bytes / 2, "{huge} of {bytes} bytes");
    assert!(
        resident < bytes + (16 << 20),
        "{resident} for {bytes} bytes"
    );
}

/// Whether the kernel is one that collapses pages (6.1 or later, with huge pages).
fn huge_pages_on_request() -> bool {
    let there = std::path::Path::new("/sys/kernel/mm/transparent_hugepage/enabled").exists();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(['.', '-'])
        .map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    there && version >= (6, 1)
}
