//! A GGUF that this project did not write: sizes that are no multiples of 32, a SentencePiece vocabulary, another
//! alignment. The committed file is served, and the script that made it is run where Python can be had.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testnet::client::Ask;
use tests::{PATIENCE, command, foreign_file, repository, serve};
use tokio::time::timeout;

/// What the fixture was made with.
const PACKAGES: [&str; 2] = ["gguf==0.19.0", "numpy==2.4.6"];

/// A package index that does not answer is no failure of this project.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(90);

#[tokio::test]
async fn it_is_imported_cut_and_served_exactly() -> Result<()> {
    let file = foreign_file().display().to_string();
    let mut swarm = serve(&file, &["0..1", "1..3", "3..4", "4..5"], &[]).await?;
    let client = swarm.client("client");
    client.until_covered(5, PATIENCE).await?;

    let import = ["import", &file, "--name", "foreign"];
    let output = client.output(&import, PATIENCE).await?;
    ensure!(output.status.success(), "import failed:\n{}", output.stderr);

    let words = Ask::text("foreign", "sate bavi, é 語 \u{1F41F}", 64);
    let mut ids = Ask::text("foreign", "1 300 301 302 40", 64);
    ids.tokens = true;
    for ask in [words, ids] {
        let staged = client.ask(&ask, PATIENCE).await?;
        let whole = client
            .ask_local(
                &Ask {
                    model: file.clone(),
                    ..ask.clone()
                },
                PATIENCE,
            )
            .await?;
        ensure!(
            staged.route.len() == 4,
            "the route has {} hops",
            staged.route.len()
        );
        ensure!(!whole.tokens.is_empty(), "the whole model says nothing");
        ensure!(
            staged.same(&whole),
            "{ask:?}\nstaged: {staged:?}\nwhole: {whole:?}"
        );
    }
    swarm.stop().await;
    Ok(())
}

#[tokio::test]
async fn the_committed_file_is_what_the_script_writes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let python = match python_with_gguf(folder.path()).await {
        Ok(python) => python,
        Err(reason) => {
            println!("skipped: {reason:#}");
            return Ok(());
        }
    };
    let script = repository().join("tests/fixtures/foreign_gguf.py");
    let written = folder.path().join("foreign.gguf");
    let status = command(&python, folder.path())
        .arg(script)
        .arg(&written)
        .status()
        .await?;
    ensure!(status.success(), "the script failed");
    ensure!(
        std::fs::read(written)? == std::fs::read(foreign_file())?,
        "run tests/fixtures/foreign_gguf.py again"
    );
    Ok(())
}

/// A Python with the packages in an environment of its own.
async fn python_with_gguf(folder: &Path) -> Result<std::path::PathBuf> {
    let environment = folder.join("venv");
    let mut make = command(Path::new("python3"), folder);
    run(make.args(["-m", "venv"]).arg(&environment))
        .await
        .context("no Python that makes environments")?;
    let python = environment.join("bin/python");
    let mut install = command(&python, folder);
    install.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--retries",
        "0",
        "--disable-pip-version-check",
    ]);
    run(install.args(PACKAGES))
        .await
        .context("the packages cannot be had")?;
    Ok(python)
}

async fn run(command: &mut tokio::process::Command) -> Result<()> {
    let output = timeout(INSTALL_TIMEOUT, command.output())
        .await
        .context("it takes too long")??;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{}",
        stderr.lines().last().unwrap_or("it failed")
    );
    Ok(())
}
