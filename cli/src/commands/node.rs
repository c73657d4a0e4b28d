//! `shoal node`: the same as the program `shoal-node`, for those who install one binary.

use std::process::ExitCode;

use crate::failure::Failure;
use crate::terminal;

/// Serve the layers of a model that fit this machine; the same as shoal-node.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal node --model demo
  shoal node --model llama-1b --memory 4G
  shoal node --model model.gguf --layers 0..8 --listen /ip4/0.0.0.0/tcp/4001

Ctrl-C withdraws its advert, lets running sessions end for a few seconds and stops.")]
pub struct Args {
    #[command(flatten)]
    daemon: node::daemon::Args,
}

/// Runs until it is told to stop.
pub fn main(args: Args) -> anyhow::Result<()> {
    let ready_json = args.daemon.ready_json;
    let ran = node::daemon::run(args.daemon, move |ready| {
        if ready_json && let Ok(line) = serde_json::to_string(ready) {
            // Whoever asked for the line and left does not stop the node.
            let _ = terminal::say(line);
        }
    });
    ran.map_err(|error| {
        let usage = error.exit_code() == ExitCode::from(2);
        let failure = if usage {
            Failure::usage(error.to_string())
        } else {
            Failure::new(error.to_string())
        };
        failure.into()
    })
}
