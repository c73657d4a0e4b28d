//! The structures of ggml-backend-impl.h, as the pinned release has them.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use llama_cpp_sys_2 as sys;

/// The release these declarations are of.
const GGML_VERSION: &CStr = c"0.26.0";
/// `GGML_BACKEND_API_VERSION` of it.
pub(super) const API_VERSION: c_int = 3;

/// A function that is optional and not given: of whatever type.
pub(super) type Absent = Option<unsafe extern "C" fn()>;

pub(super) type BufferType = sys::ggml_backend_buffer_type_t;
pub(super) type BufferPtr = sys::ggml_backend_buffer_t;
pub(super) type DevicePtr = sys::ggml_backend_dev_t;
pub(super) type RegPtr = sys::ggml_backend_reg_t;
pub(super) type BackendPtr = sys::ggml_backend_t;
pub(super) type TensorPtr = *mut sys::ggml_tensor;

#[repr(C)]
pub(super) struct BufferTypeFns {
    pub get_name: unsafe extern "C" fn(BufferType) -> *const c_char,
    pub alloc_buffer: unsafe extern "C" fn(BufferType, usize) -> BufferPtr,
    pub alloc_buffer_n: Absent,
    pub get_alignment: unsafe extern "C" fn(BufferType) -> usize,
    pub get_max_size: Absent,
    pub get_alloc_size: Absent,
    pub get_alloc_size_n: Absent,
    pub is_host: Absent,
}

/// `ggml_backend_buffer_type`.
#[repr(C)]
pub(super) struct BufferKind {
    pub fns: BufferTypeFns,
    pub device: DevicePtr,
    pub context: *mut c_void,
}

type SetTensor = unsafe extern "C" fn(BufferPtr, TensorPtr, *const c_void, usize, usize);
type GetTensor =
    unsafe extern "C" fn(BufferPtr, *const sys::ggml_tensor, *mut c_void, usize, usize);

#[repr(C)]
pub(super) struct BufferFns {
    pub free_buffer: Absent,
    pub get_base: unsafe extern "C" fn(BufferPtr) -> *mut c_void,
    pub init_tensor: Absent,
    pub memset_tensor: unsafe extern "C" fn(BufferPtr, TensorPtr, u8, usize, usize),
    pub set_tensor: SetTensor,
    pub get_tensor: GetTensor,
    pub set_tensor_2d: Absent,
    pub get_tensor_2d: Absent,
    pub cpy_tensor: Absent,
    pub clear: unsafe extern "C" fn(BufferPtr, u8),
    pub reset: Absent,
}

/// `ggml_backend_buffer`.
#[repr(C)]
pub(super) struct Buffer {
    pub fns: BufferFns,
    pub kind: BufferType,
    pub context: *mut c_void,
    pub size: usize,
    pub usage: sys::ggml_backend_buffer_usage,
}

#[repr(C)]
pub(super) struct BackendFns {
    pub get_name: unsafe extern "C" fn(BackendPtr) -> *const c_char,
    pub free: unsafe extern "C" fn(BackendPtr),
    pub set_tensor_async: Absent,
    pub get_tensor_async: Absent,
    pub set_tensor_2d_async: Absent,
    pub get_tensor_2d_async: Absent,
    pub cpy_tensor_async: Absent,
    pub synchronize: Absent,
    pub graph_plan_create: Absent,
    pub graph_plan_free: Absent,
    pub graph_plan_update: Absent,
    pub graph_plan_compute: Absent,
    pub graph_compute: unsafe extern "C" fn(BackendPtr, *mut sys::ggml_cgraph) -> sys::ggml_status,
    pub event_record: Absent,
    pub event_wait: Absent,
    pub graph_optimize: Absent,
}

/// `ggml_backend`.
#[repr(C)]
pub(super) struct Backend {
    pub guid: *mut [u8; 16],
    pub fns: BackendFns,
    pub device: DevicePtr,
    pub context: *mut c_void,
}

#[repr(C)]
pub(super) struct DeviceFns {
    pub get_name: unsafe extern "C" fn(DevicePtr) -> *const c_char,
    pub get_description: unsafe extern "C" fn(DevicePtr) -> *const c_char,
    pub get_memory: unsafe extern "C" fn(DevicePtr, *mut usize, *mut usize),
    pub get_type: unsafe extern "C" fn(DevicePtr) -> sys::ggml_backend_dev_type,
    pub get_props: unsafe extern "C" fn(DevicePtr, *mut sys::ggml_backend_dev_props),
    pub init_backend: unsafe extern "C" fn(DevicePtr, *const c_char) -> BackendPtr,
    pub get_buffer_type: unsafe extern "C" fn(DevicePtr) -> BufferType,
    pub get_host_buffer_type: Absent,
    pub buffer_from_host_ptr: Absent,
    pub supports_op: unsafe extern "C" fn(DevicePtr, *const sys::ggml_tensor) -> bool,
    pub supports_buft: unsafe extern "C" fn(DevicePtr, BufferType) -> bool,
    pub offload_op: Absent,
    pub event_new: Absent,
    pub event_free: Absent,
    pub event_synchronize: Absent,
}

/// `ggml_backend_device`.
#[repr(C)]
pub(super) struct Device {
    pub fns: DeviceFns,
    pub reg: RegPtr,
    pub context: *mut c_void,
}

#[repr(C)]
pub(super) struct RegFns {
    pub get_name: unsafe extern "C" fn(RegPtr) -> *const c_char,
    pub get_device_count: unsafe extern "C" fn(RegPtr) -> usize,
    pub get_device: unsafe extern "C" fn(RegPtr, usize) -> DevicePtr,
    pub get_proc_address: Absent,
}

/// `ggml_backend_reg`.
#[repr(C)]
pub(super) struct Reg {
    pub api_version: c_int,
    pub fns: RegFns,
    pub context: *mut c_void,
}

unsafe extern "C" {
    /// Of the same header; the buffer is the library's, `fns` are copied.
    pub(super) fn ggml_backend_buffer_init(
        kind: BufferType,
        fns: BufferFns,
        context: *mut c_void,
        size: usize,
    ) -> BufferPtr;
}

/// Whether the library is the one that these declarations are of. Looked at
/// once, before anything is made of them.
pub(super) fn check() -> Result<(), String> {
    static CHECKED: OnceLock<Result<(), String>> = OnceLock::new();
    CHECKED
        .get_or_init(|| {
            check_version()?;
            check_layout().map_err(|what| {
                format!("ggml's structures are not those of {GGML_VERSION:?}: {what} is elsewhere")
            })
        })
        .clone()
}

fn check_version() -> Result<(), String> {
    // SAFETY: returns a static string.
    let version = unsafe { sys::ggml_version() };
    // SAFETY: a C string that is never freed.
    let version = unsafe { CStr::from_ptr(version) };
    // SAFETY: returns a static.
    let reg = unsafe { sys::ggml_backend_cpu_reg() };
    // SAFETY: the version is the first field of every release.
    let api = unsafe { (*reg.cast::<Reg>()).api_version };
    if version != GGML_VERSION || api != API_VERSION {
        return Err(format!(
            "experts need ggml {GGML_VERSION:?} with backends of version {API_VERSION}, this is \
             {version:?} with {api}: engine/src/llama/experts/abi.rs has to follow"
        ));
    }
    Ok(())
}

/// Holds the fields at the ends of the structures against the library's own
/// functions, on objects of the CPU backend.
fn check_layout() -> Result<(), &'static str> {
    let same = |what, same: bool| if same { Ok(()) } else { Err(what) };
    // SAFETY: returns a static.
    let reg = unsafe { sys::ggml_backend_cpu_reg() };
    // SAFETY: the CPU has one device.
    let dev = unsafe { sys::ggml_backend_reg_dev_get(reg, 0) };
    // SAFETY: a static of the library; read only.
    let device = unsafe { &*dev.cast::<Device>() };
    // SAFETY: `dev` lives for ever.
    let its_reg = unsafe { sys::ggml_backend_dev_backend_reg(dev) };
    same(
        "a device's registry",
        device.reg == its_reg && its_reg == reg,
    )?;
    // SAFETY: the function takes the device it is of.
    let name = unsafe { (device.fns.get_name)(dev) };
    // SAFETY: `dev` lives for ever.
    let its_name = unsafe { sys::ggml_backend_dev_name(dev) };
    same("a device's name", name == its_name)?;
    // SAFETY: the function takes the device it is of.
    let kind = unsafe { (device.fns.get_buffer_type)(dev) };
    // SAFETY: no arguments.
    let cpu = unsafe { sys::ggml_backend_cpu_buffer_type() };
    same("a device's buffer type", kind == cpu)?;
    // SAFETY: the function takes the device it is of.
    let supports = unsafe { (device.fns.supports_buft)(dev, cpu) };
    same("a device's last functions", supports)?;

    // SAFETY: a static of the library; read only.
    let buffer_type = unsafe { &*cpu.cast::<BufferKind>() };
    // SAFETY: `cpu` lives for ever.
    let its_device = unsafe { sys::ggml_backend_buft_get_device(cpu) };
    same("a buffer type's device", buffer_type.device == its_device)?;
    // SAFETY: the function takes the type it is of.
    let alignment = unsafe { (buffer_type.fns.get_alignment)(cpu) };
    // SAFETY: `cpu` lives for ever.
    let expected = unsafe { sys::ggml_backend_buft_get_alignment(cpu) };
    same("a buffer type's alignment", alignment == expected)?;

    // SAFETY: `cpu` is a buffer type.
    let buffer = unsafe { sys::ggml_backend_buft_alloc_buffer(cpu, 192) };
    if buffer.is_null() {
        return Err("a buffer");
    }
    // SAFETY: just made.
    unsafe { sys::ggml_backend_buffer_set_usage(buffer, sys::GGML_BACKEND_BUFFER_USAGE_COMPUTE) };
    // SAFETY: just made; read only.
    let fields = unsafe { &*buffer.cast::<Buffer>() };
    // SAFETY: the function takes the buffer it is of.
    let base = unsafe { (fields.fns.get_base)(buffer) };
    // SAFETY: the buffer lives.
    let its_base = unsafe { sys::ggml_backend_buffer_get_base(buffer) };
    // SAFETY: the buffer lives.
    let size = unsafe { sys::ggml_backend_buffer_get_size(buffer) };
    let fits = (fields.kind, fields.size, base) == (cpu, size, its_base)
        && fields.usage == sys::GGML_BACKEND_BUFFER_USAGE_COMPUTE;
    // SAFETY: ours, used no more.
    unsafe { sys::ggml_backend_buffer_free(buffer) };
    same("a buffer's size or usage", fits)?;

    // SAFETY: no arguments.
    let backend = unsafe { sys::ggml_backend_cpu_init() };
    if backend.is_null() {
        return Err("a backend");
    }
    // SAFETY: just made; read only.
    let fields = unsafe { &*backend.cast::<Backend>() };
    // SAFETY: the backend lives.
    let its_device = unsafe { sys::ggml_backend_get_device(backend) };
    // SAFETY: the function takes the backend it is of.
    let name = unsafe { (fields.fns.get_name)(backend) };
    // SAFETY: the backend lives.
    let its_name = unsafe { sys::ggml_backend_name(backend) };
    let fits = fields.device == its_device && name == its_name;
    // SAFETY: ours, used no more.
    unsafe { sys::ggml_backend_free(backend) };
    same("a backend's device", fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_the_one_declared() {
        super::super::super::start();
        assert_eq!(check(), Ok(()));
    }
}
