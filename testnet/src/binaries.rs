//! Where the programs under test are: beside the program that asks.
//!
//! `cargo build` puts them into one folder, and a test lies one folder deeper (`deps`). Nothing is looked up in
//! `PATH`, so that an installed `shoal` is never tested by accident.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The two programs that a swarm consists of.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// The command a user types.
    pub shoal: PathBuf,
    /// The daemon.
    pub node: PathBuf,
}

impl Binaries {
    /// Finds both in the folder of the running program, or in the one above it.
    ///
    /// # Errors
    /// When one is not there; the message says what builds it.
    pub fn beside_this_program() -> Result<Self> {
        let program = std::env::current_exe().context("the path of this program is not known")?;
        let folders: Vec<&Path> = program.ancestors().skip(1).take(2).collect();
        Ok(Self {
            shoal: find("shoal", &folders)?,
            node: find("shoal-node", &folders)?,
        })
    }
}

fn find(name: &str, folders: &[&Path]) -> Result<PathBuf> {
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let Some(found) = folders
        .iter()
        .map(|folder| folder.join(&file))
        .find(|path| path.is_file())
    else {
        let looked: Vec<String> = folders
            .iter()
            .map(|folder| folder.display().to_string())
            .collect();
        bail!(
            "no {name} in {}: `cargo build --release --locked` makes it",
            looked.join(" or ")
        );
    };
    Ok(found)
}
