//! llama.cpp's log, to `tracing`; its latest error is kept for messages.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::panic::catch_unwind;

use llama_cpp_sys_2 as sys;

thread_local! {
    static LATEST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Forgets earlier errors of this thread.
pub(super) fn clear() {
    LATEST.with_borrow_mut(String::clear);
}

/// The errors that llama.cpp has logged on this thread since [`clear`].
pub(super) fn errors(or: &str) -> String {
    let text = LATEST.with_borrow_mut(std::mem::take);
    if text.is_empty() { or.to_owned() } else { text }
}

/// Notes an error of our own, for a call into llama.cpp that fails with it.
pub(super) fn error(why: &str) {
    note(sys::GGML_LOG_LEVEL_ERROR, why);
}

/// llama.cpp's log callback.
pub(super) unsafe extern "C" fn forward(
    level: sys::ggml_log_level,
    line: *const c_char,
    _: *mut c_void,
) {
    if line.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a C string that lives through the call.
    let line = unsafe { CStr::from_ptr(line) }.to_string_lossy();
    let line = line.trim_end();
    // A panic must not unwind into C; losing a line is the lesser harm.
    let _ = catch_unwind(|| note(level, line));
}

fn note(level: sys::ggml_log_level, line: &str) {
    match level {
        _ if line.is_empty() || line == "." => {}
        sys::GGML_LOG_LEVEL_ERROR => {
            tracing::warn!(target: "llama", "{line}");
            LATEST.with_borrow_mut(|latest| {
                if latest.len() < 500 {
                    if !latest.is_empty() {
                        latest.push_str("; ");
                    }
                    latest.extend(line.chars().take(300));
                }
            });
        }
        // Warnings there are about uses that stages make on purpose.
        sys::GGML_LOG_LEVEL_WARN => tracing::debug!(target: "llama", "{line}"),
        _ => tracing::trace!(target: "llama", "{line}"),
    }
}
