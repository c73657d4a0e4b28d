//! What the end-to-end tests share: spans over real nodes, the launcher as a child, and how long to wait.
//!
//! Nothing here is asserted; errors come back with what the processes said.

pub mod browser;
pub mod collector;
pub mod http;
pub mod metrics;
pub mod room;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use gguf::Header;
use testnet::binaries::Binaries;
use testnet::client::{Client, poll_pause};
use testnet::swarm::{NodeSpec, StartPlan, Swarm};
use tokio::process::{Child, Command};
use tokio::time::Instant;

/// How long anything may take on a machine that runs other tests too. Reaching it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The demo model's eight layers on four nodes that overlap, and each of which every route needs.
pub const FOUR_SPANS: [&str; 4] = ["0..3", "2..5", "4..7", "6..8"];

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(PathBuf::from)
        .unwrap_or_default()
}

/// The demo model's file, as committed.
pub fn demo_file() -> PathBuf {
    repository().join("models/demo.gguf")
}

/// A model file written by another project's code.
pub fn foreign_file() -> PathBuf {
    repository().join("tests/fixtures/foreign.gguf")
}

/// A swarm with one node for each of `spans`; every node gets the flags in `more` too.
///
/// # Errors
/// When a node does not serve in time.
pub async fn serve(model: &str, spans: &[&str], more: &[&str]) -> Result<Swarm> {
    let mut swarm = Swarm::new(Binaries::beside_this_program()?)?;
    join(&mut swarm, model, spans, more).await?;
    Ok(swarm)
}

/// Adds nodes to a swarm.
///
/// # Errors
/// As [`serve`].
pub async fn join(swarm: &mut Swarm, model: &str, spans: &[&str], more: &[&str]) -> Result<()> {
    let spec = |span: &&str| {
        NodeSpec::new(
            ["--model", model, "--layers", span]
                .iter()
                .chain(more)
                .copied(),
        )
    };
    let specs: Vec<NodeSpec> = spans.iter().map(spec).collect();
    // No layers to wait for: the spans are given, so only the first node starts alone, to introduce the others.
    let plan = StartPlan {
        n_layer: 0,
        at_once: 4,
        ready_timeout: PATIENCE,
        seed: 1,
    };
    let (first, others) = specs.split_at(specs.len().min(1));
    swarm.start_all(first, &plan, &mut |_| ()).await?;
    swarm.start_all(others, &plan, &mut |_| ()).await
}

/// Waits until every layer has two holders or more: any one may go then.
///
/// # Errors
/// As [`until`].
pub async fn until_held_twice(client: &Client) -> Result<()> {
    until("every layer has two holders", PATIENCE, async || {
        let layers = client.layers(PATIENCE).await.ok()?;
        let twice = layers.iter().all(|layer| layer.holders.len() > 1);
        twice.then_some(())
    })
    .await
}

/// Looks until `seen` gives something.
///
/// # Errors
/// After `limit`: `what` did not happen.
pub async fn until<T>(
    what: &str,
    limit: Duration,
    mut seen: impl AsyncFnMut() -> Option<T>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = seen().await {
            return Ok(found);
        }
        anyhow::ensure!(
            Instant::now() < deadline,
            "after {} s still not: {what}",
            limit.as_secs()
        );
        poll_pause().await;
    }
}

/// Starts the launcher with its temporary files, home and working folder in `folder`.
///
/// # Errors
/// When it is not built or cannot be started.
pub fn launch(folder: &Path, args: &[&str]) -> Result<Child> {
    command(&launcher()?, folder)
        .args(args)
        .spawn()
        .context("cannot start shoal-testnet")
}

/// The launcher's path.
///
/// # Errors
/// When the programs are not built.
pub fn launcher() -> Result<PathBuf> {
    let shoal = Binaries::beside_this_program()?.shoal;
    Ok(shoal.with_file_name(format!("shoal-testnet{}", std::env::consts::EXE_SUFFIX)))
}

/// A program that finds an empty home and leaves nothing outside `folder`.
pub fn command(program: &Path, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .current_dir(folder)
        .env("TMPDIR", folder)
        .env("HOME", folder)
        .env_remove("XDG_DATA_HOME")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Writes the demo model with another value of one setting to `path`.
///
/// # Errors
/// When it cannot be read or written.
pub fn demo_with(path: &Path, key: &str, value: impl Into<gguf::Value>) -> Result<()> {
    let mut demo = File::open(demo_file())?;
    let len = demo.metadata()?.len();
    let mut header = Header::read(&mut demo, len)?;
    let data = header.data_offset;
    header.set(key, value);
    let header = Header::new(header.alignment, header.kv, header.tensors)?;
    let mut file = File::create(path)?;
    header.write(&mut file)?;
    demo.seek(SeekFrom::Start(data))?;
    std::io::copy(&mut demo, &mut file)?;
    Ok(())
}
