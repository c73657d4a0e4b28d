//! `shoal serve`: the swarm behind OpenAI's HTTP API.

use std::net::SocketAddr;
use std::sync::Arc;

use api::Server;

use crate::api_args::{ApiArgs, explained};
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::run_report::Privacy;
use crate::serving::Serving;
use crate::session_args::SessionArgs;
use crate::swarm::Swarm;
use crate::{supervisor, terminal};

/// Answer HTTP requests as OpenAI's API does, out of the swarm.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal serve
  shoal serve -m llama-1b --bind 127.0.0.1:9000
  shoal serve --bind 0.0.0.0:8080 --api-key-file keys.txt --tls-cert cert.pem --tls-key key.pem
  shoal serve --cors https://chat.example --privacy trusted --allow 12D3KooW...

Then, in any program that speaks to OpenAI, with http://127.0.0.1:8080/v1 as its address:
  curl http://127.0.0.1:8080/v1/models
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"model\": \"demo\", \"stream\": true, \"messages\": [{\"role\": \"user\", \"content\": \"Tell me a story about a fox.\"}]}'

What a request does not say (temperature, top_p, top_k, min_p) is as `shoal run` has it. Every answer says under
x_shoal who computed it and who could read the prompt. Prompts are neither kept nor logged. Ctrl-C lets running
answers go on for some seconds, and frees their sessions on every hop.")]
pub struct Args {
    /// The model for requests that name none: a name, or the beginning of an id.
    #[arg(short, long, env = "SHOAL_MODEL", value_name = "NAME|ID")]
    model: Option<String>,

    /// Where to listen. Other machines can reach it only if you say so here, and then it asks for a key.
    #[arg(
        long,
        env = "SHOAL_BIND",
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:8080"
    )]
    bind: SocketAddr,

    /// Print one line of JSON on standard output once requests are answered.
    #[arg(long)]
    ready_json: bool,

    #[command(flatten)]
    session: SessionArgs,

    #[command(flatten)]
    api: ApiArgs,

    #[command(flatten)]
    swarm: Swarm,
}

/// What this process logs where nobody says.
const LOG: &str = "api=info,warn";

/// Serves until Ctrl-C.
pub fn main(args: Args) -> anyhow::Result<()> {
    if args.session.privacy == Some(Privacy::Local) || args.session.local_fallback.is_some() {
        return Err(
            Failure::usage("`shoal serve` answers out of the swarm, not in this process")
                .try_this("`shoal node --model NAME` beside it: a swarm of one machine")
                .into(),
        );
    }
    node::runtime::run(serve(args))?
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let config = args.api.config(args.bind)?;
    let interrupt = Interrupt::listen();
    let joined = args.swarm.join_early(args.session.trusted(), LOG);
    let member = interrupt.or_end(joined).await?;
    let travel = args.session.travel.clone();
    let (model, http) = (args.model.clone(), &args.api);
    let serving = Serving::new(member, travel, model, http.queue(), http.keep());
    let serving = Arc::new(serving);
    let models = Arc::clone(&serving) as Arc<dyn api::Models>;
    let bound = Server::bind(config, models).await;
    let server = bound.map_err(|error| explained(error, "--bind"))?;
    args.say_ready(&server.url(), api::Models::listed(&*serving).len())?;
    supervisor::ready();
    let told = async {
        interrupt.wait().await;
        supervisor::stopping();
    };
    server.run(told).await;
    serving.forget().await;
    if let Some(serving) = Arc::into_inner(serving) {
        serving.member.leave().await;
    }
    Ok(())
}

impl Args {
    fn say_ready(&self, url: &str, models: usize) -> anyhow::Result<()> {
        if self.ready_json {
            terminal::say_json_line(&serde_json::json!({ "url": url }))?;
        }
        let there = match models {
            0 => " · no model is whole in the swarm yet; requests get 503 until one is",
            _ => "",
        };
        terminal::note(format!("answering at {url}/v1{there}"));
        Ok(())
    }
}
