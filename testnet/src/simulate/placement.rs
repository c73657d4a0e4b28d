//! `shoal-testnet sim placement`: swarms that place themselves, by the product's rules and by Petals', a bar
//! while they run, and what share of the best possible they reach.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;
use std::time::Instant;

use testnet::placement::{Cell, Rule, Settings, Workload, run};
use testnet::screen::Screen;

use super::bar;

/// What to simulate.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  shoal-testnet sim placement
  shoal-testnet sim placement --nodes 50,200 --seeds 10
  shoal-testnet sim placement --json > figures.json

T is what a swarm can compute with the layers that are live, U a bound on what any placement of the same machines
could. Machines, links and lives are drawn from the seed: a model, not a measurement.")]
pub struct Args {
    /// Swarms of each size under churn; six times as many that lose a region, or are tight.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Nodes of the swarms under churn, several sizes with commas between them.
    #[arg(long, value_delimiter = ',', default_value = "200,1000", value_name = "N,…", value_parser = clap::value_parser!(u16).range(1..=4000))]
    nodes: Vec<u16>,
    /// Swarms at the same time; as many as there are cores when it is left out.
    #[arg(long)]
    threads: Option<usize>,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run_all(args: &Args, screen: &mut Screen) -> ExitCode {
    let begin = Instant::now();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let settings = Settings {
        nodes: args.nodes.iter().map(|nodes| usize::from(*nodes)).collect(),
        seed: args.seed,
        seeds: args.seeds,
    };
    let live = std::io::stderr().is_terminal();
    let cells = run(&settings, args.threads.unwrap_or(cores), |done, of| {
        if live {
            let end = if done == of { "\r\x1b[K" } else { "" };
            let bar = bar(done as u64, of as u64);
            let mut stderr = anstream::stderr().lock();
            let _ = write!(stderr, "\r  {bar} {done} of {of} swarms{end}");
            let _ = stderr.flush();
        }
    });
    match (args.json, serde_json::to_string_pretty(&cells)) {
        (true, Ok(json)) => screen.lines(&json),
        _ => screen.lines(&format!(
            "{}\n  took {:.0} s",
            table(&cells),
            begin.elapsed().as_secs_f64()
        )),
    }
    ExitCode::SUCCESS
}

/// A line for each workload.
fn table(cells: &[Cell]) -> String {
    let mut text = format!(
        "  {:<38} {:>6}  {:>14}  {:>14}\n  {:<38} {:>6}  {:>7} {:>6}  {:>7} {:>6}",
        "share T/U of the upper bound",
        "swarms",
        "Shoal",
        "Petals' rule",
        "",
        "",
        "mean",
        "p5",
        "mean",
        "p5"
    );
    for cell in cells.iter().filter(|cell| cell.rule == Rule::Shoal) {
        let _ = write!(text, "\n  {:<38} {:>6}", name(&cell.workload), cell.swarms);
        for rule in Rule::ALL {
            let same = |other: &&Cell| other.workload == cell.workload && other.rule == rule;
            if let Some(cell) = cells.iter().find(same) {
                let _ = write!(text, "  {:>7.3} {:>6.3}", cell.mean, cell.p5);
            }
        }
    }
    text
}

fn name(workload: &Workload) -> String {
    match workload {
        Workload::Churn { nodes } => format!("{nodes} nodes, 1 h to 4 h of churn"),
        Workload::RegionLoss { nodes, churn } => {
            let before = if *churn { "churn" } else { "peace" };
            format!("{nodes} in {before}, a minute after 40 % died")
        }
        Workload::Tight {
            nodes,
            ratio,
            together,
        } => {
            let how = if *together { "together" } else { "one by one" };
            format!("{nodes} {how}, memory {ratio} × the model")
        }
    }
}
