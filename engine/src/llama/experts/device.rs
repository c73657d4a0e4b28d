//! The trunk's device: its buffers hold nothing, and what is to be computed with
//! tensors in them is asked of others.
//!
//! ```text
//! ggml's scheduler:  CPU … │ ours: MUL_MAT_ID, MUL_MAT_ID, GLU, MUL_MAT_ID │ CPU …
//! ```
//!
//! Results lie in the CPU's own buffers, so nothing is copied between the two.

use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use llama_cpp_sys_2 as sys;

use super::super::log;
use super::super::tap::Shared;
use super::abi::{
    self, API_VERSION, Backend, BackendFns, BackendPtr, BufferFns, BufferKind, BufferPtr,
    BufferType, BufferTypeFns, Device, DeviceFns, DevicePtr, Reg, RegFns, RegPtr, TensorPtr,
};
use super::graph;
use crate::experts::{self, ExpertHolders};

/// What stands for the address of tensors that are nowhere. Never read.
const NOWHERE: usize = 4096;
/// ggml's own for the CPU.
const ALIGNMENT: usize = 64;

static NAME: &std::ffi::CStr = c"experts";

/// A device for one model. C keeps its address: it outlives the model and the
/// contexts on it.
pub(crate) struct ExpertDevice {
    parts: Shared<Parts>,
}

/// Everything C points to.
struct Parts {
    reg: Reg,
    device: Device,
    buffers: BufferKind,
    holders: Arc<dyn ExpertHolders>,
    /// The whole model's layer that the file calls 0.
    first_layer: u32,
    /// Bytes of tensors that are not here.
    elsewhere: AtomicU64,
}

// SAFETY: after it was made nothing is written but the atomic; `holders` is
// `Send` and `Sync`, the pointers are to `Parts` itself and to statics.
unsafe impl Send for ExpertDevice {}
// SAFETY: as above.
unsafe impl Sync for ExpertDevice {}

impl ExpertDevice {
    /// A device for a model whose layer 0 is `first_layer` of the whole.
    ///
    /// # Errors
    /// The library is another than the one this was written for.
    pub(crate) fn new(
        holders: Arc<dyn ExpertHolders>,
        first_layer: u32,
    ) -> Result<ExpertDevice, String> {
        super::super::start();
        abi::check()?;
        let parts = Shared::new(Parts {
            reg: reg(),
            device: device(),
            buffers: buffers(),
            holders,
            first_layer,
            elsewhere: AtomicU64::new(0),
        });
        let all = parts.as_ptr();
        let (context, device) = (all.cast::<c_void>(), device_of(all));
        // SAFETY: just made; nothing else has its address yet.
        unsafe { (*all).reg.context = context };
        // SAFETY: as above.
        unsafe { (*all).device.reg = reg_of(all) };
        // SAFETY: as above.
        unsafe { (*all).device.context = context };
        // SAFETY: as above.
        unsafe { (*all).buffers.device = device };
        // SAFETY: as above.
        unsafe { (*all).buffers.context = context };
        Ok(ExpertDevice { parts })
    }

    /// Bytes of tensors that were mapped to it.
    pub(crate) fn bytes_elsewhere(&self) -> u64 {
        // SAFETY: lives as long as `self`; only the atomic is ever written.
        let parts = unsafe { &*self.parts.as_ptr() };
        parts.elsewhere.load(Ordering::Relaxed)
    }

    pub(in super::super) fn device(&self) -> DevicePtr {
        device_of(self.parts.as_ptr())
    }

    pub(in super::super) fn buffer_type(&self) -> BufferType {
        // SAFETY: in bounds of what lives; only an address is taken.
        let buffers = unsafe { &raw mut (*self.parts.as_ptr()).buffers };
        buffers.cast()
    }
}

fn device_of(parts: *mut Parts) -> DevicePtr {
    // SAFETY: in bounds of what lives; only an address is taken.
    let device = unsafe { &raw mut (*parts).device };
    device.cast()
}

fn reg_of(parts: *mut Parts) -> RegPtr {
    // SAFETY: in bounds of what lives; only an address is taken.
    let reg = unsafe { &raw mut (*parts).reg };
    reg.cast()
}

fn reg() -> Reg {
    Reg {
        api_version: API_VERSION,
        fns: RegFns {
            get_name: reg_name,
            get_device_count: reg_count,
            get_device: reg_device,
            get_proc_address: None,
        },
        context: std::ptr::null_mut(),
    }
}

fn device() -> Device {
    Device {
        fns: DeviceFns {
            get_name: device_name,
            get_description: device_name,
            get_memory: device_memory,
            get_type: device_type,
            get_props: device_props,
            init_backend,
            get_buffer_type: device_buffer_type,
            get_host_buffer_type: None,
            buffer_from_host_ptr: None,
            supports_op,
            supports_buft,
            offload_op: None,
            event_new: None,
            event_free: None,
            event_synchronize: None,
        },
        reg: std::ptr::null_mut(),
        context: std::ptr::null_mut(),
    }
}

fn buffers() -> BufferKind {
    BufferKind {
        fns: BufferTypeFns {
            get_name: buffer_type_name,
            alloc_buffer,
            alloc_buffer_n: None,
            get_alignment,
            get_max_size: None,
            get_alloc_size: None,
            get_alloc_size_n: None,
            is_host: None,
        },
        device: std::ptr::null_mut(),
        context: std::ptr::null_mut(),
    }
}

/// # Safety
/// `dev` is the device of an [`ExpertDevice`] that lives.
unsafe fn parts_of<'a>(dev: DevicePtr) -> &'a Parts {
    // SAFETY: the caller's promise.
    let parts = unsafe { (*dev.cast::<Device>()).context };
    // SAFETY: set by `new` to what lives as long; only its atomic is written.
    unsafe { &*parts.cast::<Parts>() }
}

unsafe extern "C" fn reg_name(_: RegPtr) -> *const c_char {
    NAME.as_ptr()
}

unsafe extern "C" fn reg_count(_: RegPtr) -> usize {
    1
}

unsafe extern "C" fn reg_device(reg: RegPtr, _: usize) -> DevicePtr {
    // SAFETY: ggml passes the registry of a live `ExpertDevice`.
    let parts = unsafe { (*reg.cast::<Reg>()).context };
    device_of(parts.cast())
}

unsafe extern "C" fn device_name(_: DevicePtr) -> *const c_char {
    NAME.as_ptr()
}

unsafe extern "C" fn device_memory(_: DevicePtr, free: *mut usize, total: *mut usize) {
    for bytes in [free, total] {
        // SAFETY: ggml passes two places for numbers. One byte: llama.cpp divides
        // by their sum when it would share layers out.
        unsafe { *bytes = 1 };
    }
}

unsafe extern "C" fn device_type(_: DevicePtr) -> sys::ggml_backend_dev_type {
    sys::GGML_BACKEND_DEVICE_TYPE_ACCEL
}

unsafe extern "C" fn device_props(_: DevicePtr, props: *mut sys::ggml_backend_dev_props) {
    let filled = sys::ggml_backend_dev_props {
        name: NAME.as_ptr(),
        description: NAME.as_ptr(),
        memory_free: 1,
        memory_total: 1,
        type_: sys::GGML_BACKEND_DEVICE_TYPE_ACCEL,
        device_id: std::ptr::null(),
        caps: sys::ggml_backend_dev_caps {
            async_: false,
            host_buffer: false,
            buffer_from_host_ptr: false,
            events: false,
            mmap_support: false,
        },
    };
    // SAFETY: ggml passes a place for it.
    unsafe { props.write(filled) };
}

unsafe extern "C" fn init_backend(dev: DevicePtr, _: *const c_char) -> BackendPtr {
    static GUID: [u8; 16] = *b"shoal's experts\0";
    let backend = Backend {
        guid: GUID.as_ptr().cast_mut().cast(),
        fns: BackendFns {
            get_name: backend_name,
            free: backend_free,
            set_tensor_async: None,
            get_tensor_async: None,
            set_tensor_2d_async: None,
            get_tensor_2d_async: None,
            cpy_tensor_async: None,
            synchronize: None,
            graph_plan_create: None,
            graph_plan_free: None,
            graph_plan_update: None,
            graph_plan_compute: None,
            graph_compute,
            event_record: None,
            event_wait: None,
            graph_optimize: None,
        },
        device: dev,
        context: std::ptr::null_mut(),
    };
    Box::into_raw(Box::new(backend)).cast()
}

unsafe extern "C" fn backend_name(_: BackendPtr) -> *const c_char {
    NAME.as_ptr()
}

unsafe extern "C" fn backend_free(backend: BackendPtr) {
    // SAFETY: from `init_backend`, freed once.
    drop(unsafe { Box::from_raw(backend.cast::<Backend>()) });
}

/// Results are the CPU's tensors.
unsafe extern "C" fn device_buffer_type(_: DevicePtr) -> BufferType {
    // SAFETY: no arguments; a static.
    unsafe { sys::ggml_backend_cpu_buffer_type() }
}

unsafe extern "C" fn supports_buft(dev: DevicePtr, kind: BufferType) -> bool {
    // SAFETY: `kind` is a buffer type that lives.
    let its_device = unsafe { sys::ggml_backend_buft_get_device(kind) };
    // SAFETY: as above.
    its_device == dev || unsafe { sys::ggml_backend_buft_is_host(kind) }
}

unsafe extern "C" fn supports_op(dev: DevicePtr, op: *const sys::ggml_tensor) -> bool {
    // SAFETY: `dev` is ours and lives.
    let parts = unsafe { parts_of(dev) };
    let ours = (&raw const parts.buffers).cast_mut().cast();
    // SAFETY: ggml passes a live node, whose sources live.
    unsafe { graph::belongs_to_experts(op, ours) }
}

unsafe extern "C" fn graph_compute(
    backend: BackendPtr,
    graph: *mut sys::ggml_cgraph,
) -> sys::ggml_status {
    // SAFETY: `backend` is from `init_backend`.
    let dev = unsafe { (*backend.cast::<Backend>()).device };
    // SAFETY: `dev` is ours and lives.
    let parts = unsafe { parts_of(dev) };
    let computed = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: ggml passes a graph whose inputs are computed and whose nodes
        // are allocated, in buffers that this device supports.
        unsafe { compute(parts, graph) }
    }));
    let why = match computed {
        Ok(Ok(())) => return sys::GGML_STATUS_SUCCESS,
        Ok(Err(why)) => why,
        Err(_) => "asking for experts panicked".into(),
    };
    // llama_decode fails with it, on this thread.
    log::error(&why);
    sys::GGML_STATUS_FAILED
}

/// # Safety
/// `graph` lives, its inputs are computed, its nodes allocated.
unsafe fn compute(parts: &Parts, graph: *mut sys::ggml_cgraph) -> Result<(), String> {
    let ours = (&raw const parts.buffers).cast_mut().cast();
    // SAFETY: the caller's promise.
    let Some(seen) = (unsafe { graph::read(graph, ours) }) else {
        return Ok(());
    };
    let block = experts::recognise(&seen.nodes)?;
    // SAFETY: the caller's promise; the tensors are the graph's.
    let picks = unsafe { graph::picks(seen.tensors[block.first], seen.tensors[block.last]) }?;
    let rows = experts::dispatch(&block, parts.first_layer, &picks, parts.holders.as_ref())
        .map_err(|why| why.to_string())?;
    // SAFETY: as above.
    unsafe { graph::put(seen.tensors[block.last], &rows) }
}

unsafe extern "C" fn buffer_type_name(_: BufferType) -> *const c_char {
    NAME.as_ptr()
}

unsafe extern "C" fn get_alignment(_: BufferType) -> usize {
    ALIGNMENT
}

unsafe extern "C" fn alloc_buffer(kind: BufferType, size: usize) -> BufferPtr {
    let fns = BufferFns {
        free_buffer: None,
        get_base,
        init_tensor: None,
        memset_tensor,
        set_tensor,
        get_tensor,
        set_tensor_2d: None,
        get_tensor_2d: None,
        cpy_tensor: None,
        clear,
        reset: None,
    };
    // SAFETY: `kind` lives as long as the model; the functions are ours.
    unsafe { abi::ggml_backend_buffer_init(kind, fns, std::ptr::null_mut(), size) }
}

unsafe extern "C" fn get_base(_: BufferPtr) -> *mut c_void {
    std::ptr::without_provenance_mut(NOWHERE)
}

unsafe extern "C" fn clear(_: BufferPtr, _: u8) {}

unsafe extern "C" fn memset_tensor(_: BufferPtr, _: TensorPtr, _: u8, _: usize, _: usize) {}

/// What the loader read from the file's hole goes nowhere.
unsafe extern "C" fn set_tensor(
    buffer: BufferPtr,
    _: TensorPtr,
    _: *const c_void,
    _: usize,
    size: usize,
) {
    // SAFETY: the buffer is from `alloc_buffer`.
    let kind = unsafe { (*buffer.cast::<abi::Buffer>()).kind };
    // SAFETY: its type is ours and lives.
    let dev = unsafe { (*kind.cast::<BufferKind>()).device };
    // SAFETY: `dev` is ours and lives.
    let parts = unsafe { parts_of(dev) };
    parts.elsewhere.fetch_add(size as u64, Ordering::Relaxed);
}

/// Nobody asks for what is not here; if so, zeros.
unsafe extern "C" fn get_tensor(
    _: BufferPtr,
    _: *const sys::ggml_tensor,
    out: *mut c_void,
    _: usize,
    size: usize,
) {
    // SAFETY: ggml passes room for `size` bytes.
    unsafe { out.cast::<u8>().write_bytes(0, size) };
}
