//! One `shoal-node` process: started, heard, measured, stopped.
//!
//! Its standard output is read for the one ready line; its standard error goes to a file, whose end is shown when
//! the process dies. It runs in a process group of its own, so that a Ctrl-C at the terminal reaches only the
//! launcher, which then ends it by its id.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// How long a node may take between SIGTERM and its end: it promises 5 s, a loaded machine gets more.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// How much of a dead node's log an error shows.
const TAIL_BYTES: u64 = 4096;

/// The line that a node prints when it serves.
#[derive(Clone, Debug, Deserialize)]
pub struct Ready {
    /// The peer id.
    pub peer: String,
    /// Where it listens, with the peer id at the end or without.
    pub addrs: Vec<String>,
    /// What it serves.
    pub models: Vec<Served>,
    /// Where it answers HTTP, if it was told to.
    #[serde(default)]
    pub api: Option<String>,
    /// Where its metrics are, if it serves them.
    #[serde(default)]
    pub metrics: Option<String>,
}

/// A model that a node serves.
#[derive(Clone, Debug, Deserialize)]
pub struct Served {
    /// Its id.
    pub model: String,
    /// Its layers, as `start..end`.
    pub layers: String,
}

impl Ready {
    /// The addresses with the peer id at the end, as other programs want them.
    pub fn dialable(&self) -> Vec<String> {
        let suffix = format!("/p2p/{}", self.peer);
        let full = |addr: &String| {
            if addr.ends_with(&suffix) {
                addr.clone()
            } else {
                format!("{addr}{suffix}")
            }
        };
        self.addrs.iter().map(full).collect()
    }

    /// The layers of its first model as numbers; empty when the node holds none.
    pub fn span(&self) -> Range<u32> {
        self.models
            .first()
            .map_or(0..0, |served| span(&served.layers))
    }

    /// The id of its first model.
    pub fn model(&self) -> &str {
        self.models.first().map_or("", |served| &served.model)
    }
}

/// Layers as `start..end`; empty where that is something else.
pub(crate) fn span(text: &str) -> Range<u32> {
    let numbers = text
        .split_once("..")
        .and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    numbers.unwrap_or(0..0)
}

/// A node that was started. Dropping it kills the process.
#[derive(Debug)]
pub struct NodeProcess {
    /// What messages call it.
    pub name: String,
    child: Child,
    pid: u32,
    log: PathBuf,
}

impl NodeProcess {
    /// Starts `program` with `args`, its home and log under `folder`. The second part resolves to the ready line,
    /// or to nothing when the process ends without one.
    ///
    /// # Errors
    /// When the folder cannot be made or the program cannot be started.
    pub fn spawn(
        name: &str,
        program: &Path,
        args: &[String],
        folder: &Path,
    ) -> Result<(Self, oneshot::Receiver<Ready>)> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let log = folder.join("log");
        let stderr =
            File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(program);
        clean_environment(&mut command, folder);
        let mut child = command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let pid = child.id().context("a node ended while it was started")?;
        let stdout = child
            .stdout
            .take()
            .context("a node's standard output was not caught")?;
        let (found, ready) = oneshot::channel();
        tokio::spawn(listen(stdout, found));
        Ok((
            Self {
                name: name.to_owned(),
                child,
                pid,
                log,
            },
            ready,
        ))
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits up to `limit` for the process to end by itself.
    ///
    /// # Errors
    /// When it still runs then.
    pub async fn ended(&mut self, limit: Duration) -> Result<ExitStatus> {
        let ended = timeout(limit, self.child.wait()).await;
        Ok(
            ended
                .map_err(|_| anyhow!("{} still runs after {} s", self.name, limit.as_secs()))??,
        )
    }

    /// Sends a signal to this process and to no other.
    ///
    /// # Errors
    /// When the process has ended already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if !self.is_running() {
            bail!("{} has ended already", self.name);
        }
        let pid = i32::try_from(self.pid)
            .ok()
            .and_then(Pid::from_raw)
            .context("not a process id")?;
        kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Ends the process: SIGTERM, then SIGKILL after [`STOP_TIMEOUT`]. Returns whether the latter was needed. A frozen
    /// process is thawed, so that it can end.
    pub async fn stop(&mut self) -> bool {
        let asked = self
            .signal(Signal::TERM)
            .and_then(|()| self.signal(Signal::CONT))
            .is_ok();
        if !asked || self.ended(STOP_TIMEOUT).await.is_ok() {
            return false;
        }
        // An error means that it has ended meanwhile, which is what is wanted.
        let _ = self.child.kill().await;
        true
    }

    /// Resident memory in bytes, where the system tells it.
    pub fn rss_bytes(&self) -> Option<u64> {
        rss_of_proc(self.pid).or_else(|| rss_of_ps(self.pid))
    }

    /// An error that says how the process ended and shows the end of its log.
    pub async fn death(&mut self) -> anyhow::Error {
        let how = match self.ended(Duration::from_secs(1)).await {
            Ok(status) => format!("ended with {status}"),
            Err(_) => "closed its standard output but still runs".to_owned(),
        };
        anyhow!(
            "{} {how} before it served; the end of its log:\n{}",
            self.name,
            self.log_tail()
        )
    }

    /// The end of the log, indented.
    pub fn log_tail(&self) -> String {
        let tail = read_tail(&self.log).unwrap_or_default();
        let lines: Vec<&str> = tail.lines().collect();
        let last = lines
            .get(lines.len().saturating_sub(20)..)
            .unwrap_or_default();
        if last.is_empty() {
            "    (nothing)".to_owned()
        } else {
            format!("    {}", last.join("\n    "))
        }
    }
}

/// Takes the user's own settings of Shoal out of a child's environment and gives it a home of its own. Its temporary
/// files lie beside the homes: the lock that keeps nodes from measuring at the same time is then one for the swarm,
/// and goes with it.
pub(crate) fn clean_environment(command: &mut Command, home: &Path) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SHOAL_") {
            command.env_remove(&name);
        }
    }
    command
        .env("SHOAL_HOME", home)
        .env("XDG_CONFIG_HOME", home.join("config"))
        .env("HOME", home)
        .env("TMPDIR", home.parent().unwrap_or(home));
}

async fn listen(stdout: ChildStdout, found: oneshot::Sender<Ready>) {
    let mut found = Some(found);
    let mut lines = BufReader::new(stdout).lines();
    // Reads on after the ready line, so that a node that prints more never waits for a reader.
    while let Ok(Some(line)) = lines.next_line().await {
        let ready = serde_json::from_str::<Ready>(&line).ok();
        if let Some((ready, found)) = ready.and_then(|ready| Some((ready, found.take()?))) {
            // The launcher may have given up on the node: then nobody needs the line.
            let _ = found.send(ready);
        }
    }
}

fn read_tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn rss_of_proc(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    kib(line.trim().strip_suffix("kB")?)
}

fn rss_of_ps(pid: u32) -> Option<u64> {
    let output = std::process::Command::new("ps")
        .args(["-o", "rss=", "-p", &pid.to_string()])
        .output()
        .ok()?;
    kib(&String::from_utf8(output.stdout).ok()?)
}

fn kib(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ready_line_is_understood() {
        let line = r#"{"peer":"12D3KooWx","addrs":["/ip4/127.0.0.1/tcp/4001"],"models":[{"layers":"2..5","model":"06"}],"more":1}"#;
        let ready: Ready = serde_json::from_str(line).unwrap();
        assert_eq!(ready.span(), 2..5);
        assert_eq!(ready.dialable(), ["/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWx"]);
    }

    #[tokio::test]
    async fn a_program_that_dies_is_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let args = ["-c".to_owned(), "echo no model here >&2; exit 3".to_owned()];
        let (mut process, ready) =
            NodeProcess::spawn("node 1", Path::new("/bin/sh"), &args, folder.path()).unwrap();
        assert!(ready.await.is_err());
        let message = process.death().await.to_string();
        assert!(
            message.contains("exit status: 3") && message.contains("no model here"),
            "{message}"
        );
    }

    #[tokio::test]
    async fn a_frozen_program_ends_by_itself_too() {
        let folder = tempfile::tempdir().unwrap();
        let args = ["60".to_owned()];
        let (mut process, _) =
            NodeProcess::spawn("node 1", Path::new("/bin/sleep"), &args, folder.path()).unwrap();
        process.signal(Signal::STOP).unwrap();
        assert!(!process.stop().await, "it had to be killed");
    }

    #[tokio::test]
    async fn a_program_is_heard_measured_and_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let script = r#"trap 'exit 0' TERM; echo '{"peer":"P","addrs":[],"models":[{"layers":"0..1","model":"06"}]}'; while :; do sleep 0.05; done"#;
        let args = ["-c".to_owned(), script.to_owned()];
        let (mut process, ready) =
            NodeProcess::spawn("node 1", Path::new("/bin/sh"), &args, folder.path()).unwrap();
        assert_eq!(ready.await.unwrap().peer, "P");
        assert!(process.rss_bytes().unwrap() > 0);
        assert!(!process.stop().await, "it did not end by itself");
        assert!(!process.is_running());
    }
}
