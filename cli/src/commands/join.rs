//! `shoal join`: remembers a ticket, so that every later command finds the swarm by itself.

use swarm_proto::Ticket;

use crate::failure::Failure;
use crate::figures;
use crate::home::Home;
use crate::terminal::{self, BOLD, DIM, HINT, paint};

/// Join the swarm of a ticket.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal join shoal1QmX...
  ssh first shoal invite | shoal join -

The ticket is kept in the home directory; a later one replaces it. Flags and SHOAL_* variables win.")]
pub struct Args {
    /// The ticket that `shoal invite` printed; `-` reads it from stdin.
    ticket: String,
    #[command(flatten)]
    home: Home,
}

/// Checks the ticket and keeps it.
pub fn main(args: Args) -> anyhow::Result<()> {
    let text = if args.ticket == "-" {
        crate::prompt::read(None)?
    } else {
        args.ticket
    };
    let ticket: Ticket = text.trim().parse().map_err(|error| {
        Failure::new(format!("this ticket is of no use: {error}"))
            .try_this("run `shoal invite` on a machine of the swarm and copy the whole line")
    })?;
    let home = args.home.dir()?;
    node::config::save_ticket(&home, &ticket)?;
    let kind = if ticket.key.is_some() {
        "private, with a key"
    } else {
        "open to whoever knows its name"
    };
    terminal::say(format!(
        "joined swarm {} {}",
        paint(BOLD, &ticket.swarm),
        paint(DIM, format!("({kind})"))
    ))?;
    for addr in &ticket.addrs {
        terminal::say(paint(DIM, format!("  {}", figures::printable(addr, 200))))?;
    }
    terminal::say(format!(
        "  {} `shoal status`, or `shoal node --model NAME` to serve",
        paint(HINT, "next:")
    ))?;
    Ok(())
}
