//! `shoal gc`: removes what fetching left over.

use std::time::Duration;

use crate::home::Home;
use crate::{figures, local_models, terminal};

/// Shards that were partly fetched and not gone on with for so long.
const OLD: Duration = Duration::from_secs(7 * 24 * 3600);

/// Remove shards of no model, and those whose fetching was given up a week ago.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal gc
  shoal gc --json")]
pub struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    home: Home,
}

/// Removes and says how much.
pub fn main(args: Args) -> anyhow::Result<()> {
    let store = local_models::store(&args.home.dir()?)?;
    let (_, problems) = store.models();
    for problem in problems {
        terminal::warn(problem);
    }
    let collected = store.collect(OLD)?;
    if args.json {
        return terminal::say_json(&collected);
    }
    terminal::say(format!(
        "removed {} of no model and {}: {}",
        figures::plural(collected.blobs, "shard"),
        figures::plural(collected.partials, "old partial shard"),
        figures::bytes(collected.bytes)
    ))?;
    Ok(())
}
