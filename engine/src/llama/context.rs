//! A context: one model, the KV of one session or of several, a lane each.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use super::tap::{LAYERS_MAX, Shared, Tap, on_tensor};
use super::{Model, log};

/// How a context is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ContextOptions {
    /// Positions of each lane.
    pub n_ctx: u32,
    /// Sequences that lie side by side, each with a KV of its own, at most [`LANES_MAX`].
    pub lanes: u32,
    /// Most rows in a call.
    pub n_batch: u32,
    /// Compute threads.
    pub n_threads: u32,
    /// The model's layer that rows enter at: what lies before is not computed.
    pub enter: u32,
    /// The model's layer that rows are taken behind: what follows is not
    /// computed. `None`: logits.
    pub leave: Option<u32>,
}

/// Most lanes of a context. The repacked kernels of most quantised types take rows by four, and four of them
/// cost less than two; only lanes that follow each other run in one call, and among four there are few gaps.
/// One where memory that nobody uses cannot be given back: there each lane would be paid for.
pub(crate) const LANES_MAX: u32 = if cfg!(target_os = "linux") { 4 } else { 1 };

/// What a call computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// The KV only.
    None,
    /// The last row.
    Last,
    /// Every row.
    All,
    /// Every row, and of each what is behind the last norm, not its logits.
    Normed,
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
    /// A pool; that of one thread is no thread, but saves making it anew.
    pub(crate) fn new(n_threads: u32) -> Result<Arc<ThreadPool>, String> {
        // SAFETY: a plain value.
        let mut params = unsafe { sys::ggml_threadpool_params_default(n_threads as i32) };
        // SAFETY: `params` is initialised.
        let ptr = unsafe { sys::ggml_threadpool_new(&raw mut params) };
        match NonNull::new(ptr) {
            Some(ptr) => Ok(Arc::new(ThreadPool { ptr })),
            None => Err(format!("no pool of {n_threads} threads")),
        }
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ggml_threadpool {
        self.ptr.as_ptr()
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        // SAFETY: ours; contexts hold an `Arc` of it.
        unsafe { sys::ggml_threadpool_free(self.ptr.as_ptr()) };
    }
}

/// Rows of the batch that C reads; kept, so that a call allocates nothing.
struct Batch {
    pos: Vec<i32>,
    n_seq_id: Vec<i32>,
    seq_id: Vec<*mut i32>,
    output: Vec<i8>,
    token: Vec<i32>,
    /// What the elements of `seq_id` point to: the numbers of the lanes.
    ids: Vec<Shared<i32>>,
}

/// An owned `llama_context`.
pub(crate) struct Context {
    ptr: NonNull<sys::llama_context>,
    tap: Option<Shared<Tap>>,
    /// Outputs that a tapped call declares: as many as its last layer computes.
    tapped: Output,
    /// Whether llama.cpp was told to keep the rows behind the last norm.
    normed: bool,
    batch: Batch,
    n_embd: usize,
    /// Whether rows behind the last norm are as long.
    one_width: bool,
    n_vocab: usize,
    lanes: u32,
    /// Where keys and values lie, lane after lane; empty with one lane.
    kv: Vec<Range<usize>>,
    // Both outlive `ptr`: dropped after it, in order of declaration.
    _model: Model,
    _threads: Arc<ThreadPool>,
}

// SAFETY: llama.cpp's contexts have no ties to a thread; `&mut self` on every
// call keeps it to one at a time. The raw pointers in `batch` and `tap` are to
// memory that they own.
unsafe impl Send for Context {}

/// What enters a call.
pub(crate) enum Rows<'a> {
    /// Token ids, looked up by llama.cpp.
    Tokens(&'a [u32]),
    /// Rows of `n_embd` floats; finite.
    Hidden(&'a [f32]),
}

impl Context {
    /// A context, empty. Lanes that nobody uses take no memory.
    pub(crate) fn new(
        model: &Model,
        options: &ContextOptions,
        threads: &Arc<ThreadPool>,
    ) -> Result<Context, String> {
        log::clear();
        let n_layer = model.n_layer();
        let enter = options.enter.checked_sub(1);
        let inside = enter.is_some() || options.leave.is_some();
        let lanes = options.lanes.clamp(1, LANES_MAX);
        // With several lanes also to see where they lie.
        let tap = (inside || lanes > 1).then(|| Shared::new(Tap::new(enter, options.leave)));
        if inside && n_layer > LAYERS_MAX {
            return Err(format!("a model of {n_layer} layers is not entered inside"));
        }
        // Only the last layer computes no more rows than are declared as outputs.
        let tapped = match options.leave {
            Some(layer) if layer + 1 < n_layer => Output::Last,
            _ => Output::All,
        };
        // SAFETY: no arguments.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = options.n_ctx.saturating_mul(lanes);
        params.n_batch = options.n_batch;
        params.n_ubatch = options.n_batch;
        // At least one for each lane, or it aborts.
        params.n_outputs_max = if tapped == Output::Last { lanes } else { 0 };
        params.n_seq_max = lanes;
        params.kv_unified = false;
        params.n_threads = options.n_threads as i32;
        params.n_threads_batch = options.n_threads as i32;
        params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_ENABLED;
        // Without, a windowed layer forgets what truncation needs again.
        params.swa_full = true;
        // Pooling is done by who asks: a prompt may come in several calls.
        params.pooling_type = sys::LLAMA_POOLING_TYPE_NONE;
        params.no_perf = true;
        if let Some(tap) = &tap {
            params.cb_eval = Some(on_tensor);
            params.cb_eval_user_data = tap.as_ptr().cast();
        }
        // SAFETY: the model lives; `tap` outlives the context.
        let ptr = unsafe { sys::llama_init_from_model(model.as_ptr(), params) };
        let Some(ptr) = NonNull::new(ptr) else {
            return Err(log::errors("no context"));
        };
        let pool = threads.ptr.as_ptr();
        // SAFETY: both live, and the pool outlives the context.
        unsafe { sys::llama_attach_threadpool(ptr.as_ptr(), pool, pool) };
        let mut context = Context {
            ptr,
            tap,
            tapped,
            normed: false,
            batch: Batch::new(options.n_batch as usize, lanes),
            n_embd: model.n_embd() as usize,
            one_width: model.n_embd_out() == model.n_embd(),
            n_vocab: model.n_vocab() as usize,
            lanes,
            kv: Vec::new(),
            _model: Arc::clone(model),
            _threads: Arc::clone(threads),
        };
        if lanes > 1 {
            context.find_lanes()?;
            (0..lanes).for_each(|lane| context.release(lane));
        }
        Ok(context)
    }

    /// llama.cpp does not say where keys and values lie, but shows them to the evaluation callback: one row is
    /// computed to see them.
    fn find_lanes(&mut self) -> Result<(), String> {
        let row = vec![0.0; self.n_embd];
        let Some(tap) = self.tap.as_ref().map(Shared::as_ptr) else {
            return Ok(());
        };
        // SAFETY: ours, and no call is in progress that would touch it.
        unsafe { (*tap).look() };
        let decoded = self.decode(&Rows::Hidden(&row), &[(0, 0)], Output::None);
        // SAFETY: the context lives; after this nothing computes.
        unsafe { sys::llama_synchronize(self.ptr.as_ptr()) };
        // SAFETY: ours, and the call is over.
        self.kv = unsafe { (*tap).looked() };
        decoded?;
        self.truncate(0, 0)
    }

    /// Gives the memory of an empty lane back to the system; it is taken again as it is used.
    pub(crate) fn release(&self, lane: u32) {
        for range in &self.kv {
            let len = range.len() / self.lanes as usize;
            let start = range.start + len * lane as usize;
            super::give_back(start..start + len);
        }
    }

    /// The model it is of.
    pub(crate) fn model(&self) -> &Model {
        &self._model
    }

    /// Floats in a logits row.
    pub(crate) fn n_vocab(&self) -> u32 {
        self.n_vocab as u32
    }

    /// Drops every position of a lane from `pos` on.
    pub(crate) fn truncate(&mut self, lane: u32, pos: u32) -> Result<(), String> {
        // SAFETY: the context lives.
        let memory = unsafe { sys::llama_get_memory(self.ptr.as_ptr()) };
        if pos == 0 && self.lanes == 1 {
            // SAFETY: the memory is the context's.
            unsafe { sys::llama_memory_clear(memory, false) };
            return Ok(());
        }
        // SAFETY: the memory is the context's.
        let done = unsafe { sys::llama_memory_seq_rm(memory, lane as i32, pos as i32, -1) };
        if done {
            Ok(())
        } else {
            Err("this model's memory cannot be truncated".into())
        }
    }

    /// Sequences that lie side by side.
    pub(crate) fn lanes(&self) -> u32 {
        self.lanes
    }

    /// Keys and values of a lane, for [`Context::put_state`]; as many bytes as they take.
    pub(crate) fn state(&mut self, lane: u32) -> Result<Vec<u8>, String> {
        log::clear();
        // SAFETY: the context lives.
        let len = unsafe { sys::llama_state_seq_get_size(self.ptr.as_ptr(), lane as i32) };
        let mut state = vec![0; len];
        let bytes = state.as_mut_ptr();
        // SAFETY: `state` has room for `len` bytes; the call waits for the computation.
        let written =
            unsafe { sys::llama_state_seq_get_data(self.ptr.as_ptr(), bytes, len, lane as i32) };
        if written == len && len > 0 {
            Ok(state)
        } else {
            Err(log::errors("no state of a lane"))
        }
    }

    /// Fills an empty lane with the state of one that holds `end` positions, of a context of the same model with as
    /// many lanes. Whether it has them all then; else it is empty: there was no room, or a window that slides has
    /// forgotten some.
    pub(crate) fn put_state(&mut self, lane: u32, state: &[u8], end: u32) -> Result<bool, String> {
        log::clear();
        let (bytes, len) = (state.as_ptr(), state.len());
        // SAFETY: the context lives, and the call reads no more than `len` bytes.
        let read =
            unsafe { sys::llama_state_seq_set_data(self.ptr.as_ptr(), bytes, len, lane as i32) };
        // SAFETY: the context lives.
        let memory = unsafe { sys::llama_get_memory(self.ptr.as_ptr()) };
        // SAFETY: the memory is the context's.
        let first = unsafe { sys::llama_memory_seq_pos_min(memory, lane as i32) };
        // SAFETY: as above.
        let last = unsafe { sys::llama_memory_seq_pos_max(memory, lane as i32) };
        let whole = read == len && first == 0 && i64::from(last) + 1 == i64::from(end);
        if !whole {
            self.truncate(lane, 0)?;
        }
        Ok(whole)
    }

    /// Runs rows, each given by its lane and its position: those of one lane, one after the other, or one each
    /// of lanes that follow each other, in their order. `out` is replaced by the rows asked for: hidden ones
    /// behind a layer (always all), or behind the last norm, else logits.
    pub(crate) fn run(
        &mut self,
        rows: &Rows<'_>,
        at: &[(u32, u32)],
        output: Output,
        out: &mut Vec<f32>,
    ) -> Result<(), String> {
        let n_rows = at.len();
        let (len, expected) = match rows {
            Rows::Tokens(tokens) => (tokens.len(), n_rows),
            Rows::Hidden(rows) => (rows.len(), n_rows.saturating_mul(self.n_embd)),
        };
        let n_batch = self.batch.pos.len();
        if len != expected || n_rows == 0 || n_rows > n_batch {
            let why = format!("{len} values for {n_rows} rows, at most {n_batch} are possible");
            return Err(why);
        }
        if at.iter().any(|(lane, _)| *lane >= self.lanes) {
            return Err(format!("a lane beyond {}", self.lanes));
        }
        log::clear();
        if !self.leaves() {
            self.keep_normed(output == Output::Normed);
        }
        let Some(tap) = &self.tap else {
            self.decode(rows, at, output)?;
            return self.take(n_rows, output, out);
        };
        let tap = tap.as_ptr();
        // SAFETY: ours, and no call is in progress that would touch it.
        unsafe { (*tap).begin(rows, out) };
        let output = if self.leaves() { self.tapped } else { output };
        let decoded = self.decode(rows, at, output);
        // SAFETY: as above.
        let taken = unsafe { (*tap).end(out) };
        decoded?;
        taken?;
        match self.leaves() {
            false => self.take(n_rows, output, out),
            true if out.len() == n_rows * self.n_embd => Ok(()),
            true => Err(format!("{} values for {n_rows} rows left", out.len())),
        }
    }

    /// Whether rows are taken behind a layer.
    pub(crate) fn leaves(&self) -> bool {
        // SAFETY: ours, and never written after it was made.
        self.tap
            .as_ref()
            .is_some_and(|tap| unsafe { (*tap.as_ptr()).leaves() })
    }

    fn decode(&mut self, rows: &Rows<'_>, at: &[(u32, u32)], output: Output) -> Result<(), String> {
        let batch = self.batch.fill(rows, at, output);
        // SAFETY: the batch's arrays have as many elements as rows, its rows `n_embd`
        // each (checked by `run`); they live through the call, which does not
        // write to them.
        let status = unsafe { sys::llama_decode(self.ptr.as_ptr(), batch) };
        if status == 0 {
            return Ok(());
        }
        Err(log::errors("llama_decode failed"))
    }

    /// Told once: a graph of the other kind is built anew.
    fn keep_normed(&mut self, keep: bool) {
        if self.normed != keep {
            // SAFETY: the context lives, and no call is in progress.
            unsafe { sys::llama_set_embeddings(self.ptr.as_ptr(), keep) };
            self.normed = keep;
        }
    }

    /// The rows asked for of a call that went to the end.
    fn take(&mut self, n_rows: usize, output: Output, out: &mut Vec<f32>) -> Result<(), String> {
        if output == Output::Normed {
            return self.take_normed(n_rows, out);
        }
        self.take_logits(n_rows, output, out)
    }

    fn take_normed(&mut self, n_rows: usize, out: &mut Vec<f32>) -> Result<(), String> {
        out.clear();
        if !self.one_width {
            return Err("its rows are of another width behind the last norm".into());
        }
        // SAFETY: the context lives; the call waits for the computation.
        let rows = unsafe { sys::llama_get_embeddings(self.ptr.as_ptr()) };
        if rows.is_null() {
            return Err("no rows behind the last norm".into());
        }
        // SAFETY: without pooling llama.cpp keeps a row of `n_embd` per row of the call, in the
        // order of the batch, until the next call.
        let rows = unsafe { std::slice::from_raw_parts(rows, n_rows * self.n_embd) };
        out.extend_from_slice(rows);
        Ok(())
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
            Output::All | Output::Normed => n_rows,
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
    fn new(n: usize, lanes: u32) -> Batch {
        let ids: Vec<_> = (0..lanes as i32).map(Shared::new).collect();
        Batch {
            pos: vec![0; n],
            n_seq_id: vec![1; n],
            seq_id: vec![std::ptr::null_mut(); n],
            output: vec![0; n],
            token: Vec::new(),
            ids,
        }
    }

    /// The C view of rows that fit, in lanes that there are.
    fn fill(&mut self, rows: &Rows<'_>, at: &[(u32, u32)], output: Output) -> sys::llama_batch {
        let n_rows = at.len();
        for (i, (lane, pos)) in at.iter().enumerate() {
            self.pos[i] = *pos as i32;
            self.seq_id[i] = self.ids[*lane as usize].as_ptr();
        }
        let all = matches!(output, Output::All | Output::Normed);
        self.output.fill(i8::from(all));
        if output == Output::Last {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::FileModel;
    use crate::{RandomShape, RandomWeights, random_model};

    #[test]
    fn a_call_of_another_length_than_its_rows_does_not_reach_c() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let shape = RandomShape::tiny();
        random_model("llama", &shape, RandomWeights::Q4KM, 1, &path).unwrap();
        let model = FileModel::from_path(&path).unwrap();
        let threads = ThreadPool::new(1).unwrap();
        let n_embd = shape.n_embd as usize;
        let rows = vec![0.5; 5 * n_embd];
        for (enter, leave) in [(0, None), (1, None), (0, Some(1)), (1, Some(2))] {
            let options = ContextOptions {
                n_ctx: 256,
                lanes: 1,
                n_batch: 4,
                n_threads: 1,
                enter,
                leave,
            };
            let mut context = Context::new(&model, &options, &threads).unwrap();
            let mut out = Vec::new();
            let mut run = |rows: Rows<'_>, n_rows: u32| {
                let at: Vec<_> = (0..n_rows).map(|pos| (0, pos)).collect();
                context.run(&rows, &at, Output::All, &mut out)
            };
            for (len, n_rows) in [(n_embd - 1, 1), (n_embd + 1, 1), (2 * n_embd, 1), (0, 0)] {
                assert!(run(Rows::Hidden(&rows[..len]), n_rows).is_err(), "{len}");
            }
            assert!(run(Rows::Hidden(&rows), 5).is_err(), "over the batch");
            assert!(run(Rows::Tokens(&[1, 2]), 3).is_err());
            run(Rows::Hidden(&rows[..2 * n_embd]), 2).unwrap();
            let width = leave.map_or(shape.n_vocab as usize, |_| n_embd);
            assert_eq!(out.len(), 2 * width);
        }
    }
}
