//! The units in deploy/ as systemd itself reads them, where it is here: no word that it does not know, and little that
//! a service could do to its machine.

use std::io::Write;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testnet::binaries::Binaries;
use tests::repository;

/// Tenths of a point, of 100: what hardening is left out is said in the units.
const EXPOSURE_MAX: &str = "15";

#[test]
fn systemd_takes_the_units_and_finds_them_hardened() -> Result<()> {
    let there = Command::new("systemd-analyze").arg("--version").output();
    if !there.is_ok_and(|output| output.status.success()) {
        writeln!(std::io::stderr(), "\nNOT TESTED: no systemd-analyze here\n")?;
        return Ok(());
    }
    let binaries = Binaries::beside_this_program()?;
    let folder = binaries.shoal.parent().context("no folder")?;
    let copies = tempfile::tempdir()?;
    for name in ["shoal-node.service", "shoal-serve.service"] {
        let unit = std::fs::read_to_string(repository().join("deploy").join(name))?;
        let program = format!("ExecStart={}/", folder.display());
        let here = unit.replace("ExecStart=/usr/local/bin/", &program);
        ensure!(here != unit, "{name} starts another program");
        // Without the manual pages, which are not installed here.
        let here: String = here
            .lines()
            .filter(|line| !line.starts_with("Documentation="))
            .flat_map(|line| [line, "\n"])
            .collect();
        let path = copies.path().join(name);
        std::fs::write(&path, here)?;
        let verified = Command::new("systemd-analyze")
            .args(["--man=no", "verify"])
            .arg(&path)
            .output()?;
        let said = String::from_utf8_lossy(&verified.stderr);
        let ours = said.lines().any(|line| line.contains(name));
        ensure!(verified.status.success() && !ours, "{name}: {said}");
        let exposed = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager"])
            .arg(format!("--threshold={EXPOSURE_MAX}"))
            .arg(&path)
            .output()?;
        let said = String::from_utf8_lossy(&exposed.stdout);
        let last = said.lines().rev().find(|line| !line.is_empty());
        ensure!(exposed.status.success(), "{name}: {last:?}");
    }
    Ok(())
}
