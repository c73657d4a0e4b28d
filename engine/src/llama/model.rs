//! A loaded model.

use std::ffi::{CString, c_char, c_int, c_void};
use std::fs::File;
use std::os::fd::IntoRawFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use super::{ExpertDevice, log, start};
use crate::experts;

unsafe extern "C" {
    fn fdopen(fd: c_int, mode: *const c_char) -> *mut c_void;
    fn fclose(file: *mut c_void) -> c_int;
}

/// A `llama_model`, shared by the contexts on it.
pub(crate) type Model = Arc<FileModel>;

/// The owner of a `llama_model`.
pub(crate) struct FileModel {
    ptr: NonNull<sys::llama_model>,
    /// What computes its experts, where that is somewhere else. Dropped after
    /// the model.
    experts: Option<ExpertDevice>,
}

// SAFETY: a loaded model is read-only: llama.cpp runs contexts on one model from
// several threads.
unsafe impl Send for FileModel {}
// SAFETY: as above.
unsafe impl Sync for FileModel {}

impl FileModel {
    /// Loads a GGUF from an open file that begins at its current position.
    pub(crate) fn from_file(file: File, vocab_only: bool) -> Result<Model, String> {
        Self::load(file, params(vocab_only), None)
    }

    /// As [`FileModel::from_file`], but the experts' tensors, holes in the file,
    /// are left to `experts`.
    pub(crate) fn trunk(file: File, experts: ExpertDevice) -> Result<Model, String> {
        let mut devices = [experts.device(), std::ptr::null_mut()];
        let overrides = [
            sys::llama_model_tensor_buft_override {
                pattern: experts::PATTERN.as_ptr(),
                buft: experts.buffer_type(),
            },
            sys::llama_model_tensor_buft_override {
                pattern: std::ptr::null(),
                buft: std::ptr::null_mut(),
            },
        ];
        let mut params = params(false);
        // Read while the model is loaded, and not kept.
        params.devices = devices.as_mut_ptr();
        params.tensor_buft_overrides = overrides.as_ptr();
        // All else stays with the CPU: the device is there for experts only.
        params.n_gpu_layers = 0;
        Self::load(file, params, Some(experts))
    }

    /// What `params` points to lives through the call.
    fn load(
        file: File,
        params: sys::llama_model_params,
        experts: Option<ExpertDevice>,
    ) -> Result<Model, String> {
        start();
        log::clear();
        let fd = file.into_raw_fd();
        // SAFETY: `fd` is open and ours; the mode is a C string.
        let stream = unsafe { fdopen(fd, c"rb".as_ptr()) };
        let Some(stream) = NonNull::new(stream) else {
            return Err("no stream for the stage file".into());
        };
        // SAFETY: `stream` is an open FILE; the parameters are valid.
        let ptr = unsafe { sys::llama_model_load_from_file_ptr(stream.as_ptr(), params) };
        // SAFETY: `stream` is open, and the model holds no reference to it:
        // nothing is mapped, every tensor has been read.
        unsafe { fclose(stream.as_ptr()) };
        Self::own(ptr, experts)
    }

    /// Loads a GGUF by its path; the further files of a split one by theirs.
    pub(crate) fn from_path(path: &Path) -> Result<Model, String> {
        start();
        log::clear();
        let path = path.to_str().and_then(|path| CString::new(path).ok());
        let path = path.ok_or("the path is not UTF-8")?;
        // SAFETY: `path` is a C string; the parameters are valid.
        let ptr = unsafe { sys::llama_model_load_from_file(path.as_ptr(), params(false)) };
        Self::own(ptr, None)
    }

    fn own(ptr: *mut sys::llama_model, experts: Option<ExpertDevice>) -> Result<Model, String> {
        match NonNull::new(ptr) {
            Some(ptr) => Ok(Arc::new(FileModel { ptr, experts })),
            None => Err(log::errors("the model was not loaded")),
        }
    }

    /// Bytes of its tensors that are here.
    pub(crate) fn bytes(&self) -> u64 {
        // SAFETY: the model lives.
        let all = unsafe { sys::llama_model_size(self.ptr.as_ptr()) };
        let elsewhere = self.experts.as_ref().map(ExpertDevice::bytes_elsewhere);
        all.saturating_sub(elsewhere.unwrap_or(0))
    }

    /// Layers.
    pub(super) fn n_layer(&self) -> u32 {
        // SAFETY: the model lives.
        unsafe { sys::llama_model_n_layer(self.ptr.as_ptr()) }.unsigned_abs()
    }

    /// Floats in a hidden row.
    pub(super) fn n_embd(&self) -> u32 {
        // SAFETY: the model lives.
        unsafe { sys::llama_model_n_embd(self.ptr.as_ptr()) }.unsigned_abs()
    }

    /// Floats in a row that is given out as an embedding.
    pub(super) fn n_embd_out(&self) -> u32 {
        // SAFETY: the model lives.
        unsafe { sys::llama_model_n_embd_out(self.ptr.as_ptr()) }.unsigned_abs()
    }

    /// Floats in a logits row.
    pub(super) fn n_vocab(&self) -> u32 {
        // SAFETY: the model lives.
        let vocab = unsafe { sys::llama_model_get_vocab(self.ptr.as_ptr()) };
        // SAFETY: the vocabulary is the model's.
        unsafe { sys::llama_vocab_n_tokens(vocab) }.unsigned_abs()
    }

    pub(super) fn as_ptr(&self) -> *mut sys::llama_model {
        self.ptr.as_ptr()
    }
}

fn params(vocab_only: bool) -> sys::llama_model_params {
    // SAFETY: no arguments.
    let mut params = unsafe { sys::llama_model_default_params() };
    // Reading beats mapping: weights are repacked for the CPU's kernels, and a
    // mapping would keep the original resident beside them.
    params.load_mode = sys::LLAMA_LOAD_MODE_NONE;
    params.vocab_only = vocab_only;
    params
}

impl Drop for FileModel {
    fn drop(&mut self) {
        // SAFETY: the model is ours, and contexts hold an `Arc` of it.
        unsafe { sys::llama_model_free(self.ptr.as_ptr()) };
    }
}
