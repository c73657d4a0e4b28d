//! The daemon: `node::daemon` behind a `main`. Prints its one ready line, and why it failed.

use std::process::ExitCode;

use clap::Parser;
use node::daemon;

/// Serve layers of a language model to a swarm.
#[derive(Parser)]
#[command(name = "shoal-node", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    args: daemon::Args,
}

fn main() -> ExitCode {
    let Cli { args } = Cli::parse();
    let wanted = args.ready_json;
    match daemon::run(args, move |ready| print_ready(wanted, ready)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

#[allow(clippy::print_stdout)] // the ready line is for the program that started this one
fn print_ready(wanted: bool, ready: &daemon::Ready) {
    if wanted && let Ok(line) = serde_json::to_string(ready) {
        println!("{line}");
    }
}

#[allow(clippy::print_stderr)] // logging may not be set up yet
fn report(error: &daemon::DaemonError) -> ExitCode {
    eprintln!("error: {error}");
    error.exit_code()
}
