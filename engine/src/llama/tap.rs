//! Where rows enter and leave a model in the middle: llama.cpp's evaluation
//! callback, which sees every node of a graph before any is computed.
//!
//! ```text
//! … l_out-1 ─▶ layer 2 ─▶ … ─▶ l_out-4 ─▶ …
//! switched off, then    computed,         taken, and
//! overwritten by rows                     the graph ends
//! ```

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::Rows;

/// `l_out-` and the layer's digit: the tensor behind a layer.
type Name = [u8; 8];

/// Most layers of a model that is entered or left inside: one digit names them.
pub(crate) const LAYERS_MAX: u32 = 10;

/// The name of the tensor behind `layer`, which is below [`LAYERS_MAX`].
fn behind(layer: u32) -> Name {
    let mut name = *b"l_out-0\0";
    name[6] += (layer % LAYERS_MAX) as u8;
    name
}

/// A box whose address C keeps. It is reached through this pointer alone: a
/// `Box` would claim that nobody else has it.
pub(super) struct Shared<T>(NonNull<T>);

impl<T> Shared<T> {
    pub(super) fn new(value: T) -> Shared<T> {
        Shared(NonNull::from(Box::leak(Box::new(value))))
    }

    pub(super) fn as_ptr(&self) -> *mut T {
        self.0.as_ptr()
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: from `Box::leak`, and what C has of it is not used any more:
        // whoever owns this drops it after the context.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// What the callback puts in and takes out.
pub(super) struct Tap {
    enter: Option<Name>,
    leave: Option<Name>,
    /// Rows that enter, during a call.
    input: *const f32,
    n_input: usize,
    /// Rows that left.
    rows: Vec<f32>,
    entered: bool,
    left: bool,
    /// Where keys and values lie, while a call looks for them.
    kv: Option<Vec<Range<usize>>>,
}

impl Tap {
    /// For rows that enter behind layer `enter`, or at the beginning, and leave
    /// behind layer `leave`, or at the head.
    pub(super) fn new(enter: Option<u32>, leave: Option<u32>) -> Tap {
        Tap {
            enter: enter.map(behind),
            leave: leave.map(behind),
            input: std::ptr::null(),
            n_input: 0,
            rows: Vec::new(),
            entered: false,
            left: false,
            kv: None,
        }
    }

    /// Before a call that computes every layer, to see where keys and values are written.
    pub(super) fn look(&mut self) {
        self.kv = Some(Vec::new());
    }

    /// After it: what was seen.
    pub(super) fn looked(&mut self) -> Vec<Range<usize>> {
        self.kv.take().unwrap_or_default()
    }

    /// Whether rows leave behind a layer.
    pub(super) fn leaves(&self) -> bool {
        self.leave.is_some()
    }

    /// Before a call: what enters, and a buffer for what leaves.
    pub(super) fn begin(&mut self, rows: &Rows<'_>, out: &mut Vec<f32>) {
        if let Rows::Hidden(rows) = rows {
            (self.input, self.n_input) = (rows.as_ptr(), rows.len());
        }
        self.entered = self.enter.is_none();
        self.left = self.leave.is_none();
        std::mem::swap(&mut self.rows, out);
    }

    /// After a call.
    pub(super) fn end(&mut self, out: &mut Vec<f32>) -> Result<(), String> {
        (self.input, self.n_input) = (std::ptr::null(), 0);
        std::mem::swap(&mut self.rows, out);
        match (self.entered, self.left) {
            (true, true) => Ok(()),
            (false, _) => Err("the layer's input was not seen".into()),
            (true, false) => Err("the layer's output was not seen".into()),
        }
    }

    /// Overwrites the tensor before the first layer that is computed.
    ///
    /// # Safety
    /// `tensor` is live and allocated, and a call is in progress.
    unsafe fn put(&mut self, tensor: *mut sys::ggml_tensor) {
        // SAFETY: the caller's promise.
        let n_bytes = unsafe { bytes_of_f32(tensor) };
        if n_bytes != Some(size_of::<f32>() * self.n_input) {
            return; // not entered: the caller's error
        }
        // SAFETY: the tensor has as many bytes as the rows of the call.
        unsafe { sys::ggml_backend_tensor_set(tensor, self.input.cast(), 0, 4 * self.n_input) };
        self.entered = true;
    }

    /// Copies the tensor behind the last layer that is computed.
    ///
    /// # Safety
    /// `tensor` is live and computed.
    unsafe fn take(&mut self, tensor: *mut sys::ggml_tensor) {
        // SAFETY: the caller's promise.
        let Some(n_bytes) = (unsafe { bytes_of_f32(tensor) }) else {
            return; // not left: the caller's error
        };
        self.rows.clear();
        self.rows.resize(n_bytes / size_of::<f32>(), 0.0);
        let rows = self.rows.as_mut_ptr().cast();
        // SAFETY: `rows` has room for all the tensor's bytes.
        unsafe { sys::ggml_backend_tensor_get(tensor, rows, 0, n_bytes) };
        self.left = true;
    }
}

/// The bytes of an f32 tensor; a layer's output always is one.
///
/// # Safety
/// `tensor` is live.
unsafe fn bytes_of_f32(tensor: *const sys::ggml_tensor) -> Option<usize> {
    // SAFETY: the caller's promise.
    let is_f32 = unsafe { (*tensor).type_ } == sys::GGML_TYPE_F32;
    // SAFETY: the caller's promise.
    is_f32.then(|| unsafe { sys::ggml_nbytes(tensor) })
}

/// The bytes of the whole tensor that this one writes rows into: keys or values, for nothing else is written so.
///
/// # Safety
/// `tensor` is live, and its graph allocated.
unsafe fn written(tensor: *const sys::ggml_tensor) -> Option<Range<usize>> {
    // SAFETY: the caller's promise.
    let (op, whole) = unsafe { ((*tensor).op, (*tensor).view_src) };
    if op != sys::GGML_OP_SET_ROWS || whole.is_null() {
        return None;
    }
    // SAFETY: a view's source lives as long as the view.
    let start = unsafe { (*whole).data } as usize;
    // SAFETY: as above.
    let len = unsafe { sys::ggml_nbytes(whole) };
    Some(start..start + len)
}

/// Asked about each tensor, in order, before any is computed, and about the one
/// it wanted after. Switches off what lies before the first layer and ends the
/// graph behind the last: llama.cpp computes neither, nor norm nor head.
///
/// # Safety
/// `tap` is a [`Tap`] that nothing else touches during the call.
pub(super) unsafe extern "C" fn on_tensor(
    tensor: *mut sys::ggml_tensor,
    ask: bool,
    tap: *mut c_void,
) -> bool {
    // SAFETY: set by `Context::new` to what lives as long; nothing else touches
    // it during a call.
    let tap = unsafe { &mut *tap.cast::<Tap>() };
    if let Some(kv) = &mut tap.kv {
        if ask {
            // SAFETY: ggml passes a live tensor of an allocated graph.
            kv.extend(unsafe { written(tensor) });
        }
        return !ask;
    }
    // SAFETY: ggml passes a live tensor; its name has 64 bytes. Compared as a
    // word: this is called some thirty times a layer and token.
    let name = unsafe { *(&raw const (*tensor).name).cast::<Name>() };
    if !tap.entered {
        // SAFETY: ggml passes a live tensor. It is computed only with this flag,
        // and nothing behind the first layer reads it but for its input.
        unsafe { (*tensor).flags &= !(sys::GGML_TENSOR_FLAG_COMPUTE as i32) };
        if tap.enter == Some(name) {
            // SAFETY: the graph is allocated and a call in progress.
            unsafe { tap.put(tensor) };
        }
        return false;
    }
    if tap.leave != Some(name) {
        return !ask;
    }
    if !ask {
        // SAFETY: ggml passes a live tensor, computed and synchronised.
        unsafe { tap.take(tensor) };
    }
    ask
}
