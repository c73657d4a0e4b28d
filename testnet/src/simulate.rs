//! `shoal-testnet sim`: many seeds of the simulator, a bar while they run, what they came to, and how to
//! see a seed that broke a rule.

use std::process::ExitCode;
use std::time::Duration;

use testnet::screen::Screen;
use testnet::sim::{Settings, Summary, run_seeds, virtual_time};
use tracing_subscriber::fmt::{format::Writer, time::FormatTime};

mod placement;

/// Columns of the bar.
const BAR: usize = 40;

/// What to simulate.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// How many seeds.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Nodes of a swarm.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=2000))]
    nodes: u16,
    /// Requests in a swarm, each of a client of its own.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    sessions: u16,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=128))]
    tokens: u16,
    /// Faults in a swarm.
    #[arg(long, default_value_t = 10)]
    faults: u16,
    /// Virtual seconds in which requests begin and faults happen.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..=3600))]
    seconds: u16,
    /// Seeds at the same time; as many as there are cores when it is left out.
    #[arg(long)]
    threads: Option<usize>,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
    /// Log what happens, in virtual seconds, to standard error; twice: every frame.
    #[arg(long, short, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// What else can be simulated.
#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Swarms under churn that decide by themselves who holds what, compared with Petals' rule.
    Placement(placement::Args),
}

/// Runs it; fails where a rule was broken.
pub fn run(args: &Args, screen: &mut Screen) -> ExitCode {
    if let Some(Command::Placement(args)) = &args.command {
        return placement::run_all(args, screen);
    }
    log(args.verbose);
    let settings = Settings {
        nodes: args.nodes.into(),
        sessions: args.sessions.into(),
        tokens: args.tokens.into(),
        faults: args.faults.into(),
        span: Duration::from_secs(args.seconds.into()),
    };
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = if args.verbose > 0 {
        1
    } else {
        args.threads.unwrap_or(cores)
    };
    let mut done = 0;
    let seeds = args.seed..args.seed.saturating_add(args.seeds);
    let ran = run_seeds(seeds, &settings, threads, |outcome| {
        done += 1;
        if screen.is_live() && args.verbose == 0 && !args.json {
            let bar = bar(done, args.seeds);
            let line = format!(
                "  {bar} {done} of {} seeds · seed {} ended",
                args.seeds, outcome.seed
            );
            screen.picture(&[line]);
        }
    });
    let summary = match ran {
        Ok(summary) => summary,
        Err(stuck) => {
            screen.error(&format!("{stuck}\n{}", again(args, stuck.seed)));
            return ExitCode::FAILURE;
        }
    };
    match (args.json, serde_json::to_string_pretty(&summary)) {
        (true, Ok(json)) => screen.lines(&json),
        _ => screen.lines(&figures(&summary)),
    }
    for (seed, violation) in &summary.broken {
        let at = Duration::from_millis(violation.at_ms);
        screen.error(&format!(
            "seed {seed} broke a rule after {at:?}: {}\n  {}\n{}",
            violation.invariant,
            violation.detail,
            again(args, *seed)
        ));
    }
    if summary.broken.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// How to see the same run again.
fn again(args: &Args, seed: u64) -> String {
    format!(
        "  the same run with its log: shoal-testnet sim --seed {seed} --seeds 1 --nodes {} --sessions {} --tokens {} \
         --faults {} --seconds {} --verbose",
        args.nodes, args.sessions, args.tokens, args.faults, args.seconds
    )
}

fn bar(done: u64, of: u64) -> String {
    let full = (done * BAR as u64 / of.max(1)) as usize;
    "█".repeat(full.min(BAR)) + &"░".repeat(BAR.saturating_sub(full))
}

fn figures(summary: &Summary) -> String {
    let faults: usize = summary.faults.values().sum();
    let kinds: Vec<String> = summary
        .faults
        .iter()
        .map(|(name, n)| format!("{name} {n}"))
        .collect();
    format!(
        "  seeds             {} in {:.1} s, {} broke a rule\n\
         \x20 faults            {faults} ({})\n\
         \x20 requests          {} answered, {} given up by their client, {} failed for want of holders\n\
         \x20 rows              {}, every one the whole chain's\n\
         \x20 recoveries        {}; a session stood still for p50 {} ms, p99 {} ms, at most {} ms (virtual)",
        summary.seeds,
        summary.wall_s,
        summary.broken.len(),
        kinds.join(", "),
        summary.answered,
        summary.given_up,
        summary.failed,
        summary.rows,
        summary.recoveries,
        summary.stall_p50_ms,
        summary.stall_p99_ms,
        summary.stall_max_ms,
    )
}

fn log(verbose: u8) {
    let level = match verbose {
        0 => return,
        1 => "sim=debug,node=debug,engine=debug",
        _ => "sim=trace,node=debug,engine=debug",
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(level)
        .with_timer(VirtualTime)
        .with_writer(std::io::stderr)
        .finish();
    // Fails only where there is one already.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Seconds since the run began, by its own clock.
struct VirtualTime;

impl FormatTime for VirtualTime {
    fn format_time(&self, to: &mut Writer<'_>) -> std::fmt::Result {
        let time = virtual_time().unwrap_or_default();
        write!(to, "{:10.3}", time.as_secs_f64())
    }
}
