//! What a holder computes with: an expert's tensors, laid as llama.cpp lays
//! those of a model, and the small graph that is run on them.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use gguf::TensorType;
use llama_cpp_sys_2 as sys;

use super::super::{ThreadPool, start};
use crate::experts::{Activation, Form, Kind, Part};

/// Nodes and tensors that an expert adds to a graph: 2 inputs, up to 3 matrices
/// with scale and bias, their halves and 4 steps of an activation.
const NODES_MAX: usize = 24;

type Tensor = *mut sys::ggml_tensor;
/// An operation with one source, and one with two.
type One = unsafe extern "C" fn(*mut sys::ggml_context, Tensor) -> Tensor;
type Two = unsafe extern "C" fn(*mut sys::ggml_context, Tensor, Tensor) -> Tensor;
type GetExtra =
    unsafe extern "C" fn(sys::ggml_backend_dev_t) -> *mut sys::ggml_backend_buffer_type_t;

/// A ggml context: tensors without data.
struct Context(NonNull<sys::ggml_context>);

impl Context {
    fn new(tensors: usize) -> Result<Context, String> {
        // SAFETY: no arguments.
        let each = unsafe { sys::ggml_tensor_overhead() };
        Self::of(sys::ggml_init_params {
            mem_size: tensors * each,
            mem_buffer: std::ptr::null_mut(),
            no_alloc: true,
        })
    }

    fn of(params: sys::ggml_init_params) -> Result<Context, String> {
        // SAFETY: the memory is ggml's own, or outlives the context.
        let ptr = unsafe { sys::ggml_init(params) };
        Ok(Context(NonNull::new(ptr).ok_or("no ggml context")?))
    }

    fn tensor(&self, ty: u32, dims: [u64; 3]) -> Tensor {
        let [a, b, c] = dims.map(|dim| dim as i64);
        // SAFETY: the context has room, the type is one of ggml's.
        unsafe { sys::ggml_new_tensor_3d(self.0.as_ptr(), ty, a, b, c) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: ours; its tensors are used no more.
        unsafe { sys::ggml_free(self.0.as_ptr()) };
    }
}

/// A buffer of the CPU, or of its repacked weights.
struct Buffer(NonNull<sys::ggml_backend_buffer>);

impl Buffer {
    fn new(kind: sys::ggml_backend_buffer_type_t, size: usize) -> Result<Buffer, String> {
        // SAFETY: a buffer type of the CPU's.
        let ptr = unsafe { sys::ggml_backend_buft_alloc_buffer(kind, size) };
        let none = || format!("no memory for {size} bytes of experts");
        Ok(Buffer(NonNull::new(ptr).ok_or_else(none)?))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: ours; what lies in it is used no more.
        unsafe { sys::ggml_backend_buffer_free(self.0.as_ptr()) };
    }
}

/// The tensors of one expert.
pub(crate) struct ExpertWeights {
    tensors: BTreeMap<(Part, Kind), Tensor>,
    bytes: u64,
    // After the tensors: what they lie in, and what they are.
    _buffers: Vec<Buffer>,
    context: Context,
}

// SAFETY: read only once they are filled; ggml's tensors have no thread.
unsafe impl Send for ExpertWeights {}

/// Tensors an expert can have.
const TENSORS_MAX: usize = 12;

impl ExpertWeights {
    /// An expert without tensors yet.
    pub(crate) fn new() -> Result<ExpertWeights, String> {
        start();
        Ok(ExpertWeights {
            tensors: BTreeMap::new(),
            bytes: 0,
            _buffers: Vec::new(),
            context: Context::new(TENSORS_MAX)?,
        })
    }

    /// Takes a tensor in: `rows` rows of `columns`, as many bytes as they take.
    pub(crate) fn add(
        &mut self,
        what: (Part, Kind),
        ty: TensorType,
        [columns, rows]: [u64; 2],
        bytes: &[u8],
    ) -> Result<(), String> {
        let expected = ty.row_bytes(columns).and_then(|row| row.checked_mul(rows));
        if expected != Some(bytes.len() as u64) || self.tensors.len() == TENSORS_MAX {
            return Err(format!(
                "{} bytes for {rows} {ty} rows of {columns}",
                bytes.len()
            ));
        }
        let kind = match what.1 {
            Kind::Weight => buffer_type(ty, [columns, rows])?,
            // SAFETY: no arguments.
            _ => unsafe { sys::ggml_backend_cpu_buffer_type() },
        };
        let tensor = self.context.tensor(ty.id(), [columns, rows, 1]);
        // SAFETY: a buffer type and a tensor.
        let size = unsafe { sys::ggml_backend_buft_get_alloc_size(kind, tensor) };
        let buffer = Buffer::new(kind, size)?;
        let ptr = buffer.0.as_ptr();
        // SAFETY: the buffer is ours.
        unsafe { sys::ggml_backend_buffer_set_usage(ptr, sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS) };
        // SAFETY: the buffer is ours.
        let base = unsafe { sys::ggml_backend_buffer_get_base(ptr) };
        // SAFETY: the buffer has room for the tensor, which has none yet.
        let status = unsafe { sys::ggml_backend_tensor_alloc(ptr, tensor, base) };
        if status != sys::GGML_STATUS_SUCCESS {
            return Err("a tensor was not placed".into());
        }
        // SAFETY: as many bytes as the tensor has, checked above.
        unsafe { sys::ggml_backend_tensor_set(tensor, bytes.as_ptr().cast(), 0, bytes.len()) };
        self._buffers.push(buffer);
        self.tensors.insert(what, tensor);
        self.bytes += size as u64;
        Ok(())
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn get(&self, part: Part, kind: Kind) -> Option<Tensor> {
        self.tensors.get(&(part, kind)).copied()
    }
}

/// Where llama.cpp would put such a matrix: the first of the CPU's buffer types
/// whose kernels take it. It asks with the tensor of all experts, which has
/// three dimensions; the kernels do not mind one that has a single expert.
fn buffer_type(
    ty: TensorType,
    [columns, rows]: [u64; 2],
) -> Result<sys::ggml_backend_buffer_type_t, String> {
    // SAFETY: returns a static.
    let reg = unsafe { sys::ggml_backend_cpu_reg() };
    // SAFETY: the CPU has one device.
    let dev = unsafe { sys::ggml_backend_reg_dev_get(reg, 0) };
    for kind in buffer_types(reg, dev) {
        let context = Context::new(4)?;
        let matrix = context.tensor(ty.id(), [columns, rows, 2]);
        let input = context.tensor(sys::GGML_TYPE_F32, [columns, 1, 8]);
        let ids = context.tensor(sys::GGML_TYPE_I32, [1, 8, 1]);
        // SAFETY: shapes that fit each other.
        let node = unsafe { sys::ggml_mul_mat_id(context.0.as_ptr(), matrix, input, ids) };
        let buffer = Buffer::new(kind, 0)?;
        // SAFETY: the tensor is ours; the buffer outlives its use.
        unsafe { (*matrix).buffer = buffer.0.as_ptr() };
        // SAFETY: a node with all its sources.
        if unsafe { sys::ggml_backend_dev_supports_op(dev, node) } {
            return Ok(kind);
        }
    }
    Err(format!("this machine computes no experts of type {ty}"))
}

/// The CPU's buffer types, in llama.cpp's order: those that repack weights, then
/// the plain one.
fn buffer_types(
    reg: sys::ggml_backend_reg_t,
    dev: sys::ggml_backend_dev_t,
) -> Vec<sys::ggml_backend_buffer_type_t> {
    let mut kinds = Vec::new();
    let name = c"ggml_backend_dev_get_extra_bufts";
    // SAFETY: a registry and a C string.
    let found = unsafe { sys::ggml_backend_reg_get_proc_address(reg, name.as_ptr()) };
    if !found.is_null() {
        // SAFETY: ggml documents the type of what has this name.
        let get = unsafe { std::mem::transmute::<*mut c_void, GetExtra>(found) };
        // SAFETY: the device is the registry's.
        let mut next = unsafe { get(dev) };
        while !next.is_null() {
            // SAFETY: an array that ends with null.
            let kind = unsafe { *next };
            if kind.is_null() {
                break;
            }
            kinds.push(kind);
            // SAFETY: the end has not been reached.
            next = unsafe { next.add(1) };
        }
    }
    // SAFETY: no arguments.
    kinds.push(unsafe { sys::ggml_backend_cpu_buffer_type() });
    kinds
}

/// Rows for one expert.
pub(crate) struct Job<'a> {
    pub weights: &'a ExpertWeights,
    pub form: Form,
    /// Rows of `n_embd` floats.
    pub rows: Vec<f32>,
    pub n_embd: usize,
}

/// Computes experts on the CPU, as the CPU backend of a model does.
pub(crate) struct ExpertCpu {
    backend: NonNull<sys::ggml_backend>,
    alloc: NonNull<sys::ggml_gallocr>,
    /// What graphs are made in; 16 bytes are ggml's alignment.
    arena: Vec<u128>,
    _threads: Arc<ThreadPool>,
}

// SAFETY: a backend and an allocator that nobody else knows; `&mut self` on
// every call.
unsafe impl Send for ExpertCpu {}

impl ExpertCpu {
    pub(crate) fn new(n_threads: u32) -> Result<ExpertCpu, String> {
        start();
        let threads = ThreadPool::new(n_threads)?;
        // SAFETY: no arguments.
        let backend = NonNull::new(unsafe { sys::ggml_backend_cpu_init() }).ok_or("no CPU")?;
        // SAFETY: no arguments.
        let kind = unsafe { sys::ggml_backend_cpu_buffer_type() };
        // SAFETY: a buffer type.
        let alloc = NonNull::new(unsafe { sys::ggml_gallocr_new(kind) });
        let Some(alloc) = alloc else {
            // SAFETY: ours, used no more.
            unsafe { sys::ggml_backend_free(backend.as_ptr()) };
            return Err("no allocator".into());
        };
        // SAFETY: the backend is ours.
        unsafe { sys::ggml_backend_cpu_set_n_threads(backend.as_ptr(), n_threads as i32) };
        // SAFETY: the threads outlive the backend.
        unsafe { sys::ggml_backend_cpu_set_threadpool(backend.as_ptr(), threads.as_ptr()) };
        Ok(ExpertCpu {
            backend,
            alloc,
            arena: Vec::new(),
            _threads: threads,
        })
    }

    /// Runs all jobs in one graph, each expert's rows in nodes of their own; gives
    /// as many rows for each, in their order. The caller has held rows and forms against the weights.
    pub(crate) fn run(&mut self, jobs: &[Job<'_>]) -> Result<Vec<Vec<f32>>, String> {
        let n_nodes = jobs.len() * NODES_MAX;
        // SAFETY: plain arithmetic.
        let graph_bytes = unsafe { sys::ggml_graph_overhead_custom(n_nodes, false) };
        // SAFETY: no arguments.
        let bytes = graph_bytes + n_nodes * unsafe { sys::ggml_tensor_overhead() };
        let words = bytes.div_ceil(size_of::<u128>());
        self.arena.resize(words.max(self.arena.len()), 0);
        let context = Context::of(sys::ggml_init_params {
            mem_size: size_of_val(self.arena.as_slice()),
            mem_buffer: self.arena.as_mut_ptr().cast(),
            no_alloc: true,
        })?;
        // SAFETY: the context has room for it.
        let graph = unsafe { sys::ggml_new_graph_custom(context.0.as_ptr(), n_nodes, false) };
        let mut ends = Vec::with_capacity(jobs.len());
        for job in jobs {
            let end = Expert {
                context: &context,
                job,
            }
            .build()?;
            // SAFETY: graph and node are of this context.
            unsafe { sys::ggml_build_forward_expand(graph, end.out) };
            ends.push(end);
        }
        // SAFETY: the allocator is ours, the graph complete.
        if !unsafe { sys::ggml_gallocr_alloc_graph(self.alloc.as_ptr(), graph) } {
            return Err("no memory for the experts' rows".into());
        }
        for (job, end) in jobs.iter().zip(&ends) {
            set(end.rows, &job.rows);
            set(end.ids, &vec![0i32; job.rows.len() / job.n_embd]);
        }
        // SAFETY: an allocated graph whose inputs are there.
        let status = unsafe { sys::ggml_backend_graph_compute(self.backend.as_ptr(), graph) };
        if status != sys::GGML_STATUS_SUCCESS {
            return Err(format!("ggml ended with {status}"));
        }
        let computed = jobs.iter().zip(&ends).map(|(job, end)| {
            let mut rows = vec![0f32; job.rows.len()];
            let n_bytes = size_of_val(rows.as_slice());
            // SAFETY: as many rows of `n_embd` come out as went in: `n_bytes`.
            unsafe { sys::ggml_backend_tensor_get(end.out, rows.as_mut_ptr().cast(), 0, n_bytes) };
            rows
        });
        Ok(computed.collect())
    }
}

impl Drop for ExpertCpu {
    fn drop(&mut self) {
        // SAFETY: ours, used no more.
        unsafe { sys::ggml_gallocr_free(self.alloc.as_ptr()) };
        // SAFETY: ours; its threads are dropped after it.
        unsafe { sys::ggml_backend_free(self.backend.as_ptr()) };
    }
}

/// Fills an input of the graph, which has as many values.
fn set<T: Copy>(tensor: Tensor, values: &[T]) {
    let n_bytes = size_of_val(values);
    // SAFETY: an allocated input, made for these values.
    unsafe { sys::ggml_backend_tensor_set(tensor, values.as_ptr().cast(), 0, n_bytes) };
}

/// An expert's part of a graph.
struct Expert<'a> {
    context: &'a Context,
    job: &'a Job<'a>,
}

struct Ends {
    rows: Tensor,
    ids: Tensor,
    out: Tensor,
}

impl Expert<'_> {
    fn ctx(&self) -> *mut sys::ggml_context {
        self.context.0.as_ptr()
    }

    fn build(&self) -> Result<Ends, String> {
        let n_embd = self.job.n_embd as u64;
        let n_rows = self.job.rows.len() as u64 / n_embd;
        let rows = self.context.tensor(sys::GGML_TYPE_F32, [n_embd, 1, n_rows]);
        let ids = self.context.tensor(sys::GGML_TYPE_I32, [1, n_rows, 1]);
        for input in [rows, ids] {
            // SAFETY: a tensor of this context. Inputs are not overwritten.
            unsafe { sys::ggml_set_input(input) };
        }
        let inner = match self.job.weights.get(Part::GateUp, Kind::Weight) {
            Some(_) => {
                let both = self.matrix(Part::GateUp, rows, ids)?;
                self.activation(Some(self.half(both, 0)), self.half(both, 1))
            }
            None => {
                let up = self.matrix(Part::Up, rows, ids)?;
                let gated = self.job.form.activation.gated();
                let gate = gated
                    .then(|| self.matrix(Part::Gate, rows, ids))
                    .transpose()?;
                self.activation(gate, up)
            }
        };
        let out = self.matrix(Part::Down, inner?, ids)?;
        // SAFETY: a node of this context. Outputs are not overwritten.
        unsafe { sys::ggml_set_output(out) };
        Ok(Ends { rows, ids, out })
    }

    /// `rows` through a matrix, its scale and its bias.
    fn matrix(&self, part: Part, rows: Tensor, ids: Tensor) -> Result<Tensor, String> {
        let weights = self.job.weights;
        let none = || format!("the expert has no {part:?}");
        let matrix = weights.get(part, Kind::Weight).ok_or_else(none)?;
        // SAFETY: the layout's check holds shapes together.
        let mut out = unsafe { sys::ggml_mul_mat_id(self.ctx(), matrix, rows, ids) };
        if let Some(scale) = weights.get(part, Kind::Scale) {
            // SAFETY: one value, repeated.
            out = unsafe { sys::ggml_mul(self.ctx(), out, scale) };
        }
        if let Some(bias) = weights.get(part, Kind::Bias) {
            // SAFETY: as long as the matrix has rows, by the layout's check.
            out = unsafe { sys::ggml_add_id(self.ctx(), out, bias, ids) };
        }
        Ok(out)
    }

    /// Gate (0) or up (1) of what a merged matrix gives.
    fn half(&self, both: Tensor, which: usize) -> Tensor {
        // SAFETY: a node of this context.
        let (ne, nb) = unsafe { ((*both).ne, (*both).nb) };
        let (n, offset) = (ne[0] / 2, which * (ne[0] as usize / 2) * nb[0]);
        // SAFETY: half of each row, an even number by the layout's check.
        unsafe { sys::ggml_view_3d(self.ctx(), both, n, ne[1], ne[2], nb[1], nb[2], offset) }
    }

    fn activation(&self, gate: Option<Tensor>, up: Tensor) -> Result<Tensor, String> {
        let activation = self.job.form.activation;
        match gate {
            None => self.plain(activation, up),
            Some(gate) => self.gated(activation, gate, up),
        }
    }

    fn plain(&self, activation: Activation, up: Tensor) -> Result<Tensor, String> {
        let op: One = match activation {
            Activation::Silu => sys::ggml_silu,
            Activation::Gelu => sys::ggml_gelu,
            Activation::Relu | Activation::ReluSquared => sys::ggml_relu,
            other => return Err(format!("{other:?} takes a gate")),
        };
        // SAFETY: a node of this context.
        let out = unsafe { op(self.ctx(), up) };
        if activation != Activation::ReluSquared {
            return Ok(out);
        }
        // SAFETY: as above.
        Ok(unsafe { sys::ggml_sqr(self.ctx(), out) })
    }

    fn gated(&self, activation: Activation, gate: Tensor, up: Tensor) -> Result<Tensor, String> {
        let op: Two = match activation {
            Activation::SwiGlu => sys::ggml_swiglu_split,
            Activation::GeGlu => sys::ggml_geglu_split,
            Activation::ReGlu => sys::ggml_reglu_split,
            Activation::GeGluErf => sys::ggml_geglu_erf_split,
            Activation::GeGluQuick => sys::ggml_geglu_quick_split,
            Activation::SwiGluOai { alpha, limit } => {
                // SAFETY: nodes of this context, both of one shape.
                return Ok(unsafe { sys::ggml_swiglu_oai(self.ctx(), gate, up, alpha, limit) });
            }
            Activation::SwiGluClamp { limit } => {
                // SAFETY: as above.
                return Ok(unsafe { sys::ggml_swiglu_clamp(self.ctx(), gate, up, limit) });
            }
            Activation::SiluLimited { limit } => {
                let up = self.clamp(up, -limit, limit);
                // SAFETY: a node of this context.
                let gate = unsafe { sys::ggml_silu(self.ctx(), gate) };
                let gate = self.clamp(gate, f32::NEG_INFINITY, limit);
                // SAFETY: nodes of this context, both of one shape.
                return Ok(unsafe { sys::ggml_mul(self.ctx(), gate, up) });
            }
            other => return Err(format!("{other:?} takes no gate")),
        };
        // SAFETY: nodes of this context, both of one shape.
        Ok(unsafe { op(self.ctx(), gate, up) })
    }

    fn clamp(&self, value: Tensor, low: f32, high: f32) -> Tensor {
        // SAFETY: a node of this context.
        unsafe { sys::ggml_clamp(self.ctx(), value, low, high) }
    }
}
