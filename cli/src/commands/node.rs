//! `shoal node`: the same as the program `shoal-node`, for those who install one binary; and the owner's word to
//! one that runs.

use std::time::Duration;

use clap::Subcommand;
use node::control::{
    self, AskError, ExpertsStatus, IslandStatus, ModelStatus, NodeStatus, Request, State,
    TransferStatus,
};
use node::net::now_ms;
use node::pause::{Paused, Why, parse_duration};

use crate::daemon;
use crate::failure::Failure;
use crate::figures::{self, bytes};
use crate::terminal::{self, BOLD, DIM, GOOD, WARN, paint};

/// Serve the layers of a model that fit this machine, the same as shoal-node; or ask and pause one that does.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal node --model demo
  shoal node --model llama-1b --memory 4G
  shoal node --model model.gguf --layers 0..8 --listen /ip4/0.0.0.0/tcp/4001
  shoal node --model llama-1b --api 127.0.0.1:8080
  shoal node --model llama-1b --cpu-share 50 --quiet-hours 22:00-07:00
  shoal node --model demo-moe --hold experts --memory 1M
  shoal node --model demo-moe --hold trunk      its experts are computed by peers near by
  shoal node status                     what the node of this home does
  shoal node pause --for 2h             the machine for yourself; `shoal node resume` ends it

Ctrl-C withdraws its advert, lets running sessions end for a few seconds and stops.")]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    daemon: daemon::Args,
}

#[derive(Subcommand)]
enum Command {
    Status(Status),
    Pause(Pause),
    Resume(Resume),
}

/// Show what the node that runs in this home does.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal node status
  shoal node status --home /srv/shoal
  shoal node status --json | jq '.transfer.shards[] | {kind, fetches, given_bytes}'")]
struct Status {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Let the node that runs in this home do nothing for others: it takes no new sessions and gives no shards; sessions
/// that run go on at others that hold their layers, or else here to their end. Its layers stay loaded.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal node pause                      until `shoal node resume`
  shoal node pause --for 2h             or 30m, 1h30m, 1d

A pause outlives its node: one that is started again in this home is paused still.")]
struct Pause {
    /// For so long, for example 2h [default: until `shoal node resume`].
    #[arg(long = "for", value_name = "TIME", value_parser = parse_duration)]
    lasts: Option<Duration>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Let the node that runs in this home serve again.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal node resume")]
struct Resume {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs until it is told to stop, or says a word to one that runs.
pub fn main(args: Args) -> anyhow::Result<()> {
    let (request, json) = match args.command {
        None => return daemon::main(args.daemon),
        Some(Command::Status(args)) => (Request::Status, args.json),
        Some(Command::Pause(args)) => {
            let for_s = args.lasts.map(|lasts| lasts.as_secs());
            (Request::Pause { for_s }, args.json)
        }
        Some(Command::Resume(args)) => (Request::Resume, args.json),
    };
    let home = args.daemon.home_dir()?;
    let status = control::ask(&home, &request).map_err(|error| match &error {
        AskError::NoNode { .. } => Failure::new(error.to_string()).try_this(
            "start one with `shoal node --model NAME`, or name the home of one that runs: --home DIR",
        ),
        _ => Failure::new(error.to_string()),
    })?;
    match request {
        _ if json => terminal::say_json(&status),
        Request::Status => print(&status),
        Request::Pause { .. } | Request::Resume => Ok(terminal::say(state(&status))?),
    }
}

fn print(status: &NodeStatus) -> anyhow::Result<()> {
    let about = format!(
        "{} · up {} · process {}",
        status.home.display(),
        figures::duration(Duration::from_secs(status.uptime_s)),
        status.pid
    );
    terminal::say(format!(
        "{} {}",
        paint(BOLD, format!("node {}", figures::short_peer(&status.peer))),
        paint(DIM, about)
    ))?;
    terminal::say(format!("  {}", state(status)))?;
    for model in &status.models {
        print_model(model)?;
    }
    print_transfer(&status.transfer)?;
    let of = match status.disk_bytes_max {
        Some(max) => format!(" of {}", bytes(max)),
        None => String::new(),
    };
    if let Some(disk) = status.disk_bytes {
        terminal::say(format!("  fetched shards take {}{of} of disk", bytes(disk)))?;
    }
    Ok(())
}

fn state(status: &NodeStatus) -> String {
    let sessions = figures::plural(status.sessions, "session");
    match (status.state, &status.paused) {
        (State::Starting, _) => paint(WARN, "starting: no layer is there yet"),
        (State::Serving, _) => format!("{} · {sessions}", paint(GOOD, "serving")),
        (State::Paused, paused) => {
            let until = paused.as_ref().map(until).unwrap_or_default();
            format!("{} · {sessions}", paint(WARN, format!("paused{until}")))
        }
    }
}

fn until(paused: &Paused) -> String {
    let why = match paused.why {
        Why::Owner => "",
        Why::QuietHours => ": quiet hours,",
    };
    let now_s = now_ms() / 1000;
    match paused.until {
        Some(until) => {
            let left = Duration::from_secs(until.saturating_sub(now_s));
            format!("{why} for another {}", figures::duration(left))
        }
        None => format!("{why} until `shoal node resume`"),
    }
}

fn print_model(model: &ModelStatus) -> anyhow::Result<()> {
    terminal::say(format!(
        "  {} {}",
        paint(BOLD, figures::printable(&model.name, 64)),
        paint(DIM, figures::short_hash(&model.model))
    ))?;
    if let Some(intended) = &model.intended {
        print_layers(model, intended)?;
    }
    if let Some(experts) = &model.experts {
        print_experts(experts)?;
    }
    Ok(())
}

fn print_experts(experts: &ExpertsStatus) -> anyhow::Result<()> {
    let live = match &experts.live[..] {
        [] => "none yet".to_owned(),
        live => format!("{} ({})", experts.count, live.join("; ")),
    };
    let missing = match experts.live == experts.intended {
        true => String::new(),
        false => format!(", then {}", experts.intended.join("; ")),
    };
    terminal::say(format!("    experts {live}{missing}"))?;
    terminal::say(format!(
        "    {} expert-rows/s · {} answered, {} · weights {}",
        figures::rate(experts.rows_s.map(f64::from)),
        figures::plural(experts.calls as usize, "call"),
        figures::plural(experts.rows as usize, "row"),
        bytes(experts.tensor_bytes),
    ))?;
    Ok(())
}

fn print_island(island: &IslandStatus) -> anyhow::Result<()> {
    let held = island
        .experts
        .iter()
        .filter(|expert| !expert.holders.is_empty());
    let (held, all) = (held.count(), island.experts.len());
    let missing = match all - held {
        0 => String::new(),
        n => paint(WARN, format!(", {n} of them nowhere now")),
    };
    let peers = figures::plural(island.holders.len(), "holder");
    terminal::say(format!(
        "    experts of these layers: {all}, with {peers}{missing}"
    ))?;
    for holder in &island.holders {
        let who = match &holder.peer {
            Some(peer) => figures::printable(peer, 16),
            None => "here".into(),
        };
        let micros = |micros: Option<u64>| match micros {
            Some(micros) => format!("{:.2} ms", micros as f64 / 1e3),
            None => "not known yet".into(),
        };
        let state = match &holder.down {
            Some(why) => paint(
                WARN,
                format!(" · not asked now: {}", figures::printable(why, 120)),
            ),
            None => String::new(),
        };
        terminal::say(format!(
            "      {} {} · {} · round trip {}{state}",
            paint(DIM, who),
            figures::plural(holder.experts, "expert"),
            figures::plural(holder.calls as usize, "call"),
            micros(holder.rtt_us),
        ))?;
    }
    Ok(())
}

fn print_layers(model: &ModelStatus, intended: &str) -> anyhow::Result<()> {
    let live = match &model.live[..] {
        [] => "none yet".to_owned(),
        live => figures::list(live),
    };
    let layers = format!("layers {live}");
    let whole = model.live == [intended];
    let intended = match whole {
        true => String::new(),
        false => format!(", {intended} when all are there"),
    };
    terminal::say(format!("    {layers}{intended} of {}", model.n_layer))?;
    if let Some(island) = &model.island {
        print_island(island)?;
    }
    terminal::say(format!(
        "    {} layer-tokens/s · queue {} · {} · KV {} of {} · weights {}",
        figures::rate(model.layer_tokens_s.map(f64::from)),
        model.queue,
        figures::plural(model.sessions as usize, "session"),
        bytes(model.kv_bytes),
        bytes(model.kv_bytes_max),
        bytes(model.tensor_bytes),
    ))?;
    Ok(())
}

fn print_transfer(transfer: &TransferStatus) -> anyhow::Result<()> {
    let fetched = transfer.shards.iter().filter(|shard| shard.fetches > 0);
    let limit = match transfer.upload_bytes_s_max {
        Some(limit) => format!(" (at most {}/s)", bytes(limit)),
        None => String::new(),
    };
    terminal::say(format!(
        "  fetched {} ({}) · gave {}{limit}",
        bytes(transfer.fetched_bytes),
        figures::plural(fetched.count(), "shard"),
        bytes(
            transfer
                .given_bytes
                .saturating_add(transfer.described_bytes)
        ),
    ))?;
    Ok(())
}
