//! Requests: who may be asked how, who gets the token, and how redirects are followed.
//!
//! Redirects are followed by hand. The token goes to the hub's own origin (scheme, host and port) and to
//! nobody that it sends us to; nothing leads from https to http.

use std::time::Duration;

use ureq::{
    Agent, Body,
    http::{HeaderMap, Response},
};
use url::{Host, Url};

use crate::{DownloadError, Settings, roots::system_tls, source::shown};

/// Finding a host, connecting, the TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Redirects in a row.
const REDIRECTS_MAX: usize = 10;
/// Largest answer that is not a file: the list of a large repository.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// A client of servers.
pub(crate) struct Http<'a> {
    agent: Agent,
    settings: &'a Settings,
    /// Why no certificate can be checked, where that is so.
    no_roots: Option<String>,
}

/// How far redirects are followed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Follow {
    /// To anybody.
    Anywhere,
    /// While they stay with the server that was asked; one that leads elsewhere is the answer.
    Home,
}

/// An answer to a request.
pub(crate) struct Reply {
    pub(crate) response: Response<Body>,
    /// Who gave it in the end.
    pub(crate) url: Url,
}

impl Reply {
    pub(crate) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(self.response.headers(), name)
    }

    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        self.header(name)?.trim().parse().ok()
    }

    /// The error that its status is.
    pub(crate) fn refusal(&self) -> DownloadError {
        DownloadError::Status {
            url: shown(self.url.as_str()),
            status: self.status(),
        }
    }

    /// The server did something that it should not.
    pub(crate) fn wrong(&self, why: impl Into<String>) -> DownloadError {
        DownloadError::Server {
            url: shown(self.url.as_str()),
            why: why.into(),
        }
    }

    /// A small answer as text.
    pub(crate) fn text(mut self) -> Result<String, DownloadError> {
        let body = self.response.body_mut().with_config();
        let text = body.limit(ANSWER_BYTES_MAX).read_to_string();
        text.map_err(|e| broken(&self.url, &e))
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

impl<'a> Http<'a> {
    pub(crate) fn new(settings: &'a Settings) -> Http<'a> {
        let tls = system_tls();
        let config = Agent::config_builder()
            .tls_config(tls.config)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_send_request(Some(settings.silence))
            .timeout_recv_response(Some(settings.silence))
            .timeout_per_read(Some(settings.silence))
            .timeout_per_write(Some(settings.silence))
            .user_agent(concat!("shoal/", env!("CARGO_PKG_VERSION")))
            // The bytes of a file, not of a packed one: ranges and lengths are of these.
            .accept_encoding("identity")
            .build();
        Http {
            agent: config.new_agent(),
            settings,
            no_roots: tls.no_roots,
        }
    }

    /// The headers of what is at `url`.
    pub(crate) fn head(&self, url: &Url, follow: Follow) -> Result<Reply, DownloadError> {
        self.ask(true, url, &[], follow)
    }

    /// What is at `url`.
    pub(crate) fn get(
        &self,
        url: &Url,
        headers: &[(&str, String)],
    ) -> Result<Reply, DownloadError> {
        self.ask(false, url, headers, Follow::Anywhere)
    }

    fn ask(
        &self,
        head: bool,
        url: &Url,
        headers: &[(&str, String)],
        follow: Follow,
    ) -> Result<Reply, DownloadError> {
        let mut url = url.clone();
        for _ in 0..=REDIRECTS_MAX {
            let response = self.once(head, &url, headers)?;
            let reply = Reply { response, url };
            let next = match reply.status() {
                301 | 302 | 303 | 307 | 308 => reply.header("location"),
                _ => None,
            };
            let Some(next) = next.and_then(|next| reply.url.join(next).ok()) else {
                return Ok(reply);
            };
            if follow == Follow::Home && next.origin() != reply.url.origin() {
                return Ok(reply);
            }
            if reply.url.scheme() == "https" && next.scheme() != "https" {
                return Err(DownloadError::Insecure {
                    url: shown(next.as_str()),
                });
            }
            url = next;
        }
        Err(DownloadError::Server {
            url: shown(url.as_str()),
            why: format!("more than {REDIRECTS_MAX} redirects"),
        })
    }

    fn once(
        &self,
        head: bool,
        url: &Url,
        headers: &[(&str, String)],
    ) -> Result<Response<Body>, DownloadError> {
        self.may_ask(url)?;
        let mut request = if head {
            self.agent.head(url.as_str())
        } else {
            self.agent.get(url.as_str())
        };
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let token = self.token_for(url);
        if let Some(token) = token {
            request = request.header("authorization", token);
        }
        request.call().map_err(|e| broken(url, &e))
    }

    /// The token belongs to the hub.
    fn token_for(&self, url: &Url) -> Option<String> {
        let hub = url.origin() == self.settings.endpoint.origin();
        let token = self.settings.token.as_ref().filter(|_| hub)?;
        Some(token.header())
    }

    fn may_ask(&self, url: &Url) -> Result<(), DownloadError> {
        match (url.scheme(), &self.no_roots) {
            ("https", None) => Ok(()),
            ("https", Some(why)) => Err(DownloadError::NoRoots { why: why.clone() }),
            ("http", _) if is_this_machine(url) => Ok(()),
            _ => Err(DownloadError::Insecure {
                url: shown(url.as_str()),
            }),
        }
    }
}

fn is_this_machine(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// What went wrong on the way to a server or from it.
pub(crate) fn broken(url: &Url, error: &ureq::Error) -> DownloadError {
    let host = url.host_str().unwrap_or_default();
    let host = match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    if let ureq::Error::Io(_) | ureq::Error::Rustls(_) = error {
        let why = error.to_string();
        if why.contains("certificate") {
            return DownloadError::Certificate { host, why };
        }
    }
    let why = match error {
        ureq::Error::HostNotFound => "no such host is known here".into(),
        ureq::Error::Timeout(what) => format!("no answer in time ({what})"),
        other => other.to_string(),
    };
    DownloadError::Unreachable { host, why }
}
