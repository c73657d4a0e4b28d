//! `shoal status`: which layer is where, what is missing, how fast and how fresh.

use crate::choose_model::choose;
use crate::figures;
use crate::layer_map::{self, Ink};
use crate::swarm_report::{ModelReport, REMARKS, SwarmReport};
use crate::terminal::{self, BAD, BOLD, DIM, GOOD, HINT, WARN, paint};

/// Show which layer is where, gaps and speeds.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal status
  shoal status --model llama-1b
  shoal status --why
  shoal status --json | jq '.models[0].layers[] | select(.holders == [])'
  shoal status --peer /ip4/192.168.1.20/tcp/4001

In the picture █ is served, ░ is being loaded, and `copies` counts the peers of each layer.")]
pub struct Args {
    /// Only this model: a name, or the beginning of its id.
    #[arg(short, long, env = "SHOAL_MODEL", value_name = "NAME|ID")]
    model: Option<String>,
    /// Also say which peers are left alone after failures, and why.
    #[arg(long)]
    why: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    swarm: crate::swarm::Swarm,
}

/// Asks for the adverts and prints them.
pub fn main(args: Args) -> anyhow::Result<()> {
    let mut report = args.swarm.report()?;
    if let Some(asked) = &args.model {
        let id = choose(Some(asked), None, &report.models)?;
        report.models.retain(|model| model.id == id);
    }
    if args.json {
        terminal::say_json(&report)
    } else {
        print(&report)?;
        if args.why {
            print_failed(&report)?;
        }
        Ok(())
    }
}

/// Who failed this home's clients, and whether it is asked.
fn print_failed(report: &SwarmReport) -> anyhow::Result<()> {
    terminal::say("")?;
    if report.failed.is_empty() {
        terminal::say("no peer has failed clients of this machine lately")?;
        return Ok(());
    }
    let about = "as seen from this machine; who serves again is forgiven";
    terminal::say(format!(
        "{} {}",
        paint(BOLD, "peers that failed"),
        paint(DIM, about)
    ))?;
    for failed in &report.failed {
        let state = match failed.left_alone_s {
            0 => paint(DIM, "asked again when needed"),
            s => paint(WARN, format!("left alone for {s} s")),
        };
        let times = figures::plural(failed.failures as usize, "failure");
        let peer = figures::short_peer(&failed.peer);
        let ago = failed.ago_s;
        terminal::say(format!("  {peer}  {times} · {state}"))?;
        terminal::say(paint(DIM, format!("    {ago} s ago: {}", failed.last)))?;
    }
    Ok(())
}

fn print(report: &SwarmReport) -> anyhow::Result<()> {
    let peers = figures::plural(report.peers.len(), "peer");
    terminal::say(format!(
        "{} {}",
        paint(BOLD, format!("swarm {}", report.swarm)),
        paint(DIM, peers)
    ))?;
    for model in &report.models {
        terminal::say("")?;
        print_model(model)?;
    }
    if report.models.is_empty() {
        terminal::say("nobody serves a model")?;
        terminal::say(format!(
            "  {} start a node: `shoal node --model demo`",
            paint(HINT, "try:")
        ))?;
    }
    Ok(())
}

fn print_model(model: &ModelReport) -> anyhow::Result<()> {
    let state = if model.complete {
        paint(GOOD, "complete")
    } else {
        paint(
            BAD,
            format!("incomplete, nobody holds {}", model.gaps.join(", ")),
        )
    };
    let about = format!(
        "{} · {}",
        figures::short_hash(&model.model),
        figures::plural(model.n_layer.into(), "layer")
    );
    terminal::say(format!(
        "{} {} · {state}",
        paint(BOLD, &model.name),
        paint(DIM, about)
    ))?;
    for line in layer_map::draw(
        model.n_layer.into(),
        &model.rows(),
        REMARKS,
        terminal::width(),
    ) {
        let painted: String = line
            .into_iter()
            .map(|(ink, text)| colour(ink, text))
            .collect();
        terminal::say(painted.trim_end())?;
    }
    for gap in &model.gaps {
        let name = if model.name.is_empty() {
            figures::short_hash(&model.model)
        } else {
            &model.name
        };
        terminal::say(format!(
            "  {} `shoal node --model {name} --layers {gap}`",
            paint(HINT, "try:")
        ))?;
    }
    Ok(())
}

fn colour(ink: Ink, text: String) -> String {
    match ink {
        Ink::Plain => text,
        Ink::Live => paint(GOOD, text),
        Ink::Partly | Ink::Intended => paint(WARN, text),
        Ink::Empty | Ink::Head => paint(DIM, text),
        Ink::Gap => paint(BAD, text),
    }
}
