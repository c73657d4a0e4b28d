//! This process, under the names that every Prometheus exporter has for them. What a system does not tell is left out.

use std::fmt;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::Reading;

/// Memory, files and time.
#[derive(Debug)]
pub(super) struct ProcessMetrics;

/// Where the system does not say when the process began: when somebody first asked.
static BEGUN: LazyLock<f64> = LazyLock::new(|| {
    let begun = SystemTime::now().duration_since(UNIX_EPOCH);
    begun.map_or(0.0, |begun| begun.as_secs_f64())
});

impl Collector for ProcessMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Reading(encoder);
        let seen = system::look();
        to.gauge(
            "process_start_time_seconds",
            "When this process began, in seconds since 1970",
            seen.begun_s.unwrap_or(*BEGUN),
        )?;
        if let Some(cpu_s) = seen.cpu_s {
            let help = "Processor time that this process took";
            to.counter("process_cpu_seconds", help, cpu_s)?;
        }
        for (name, help, value) in [
            (
                "process_resident_memory_bytes",
                "Memory in use",
                seen.resident_bytes,
            ),
            (
                "process_virtual_memory_bytes",
                "Addresses in use",
                seen.virtual_bytes,
            ),
            ("process_open_fds", "Open files and sockets", seen.open_fds),
            ("process_max_fds", "Most that may be open", seen.fds_max),
            ("process_threads", "Threads", seen.threads),
        ] {
            if let Some(value) = value {
                to.gauge(name, help, value)?;
            }
        }
        Ok(())
    }
}

/// What the system tells.
#[derive(Debug, Default)]
struct Seen {
    begun_s: Option<f64>,
    cpu_s: Option<f64>,
    resident_bytes: Option<u64>,
    virtual_bytes: Option<u64>,
    open_fds: Option<u64>,
    fds_max: Option<u64>,
    threads: Option<u64>,
}

#[cfg(target_os = "linux")]
mod system {
    use std::fs;

    use super::Seen;

    /// Of `/proc`, where times are in this unit whatever the kernel was built with.
    const TICKS_PER_S: f64 = 100.0;

    pub(super) fn look() -> Seen {
        let mut seen = Seen {
            open_fds: fs::read_dir("/proc/self/fd")
                .ok()
                .map(|it| it.count() as u64),
            fds_max: rustix::process::getrlimit(rustix::process::Resource::Nofile).current,
            ..Seen::default()
        };
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The second field is a name and may hold anything, brackets and blanks included.
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let fields: Vec<f64> = after_name
            .split_whitespace()
            .map(|field| field.parse().unwrap_or(0.0))
            .collect();
        // Counted from the third field of proc_pid_stat(5).
        let field = |number: usize| fields.get(number - 3).copied();
        if let (Some(user), Some(kernel)) = (field(14), field(15)) {
            seen.cpu_s = Some((user + kernel) / TICKS_PER_S);
        }
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let number = |name: &str| -> Option<u64> {
            let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
            rest.split_whitespace().next()?.parse().ok()
        };
        seen.threads = number("Threads:");
        seen.virtual_bytes = number("VmSize:").map(|kib| kib << 10);
        seen.resident_bytes = number("VmRSS:").map(|kib| kib << 10);
        let boot = fs::read_to_string("/proc/stat").unwrap_or_default();
        let boot = boot.lines().find_map(|line| line.strip_prefix("btime "));
        let boot: Option<f64> = boot.and_then(|boot| boot.trim().parse().ok());
        seen.begun_s = boot
            .zip(field(22))
            .map(|(boot, ticks)| boot + ticks / TICKS_PER_S);
        seen
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use super::Seen;

    pub(super) fn look() -> Seen {
        Seen::default()
    }
}
