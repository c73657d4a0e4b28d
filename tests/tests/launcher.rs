//! `shoal-testnet` itself: its report, the network it needs (none but loopback), and what it leaves behind (nothing).

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tests::{PATIENCE, command, foreign_file, launch, launcher, until};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;
use tokio::time::timeout;

/// Nodes end within 5 s of being told; a loaded machine gets more.
const CLEANED_WITHIN: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_report_holds_the_figures_and_nothing_is_left() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let child = launch(folder.path(), &["--nodes", "8", "--report", "report.json"])?;
    let output = finished(child).await?;
    ensure!(
        said(&output).contains("same text as the whole model: yes"),
        "{}",
        said(&output)
    );
    let report: Value = serde_json::from_slice(&std::fs::read(folder.path().join("report.json"))?)?;
    ensure!(
        report["nodes"] == 8 && report["covered"] == true,
        "{report}"
    );
    let route = report["route"].as_array().context("no route")?;
    ensure!(
        route.len() >= 3 && report["hops"] == route.len(),
        "{report}"
    );
    for figure in ["ttft_ms", "tokens_per_s", "start_s"] {
        ensure!(
            report[figure].as_f64().is_some_and(|value| value > 0.0),
            "no {figure}: {report}"
        );
    }
    ensure!(
        report["text"].as_str().is_some_and(|text| !text.is_empty()),
        "{report}"
    );
    ensure!(
        report["rss_bytes"]
            .as_array()
            .is_some_and(|rss| rss.len() == 8),
        "{report}"
    );
    let spans: BTreeSet<String> = report["layers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(Value::to_string)
        .collect();
    ensure!(spans.len() >= 3, "the spans are all alike: {spans:?}");
    nothing_left(folder.path(), &["report.json"])
}

#[tokio::test]
async fn any_gguf_file_will_do() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = foreign_file().display().to_string();
    let child = launch(
        folder.path(),
        &[
            "--nodes",
            "5",
            "--model",
            &file,
            "--prompt",
            "sate bavi",
            "-n",
            "24",
        ],
    )?;
    let output = finished(child).await?;
    ensure!(
        said(&output).contains("same text as the whole model: yes"),
        "{}",
        said(&output)
    );
    nothing_left(folder.path(), &[])
}

#[tokio::test]
async fn a_model_that_is_not_there_is_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let output = timeout(
        PATIENCE,
        launch(folder.path(), &["--model", "no/such.gguf"])?.wait_with_output(),
    )
    .await??;
    ensure!(!output.status.success());
    ensure!(
        String::from_utf8_lossy(&output.stderr).contains("no/such.gguf"),
        "{}",
        said(&output)
    );
    nothing_left(folder.path(), &[])
}

#[tokio::test]
async fn faults_are_counted_and_change_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let args =
        "--chaos kill,freeze,corrupt --faults 2 --nodes 6 -n 96 --seed 3 --report report.json";
    let args: Vec<&str> = args.split(' ').collect();
    let output = finished(launch(folder.path(), &args)?).await?;
    ensure!(said(&output).contains("--seed 3"), "{}", said(&output));
    let report: Value = serde_json::from_slice(&std::fs::read(folder.path().join("report.json"))?)?;
    for figure in [
        "tokens_lost",
        "tokens_changed",
        "tokens_doubled",
        "runs_failed",
    ] {
        ensure!(report[figure] == 0, "{figure}: {report}");
    }
    ensure!(report["faults"] == 6, "{report}");
    let kinds = report["by_kind"].as_array().context("no kinds")?;
    let named: Vec<&str> = kinds.iter().filter_map(|of| of["kind"].as_str()).collect();
    ensure!(named == ["kill", "freeze", "corrupt"], "{report}");
    // Who dies in the first half of an answer is missed: a fault that nobody notices tests nothing.
    ensure!(kinds[0]["recoveries"].as_u64() >= Some(2), "{report}");
    ensure!(kinds[1]["stall_ms_p50"].as_f64() > Some(200.0), "{report}");
    nothing_left(folder.path(), &["report.json"])
}

#[tokio::test]
async fn a_signal_ends_frozen_nodes_too() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let args = ["--chaos", "freeze", "--faults", "500", "--nodes", "6"];
    let mut child = launch(folder.path(), &args)?;
    let mut output = child.stdout.take().context("no output")?;
    tokio::spawn(async move { tokio::io::copy(&mut output, &mut tokio::io::sink()).await });
    let frozen = async || {
        let mut states = pids(folder.path()).into_iter().filter_map(state);
        states.any(|state| state == 'T').then_some(())
    };
    if Path::new("/proc/self/stat").exists() {
        until("a node is frozen", PATIENCE, frozen).await?;
    }
    let pid = child
        .id()
        .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    kill_process(pid.context("it ended already")?, Signal::INT)?;
    let status = timeout(CLEANED_WITHIN, child.wait()).await??;
    ensure!(status.code() == Some(130), "{status}");
    nothing_left(folder.path(), &[])
}

#[tokio::test]
async fn faults_need_nodes_that_stand_in() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let refused = launch(folder.path(), &["--chaos", "kill", "--nodes", "5"])?;
    let output = timeout(PATIENCE, refused.wait_with_output()).await??;
    ensure!(
        output.status.code() == Some(2) && said(&output).contains("6 nodes"),
        "{}",
        said(&output)
    );
    let unknown = launch(folder.path(), &["--chaos", "earthquake"])?;
    let output = timeout(PATIENCE, unknown.wait_with_output()).await??;
    ensure!(
        output.status.code() == Some(2) && said(&output).contains("partition"),
        "{}",
        said(&output)
    );
    Ok(())
}

#[tokio::test]
async fn a_signal_ends_what_was_started() -> Result<()> {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let folder = tempfile::tempdir()?;
        let mut child = launch(folder.path(), &["--nodes", "24"])?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let serving = async {
            while let Some(line) = lines.next_line().await? {
                if line.contains("nodes serve") {
                    return anyhow::Ok(());
                }
            }
            bail!("it ended before a node served")
        };
        timeout(PATIENCE, serving).await??;
        ensure!(
            !processes(folder.path()).is_empty(),
            "no node is seen, so the end of none would be seen"
        );
        let pid = child
            .id()
            .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
            .context("it ended already")?;
        kill_process(pid, signal)?;
        // Read on, or the child would wait for a reader.
        let (status, _) = tokio::join!(timeout(CLEANED_WITHIN, child.wait()), async {
            while let Ok(Some(_)) = lines.next_line().await {}
        });
        ensure!(status??.code() == Some(code));
        nothing_left(folder.path(), &[])?;
    }
    Ok(())
}

#[tokio::test]
async fn a_swarm_that_is_kept_answers_and_can_be_stopped() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let output = finished(launch(
        folder.path(),
        &["--nodes", "4", "--keep", "-n", "8"],
    )?)
    .await?;
    let text = said(&output);
    let line = |part: &str| {
        text.lines()
            .find(|line| line.contains(part))
            .map(str::trim)
            .context(text.clone())
    };
    let status = line(" status ")?.to_owned();
    let stop = line("kill $(cat")?.to_owned();
    ensure!(
        processes(folder.path()).len() == 4,
        "{:?}",
        processes(folder.path())
    );
    let status = shell(&format!("{status} --json"), folder.path()).await?;
    let status: Value = serde_json::from_str(&status)?;
    ensure!(status["models"][0]["complete"] == true, "{status}");
    shell(&stop, folder.path()).await?;
    until("the nodes have ended", CLEANED_WITHIN, async || {
        processes(folder.path()).is_empty().then_some(())
    })
    .await
}

#[tokio::test]
async fn loopback_is_all_the_network_it_needs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut alone = command(Path::new("unshare"), folder.path());
    // As root without a user namespace, else with one.
    let root = rustix::process::geteuid().is_root();
    alone.args(if root {
        ["--net", "--"].as_slice()
    } else {
        ["--net", "--map-root-user", "--"].as_slice()
    });
    let up = "ip link set lo up && exec \"$0\" --nodes 6 -n 16";
    let Ok(child) = alone.args(["sh", "-c", up]).arg(launcher()?).spawn() else {
        println!("skipped: there is no unshare here");
        return Ok(());
    };
    let output = timeout(PATIENCE, child.wait_with_output()).await??;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("unshare failed")
        || stderr.contains("not permitted")
        || stderr.contains("ip: not found")
    {
        println!(
            "skipped: a network namespace is not permitted here: {}",
            stderr.trim()
        );
        return Ok(());
    }
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(
        said(&output).contains("same text as the whole model: yes"),
        "{}",
        said(&output)
    );
    nothing_left(folder.path(), &[])
}

async fn finished(child: Child) -> Result<Output> {
    let output = timeout(PATIENCE, child.wait_with_output()).await??;
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        said(&output)
    );
    Ok(output)
}

async fn shell(line: &str, folder: &Path) -> Result<String> {
    let output = timeout(
        PATIENCE,
        command(Path::new("sh"), folder).args(["-c", line]).output(),
    )
    .await??;
    ensure!(output.status.success(), "{line}: {}", said(&output));
    Ok(String::from_utf8(output.stdout)?)
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// No file but `expected`, and no process whose command line names the folder.
fn nothing_left(folder: &Path, expected: &[&str]) -> Result<()> {
    let mut left = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !expected.contains(&name.as_str()) {
            left.push(name);
        }
    }
    ensure!(left.is_empty(), "left behind: {left:?}");
    let running = processes(folder);
    ensure!(running.is_empty(), "still running: {running:?}");
    Ok(())
}

/// The command lines of the nodes whose home is in `folder`; none where there is no /proc.
fn processes(folder: &Path) -> Vec<String> {
    pids(folder).into_iter().filter_map(command_line).collect()
}

/// Their process ids.
fn pids(folder: &Path) -> Vec<u32> {
    let Ok(all) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let folder = folder.display().to_string();
    let numbers = all
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let ours = |pid: &u32| {
        command_line(*pid).is_some_and(|line| line.contains("shoal-node") && line.contains(&folder))
    };
    numbers.filter(ours).collect()
}

fn command_line(pid: u32) -> Option<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(String::from_utf8_lossy(&line).replace('\0', " "))
}

/// `T` for one that is stopped.
fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}
