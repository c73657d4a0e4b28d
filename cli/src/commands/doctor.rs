//! `shoal doctor`: what this machine can do, and what would stop it from serving or asking.
//!
//! Each check is a function that gives a [`Finding`]; nothing here changes anything except that the
//! home directory is created, as every other command would.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::SystemInfo;
use serde::Serialize;

use crate::failure::Failure;
use crate::figures;
use crate::local_models::{BRING_BACK, missing};
use crate::terminal::{self, BAD, BOLD, GOOD, HINT, WARN, paint};

/// Say what this machine can do and what would stop it.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal doctor
  shoal doctor --json | jq '.checks[] | select(.verdict != \"fine\")'

Exit code 1 when something is broken; warnings alone give 0.")]
pub struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    home: crate::home::Home,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Fine,
    Warning,
    Broken,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn fine(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Fine,
            found: found.into(),
            remedy: None,
        }
    }

    fn warning(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Warning,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn broken(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Broken,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    checks: Vec<Finding>,
}

/// Runs every check and prints the report.
pub fn main(args: Args) -> anyhow::Result<()> {
    let home = args.home.dir()?;
    let info = engine::system_info();
    let mut checks = vec![
        cpu(&info),
        gpu(&info),
        numerics(&info),
        threads(&info),
        memory(),
    ];
    checks.extend([home_dir(&home), identity(&home), store(&home), peers(&home)]);
    checks.extend([
        tcp_port(),
        udp_port(),
        firewall(Path::new("/etc/ufw/ufw.conf")),
    ]);
    checks.extend([clock(SystemTime::now()), open_files()]);
    let worst = checks.iter().map(|finding| finding.verdict).max();
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        checks,
    };
    if args.json {
        terminal::say_json(&report)?;
    } else {
        print(&report)?;
    }
    if worst == Some(Verdict::Broken) {
        let n = report
            .checks
            .iter()
            .filter(|finding| finding.verdict == Verdict::Broken)
            .count();
        let failure = Failure::new(format!("{} failed", figures::plural(n, "check")));
        return Err(failure.told_in_json().into());
    }
    Ok(())
}

fn print(report: &Report) -> Result<(), Failure> {
    terminal::say(paint(BOLD, format!("shoal {}", report.version)))?;
    for finding in &report.checks {
        let mark = match finding.verdict {
            Verdict::Fine => paint(GOOD, "✓"),
            Verdict::Warning => paint(WARN, "!"),
            Verdict::Broken => paint(BAD, "✗"),
        };
        terminal::say(format!("{mark} {:<10} {}", finding.check, finding.found))?;
        if let Some(remedy) = &finding.remedy {
            terminal::say(format!("  {:<10} {} {remedy}", "", paint(HINT, "→")))?;
        }
    }
    Ok(())
}

fn cpu(info: &SystemInfo) -> Finding {
    let names: Vec<&str> = info
        .devices
        .iter()
        .map(|device| device.description.as_str())
        .collect();
    let name = figures::printable(names.first().copied().unwrap_or("CPU"), 80);
    Finding::fine(
        "cpu",
        format!(
            "{name}; {}; ggml uses {}",
            std::env::consts::ARCH,
            features(&info.cpu_features)
        ),
    )
}

/// ggml's line reads `CPU : SSE3 = 1 | AVX2 = 1 | … | REPACK = 1 |`; what is off is left out.
fn features(line: &str) -> String {
    let on: Vec<&str> = line
        .split(['|', ':'])
        .filter_map(|part| {
            part.split_once('=')
                .filter(|(_, value)| value.trim() != "0")
                .map(|(name, _)| name.trim())
        })
        .collect();
    if on.is_empty() {
        "no special instructions".into()
    } else {
        on.join(" ")
    }
}

fn gpu(info: &SystemInfo) -> Finding {
    if !info.gpu {
        return Finding::fine(
            "gpu",
            "0 layers: this build computes on the CPU (features cuda, metal, vulkan build others)",
        );
    }
    let names: Vec<String> = info
        .devices
        .iter()
        .filter(|device| !device.name.starts_with("CPU"))
        .map(|device| {
            format!(
                "{} ({} free)",
                figures::printable(&device.description, 80),
                figures::bytes(device.free_bytes)
            )
        })
        .collect();
    Finding::fine(
        "gpu",
        format!("every layer a node holds goes to {}", names.join(", ")),
    )
}

fn numerics(info: &SystemInfo) -> Finding {
    let class = info.numerics_class;
    Finding::fine(
        "numerics",
        format!(
            "class {class:016x} with one thread ({}): the same class gives the same bits",
            info.llama_version
        ),
    )
}

fn threads(info: &SystemInfo) -> Finding {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    let physical = info.physical_cores;
    Finding::fine(
        "threads",
        format!(
            "{logical} cores, {physical} physical; --threads {physical} on a machine of its own, fewer where it is shared: ggml's threads wait busily"
        ),
    )
}

fn memory() -> Finding {
    let kib = |name: &str| -> Option<u64> {
        let text = fs::read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    match (kib("MemAvailable:"), kib("MemTotal:")) {
        (Some(free), Some(total)) => {
            let found = format!(
                "{} free of {}",
                figures::bytes(free * 1024),
                figures::bytes(total * 1024)
            );
            if free < 512 * 1024 {
                Finding::warning(
                    "memory",
                    found,
                    "a node needs its layers' size and a quarter more for KV: close something",
                )
            } else {
                Finding::fine("memory", found)
            }
        }
        _ => Finding::fine(
            "memory",
            "not known on this system: give nodes a --memory budget",
        ),
    }
}

fn home_dir(home: &Path) -> Finding {
    let shown = home.display();
    if let Err(error) = fs::create_dir_all(home) {
        return Finding::broken(
            "home",
            format!("{shown}: {error}"),
            "point --home or SHOAL_HOME at a directory you may write",
        );
    }
    let probe = home.join(format!(".doctor-{}", std::process::id()));
    let written = fs::write(&probe, b"probe").and_then(|()| fs::remove_file(&probe));
    match written {
        Ok(()) => Finding::fine("home", shown.to_string()),
        Err(error) => Finding::broken(
            "home",
            format!("{shown}: {error}"),
            "point --home or SHOAL_HOME at a directory you may write",
        ),
    }
}

fn identity(home: &Path) -> Finding {
    let path = home.join("identity.key");
    match fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Finding::fine("identity", "none yet: the first node or run here makes one")
        }
        Err(error) => Finding::broken(
            "identity",
            format!("{}: {error}", path.display()),
            "check who owns the home directory",
        ),
        Ok(meta) => private(&path, &meta),
    }
}

fn store(home: &Path) -> Finding {
    let store = match crate::local_models::store(home) {
        Ok(store) => store,
        Err(error) => {
            return Finding::broken(
                "models",
                error.to_string(),
                "check who owns the home directory, and the disk's room",
            );
        }
    };
    let (models, problems) = store.models();
    if let Some(problem) = problems.first() {
        let found = format!(
            "{} damaged, first {problem}",
            figures::plural(problems.len(), "entry")
        );
        return Finding::warning(
            "models",
            found,
            "import the model again, or remove the entry",
        );
    }
    let mut gone = models.iter().flat_map(|model| missing(&model.files));
    if let Some(path) = gone.next() {
        return Finding::warning("models", format!("{} is gone", path.display()), BRING_BACK);
    }
    Finding::fine("models", figures::plural(models.len(), "model"))
}

/// Peers of earlier runs, dialled where those given by hand do not answer.
fn peers(home: &Path) -> Finding {
    let swarms: Vec<String> = node::known_peers::swarms(home)
        .into_iter()
        .map(|(swarm, n)| format!("{} of swarm {swarm}", figures::plural(n, "peer")))
        .collect();
    let found = if swarms.is_empty() {
        "none remembered yet".into()
    } else {
        format!("remembered: {}", swarms.join(", "))
    };
    Finding::fine("peers", found)
}

#[cfg(unix)]
fn private(path: &Path, meta: &fs::Metadata) -> Finding {
    use std::os::unix::fs::PermissionsExt;
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        Finding::fine(
            "identity",
            format!("{}, mode {mode:04o}{}", path.display(), ids(path)),
        )
    } else {
        Finding::broken(
            "identity",
            format!("{} may be read by others (mode {mode:04o})", path.display()),
            format!("chmod 600 {}", path.display()),
        )
    }
}

/// Who this machine is to others, for their --allow lists.
#[cfg(unix)]
fn ids(path: &Path) -> String {
    let Some(home) = path.parent() else {
        return String::new();
    };
    let of = |dir: &Path| {
        node::Identity::load_or_create(dir).map(|identity| identity.peer().to_string())
    };
    match (of(home), of(&home.join(crate::swarm::CLIENT_DIR))) {
        (Ok(node), Ok(client)) => format!("; node {node}, client {client}"),
        _ => String::new(),
    }
}

#[cfg(not(unix))]
fn private(path: &Path, _meta: &fs::Metadata) -> Finding {
    Finding::fine("identity", path.display().to_string())
}

/// How long a connection to ourselves may take before something must be swallowing it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

fn tcp_port() -> Finding {
    let address = lan_address();
    let tried = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|listener| {
        let to = SocketAddr::new(address, listener.local_addr()?.port());
        TcpStream::connect_timeout(&to, CONNECT_TIMEOUT)?;
        listener.accept()
    });
    match tried {
        Ok(_) if address.is_loopback() => Finding::warning(
            "tcp",
            "listens on loopback only: no network address here",
            "connect to a network to reach other machines",
        ),
        Ok(_) => Finding::fine("tcp", format!("listens, reachable from here at {address}")),
        Err(error) => Finding::broken(
            "tcp",
            format!("cannot listen and connect at {address}: {error}"),
            "check the firewall's rules for local connections",
        ),
    }
}

fn udp_port() -> Finding {
    let address = lan_address();
    let tried = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.set_read_timeout(Some(CONNECT_TIMEOUT))?;
        socket.send_to(
            b"shoal",
            SocketAddr::new(address, socket.local_addr()?.port()),
        )?;
        socket.recv_from(&mut [0; 16])
    });
    match tried {
        Ok(_) => Finding::fine("udp", "listens (QUIC)"),
        Err(error) => Finding::warning(
            "udp",
            format!("no datagram arrives at {address}: {error}"),
            "TCP alone works; allow UDP for QUIC",
        ),
    }
}

/// The address other machines would see: the one the system would send from. Nothing is sent.
fn lan_address() -> IpAddr {
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
        .and_then(|socket| {
            // A documentation address: routed like any other, belonging to nobody.
            socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
            socket.local_addr()
        })
        .map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip())
}

fn firewall(ufw: &Path) -> Finding {
    let on = fs::read_to_string(ufw)
        .is_ok_and(|text| text.lines().any(|line| line.trim() == "ENABLED=yes"));
    if on {
        Finding::warning(
            "firewall",
            "ufw is on",
            "give the node a port (--listen /ip4/0.0.0.0/tcp/4001) and `ufw allow 4001`",
        )
    } else {
        Finding::fine(
            "firewall",
            "none found here; from another machine, `shoal status --peer ADDR` is the real test",
        )
    }
}

/// Later than any clock that is not broken could have been when this was built: 2026-01-01.
const CLOCK_FLOOR: Duration = Duration::from_secs(1_767_225_600);

fn clock(now: SystemTime) -> Finding {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    if since < CLOCK_FLOOR {
        return Finding::broken(
            "clock",
            format!("{} s after 1970: long past", since.as_secs()),
            "set the clock: adverts carry its time, and others would drop yours as old",
        );
    }
    if Path::new("/run/systemd/timesync/synchronized").exists() {
        Finding::fine("clock", "set, kept by the network")
    } else {
        Finding::fine(
            "clock",
            "set; whether it is kept by the network is not known",
        )
    }
}

/// A node with a few hundred peers has as many sockets, and every model file is one more.
const OPEN_FILES_MIN: u64 = 1024;

fn open_files() -> Finding {
    let limit = fs::read_to_string("/proc/self/limits")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find(|line| line.starts_with("Max open files"))?;
            let soft = line
                .trim_start_matches("Max open files")
                .split_whitespace()
                .next()?;
            if soft == "unlimited" {
                Some(u64::MAX)
            } else {
                soft.parse().ok()
            }
        });
    match limit {
        None => Finding::fine(
            "files",
            "the limit of open files is not known on this system",
        ),
        Some(limit) if limit < OPEN_FILES_MIN => Finding::warning(
            "files",
            format!("{limit} open files at most"),
            format!("ulimit -n {OPEN_FILES_MIN}"),
        ),
        Some(limit) => Finding::fine("files", format!("{limit} open files at most")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_in_1970_is_broken_and_this_one_is_not() {
        assert_eq!(clock(UNIX_EPOCH).verdict, Verdict::Broken);
        assert_eq!(clock(UNIX_EPOCH + CLOCK_FLOOR).verdict, Verdict::Fine);
    }

    #[test]
    fn verdicts_rank_by_badness() {
        assert!(Verdict::Broken > Verdict::Warning && Verdict::Warning > Verdict::Fine);
    }

    #[test]
    fn cpu_features_that_are_off_are_left_out() {
        assert_eq!(
            features("CPU : SSE3 = 1 | AVX = 0 | AVX2 = 1 | REPACK = 1 | "),
            "SSE3 AVX2 REPACK"
        );
        assert_eq!(features(""), "no special instructions");
    }

    #[test]
    fn this_machine_can_listen() {
        assert_ne!(tcp_port().verdict, Verdict::Broken);
    }
}
