//! A folder with a small disk of its own, that can be filled, enlarged and made read-only under programs that run:
//! a tmpfs in a mount namespace, for root and for an ordinary user.
//!
//! A process that only waits holds the namespace; others enter it (`nsenter`), and this test sees its files through
//! `/proc`. Systems that refuse namespaces to ordinary users have no rooms: that is said, and the tests that need one
//! end there.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use testnet::binaries::Binaries;
use testnet::client::Client;
use testnet::process::{NodeProcess, Ready};
use testnet::swarm::Swarm;
use tokio::sync::oneshot;

/// Larger than the reserve that fetching leaves free; a tmpfs takes memory only for what is in it.
const LARGE_KIB: u64 = 700 << 10;

/// The folder, and the process that holds its namespace.
pub struct Room {
    holder: Child,
    folder: PathBuf,
    binaries: Binaries,
}

impl Room {
    /// A disk in `folder`, which is made. None where the system refuses, which is said.
    ///
    /// # Errors
    /// What is in the way besides that.
    pub fn open(folder: &Path) -> Result<Option<Room>> {
        std::fs::create_dir_all(folder)?;
        let script = format!(
            "mount -t tmpfs -o size={LARGE_KIB}k none '{}' && echo held && exec cat",
            folder.display()
        );
        let held = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut line = String::new();
        let holder = held.and_then(|mut holder| {
            if let Some(stdout) = holder.stdout.take() {
                BufReader::new(stdout).read_line(&mut line)?;
            }
            Ok(holder)
        });
        match holder {
            Ok(holder) if line == "held\n" => Ok(Some(Room {
                holder,
                folder: folder.to_owned(),
                binaries: Binaries::beside_this_program()?,
            })),
            refused => {
                let why = match refused {
                    Ok(holder) => {
                        let said = holder.wait_with_output()?.stderr;
                        String::from_utf8_lossy(&said).into_owned()
                    }
                    Err(error) => error.to_string(),
                };
                say(&why);
                Ok(None)
            }
        }
    }

    /// A folder of the room as programs in it name it.
    pub fn inside(&self, path: &str) -> PathBuf {
        self.folder.join(path)
    }

    /// The same as this test can open it.
    pub fn seen(&self, path: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        let inside = self.inside(path);
        root.join(inside.strip_prefix("/").unwrap_or(&inside))
    }

    /// A client of `swarm` in the room, with a home there.
    ///
    /// # Errors
    /// The script that enters the room cannot be written.
    pub fn client(&self, swarm: &Swarm, home: &str) -> Result<Client> {
        let program = self.enters(&self.binaries.shoal)?;
        let peers = dialable(swarm);
        Ok(Client::new(&program, swarm.id(), peers, &self.inside(home)))
    }

    /// Starts a node of `swarm` in the room, with a home there; its log is outside.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn node(
        &self,
        swarm: &Swarm,
        home: &str,
        more: &[&str],
    ) -> Result<(NodeProcess, oneshot::Receiver<Ready>)> {
        let dir = self.inside(home).display().to_string();
        let listen = "/ip4/127.0.0.1/tcp/0";
        let mut args = vec!["--swarm", swarm.id(), "--home", &dir, "--listen", listen];
        args.extend(["--mdns", "off", "--threads", "1", "--ready-json"]);
        let peers = dialable(swarm);
        args.extend(peers.iter().flat_map(|peer| ["--peer", peer]));
        args.extend(more);
        let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        let program = self.enters(&self.binaries.node)?;
        let logs = self.folder.with_extension(format!("log-{home}"));
        NodeProcess::spawn(home, &program, &args, &logs)
    }

    /// Bytes in use.
    ///
    /// # Errors
    /// The room is gone.
    pub fn used(&self) -> Result<u64> {
        let stat = rustix::fs::statvfs(self.seen(""))?;
        Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
    }

    /// Makes the disk so small that little more than what is on it has place.
    ///
    /// # Errors
    /// The system refuses again and again.
    pub fn fill(&self) -> Result<()> {
        for more in 1..100 {
            let kib = self.used()? / 1024 + 64 * more;
            if self.resize(kib).is_ok() {
                return Ok(());
            }
        }
        self.resize(0)
    }

    /// Makes the disk large again.
    ///
    /// # Errors
    /// The system refuses.
    pub fn enlarge(&self) -> Result<()> {
        self.resize(LARGE_KIB)
    }

    fn resize(&self, kib: u64) -> Result<()> {
        let folder = self.folder.display();
        self.run(&format!("mount -o remount,size={kib}k none '{folder}'"))
    }

    /// Keeps everybody from writing below a folder, or lets them again.
    ///
    /// # Errors
    /// The system refuses.
    pub fn read_only(&self, path: &str, on: bool) -> Result<()> {
        let folder = self.inside(path).display().to_string();
        if on {
            self.run(&format!("mount --bind '{folder}' '{folder}'"))?;
        }
        let how = if on { "ro" } else { "rw" };
        self.run(&format!("mount -o remount,{how},bind '{folder}'"))
    }

    fn run(&self, script: &str) -> Result<()> {
        let mut enter = self.enter().into_iter();
        let mut command = Command::new(enter.next().unwrap_or_default());
        let done = command.args(enter).args(["sh", "-c", script]).output()?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "{script}: {said}");
        Ok(())
    }

    fn enter(&self) -> Vec<String> {
        let pid = self.holder.id().to_string();
        let words = [
            "nsenter",
            "--preserve-credentials",
            "--user",
            "--mount",
            "--target",
            &pid,
            "--",
        ];
        words.map(str::to_owned).to_vec()
    }

    /// A program that is `program` in the room.
    fn enters(&self, program: &Path) -> Result<PathBuf> {
        let name = program.file_name().context("no program")?;
        let path = self.folder.with_extension(name);
        let line = format!(
            "exec {} '{}' \"$@\"",
            self.enter().join(" "),
            program.display()
        );
        script(&path, &line)?;
        Ok(path)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Writes a shell script that can be run.
///
/// # Errors
/// It cannot be written.
pub fn script(path: &Path, lines: &str) -> Result<()> {
    std::fs::write(path, format!("#!/bin/sh\n{lines}\n"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
    Ok(())
}

fn dialable(swarm: &Swarm) -> Vec<String> {
    let serving = swarm.nodes().iter().filter_map(|node| node.ready.as_ref());
    serving.flat_map(Ready::dialable).collect()
}

#[allow(clippy::print_stderr)] // the only place where a test can say so
fn say(why: &str) {
    eprintln!(
        "NOT TESTED HERE: this system gives no mount namespace: {}",
        why.trim()
    );
}
