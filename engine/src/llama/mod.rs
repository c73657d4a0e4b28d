//! llama.cpp behind a small safe interface: the only module with `unsafe`.
//!
//! [`Model`] and [`Context`] own what llama.cpp allocates; a context keeps its
//! model alive. Nothing here is `Sync`: one thread owns a stage and all of it.

mod context;
mod experts;
mod log;
mod model;
#[cfg(target_os = "linux")]
mod pages;
mod pooled;
mod quant;
mod sampler;
mod tap;
mod vocab;

pub(crate) use context::{Context, ContextOptions, LANES_MAX, Output, Rows, ThreadPool};
pub(crate) use experts::{ExpertCpu, ExpertDevice, ExpertWeights, Job};
pub(crate) use model::{FileModel, Model};
pub(crate) use pooled::pooled;
pub(crate) use quant::{dequantize_row, quantize_file, quantize_rows};
pub(crate) use sampler::{Chain, GrammarState, Link};
pub(crate) use tap::LAYERS_MAX;
pub(crate) use vocab::VocabModel;

use std::ffi::CStr;
use std::sync::Once;

use llama_cpp_sys_2 as sys;

/// Starts llama.cpp's backends and sends its log to `tracing`, once.
pub(crate) fn start() {
    static START: Once = Once::new();
    START.call_once(|| {
        keep_large_blocks_apart();
        // SAFETY: the callback is a plain function without state; called once,
        // before any other call into the library.
        unsafe { sys::llama_log_set(Some(log::forward), std::ptr::null_mut()) };
        // SAFETY: called once, before any model is loaded.
        unsafe { sys::llama_backend_init() };
    });
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
unsafe extern "C" {
    fn malloc_trim(pad: usize) -> std::ffi::c_int;
    fn mallopt(what: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
}

/// A context reserves some 20 MB and touches a tenth of it. Mapped on its own,
/// the rest costs nothing, and all of it goes back to the system when it is
/// freed. The C library begins so, but stops as soon as it has seen a large
/// block freed, unless it is told where large begins: where it did at first.
fn keep_large_blocks_apart() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const M_MMAP_THRESHOLD: std::ffi::c_int = -3;
        // SAFETY: takes numbers, changes where later blocks come from.
        unsafe { mallopt(M_MMAP_THRESHOLD, 128 << 10) };
    }
}

/// Gives memory that was freed back to the system: the C library keeps it
/// otherwise, and an idle node would look busy.
pub(crate) fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes a number, touches only free memory.
    unsafe {
        malloc_trim(0)
    };
}

/// Asks for a model's weights to lie in huge pages, where there are such.
pub(crate) fn use_huge_pages(model: &Model) {
    #[cfg(target_os = "linux")]
    pages::use_huge_pages(model);
    #[cfg(not(target_os = "linux"))]
    let _ = model;
}

/// Gives memory of keys and values that no position refers to back to the system, where that is possible.
fn give_back(range: std::ops::Range<usize>) {
    #[cfg(target_os = "linux")]
    pages::give_back(range);
    #[cfg(not(target_os = "linux"))]
    drop(range);
}

/// A description of a backend device: name, what it is, free and total bytes.
pub(crate) fn devices() -> Vec<(String, String, usize, usize)> {
    start();
    // SAFETY: the backends are started.
    let n = unsafe { sys::ggml_backend_dev_count() };
    let describe = |i| {
        // SAFETY: `i` is below the count.
        let dev = unsafe { sys::ggml_backend_dev_get(i) };
        let (mut free, mut total) = (0, 0);
        // SAFETY: `dev` is a device; the pointers are to locals.
        unsafe { sys::ggml_backend_dev_memory(dev, &raw mut free, &raw mut total) };
        // SAFETY: `dev` is a device; its name is static.
        let name = unsafe { text(sys::ggml_backend_dev_name(dev)) };
        // SAFETY: `dev` is a device; its description is static.
        let what = unsafe { text(sys::ggml_backend_dev_description(dev)) };
        (name, what, free, total)
    };
    (0..n).map(describe).collect()
}

/// llama.cpp's own line about CPU features.
pub(crate) fn cpu_features() -> String {
    start();
    // SAFETY: returns a static string.
    unsafe { text(sys::llama_print_system_info()) }
}

/// llama.cpp's version.
pub(crate) fn version() -> String {
    // SAFETY: returns a static string.
    unsafe { text(sys::llama_version()) }
}

/// Whether layers can go to a GPU in this build and on this machine.
pub(crate) fn gpu() -> bool {
    start();
    // SAFETY: no arguments.
    unsafe { sys::llama_supports_gpu_offload() }
}

/// # Safety
/// `ptr` is null or a C string that outlives the call.
unsafe fn text(ptr: *const std::ffi::c_char) -> String {
    if ptr.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(ptr) }
        .to_string_lossy()
        .into_owned()
}
