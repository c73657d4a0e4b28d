//! A server's view, over HTTP. Blocks.

use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::failure::Failure;
use crate::figures::printable;

/// The view of a swarm of thousands is a few megabytes.
const ANSWER_BYTES_MAX: u64 = 32 << 20;
/// A server that is there answers at once; looking at a peer may have to fetch what describes a model.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A server that is asked.
#[derive(Clone)]
pub struct Server {
    /// Where, without a slash at the end.
    pub url: String,
    key: Option<String>,
    agent: Agent,
}

impl Server {
    /// The server at `url`, asked with `key`.
    ///
    /// # Errors
    /// That is no address.
    pub fn new(url: &str, key: Option<&str>) -> Result<Self, Failure> {
        Self::with_timeout(url, key, TIMEOUT)
    }

    /// The same, which must answer within `limit`.
    ///
    /// # Errors
    /// As there.
    pub fn with_timeout(url: &str, key: Option<&str>, limit: Duration) -> Result<Self, Failure> {
        let url = url.trim().trim_end_matches('/');
        let url = url.strip_suffix("/v1").unwrap_or(url);
        if !url.starts_with("http://") && !url.starts_with("https://") {
            let wrong = format!("`{}` is not the address of a server", printable(url, 120));
            return Err(Failure::usage(wrong).try_this("for example --url http://127.0.0.1:8080"));
        }
        // Of several keys that a server may have, each will do.
        let key = key.and_then(|keys| keys.split(',').next());
        Ok(Self {
            url: url.to_owned(),
            key: key.map(|key| key.trim().to_owned()),
            agent: agent(url.starts_with("https://"), limit),
        })
    }

    /// What is at `path`.
    ///
    /// # Errors
    /// The server is not there, refuses, or says something else.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = request.call().map_err(|error| self.silent(&error))?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX);
        let text = body.read_to_string().map_err(|error| self.silent(&error))?;
        match status {
            200 => serde_json::from_str(&text).map_err(|_| self.other()),
            401 => Err(Failure::new(format!("{} asks for a key", self.url))
                .try_this("--api-key KEY, one of those it was started with")),
            _ => Err(Failure::new(refusal(&text).unwrap_or_else(|| {
                format!("{} answered with status {status}", self.url)
            }))),
        }
    }

    fn silent(&self, error: &ureq::Error) -> Failure {
        Failure::new(format!("{} does not answer: {error}", self.url))
            .try_this("`shoal serve` there, or without --url to look from here")
    }

    fn other(&self) -> Failure {
        Failure::new(format!(
            "what answers at {} is no `shoal serve` of this version",
            self.url
        ))
        .try_this("the same version on both sides: `shoal --version`")
    }
}

/// What a server says of an error.
fn refusal(text: &str) -> Option<String> {
    let said: serde_json::Value = serde_json::from_str(text).ok()?;
    Some(printable(said["error"]["message"].as_str()?, 300))
}

fn agent(tls: bool, limit: Duration) -> Agent {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .timeout_global(Some(limit))
        .user_agent(concat!("shoal/", env!("CARGO_PKG_VERSION")));
    if tls {
        let found = rustls_native_certs::load_native_certs().certs;
        let roots = found
            .iter()
            .map(|der| Certificate::from_der(der.as_ref()).to_owned());
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::Specific(Arc::new(roots.collect())))
            .unversioned_rustls_crypto_provider(Arc::new(provider))
            .build();
        config = config.tls_config(tls);
    }
    config.build().new_agent()
}
