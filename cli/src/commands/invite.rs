//! `shoal invite`: prints a ticket for the next machine.

use std::path::Path;

use node::Identity;
use node::config::Settings;
use swarm_proto::{SwarmId, Ticket};

use crate::failure::Failure;
use crate::swarm::Swarm;
use crate::terminal::{self, BOLD, DIM, HINT, paint};

/// Print a ticket that lets another machine join this swarm.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal invite                       a ticket for the swarm this machine is in
  shoal invite --private             make a private swarm: a random name and a key, kept here
  shoal invite --addr /ip4/203.0.113.7/tcp/4001

The ticket goes to stdout; whoever has it can join. One with a key is a secret.
Run it where a node runs: the addresses in it are those of that node and of the peers it knows.")]
pub struct Args {
    /// Make a new private swarm with a key (and, without --swarm, a random name), and join it here.
    #[arg(long, conflicts_with = "key_file")]
    private: bool,
    /// An address to put in, besides those found; with or without /p2p/PEER.
    #[arg(long, value_name = "ADDR")]
    addr: Vec<String>,
    #[command(flatten)]
    swarm: Swarm,
}

/// Finds addresses, prints the ticket.
pub fn main(args: Args) -> anyhow::Result<()> {
    let settings = args.swarm.settings(false)?;
    let ticket = if args.private {
        private(&args, &settings)?
    } else {
        open(&args, &settings)?
    };
    terminal::say(ticket.to_text()?)?;
    let kind = if ticket.key.is_some() {
        "private: the ticket holds its key, so keep it secret"
    } else {
        "open to whoever has the ticket"
    };
    terminal::note_styled(format!(
        "{} {}",
        paint(BOLD, format!("swarm {}", ticket.swarm)),
        paint(DIM, format!("({kind})"))
    ));
    for addr in &ticket.addrs {
        terminal::note(format!("  {addr}"));
    }
    if ticket.addrs.is_empty() {
        terminal::warn(
            "the ticket holds no address: machines that join find each other on the local network only; --addr puts one in",
        );
    }
    terminal::note_styled(format!(
        "  {} `shoal join TICKET` on the other machine",
        paint(HINT, "next:")
    ));
    Ok(())
}

/// A new swarm of one machine; the name tells it apart, the key keeps others out.
fn private(args: &Args, settings: &Settings) -> anyhow::Result<Ticket> {
    let swarm: SwarmId = match &args.swarm.args().swarm {
        Some(swarm) => swarm.clone(),
        None => format!("private-{:08x}", rand::random::<u32>()).parse()?,
    };
    let ticket = Ticket {
        swarm,
        key: Some(rand::random()),
        addrs: own_addrs(args, &settings.home)?,
    };
    node::config::save_ticket(&settings.home, &ticket)?;
    terminal::note(
        "made and joined here; start a node, then `shoal invite` prints a ticket with its addresses",
    );
    Ok(ticket)
}

/// The swarm this machine is in, with the addresses of its members.
fn open(args: &Args, settings: &Settings) -> anyhow::Result<Ticket> {
    let mut addrs = own_addrs(args, &settings.home)?;
    match args.swarm.report() {
        Ok(report) => {
            let own = Identity::load_or_create(&settings.home)?.peer().to_string();
            let mut peers = report.peers;
            peers.sort_by_key(|peer| peer.peer != own);
            let found = peers
                .iter()
                .flat_map(|peer| peer.addrs.iter().map(|addr| named(addr, &peer.peer)));
            addrs.extend(found);
        }
        Err(error) => terminal::warn(format!("{error:#}")),
    }
    addrs.extend(
        settings
            .peers
            .iter()
            .filter(|addr| addr.contains("/p2p/"))
            .cloned(),
    );
    Ok(Ticket {
        swarm: settings.swarm.clone(),
        key: settings.key,
        addrs: best(addrs),
    })
}

/// What the user gave, with this machine's node id where none is named.
fn own_addrs(args: &Args, home: &Path) -> anyhow::Result<Vec<String>> {
    if args.addr.is_empty() {
        return Ok(Vec::new());
    }
    let own = Identity::load_or_create(home)?.peer().to_string();
    if let Some(bad) = args.addr.iter().find(|addr| !addr.starts_with('/')) {
        return Err(Failure::usage(format!("`{bad}` is not an address"))
            .try_this("--addr /ip4/203.0.113.7/tcp/4001")
            .into());
    }
    Ok(args.addr.iter().map(|addr| named(addr, &own)).collect())
}

fn named(addr: &str, peer: &str) -> String {
    if addr.contains("/p2p/") {
        addr.to_string()
    } else {
        format!("{addr}/p2p/{peer}")
    }
}

/// As many as a ticket takes, each once; those of this machine alone only when there are no others.
fn best(mut addrs: Vec<String>) -> Vec<String> {
    let only_here = |addr: &String| addr.starts_with("/ip4/127.") || addr.starts_with("/ip6/::1/");
    if !addrs.iter().all(only_here) {
        addrs.retain(|addr| !only_here(addr));
    }
    let mut once = Vec::new();
    for addr in addrs {
        if !once.contains(&addr) && addr.len() <= swarm_proto::ticket::TICKET_ADDR_BYTES_MAX {
            once.push(addr);
        }
    }
    once.truncate(swarm_proto::ticket::TICKET_ADDRS_MAX);
    once
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_for_when_there_is_nothing_else() {
        let lan = "/ip4/192.168.1.2/tcp/1/p2p/x".to_string();
        let here = "/ip4/127.0.0.1/tcp/1/p2p/x".to_string();
        assert_eq!(
            best(vec![here.clone(), lan.clone(), lan.clone()]),
            std::slice::from_ref(&lan)
        );
        assert_eq!(best(vec![here.clone()]), [here]);
        assert_eq!(
            best((0..40).map(|i| format!("/ip4/10.0.0.{i}/tcp/1")).collect()).len(),
            16
        );
    }

    #[test]
    fn every_address_names_its_peer() {
        assert_eq!(named("/ip4/1.2.3.4/tcp/1", "x"), "/ip4/1.2.3.4/tcp/1/p2p/x");
        assert_eq!(
            named("/ip4/1.2.3.4/tcp/1/p2p/y", "x"),
            "/ip4/1.2.3.4/tcp/1/p2p/y"
        );
    }
}
