//! `shoal serve`: the swarm behind OpenAI's HTTP API.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::{Config, Keys, ServeError, Server, Tls};
use node::config::parse_bytes;

use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::run_report::Privacy;
use crate::serving::Serving;
use crate::session_args::SessionArgs;
use crate::swarm::Swarm;
use crate::terminal;

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

    /// A key that every request must have; may be given several times.
    #[arg(
        long,
        env = "SHOAL_API_KEY",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    api_key: Vec<String>,

    /// A file of such keys, one a line.
    #[arg(long, env = "SHOAL_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,

    /// Answer other machines without asking for a key.
    #[arg(long)]
    without_key: bool,

    /// Web pages of this origin may ask, `*` for any; may be given several times.
    #[arg(long, env = "SHOAL_CORS", value_name = "ORIGIN", value_delimiter = ',')]
    cors: Vec<String>,

    /// Serve https, with this certificate (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Longest request.
    #[arg(long, value_name = "SIZE", default_value = "4M", value_parser = parse_bytes)]
    body_limit: u64,

    /// Requests answered at once; more are refused with 429.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    requests: u32,

    /// Tokens of an answer where the request does not say.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,

    /// How long a request waits where every holder of some layers is busy, before it is refused with 429.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=3600))]
    queue: u32,

    /// How long the session of a complete answer is kept for the conversation's next turn, which then computes only
    /// what is new; 0 keeps none. It is its asker's alone, and gives way to whoever needs the room.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(..=500))]
    keep: u32,

    /// How long running answers may go on after Ctrl-C.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=3600))]
    drain: u32,

    /// Print one line of JSON on standard output once requests are answered.
    #[arg(long)]
    ready_json: bool,

    #[command(flatten)]
    session: SessionArgs,

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
    let config = args.config()?;
    let interrupt = Interrupt::listen();
    let joined = args.swarm.join_early(args.session.trusted(), LOG);
    let member = interrupt.or_end(joined).await?;
    let queue = Duration::from_secs(args.queue.into());
    let keep = Duration::from_secs(args.keep.into());
    let serving = Serving::new(
        member,
        args.session.clone(),
        args.model.clone(),
        queue,
        keep,
    );
    let serving = Arc::new(serving);
    let models = Arc::clone(&serving) as Arc<dyn api::Models>;
    let server = Server::bind(config, models).await.map_err(explained)?;
    args.say_ready(&server.url(), api::Models::listed(&*serving).len())?;
    server.run(interrupt.wait()).await;
    serving.forget().await;
    if let Some(serving) = Arc::into_inner(serving) {
        serving.member.leave().await;
    }
    Ok(())
}

impl Args {
    fn config(&self) -> anyhow::Result<Config> {
        let mut keys = Keys::new(&self.api_key);
        if let Some(file) = &self.api_key_file {
            keys.add(keys_of(file)?);
        }
        let tls = self.tls_cert.clone().zip(self.tls_key.clone());
        Ok(Config {
            bind: self.bind,
            without_key: self.without_key,
            keys,
            cors: self.cors.clone(),
            tls: tls.map(|(cert, key)| Tls { cert, key }),
            body_bytes_max: usize::try_from(self.body_limit).unwrap_or(usize::MAX),
            requests_max: self.requests as usize,
            max_tokens: self.max_tokens,
            drain: Duration::from_secs(self.drain.into()),
        })
    }

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

fn keys_of(file: &Path) -> Result<Keys, Failure> {
    let wrong = |why: String| Failure::usage(format!("{}: {why}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    let keys = Keys::of_file(&text);
    if keys.is_empty() {
        return Err(wrong("there is no key in it".into()));
    }
    Ok(keys)
}

fn explained(error: ServeError) -> Failure {
    let cause = error.to_string();
    match error {
        ServeError::Open(_) => Failure::usage(cause)
            .try_this("--api-key-file FILE, or --without-key if everybody may ask"),
        ServeError::Bind { .. } => Failure::new(cause).try_this("--bind with another port"),
        ServeError::Origin(_) | ServeError::Tls { .. } => Failure::usage(cause),
    }
}
