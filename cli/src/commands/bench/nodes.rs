//! Nodes for a measurement: child processes of this same binary on loopback, with ports chosen by the
//! system and homes in a temporary directory. They end when the measurement does, however it ends.

use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use node::config::SwarmArgs;
use serde::Deserialize;

use crate::failure::Failure;
use crate::swarm::Swarm;

/// Loading a model of some gigabytes from a cold disk takes this long at worst.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
/// Between asking a node to leave and ending it.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(6);

/// Nodes that serve one model together, in the order of their layers.
pub struct Nodes {
    children: Vec<Child>,
    /// Where the first can be reached; it knows the others.
    pub addrs: Vec<String>,
    /// The swarm they form: named after this process, so that two measurements do not meet.
    pub swarm: String,
    /// Everything they write.
    home: tempfile::TempDir,
}

/// An empty settings file: the user's own must not change what is measured.
const NO_CONFIG: &str = "config.toml";

/// The line a node prints when it serves.
#[derive(Deserialize)]
struct Ready {
    addrs: Vec<String>,
}

/// The line of a server.
#[derive(Deserialize)]
struct Serving {
    url: String,
}

impl Nodes {
    /// Starts one node for each range of layers and waits until all serve.
    pub fn start(model: &Path, spans: &[Range<u32>], threads: u32) -> anyhow::Result<Self> {
        let home = super::temporary().context("making a temporary home")?;
        let swarm = format!("bench-{}", std::process::id());
        std::fs::write(home.path().join(NO_CONFIG), "").context("writing to the temporary home")?;
        let mut nodes = Self {
            children: Vec::new(),
            addrs: Vec::new(),
            swarm,
            home,
        };
        for (index, span) in spans.iter().enumerate() {
            let ready = nodes.start_one(index, model, span, threads)?;
            if nodes.addrs.is_empty() {
                nodes.addrs = ready.addrs;
            }
        }
        Ok(nodes)
    }

    /// The flags of a client of these nodes: apart from them, and from the user's own settings.
    pub fn client(&self) -> Swarm {
        Swarm::of(SwarmArgs {
            home: Some(self.home.path().join("client")),
            config: Some(self.home.path().join(NO_CONFIG)),
            swarm: self.swarm.parse().ok(),
            peer: self.addrs.clone(),
            mdns: Some(false),
            ..SwarmArgs::default()
        })
    }

    fn start_one(
        &mut self,
        index: usize,
        model: &Path,
        span: &Range<u32>,
        threads: u32,
    ) -> anyhow::Result<Ready> {
        let mut command = self.command("node", &format!("node-{index}"))?;
        command
            .args(["--listen", "/ip4/127.0.0.1/tcp/0"])
            .arg("--model")
            .arg(model)
            .args(["--layers", &format!("{}..{}", span.start, span.end)])
            .args(["--threads", &threads.to_string()]);
        let line = self.spawn(command)?;
        serde_json::from_str(&line).with_context(|| format!("node {index} said `{}`", line.trim()))
    }

    /// Starts `shoal serve` over these nodes; gives its URL.
    pub fn serve(&mut self) -> anyhow::Result<String> {
        let mut command = self.command("serve", "server")?;
        command.args(["--bind", "127.0.0.1:0"]);
        let line = self.spawn(command)?;
        let ready: Serving = serde_json::from_str(&line)
            .with_context(|| format!("the server said `{}`", line.trim()))?;
        Ok(ready.url)
    }

    /// This program as a member of the swarm, apart from the user's own settings.
    fn command(&self, what: &str, home: &str) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("finding this program")?);
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SHOAL_"))
        {
            command.env_remove(name);
        }
        command
            .args([what, "--ready-json", "--log", "error", "--mdns", "off"])
            .args(["--swarm", &self.swarm])
            .arg("--config")
            .arg(self.home.path().join(NO_CONFIG))
            .arg("--home")
            .arg(self.home.path().join(home));
        for addr in &self.addrs {
            command.args(["--peer", addr]);
        }
        Ok(command)
    }

    /// Starts it and waits for the line that says that it is ready.
    fn spawn(&mut self, mut command: Command) -> anyhow::Result<String> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("starting a process")?;
        let stdout = child.stdout.take().context("a process without stdout")?;
        self.children.push(child);
        first_line(stdout)
    }
}

/// Reads one line with a deadline; the thread ends with the pipe.
fn first_line(stdout: std::process::ChildStdout) -> anyhow::Result<String> {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line).map(|_| line);
        let _ = send.send(read);
    });
    let line = receive
        .recv_timeout(READY_TIMEOUT)
        .map_err(|_| {
            Failure::new(format!(
                "a process was not ready within {} s",
                READY_TIMEOUT.as_secs()
            ))
        })?
        .context("reading from a process")?;
    if line.is_empty() {
        return Err(
            Failure::new("a process ended before it was ready; what it said is above").into(),
        );
    }
    Ok(line)
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for child in &mut self.children {
            terminate(child);
        }
        let deadline = std::time::Instant::now() + LEAVE_TIMEOUT;
        for child in &mut self.children {
            while matches!(child.try_wait(), Ok(None)) && std::time::Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(unix)]
fn terminate(child: &Child) {
    if let Some(pid) = i32::try_from(child.id())
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

#[cfg(not(unix))]
fn terminate(_child: &Child) {}
