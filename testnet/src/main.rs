//! `shoal-testnet`: starts a swarm on this machine, asks it something, reports, cleans up.
//!
//! What it starts it ends, on success, on an error and on a signal, unless `--keep` leaves a swarm that works.
//! `testnet/run.sh` builds everything and then becomes this program.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, error::ErrorKind};
use testnet::binaries::Binaries;
use testnet::faults::Kinds;
use testnet::plan::NODES_FOR_COPIES;
use testnet::relay::Relay;
use testnet::screen::Screen;
use testnet::swarm::Swarm;
use tokio::signal::unix::{Signal, SignalKind, signal};

mod chaos;
mod cold_start;
mod island;
mod scenario;
mod simulate;

/// Starts many nodes on this machine, asks them something through `shoal`, compares with the whole model in one
/// process, and cleans up.
#[derive(Debug, Parser)]
#[command(
    name = "testnet/run.sh",
    version,
    after_help = "\
Examples:
  testnet/run.sh
  testnet/run.sh --nodes 36 --report figures.json
  testnet/run.sh --chaos all
  testnet/run.sh --nodes 24 --cold
  testnet/run.sh --cold --model big.gguf --upload-limit 10M --report figures.json
  testnet/run.sh --chaos kill,partition --faults 50 --seed 7
  testnet/run.sh --moe --nodes 12
  testnet/run.sh --moe --chaos kill,freeze --experts-per-node 10

The exit code is 0 where the text is that of the whole model, whatever was done to the nodes; with --cold only where
the seed uploaded fewer than three copies of the model, and no node fetched a shard twice.",
    args_conflicts_with_subcommands = true
)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// How many nodes [default: 24; 12 with --chaos or --moe].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    nodes: Option<u32>,
    /// A GGUF file, or a model's name [default: demo; demo-moe with --moe].
    #[arg(long, value_name = "FILE")]
    model: Option<String>,
    /// Share out the experts of a mixture: a quarter of the nodes hold trunks, the others experts for them. Says where
    /// each expert ran, and how often it was picked.
    #[arg(long, conflicts_with = "cold")]
    moe: bool,
    /// How many experts a node holds, with --moe [default: so that each is held twice].
    #[arg(long, value_name = "K", requires = "moe", value_parser = clap::value_parser!(u32).range(1..))]
    experts_per_node: Option<u32>,
    /// What to ask, given to the model as it is, without a chat template [default: the beginning of a story].
    #[arg(long)]
    prompt: Option<String>,
    /// The prompt is token ids, for models without a tokenizer.
    #[arg(long)]
    tokens: bool,
    /// How many tokens to answer [default: 48; 160 with --chaos].
    #[arg(short, long, value_name = "N")]
    n_predict: Option<u32>,
    /// Ask again and again while hops of the running route fail: kill, freeze, partition, slow, corrupt, flap, several
    /// with commas between them, or all. Counts what that changes in the answer, and how long it stands still.
    #[arg(long, value_name = "KINDS", conflicts_with = "keep")]
    chaos: Option<Kinds>,
    /// How many faults of each kind.
    #[arg(long, value_name = "N", default_value_t = 10, requires = "chaos", value_parser = clap::value_parser!(u32).range(1..))]
    faults: u32,
    /// Begin with one node that has the model. The others start together, with nothing but its address and the model's
    /// id, and fetch their layers from each other. The question goes to them alone.
    #[arg(long, conflicts_with_all = ["chaos", "keep"])]
    cold: bool,
    /// What the node that has the model uploads in a second at most, with --cold.
    #[arg(long, value_name = "SIZE", default_value = "10M", requires = "cold")]
    upload_limit: String,
    /// Write the figures there as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Leave the swarm running, and say how to talk to it and how to stop it.
    #[arg(long)]
    keep: bool,
    /// Which layers or memory the nodes get, who introduces whom, and what --chaos does to whom and when.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What else it can do.
#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Runs whole swarms with faults in virtual time, each from a seed, and checks every step. Starts nothing.
    Sim(simulate::Args),
}

impl Args {
    fn nodes(&self) -> u32 {
        self.nodes.unwrap_or(if self.chaos.is_some() || self.moe {
            12
        } else {
            24
        })
    }

    fn model(&self) -> &str {
        let default = if self.moe { "demo-moe" } else { "demo" };
        self.model.as_deref().unwrap_or(default)
    }

    fn n_predict(&self) -> u32 {
        self.n_predict
            .unwrap_or(if self.chaos.is_some() { 160 } else { 48 })
    }

    /// With --chaos one whose answer repeats itself less: what comes twice or not at all cannot hide in it.
    fn prompt(&self) -> &str {
        self.prompt.as_deref().unwrap_or(if self.chaos.is_some() {
            "In the morning the captain went to"
        } else {
            "Once upon a time there was a little"
        })
    }

    /// What clap cannot check by itself.
    fn check(&self) -> Result<(), clap::Error> {
        if self.cold && self.nodes() < 2 {
            let why = "--cold needs 2 nodes or more: one that has the model, and who fetches it";
            return Err(Args::command().error(ErrorKind::ValueValidation, why));
        }
        if self.moe && self.nodes() < island::NODES_MIN {
            let why = format!(
                "--moe needs {} nodes or more: a trunk, and who holds its experts",
                island::NODES_MIN
            );
            return Err(Args::command().error(ErrorKind::ValueValidation, why));
        }
        if self.chaos.is_some() && self.nodes() < NODES_FOR_COPIES {
            let why = format!(
                "--chaos needs {NODES_FOR_COPIES} nodes or more, so that each layer is held twice"
            );
            return Err(Args::command().error(ErrorKind::ValueValidation, why));
        }
        Ok(())
    }
}

/// How the run ended, apart from an error.
enum Ended {
    Compared { held: bool },
    Signalled(u8),
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = args.check() {
        error.exit();
    }
    let mut screen = Screen::new();
    if let Some(Command::Sim(args)) = &args.command {
        return simulate::run(args, &mut screen);
    }
    match run(&args, &mut screen) {
        Ok(Ended::Compared { held: true }) => ExitCode::SUCCESS,
        Ok(Ended::Compared { held: false }) => ExitCode::FAILURE,
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
        if args.chaos.is_some() {
            swarm = swarm.behind(Relay::new(args.seed));
        }
        let ended = tokio::select! {
            report = scenario::play(args, &mut swarm, screen) => report.map(|held| Ended::Compared { held }),
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
