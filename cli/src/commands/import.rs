//! `shoal import`: makes a GGUF known under its hash and a name, without copying it.

use std::path::PathBuf;

use serde::Serialize;
use shard_registry::AliasName;

use crate::failure::Failure;
use crate::home::Home;
use crate::terminal::{self, BOLD, HINT, paint};
use crate::{figures, local_models};

/// Make a GGUF file known, without copying it.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal import ~/models/Llama-3.2-1B-Instruct-Q4_K_M.gguf --name llama-1b
  shoal import big-00001-of-00003.gguf

The file is hashed where it is and must stay there. Of a model in several files give any one.")]
pub struct Args {
    /// The GGUF file.
    file: PathBuf,
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
    let store = local_models::store(&args.home.dir()?)?;
    let imported = local_models::import(&store, &args.file, name.as_ref())?;
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
    if args.json {
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
