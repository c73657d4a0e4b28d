//! `shoal top`: the swarm as it changes, in the terminal.
//!
//! ```text
//! Source (a server's view, or this process as a member) ─▶ App (what is shown, and keys) ─▶ draw ─▶ terminal
//! ```
//! Everything but `screen`, `server` and `source` is pure: a view and keys in, a frame out, so that tests read frames.

mod app;
mod draw;
mod peer;
mod screen;
mod server;
mod source;

use std::io::{IsTerminal, stdout};

use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::swarm::Swarm;
use crate::terminal;

use app::App;
use source::Source;

/// Show the swarm as it changes: who holds which layers, how fast, and the requests that run.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal top
  shoal top --url http://192.168.1.20:8080 --api-key KEY    what that server sees, with its requests
  shoal top --once                                          one frame as text
  shoal top --json | jq '.requests[] | {id, stage, tokens_per_s}'

In the map █ is served, ░ is being loaded, and `copies` counts the peers of each layer. Requests are known to the server
that answers them: without --url a `shoal serve` of this swarm at 127.0.0.1:8080 (or at SHOAL_BIND) is asked, and where
there is none this command joins the swarm and looks for itself, as `shoal status` does. Press ? for the keys.")]
pub struct Args {
    /// Show what the server at this address sees (`shoal serve`).
    #[arg(long, env = "SHOAL_URL", value_name = "URL")]
    url: Option<String>,
    /// The key that it asks for.
    #[arg(
        long,
        env = "SHOAL_API_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
    /// Print one frame and end.
    #[arg(long)]
    once: bool,
    /// Print what there is to see as JSON and end.
    #[arg(long, conflicts_with = "once")]
    json: bool,
    #[command(flatten)]
    swarm: Swarm,
}

/// Looks until it is told to stop.
pub fn main(args: Args) -> anyhow::Result<()> {
    let watched = !args.once && !args.json;
    if watched && !stdout().is_terminal() {
        return Err(Failure::usage("standard output is no terminal")
            .try_this("`shoal top --once` prints one frame, `shoal top --json` the same as data")
            .into());
    }
    node::runtime::run(look(args))?
}

async fn look(args: Args) -> anyhow::Result<()> {
    let interrupt = Interrupt::listen();
    let key = args.api_key.as_deref();
    let chosen = Source::choose(args.url.as_deref(), key, &args.swarm);
    let source = interrupt.or_end(chosen).await?;
    let done = async {
        if args.json {
            terminal::say_json(&source.view().await?)
        } else if args.once {
            let mut app = App::new(source.name(), source.sees_requests());
            app.see(source.view().await?);
            let frame = draw::text_of(&mut app, terminal::width())?;
            Ok(terminal::say(frame)?)
        } else {
            screen::watch(&source, &interrupt).await
        }
    };
    let done = interrupt.or_end(done).await;
    source.leave().await;
    done
}
