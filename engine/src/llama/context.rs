//! A context: one model, one session, its KV.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use super::{Model, log};

/// Name of the tensor behind the only layer of an inner stage's model.
const LAYER_OUT: [u8; 8] = *b"l_out-0\0";

/// How a context is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ContextOptions {
    /// Positions.
    pub n_ctx: u32,
    /// Most rows in a call.
    pub n_batch: u32,
    /// Compute threads.
    pub n_threads: u32,
    /// Whether rows are taken behind layer 0 instead of at the head.
    pub tap: bool,
}

/// What a call computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// The KV only.
    None,
    /// The last row.
    Last,
    /// Every row.
    All,
}

/// Threads that ggml keeps between calls, shared by the contexts of a stage.
/// Without it each call starts and ends its own.
pub(crate) struct ThreadPool {
    ptr: NonNull<sys::ggml_threadpool>,
}

// SAFETY: the contexts of a pool belong to one stage, which moves between
// threads as a whole and runs on one at a time.
unsafe impl Send for ThreadPool {}
// SAFETY: as above.
unsafe impl Sync for ThreadPool {}

impl ThreadPool {
    /// A pool, or `None` for a single thread, which needs none.
    pub(crate) fn new(n_threads: u32) -> Option<Arc<ThreadPool>> {
        if n_threads < 2 {
            return None;
        }
        // SAFETY: a plain value.
        let mut params = unsafe { sys::ggml_threadpool_params_default(n_threads as i32) };
        // SAFETY: `params` is initialised.
        let ptr = unsafe { sys::ggml_threadpool_new(&raw mut params) };
        NonNull::new(ptr).map(|ptr| Arc::new(ThreadPool { ptr }))
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        // SAFETY: ours; contexts hold an `Arc` of it.
        unsafe { sys::ggml_threadpool_free(self.ptr.as_ptr()) };
    }
}

/// Where the callback puts what it sees. Boxed: C keeps its address.
struct Tap {
    rows: Vec<f32>,
    seen: bool,
}

/// Rows of the batch that C reads; kept, so that a call allocates nothing.
struct Batch {
    pos: Vec<i32>,
    n_seq_id: Vec<i32>,
    seq_id: Vec<*mut i32>,
    output: Vec<i8>,
    token: Vec<i32>,
    /// What every element of `seq_id` points to.
    _zero: Box<i32>,
}

/// An owned `llama_context`.
pub(crate) struct Context {
    ptr: NonNull<sys::llama_context>,
    tap: Option<Box<Tap>>,
    batch: Batch,
    n_vocab: usize,
    // Both outlive `ptr`: dropped after it, in order of declaration.
    _model: Model,
    _threads: Option<Arc<ThreadPool>>,
}

// SAFETY: llama.cpp's contexts have no ties to a thread; `&mut self` on every
// call keeps it to one at a time. The raw pointers in `batch` and `tap` are to
// boxes that move along.
unsafe impl Send for Context {}

/// What enters a call.
pub(crate) enum Rows<'a> {
    /// Token ids, looked up by llama.cpp.
    Tokens(&'a [u32]),
    /// Rows of `n_embd` floats; finite.
    Hidden(&'a [f32]),
}

impl Context {
    /// A context for one sequence.
    pub(crate) fn new(
        model: &Model,
        options: &ContextOptions,
        threads: Option<&Arc<ThreadPool>>,
    ) -> Result<Context, String> {
        log::clear();
        let mut tap = options.tap.then(|| {
            Box::new(Tap {
                rows: Vec::new(),
                seen: false,
            })
        });
        // SAFETY: no arguments.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = options.n_ctx;
        params.n_batch = options.n_batch;
        params.n_ubatch = options.n_batch;
        params.n_seq_max = 1;
        params.n_threads = options.n_threads as i32;
        params.n_threads_batch = options.n_threads as i32;
        params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_ENABLED;
        // Without, a windowed layer forgets what truncation needs again.
        params.swa_full = true;
        params.no_perf = true;
        if let Some(tap) = &mut tap {
            params.cb_eval = Some(on_tensor);
            params.cb_eval_user_data = (&raw mut **tap).cast();
        }
        // SAFETY: the model lives; `tap` is boxed and outlives the context.
        let ptr = unsafe { sys::llama_init_from_model(model.as_ptr(), params) };
        let Some(ptr) = NonNull::new(ptr) else {
            return Err(log::errors("no context"));
        };
        if let Some(threads) = threads {
            let pool = threads.ptr.as_ptr();
            // SAFETY: both live, and the pool outlives the context.
            unsafe { sys::llama_attach_threadpool(ptr.as_ptr(), pool, pool) };
        }
        // SAFETY: the model lives.
        let vocab = unsafe { sys::llama_model_get_vocab(model.as_ptr()) };
        // SAFETY: the vocabulary is the model's.
        let n_vocab = unsafe { sys::llama_vocab_n_tokens(vocab) };
        Ok(Context {
            ptr,
            tap,
            batch: Batch::new(options.n_batch as usize),
            n_vocab: usize::try_from(n_vocab).unwrap_or(0),
            _model: Arc::clone(model),
            _threads: threads.map(Arc::clone),
        })
    }

    /// Floats in a logits row.
    pub(crate) fn n_vocab(&self) -> u32 {
        self.n_vocab as u32
    }

    /// Drops every position from `pos` on.
    pub(crate) fn truncate(&mut self, pos: u32) -> Result<(), String> {
        // SAFETY: the context lives.
        let memory = unsafe { sys::llama_get_memory(self.ptr.as_ptr()) };
        if pos == 0 {
            // SAFETY: the memory is the context's.
            unsafe { sys::llama_memory_clear(memory, false) };
            return Ok(());
        }
        // SAFETY: the memory is the context's.
        let done = unsafe { sys::llama_memory_seq_rm(memory, 0, pos as i32, -1) };
        if done {
            Ok(())
        } else {
            Err("this model's memory cannot be truncated".into())
        }
    }

    /// Runs `n_rows` rows from position `pos0` on; `out` is replaced by the rows
    /// asked for: hidden ones behind a tap (always all), else logits.
    pub(crate) fn run(
        &mut self,
        rows: &Rows<'_>,
        n_rows: usize,
        pos0: u32,
        output: Output,
        out: &mut Vec<f32>,
    ) -> Result<(), String> {
        log::clear();
        let batch = self.batch.fill(rows, n_rows, pos0, output);
        if let Some(tap) = &mut self.tap {
            tap.seen = false;
            std::mem::swap(&mut tap.rows, out);
        }
        // SAFETY: the batch's arrays have `n_rows` elements and live through
        // the call, which does not write to them.
        let status = unsafe { sys::llama_decode(self.ptr.as_ptr(), batch) };
        if let Some(tap) = &mut self.tap {
            std::mem::swap(&mut tap.rows, out);
            return match (status, tap.seen) {
                (0, true) => Ok(()),
                (0, false) => Err("the layer's output was not seen".into()),
                _ => Err(log::errors("llama_decode failed")),
            };
        }
        if status != 0 {
            return Err(log::errors("llama_decode failed"));
        }
        self.take_logits(n_rows, output, out)
    }

    fn take_logits(
        &mut self,
        n_rows: usize,
        output: Output,
        out: &mut Vec<f32>,
    ) -> Result<(), String> {
        out.clear();
        let n_out = match output {
            Output::None => {
                // SAFETY: the context lives.
                unsafe { sys::llama_synchronize(self.ptr.as_ptr()) };
                return Ok(());
            }
            Output::Last => 1,
            Output::All => n_rows,
        };
        // SAFETY: the context lives; the call waits for the computation.
        let logits = unsafe { sys::llama_get_logits(self.ptr.as_ptr()) };
        if logits.is_null() {
            return Err("no logits".into());
        }
        // SAFETY: llama.cpp keeps a row of `n_vocab` per output asked for, in
        // the order of the batch, until the next call.
        let logits = unsafe { std::slice::from_raw_parts(logits, n_out * self.n_vocab) };
        out.extend_from_slice(logits);
        Ok(())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: ours; the model and the threads are still there.
        unsafe { sys::llama_free(self.ptr.as_ptr()) };
    }
}

impl Batch {
    fn new(n: usize) -> Batch {
        let mut zero = Box::new(0i32);
        let seq_id = vec![&raw mut *zero; n];
        Batch {
            pos: vec![0; n],
            n_seq_id: vec![1; n],
            seq_id,
            output: vec![0; n],
            token: Vec::new(),
            _zero: zero,
        }
    }

    /// The C view of `n_rows` rows; the caller has checked that they fit.
    fn fill(
        &mut self,
        rows: &Rows<'_>,
        n_rows: usize,
        pos0: u32,
        output: Output,
    ) -> sys::llama_batch {
        let n_rows = n_rows.min(self.pos.len());
        for (i, pos) in self.pos.iter_mut().enumerate().take(n_rows) {
            *pos = pos0 as i32 + i as i32;
        }
        self.output.fill(i8::from(output == Output::All));
        if output == Output::Last && n_rows > 0 {
            self.output[n_rows - 1] = 1;
        }
        let (mut token, mut embd) = (std::ptr::null_mut(), std::ptr::null_mut());
        match rows {
            Rows::Tokens(tokens) => {
                self.token.clear();
                self.token.extend(tokens.iter().map(|&id| id as i32));
                token = self.token.as_mut_ptr();
            }
            // C takes a mutable pointer and reads only.
            Rows::Hidden(rows) => embd = rows.as_ptr().cast_mut(),
        }
        sys::llama_batch {
            n_tokens: n_rows as i32,
            token,
            embd,
            pos: self.pos.as_mut_ptr(),
            n_seq_id: self.n_seq_id.as_mut_ptr(),
            seq_id: self.seq_id.as_mut_ptr(),
            logits: self.output.as_mut_ptr(),
        }
    }
}

/// Asked about each tensor before it is computed and, where wanted, after.
/// Takes the layer's output and ends the graph there, so that an inner stage
/// computes neither norm nor head.
unsafe extern "C" fn on_tensor(tensor: *mut sys::ggml_tensor, ask: bool, tap: *mut c_void) -> bool {
    // SAFETY: ggml passes a live tensor; its name has 64 bytes. Compared as a
    // word: this is called some thirty times a layer and token.
    let name = unsafe { *(&raw const (*tensor).name).cast::<[u8; 8]>() };
    if name != LAYER_OUT {
        return !ask;
    }
    if ask {
        return true;
    }
    // SAFETY: set by `Context::new` to a box that lives as long; nothing else
    // touches it during a call.
    let tap = unsafe { &mut *tap.cast::<Tap>() };
    // SAFETY: ggml passes a live tensor.
    if unsafe { (*tensor).type_ } != sys::GGML_TYPE_F32 {
        return false; // not seen: the caller's error
    }
    // SAFETY: ggml passes a live tensor.
    let n_bytes = unsafe { sys::ggml_nbytes(tensor) };
    tap.rows.clear();
    tap.rows.resize(n_bytes / size_of::<f32>(), 0.0);
    // SAFETY: the tensor is f32 (a layer's output always is), computed and
    // synchronised; `rows` has room for all its bytes.
    unsafe { sys::ggml_backend_tensor_get(tensor, tap.rows.as_mut_ptr().cast(), 0, n_bytes) };
    tap.seen = true;
    false
}
