//! `shoal import`: makes a GGUF, here or elsewhere, known under its hash and a name, without copying it.

use std::path::Path;

use download::Source;
use serde::Serialize;
use shard_registry::{AliasName, ImportError, StoreError};

use crate::failure::Failure;
use crate::home::Home;
use crate::terminal::{self, BOLD, HINT, paint};
use crate::{figures, local_models, obtain};

/// Make a GGUF file known, without copying it; from Hugging Face or an https address too.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal import ~/models/Llama-3.2-1B-Instruct-Q4_K_M.gguf --name llama-1b
  shoal import big-00001-of-00003.gguf
  shoal import hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
  shoal import hf:owner/repo/file.gguf@main
  shoal import https://example.org/model.gguf

The file is hashed where it is and must stay there. Of a model in several files give any one.
Downloads from Hugging Face go into its own cache (HF_HOME) and use its token (HF_TOKEN); others into the home
directory. What was cut off goes on where it stopped. Where this network has an authority of its own, SSL_CERT_FILE
names the file of certificates (PEM) that are trusted instead of the system's; HTTPS_PROXY a proxy.")]
pub struct Args {
    /// The GGUF file, `hf:OWNER/REPO/FILE.gguf[@REVISION]`, `hf:OWNER/REPO[:Q4_K_M]` or an https address.
    #[arg(value_name = "FILE|hf:…|https://…")]
    source: String,
    /// What to call it [default: as the file].
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    home: Home,
}

/// What is printed.
#[derive(Serialize)]
struct Report {
    model: String,
    name: String,
    n_layer: u16,
    bytes: u64,
    shards: usize,
    can_be_cut: bool,
}

/// Imports and prints the id.
pub fn main(args: Args) -> anyhow::Result<()> {
    let name = args
        .name
        .as_deref()
        .map(str::parse::<AliasName>)
        .transpose()
        .map_err(|e| Failure::usage(e.to_string()))?;
    let source = obtain::source(&args.source)?;
    bring(&args.home.dir()?, &source, name.as_ref(), args.json)
}

/// Downloads what is not here, imports it and prints the id.
pub fn bring(
    home: &Path,
    source: &Source,
    name: Option<&AliasName>,
    json: bool,
) -> anyhow::Result<()> {
    let store = local_models::store(home)?;
    let file = obtain::obtain(home, source)?;
    let imported = local_models::import(&store, &file, name).map_err(with_remedy)?;
    let manifest = store.manifest(imported.id)?;
    let unsupported = engine::Blueprint::new(&manifest.header()?).err();
    let report = Report {
        model: imported.id.to_string(),
        name: imported.alias.to_string(),
        n_layer: manifest.n_layer,
        bytes: manifest.total_bytes(),
        shards: manifest.shards.len(),
        can_be_cut: unsupported.is_none(),
    };
    if let Some(old) = imported.replaced {
        terminal::note(format!(
            "`{}` was the name of {} until now",
            imported.alias,
            old.short()
        ));
    }
    if let Some(why) = unsupported {
        terminal::warn(format!("it cannot be served in parts: {why}"));
    }
    if json {
        return terminal::say_json(&report);
    }
    terminal::say(&report.model)?;
    let about = format!(
        "{} · {} · {} in {}",
        paint(BOLD, &report.name),
        figures::plural(report.n_layer.into(), "layer"),
        figures::bytes(report.bytes),
        figures::plural(report.shards, "shard"),
    );
    terminal::note_styled(about);
    terminal::note_styled(format!(
        "{} shoal node --model {}",
        paint(HINT, "next:"),
        report.name
    ));
    Ok(())
}

/// What to do about a name that is pinned to another model.
fn with_remedy(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref() {
        Some(ImportError::Store(pinned @ StoreError::Pinned { .. })) => {
            Failure::new(pinned.to_string())
                .try_this("--name with another name, or `shoal pin NAME --remove` first")
                .into()
        }
        _ => error,
    }
}
