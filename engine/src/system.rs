//! What this machine and this build compute with.

use std::fmt::Write as _;

use crate::llama;

/// A backend device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// ggml's short name: `CPU`, `CUDA0`, …
    pub name: String,
    /// The maker's name for it.
    pub description: String,
    /// Free memory, in bytes, where the backend knows.
    pub free_bytes: u64,
    /// Memory, in bytes, where the backend knows.
    pub total_bytes: u64,
}

/// What `doctor` prints about the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemInfo {
    /// llama.cpp's version.
    pub llama_version: String,
    /// llama.cpp's line of CPU features in use.
    pub cpu_features: String,
    /// Devices that ggml found.
    pub devices: Vec<Device>,
    /// Whether layers go to a GPU.
    pub gpu: bool,
    /// Physical cores: the default number of compute threads.
    pub physical_cores: u32,
    /// See [`numerics_class`].
    pub numerics_class: u64,
}

/// Looks at the machine and the build.
pub fn system_info() -> SystemInfo {
    let devices = llama::devices()
        .into_iter()
        .map(|(name, description, free, total)| Device {
            name,
            description,
            free_bytes: free as u64,
            total_bytes: total as u64,
        })
        .collect();
    SystemInfo {
        llama_version: llama::version(),
        cpu_features: llama::cpu_features().trim().to_owned(),
        devices,
        gpu: llama::gpu(),
        physical_cores: physical_cores(),
        numerics_class: numerics_class(1),
    }
}

/// Two stages of one class give the same bits for the same rows. Made of what
/// picks kernels: llama.cpp's version, CPU features, devices, threads.
pub fn numerics_class(n_threads: u32) -> u64 {
    let mut text = format!("{}\n{}\n", llama::version(), llama::cpu_features());
    for (name, description, ..) in llama::devices() {
        let _ = writeln!(text, "{name} {description}");
    }
    // Beyond 512 cells flash attention splits its work by thread.
    let _ = write!(text, "threads {n_threads}");
    let hash = blake3::derive_key("shoal numerics class 1", text.as_bytes());
    u64::from_le_bytes(std::array::from_fn(|i| hash[i]))
}

/// The same of experts, which give the same bits on any number of threads.
pub fn expert_numerics_class() -> u64 {
    numerics_class(0)
}

/// Below this size a layer's work is over before a second thread has woken; and where the cores are
/// shared, ggml's busily waiting threads make it many times slower.
const THREADS_WORTH_BYTES: u64 = 256 << 20;

/// Compute threads for `bytes` of tensors when nobody says.
pub fn threads_for(bytes: u64) -> u32 {
    if bytes < THREADS_WORTH_BYTES {
        1
    } else {
        physical_cores()
    }
}

/// Physical cores this process may use; at least one.
pub fn physical_cores() -> u32 {
    let logical = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    match threads_per_core() {
        Some(per_core) => (logical / per_core).max(1),
        None => logical,
    }
}

/// From `/sys` on Linux: siblings of CPU 0, as `0-1` or `0,4`.
fn threads_per_core() -> Option<u32> {
    let path = "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list";
    let list = std::fs::read_to_string(path).ok()?;
    let mut n = 0;
    for part in list.trim().split(',') {
        n += match part.split_once('-') {
            Some((from, to)) => to
                .parse::<u32>()
                .ok()?
                .checked_sub(from.parse().ok()?)?
                .checked_add(1)?,
            None => 1,
        };
    }
    (n > 0).then_some(n)
}
