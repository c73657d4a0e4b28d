//! Pages of memory: huge ones for weights, none for what nobody uses.
//!
//! A decoded token reads every weight once, and in
//! pages of 4 KiB the processor spends a tenth of that time on addresses.
//!
//! llama.cpp does not say where a model's tensors lie, but shows each to the
//! evaluation callback: one row is computed to see them. Keys and values that nobody uses go back to the
//! system, and are zeros when they come again. Linux only; wherever
//! the kernel does not follow, weights stay where they are.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::{Model, log};

/// Smallest stretch worth asking for: a huge page on most machines.
const STRETCH_MIN: usize = 2 << 20;
/// Tensors of one buffer lie closer than this.
const GAP_MAX: usize = 4096;

/// Smallest page there is,
const PAGE_MIN: usize = 4 << 10;
/// and the largest ordinary one.
const PAGE_MAX: usize = 64 << 10;

unsafe extern "C" {
    fn madvise(address: *mut c_void, len: usize, advice: c_int) -> c_int;
}
/// Takes whole private pages back; the next to touch them finds zeros.
const MADV_DONTNEED: c_int = 4;

/// Moves what is there into huge pages, now; since Linux 6.1. Unlike
/// `MADV_HUGEPAGE` it leaves no mark on the addresses: what the allocator puts
/// there after the weights would grow by it.
const MADV_COLLAPSE: c_int = 25;

/// Asks for a model's weights to lie in huge pages.
pub(crate) fn use_huge_pages(model: &Model) {
    for stretch in stretches(weights(model)) {
        // SAFETY: whole pages inside tensors of a model that lives; what they
        // hold does not change.
        let failed = unsafe { madvise(stretch.start as *mut c_void, stretch.len(), MADV_COLLAPSE) };
        if failed == 0 {
            tracing::debug!(bytes = stretch.len(), "weights moved to huge pages");
        } else {
            let why = std::io::Error::last_os_error();
            tracing::debug!(%why, "weights stay in small pages");
        }
    }
}

/// Gives whole pages within `range` back to the system. What it holds is zeros after this, or as it was.
///
/// The caller owns `range` as a live part of keys and values that no position refers to.
pub(super) fn give_back(range: Range<usize>) {
    let (start, end) = (
        range.start.next_multiple_of(PAGE_MIN),
        range.end / PAGE_MIN * PAGE_MIN,
    );
    if start >= end {
        return;
    }
    // SAFETY: whole pages inside a live buffer of ours whose bytes nobody relies on: zeros are as good. Where
    // pages are larger than these the call fails, and nothing changes.
    let failed = unsafe { madvise(start as *mut c_void, end - start, MADV_DONTNEED) };
    if failed != 0 {
        let why = std::io::Error::last_os_error();
        tracing::debug!(%why, "memory of closed sessions stays");
    }
}

/// Joins neighbours, and drops what is too short and parts of pages.
fn stretches(mut weights: Vec<Range<usize>>) -> Vec<Range<usize>> {
    weights.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in weights {
        match joined.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(GAP_MAX) => {
                last.end = last.end.max(range.end);
            }
            _ => joined.push(range),
        }
    }
    joined.retain(|range| range.len() >= STRETCH_MIN);
    joined
        .into_iter()
        .map(|r| r.start.next_multiple_of(PAGE_MAX)..r.end / PAGE_MAX * PAGE_MAX)
        .collect()
}

/// Where the tensors lie that computing a row reads; nothing when that fails.
fn weights(model: &Model) -> Vec<Range<usize>> {
    log::clear();
    let mut seen: Vec<Range<usize>> = Vec::new();
    // SAFETY: no arguments.
    let mut params = unsafe { sys::llama_context_default_params() };
    (params.n_ctx, params.n_batch, params.n_ubatch) = (256, 1, 1);
    (params.n_threads, params.n_threads_batch) = (1, 1);
    params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.cb_eval = Some(on_tensor);
    params.cb_eval_user_data = (&raw mut seen).cast();
    // SAFETY: the model lives, and `seen` as long as the context.
    let context = unsafe { sys::llama_init_from_model(model.as_ptr(), params) };
    let Some(context) = NonNull::new(context) else {
        return Vec::new();
    };
    let mut row = vec![0.0f32; model.n_embd() as usize];
    let (mut pos, mut n_seq_id, mut seq, mut output) = (0, 1, 0, 1);
    let mut seq_id = &raw mut seq;
    let batch = sys::llama_batch {
        n_tokens: 1,
        token: std::ptr::null_mut(),
        embd: row.as_mut_ptr(),
        pos: &raw mut pos,
        n_seq_id: &raw mut n_seq_id,
        seq_id: &raw mut seq_id,
        logits: &raw mut output,
    };
    // SAFETY: a batch of one row of `n_embd`, every array of it has one element.
    let status = unsafe { sys::llama_decode(context.as_ptr(), batch) };
    // SAFETY: ours, and not used again.
    unsafe { sys::llama_free(context.as_ptr()) };
    if status != 0 {
        let why = log::errors("llama_decode failed");
        tracing::debug!(why, "where the weights lie is not known");
    }
    seen
}

/// Notes the weights that a node of the graph reads.
unsafe extern "C" fn on_tensor(
    tensor: *mut sys::ggml_tensor,
    ask: bool,
    seen: *mut c_void,
) -> bool {
    // SAFETY: set by `weights` to a vector that nothing else touches meanwhile.
    let seen = unsafe { &mut *seen.cast::<Vec<Range<usize>>>() };
    // SAFETY: ggml passes a live tensor.
    for source in unsafe { (*tensor).src } {
        // SAFETY: null or a live tensor.
        seen.extend(unsafe { source.as_ref() }.and_then(weight));
    }
    !ask
}

/// Where a tensor lies, if it is a weight in this machine's memory.
fn weight(tensor: &sys::ggml_tensor) -> Option<Range<usize>> {
    let buffer = NonNull::new(tensor.buffer)?.as_ptr();
    // SAFETY: a tensor's buffer lives as long as the tensor.
    let usage = unsafe { sys::ggml_backend_buffer_get_usage(buffer) };
    // SAFETY: as above.
    if usage != sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS || !unsafe { in_memory(buffer) } {
        return None;
    }
    let start = NonNull::new(tensor.data)?.as_ptr() as usize;
    // SAFETY: a live tensor.
    Some(start..start + unsafe { sys::ggml_nbytes(tensor) })
}

/// # Safety
/// `buffer` lives.
unsafe fn in_memory(buffer: sys::ggml_backend_buffer_t) -> bool {
    // SAFETY: the caller's promise.
    if unsafe { sys::ggml_backend_buffer_is_host(buffer) } {
        return true;
    }
    // Repacked weights are not laid out for everybody, but they are here.
    // SAFETY: the caller's promise; types and devices are static.
    let device =
        unsafe { sys::ggml_backend_buft_get_device(sys::ggml_backend_buffer_get_type(buffer)) };
    // SAFETY: a device where it is not null.
    !device.is_null()
        && unsafe { sys::ggml_backend_dev_type(device) } == sys::GGML_BACKEND_DEVICE_TYPE_CPU
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_whole_pages_of_joined_neighbours() {
        let mb = 1 << 20;
        let a = 10 * mb + 100..14 * mb;
        let b = 14 * mb + 64..15 * mb + 1;
        let short = 20 * mb..21 * mb;
        assert_eq!(
            stretches(vec![short, b, a]),
            vec![Range {
                start: 10 * mb + (64 << 10),
                end: 15 * mb
            }]
        );
        assert!(stretches(Vec::new()).is_empty());
    }
}
