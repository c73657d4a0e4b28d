//! A node as a program, `shoal node` and `shoal-node` alike: the daemon of the crate `node` and, with `--api`, the HTTP
//! server beside it, over the same network.
//!
//! ```text
//! node serves ─▶ server listens ─▶ ready line ─▶ told to stop ─▶ server drains ─▶ node says goodbye
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use api::{Config, Models, Server};
use node::answer::Cancel;
use node::daemon::{Daemon, DaemonError};
use tokio::task::JoinHandle;

use crate::api_args::{ApiArgs, explained};
use crate::failure::Failure;
use crate::serving::Serving;
use crate::session_args::TravelArgs;
use crate::swarm::Member;
use crate::{supervisor, terminal};

/// Flags of a node, and of what it answers itself.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    node: node::daemon::Args,

    /// Answer HTTP requests at this address too, as `shoal serve` does, over this node's own connections; the flags
    /// below say who may ask. Requests that name no model mean the first one served here.
    #[arg(
        long,
        env = "SHOAL_API",
        value_name = "HOST:PORT",
        help_heading = "HTTP API"
    )]
    api: Option<SocketAddr>,

    #[command(flatten)]
    http: ApiArgs,

    #[command(flatten)]
    travel: TravelArgs,
}

impl Args {
    /// The home directory alone.
    pub fn home_dir(&self) -> anyhow::Result<PathBuf> {
        Ok(self.node.swarm.home_dir()?)
    }
}

/// Runs a node until SIGINT or SIGTERM, or until it cannot serve any more.
pub fn main(args: Args) -> anyhow::Result<()> {
    node::runtime::run(run(args))?
}

async fn run(args: Args) -> anyhow::Result<()> {
    // What is wrong with it is said before anything is loaded.
    let config = args.api.map(|bind| args.http.config(bind)).transpose()?;
    let Some(mut daemon) = Daemon::start(&args.node).await.map_err(failure)? else {
        return Ok(());
    };
    let server = match config {
        None => None,
        Some(config) => match Beside::start(&daemon, config, &args).await {
            Ok(server) => Some(server),
            Err(error) => {
                daemon.stop(std::future::ready(())).await;
                return Err(error.into());
            }
        },
    };
    let mut ready = daemon.ready();
    ready.api = server.as_ref().map(|server| server.url.clone());
    if args.node.ready_json
        && let Ok(line) = serde_json::to_string(&ready)
    {
        // Whoever asked for the line and left does not stop the node.
        let _ = terminal::say(line);
    }
    supervisor::ready();
    let ended = daemon.until_told().await;
    supervisor::stopping();
    let drained = async {
        if let Some(server) = server {
            server.end().await;
        }
    };
    daemon.stop(drained).await;
    ended.map_err(|error| failure(error).into())
}

fn failure(error: DaemonError) -> Failure {
    if error.exit_code() == ExitCode::from(2) {
        Failure::usage(error.to_string())
    } else {
        Failure::new(error.to_string())
    }
}

/// A server that answers beside a node.
struct Beside {
    url: String,
    serving: Arc<Serving>,
    end: Cancel,
    running: JoinHandle<()>,
}

impl Beside {
    async fn start(daemon: &Daemon, config: Config, args: &Args) -> Result<Self, Failure> {
        let member = Member::of_node(daemon.node(), daemon.settings().clone());
        let first = daemon.node().hosted().first();
        let model = first.map(|hosted| hosted.model.to_string());
        let (travel, http) = (args.travel.clone(), &args.http);
        let serving = Serving::new(member, travel, model, http.queue(), http.keep());
        let serving = Arc::new(serving);
        let models = Arc::clone(&serving) as Arc<dyn Models>;
        let bound = Server::bind(config, models).await;
        let server = bound.map_err(|error| explained(error, "--api"))?;
        let (url, end) = (server.url(), Cancel::new());
        tracing::info!(url = format!("{url}/v1"), "answering");
        let told = end.clone();
        let running = tokio::spawn(async move { server.run(told.wait()).await });
        Ok(Self {
            url,
            serving,
            end,
            running,
        })
    }

    /// No new requests; those that run have their moment to end.
    async fn end(self) {
        tracing::info!("stopping: letting answers end");
        self.end.set();
        if let Err(error) = self.running.await {
            tracing::error!(%error, "the HTTP server did not end well");
        }
        self.serving.forget().await;
        self.serving.member.remember();
    }
}
