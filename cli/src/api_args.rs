//! Flags that `shoal serve` and a node with `--api` share: who may ask the HTTP server, and how much.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::{Config, Keys, ServeError, Tls};
use node::config::{parse_bool, parse_bytes};

use crate::failure::Failure;

/// Keys, TLS, limits.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "HTTP API")]
pub struct ApiArgs {
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
    #[arg(long, env = "SHOAL_WITHOUT_KEY", value_parser = parse_bool)]
    without_key: bool,

    /// Web pages of this origin may ask, `*` for any; may be given several times.
    #[arg(long, env = "SHOAL_CORS", value_name = "ORIGIN", value_delimiter = ',')]
    cors: Vec<String>,

    /// Serve https, with this certificate (PEM).
    #[arg(
        long,
        env = "SHOAL_TLS_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    tls_cert: Option<PathBuf>,

    /// The certificate's private key (PEM).
    #[arg(
        long,
        env = "SHOAL_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_key: Option<PathBuf>,

    /// Longest request.
    #[arg(long, env = "SHOAL_BODY_LIMIT", value_name = "SIZE", default_value = "4M", value_parser = parse_bytes)]
    body_limit: u64,

    /// Requests answered at once; more are refused with 429.
    #[arg(long, env = "SHOAL_REQUESTS", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    requests: u32,

    /// Tokens of an answer where the request does not say.
    #[arg(long, env = "SHOAL_MAX_TOKENS", value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,

    /// How long a request waits where every holder of some layers is busy, before it is refused with 429.
    #[arg(long, env = "SHOAL_QUEUE", value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=3600))]
    queue: u32,

    /// How long the session of a complete answer is kept for the conversation's next turn, which then computes only
    /// what is new; 0 keeps none. It is its asker's alone, and gives way to whoever needs the room.
    #[arg(long, env = "SHOAL_KEEP", value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(..=500))]
    keep: u32,

    /// How long running answers may go on after Ctrl-C.
    #[arg(long, env = "SHOAL_DRAIN", value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=3600))]
    drain: u32,
}

impl ApiArgs {
    /// How to serve at an address.
    pub fn config(&self, bind: SocketAddr) -> anyhow::Result<Config> {
        let mut keys = Keys::new(&self.api_key);
        if let Some(file) = &self.api_key_file {
            keys.add(keys_of(file)?);
        }
        let tls = self.tls_cert.clone().zip(self.tls_key.clone());
        Ok(Config {
            bind,
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

    /// How long a request waits for a place.
    pub fn queue(&self) -> Duration {
        Duration::from_secs(self.queue.into())
    }

    /// How long sessions are kept for a next turn.
    pub fn keep(&self) -> Duration {
        Duration::from_secs(self.keep.into())
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

/// Why there is no server, with what to do; `flag` says where to listen.
pub fn explained(error: ServeError, flag: &str) -> Failure {
    let cause = error.to_string();
    match error {
        ServeError::Open(_) => Failure::usage(cause)
            .try_this("--api-key-file FILE, or --without-key if everybody may ask"),
        ServeError::Bind { .. } => {
            Failure::new(cause).try_this(format!("{flag} with another port"))
        }
        ServeError::Origin(_) | ServeError::Tls { .. } => Failure::usage(cause),
    }
}
