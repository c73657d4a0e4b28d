//! `shoal pin`: ties a name to a model, so that no import or pull moves it.

use serde::Serialize;
use shard_registry::{AliasName, Store, StoreError};
use swarm_proto::ModelId;

use crate::failure::Failure;
use crate::home::Home;
use crate::{local_models, terminal};

/// Tie a name to one model, so that nothing moves it to another.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal pin llama-1b 3f2a9c0b77de
  shoal pin llama-1b other.gguf --force
  shoal pin llama-1b --remove

A full id may be pinned before the model is here.")]
pub struct Args {
    /// The name.
    name: AliasName,
    /// A name, an id or the beginning of one, or a GGUF file.
    #[arg(value_name = "NAME|ID|FILE", required_unless_present = "remove")]
    model: Option<String>,
    /// Move a name that is pinned to another model.
    #[arg(long)]
    force: bool,
    /// Make it an ordinary name again.
    #[arg(long, conflicts_with_all = ["model", "force"])]
    remove: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    home: Home,
}

/// What is printed.
#[derive(Serialize)]
struct Report {
    name: String,
    model: String,
    pinned: bool,
}

/// Pins, or removes the pin.
pub fn main(args: Args) -> anyhow::Result<()> {
    let home = args.home.dir()?;
    let store = local_models::store(&home)?;
    let name = &args.name;
    let id = match &args.model {
        Some(model) => {
            let id = match model.parse::<ModelId>() {
                Ok(id) => id,
                Err(_) => local_models::find(&home, model)?,
            };
            pin(&store, name, id, args.force)?;
            id
        }
        None => store
            .unpin(name)?
            .ok_or_else(|| Failure::new(format!("`{name}` is not pinned")))?,
    };
    let report = Report {
        name: name.to_string(),
        model: id.to_string(),
        pinned: !args.remove,
    };
    if args.json {
        return terminal::say_json(&report);
    }
    let state = if report.pinned {
        "is pinned to"
    } else {
        "is no longer pinned, and is still"
    };
    terminal::say(format!("{name} {state} {}", id.short()))?;
    Ok(())
}

fn pin(store: &Store, name: &AliasName, id: ModelId, force: bool) -> anyhow::Result<()> {
    match store.pin(name, id, force) {
        Err(e @ StoreError::Pinned { .. }) => Err(Failure::new(e.to_string())
            .try_this("--force, if it is to be moved")
            .into()),
        other => Ok(other?),
    }
}
