//! `shoal verify`: whether a publisher put its name to a model.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Serialize;
use swarm_proto::{ModelSignature, Peer};

use crate::failure::Failure;
use crate::home::Home;
use crate::{figures, local_models, terminal};

/// Check that a publisher signed a model.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal verify llama-1b --publisher 12D3KooW...
  shoal verify llama-1b --publisher 12D3KooW... --signature received.sig

A signature says that the holder of that key stands for exactly these bytes. It does not say who that is: get the
key from the publisher, not from whoever gave you the model.")]
pub struct Args {
    /// A name, the beginning of an id, or a GGUF file.
    #[arg(value_name = "NAME|ID|FILE")]
    model: String,
    /// The publisher's public key.
    #[arg(long, value_name = "KEY")]
    publisher: Peer,
    /// A file with the signature, kept beside the model when it is right [default: what is there].
    #[arg(long, value_name = "FILE")]
    signature: Option<PathBuf>,
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
    signed: bool,
}

/// A signature's file that is longer is none.
const FILE_BYTES_MAX: u64 = 512;

/// Checks; a signature that is missing or wrong is a failure.
pub fn main(args: Args) -> anyhow::Result<()> {
    let home = args.home.dir()?;
    let id = local_models::find(&home, &args.model)?;
    let store = local_models::store(&home)?;
    let publisher = args.publisher;
    if let Some(path) = &args.signature {
        let signature = read(path)?;
        if signature.model != id {
            let found = signature.model.short();
            let failure = format!(
                "that signature is on model {found}, {} is {}",
                args.model,
                id.short()
            );
            return Err(Failure::new(failure).into());
        }
        store.add_signature(&signature)?;
    }
    let (signatures, problems) = store.signatures(id);
    for problem in problems {
        terminal::warn(problem);
    }
    if !signatures
        .iter()
        .any(|signature| signature.publisher == publisher)
    {
        let others: Vec<String> = signatures.iter().map(|s| s.publisher.to_string()).collect();
        let others = match &others[..] {
            [] => "nobody did".into(),
            others => format!("signed by {}", others.join(", ")),
        };
        let cause = format!(
            "{publisher} did not sign model {}, as far as is known here; {others}",
            id.short()
        );
        return Err(Failure::new(cause)
            .try_this("--signature FILE, with what the publisher gave you")
            .into());
    }
    let report = Report {
        model: id.to_string(),
        publisher: publisher.to_string(),
        signed: true,
    };
    if args.json {
        return terminal::say_json(&report);
    }
    let name = figures::printable(&args.model, 80);
    terminal::say(format!("{name} ({}) is signed by {publisher}", id.short()))?;
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<ModelSignature> {
    let failed = |e: &dyn std::fmt::Display| Failure::new(format!("{}: {e}", path.display()));
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|e| failed(&e))?;
    let read = file.take(FILE_BYTES_MAX).read_to_string(&mut text);
    read.map_err(|e| failed(&e))?;
    Ok(text.parse().map_err(|e| failed(&e))?)
}
