//! `shoal-testnet`: starts a swarm on this machine, asks it something, reports, cleans up.
//!
//! What it starts it ends, on success, on an error and on a signal, unless `--keep` leaves a swarm that works.
//! `testnet/run.sh` builds everything and then becomes this program.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use testnet::binaries::Binaries;
use testnet::screen::Screen;
use testnet::swarm::Swarm;
use tokio::signal::unix::{Signal, SignalKind, signal};

mod scenario;
mod simulate;

/// Starts many nodes on this machine, asks them something through `shoal`, compares with the whole model in one
/// process, and cleans up.
#[derive(Debug, Parser)]
#[command(
    name = "testnet/run.sh",
    version,
    args_conflicts_with_subcommands = true
)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// How many nodes.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=256))]
    nodes: u32,
    /// A GGUF file, or a model's name.
    #[arg(long, value_name = "FILE", default_value = "demo")]
    model: String,
    /// What to ask; given to the model as it is, without a chat template.
    #[arg(long, default_value = "Once upon a time there was a little")]
    prompt: String,
    /// The prompt is token ids, for models without a tokenizer.
    #[arg(long)]
    tokens: bool,
    /// How many tokens to answer.
    #[arg(short, long, value_name = "N", default_value_t = 48)]
    n_predict: u32,
    /// Write the figures there as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Leave the swarm running, and say how to talk to it and how to stop it.
    #[arg(long)]
    keep: bool,
    /// Which memory budgets the nodes get, and who introduces whom.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What else it can do.
#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Runs whole swarms with faults in virtual time, each from a seed, and checks every step. Starts nothing.
    Sim(simulate::Args),
}

/// How the run ended, apart from an error.
enum Ended {
    Compared { same: bool },
    Signalled(u8),
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut screen = Screen::new();
    if let Some(Command::Sim(args)) = &args.command {
        return simulate::run(args, &mut screen);
    }
    match run(&args, &mut screen) {
        Ok(Ended::Compared { same: true }) => ExitCode::SUCCESS,
        Ok(Ended::Compared { same: false }) => ExitCode::FAILURE,
        Ok(Ended::Signalled(number)) => ExitCode::from(128 + number),
        Err(error) => {
            screen.error(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, screen: &mut Screen) -> Result<Ended> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut signals = Signals::new()?;
        let mut swarm = Swarm::new(Binaries::beside_this_program()?)?;
        let ended = tokio::select! {
            report = scenario::play(args, &mut swarm, screen) => report.map(|same| Ended::Compared { same }),
            number = signals.next() => Ok(Ended::Signalled(number)),
        };
        if args.keep && matches!(ended, Ok(Ended::Compared { .. })) {
            screen.lines(&scenario::farewell(args, swarm)?);
            return ended;
        }
        let stopping = format!("stopping {} nodes", swarm.nodes().len());
        let killed = screen.wait_for(&stopping, swarm.stop()).await;
        if !killed.is_empty() {
            screen.error(&format!("did not end by themselves and were killed: {}", killed.join(", ")));
        }
        ended
    })
}

/// The signals that end a run. A second one does not hurry it: every wait of the clean-up has a deadline.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// The number of the next one.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hangup.recv() => 1,
        }
    }
}
