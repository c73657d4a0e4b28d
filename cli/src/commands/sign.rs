//! `shoal sign`: puts a publisher's name to a model.

use std::path::PathBuf;

use node::Identity;
use serde::Serialize;
use swarm_proto::ModelSignature;

use crate::home::Home;
use crate::local_models;
use crate::terminal::{self, HINT, paint};

/// Sign a model as its publisher.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal sign llama-1b
  shoal sign llama-1b --key publisher.key

The signature is over the model's id, which is the hash of all its bytes. It is kept beside the model; give the
printed file to others, who check it with `shoal verify MODEL --publisher KEY --signature FILE`.")]
pub struct Args {
    /// A name, the beginning of an id, or a GGUF file.
    #[arg(value_name = "NAME|ID|FILE")]
    model: String,
    /// The publisher's secret key, 32 bytes that only you may read [default: the node's identity].
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
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
    publisher: String,
    file: String,
    signature: String,
}

/// Signs and says where the signature is.
pub fn main(args: Args) -> anyhow::Result<()> {
    let home = args.home.dir()?;
    let id = local_models::find(&home, &args.model)?;
    let identity = match &args.key {
        Some(path) => Identity::load(path)?,
        None => Identity::load_or_create(&home)?,
    };
    let signature = ModelSignature::sign(id, identity.secret());
    let file = local_models::store(&home)?.add_signature(&signature)?;
    let report = Report {
        model: id.to_string(),
        publisher: signature.publisher.to_string(),
        file: file.display().to_string(),
        signature: signature.to_string(),
    };
    if args.json {
        return terminal::say_json(&report);
    }
    terminal::say(&report.file)?;
    terminal::note(format!("signed as {}", report.publisher));
    let publisher = &report.publisher;
    let verify = format!("shoal verify {} --publisher {publisher}", id.short());
    terminal::note_styled(format!(
        "{} {verify} --signature FILE",
        paint(HINT, "others:")
    ));
    Ok(())
}
