//! `shoal rm`: forgets a model and removes what was fetched of it. The user's own files stay.

use serde::Serialize;
use shard_registry::Resolved;
use shard_registry::blobs::Removed;

use crate::failure::Failure;
use crate::home::Home;
use crate::{figures, local_models, terminal};

/// Remove a model's fetched shards, its description and its names; never your own GGUF files.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal rm llama-1b
  shoal rm 3f1c9a0b77e2 --json")]
pub struct Args {
    /// The model: a name, or the beginning of its id.
    #[arg(value_name = "ID|NAME")]
    model: String,
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
    #[serde(flatten)]
    removed: Removed,
}

/// Removes and says what stays.
pub fn main(args: Args) -> anyhow::Result<()> {
    let store = local_models::store(&args.home.dir()?)?;
    let id = match store.resolve(&args.model) {
        Ok(Resolved::Model(id)) => id,
        Ok(Resolved::File(path)) => {
            let failure =
                Failure::usage(format!("{} is a file of yours: it stays", path.display()));
            return Err(failure
                .try_this("a name or an id from `shoal models`; delete the file yourself")
                .into());
        }
        Err(error) => {
            return Err(Failure::new(error.to_string())
                .try_this("`shoal models` lists them")
                .into());
        }
    };
    let removed = store.remove_model(id)?;
    let report = Report {
        model: id.to_string(),
        removed,
    };
    if args.json {
        return terminal::say_json(&report);
    }
    let removed = &report.removed;
    terminal::say(format!(
        "removed {}: {} of {}",
        id.short(),
        figures::plural(removed.blobs, "fetched shard"),
        figures::bytes(removed.bytes)
    ))?;
    if removed.shared > 0 {
        terminal::note(format!(
            "{} stay: another model here has them too",
            figures::plural(removed.shared, "shard")
        ));
    }
    for path in &removed.files {
        terminal::note(format!("your file stays: {}", path.display()));
    }
    Ok(())
}
