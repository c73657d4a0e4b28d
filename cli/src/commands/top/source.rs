//! Where the view comes from: a server that is asked, or this process as a member of the swarm.

use std::net::SocketAddr;
use std::time::Duration;

use api::swarm::{LiveView, NodeView, PeerDetail, SwarmView, WhyView};
use node::SessionSpec;
use swarm_proto::Peer;

use super::server::Server;
use crate::failure::Failure;
use crate::figures::printable;
use crate::serving::{CTX_EXPLAINED, node_of};
use crate::swarm::{Member, Swarm};

/// Where `shoal serve` listens when nobody says.
const USUAL: &str = "127.0.0.1:8080";
/// A server of this machine answers within that, or is not there.
const NEARBY_TIMEOUT: Duration = Duration::from_millis(500);
/// What this process logs: a picture is on the screen.
const LOG: &str = "off";

/// Where the view comes from.
pub enum Source {
    /// A server.
    Server(Server),
    /// This process.
    Member(Box<Member>),
}

impl Source {
    /// The server at `url`; else one of this swarm on this machine; else this process joins the swarm.
    ///
    /// # Errors
    /// The server cannot be asked, or the swarm not be joined.
    pub async fn choose(
        url: Option<&str>,
        key: Option<&str>,
        swarm: &Swarm,
    ) -> anyhow::Result<Self> {
        if let Some(url) = url {
            let source = Self::Server(Server::new(url, key)?);
            // What is wrong with it is said before the screen is taken.
            source.view().await?;
            return Ok(source);
        }
        let id = swarm.settings(false)?.swarm.to_string();
        match nearby(&id).await {
            Some(server) => Ok(Self::Server(server)),
            None => Ok(Self::Member(Box::new(swarm.join_early(false, LOG).await?))),
        }
    }

    /// Who sees what is shown.
    pub fn name(&self) -> String {
        match self {
            Self::Server(server) => format!("as {} sees it", printable(&server.url, 60)),
            Self::Member(_) => "as seen from here".into(),
        }
    }

    /// Whether requests are in the view.
    pub fn sees_requests(&self) -> bool {
        matches!(self, Self::Server(_))
    }

    /// The swarm now.
    ///
    /// # Errors
    /// The server does not say.
    pub async fn view(&self) -> anyhow::Result<SwarmView> {
        match self {
            Self::Server(server) => {
                let server = server.clone();
                let asked = tokio::task::spawn_blocking(move || server.get("/swarm"));
                Ok(asked.await??)
            }
            Self::Member(member) => {
                let mut view = SwarmView::of(&member.client);
                let status = node_of(member.settings.home.clone()).await;
                view.live = LiveView {
                    at_ms: crate::swarm::now_ms(),
                    node: status.as_ref().map(NodeView::from),
                    ..LiveView::default()
                };
                Ok(view)
            }
        }
    }

    /// One peer, and why it is or is not used for a model.
    ///
    /// # Errors
    /// It is not known.
    pub async fn peer(&self, peer: &str, model: &str) -> anyhow::Result<PeerDetail> {
        match self {
            Self::Server(server) => {
                let server = server.clone();
                let plain = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric());
                if !plain(peer) || !plain(model) {
                    return Err(Failure::new("the server names a peer that cannot be").into());
                }
                let path = format!("/swarm/peers/{peer}/{model}");
                let asked = tokio::task::spawn_blocking(move || server.get(&path));
                Ok(asked.await??)
            }
            Self::Member(member) => {
                let id: Peer = peer.parse()?;
                let client = &member.client;
                let mut detail = PeerDetail::of(client, &id)?;
                let why = async {
                    let model = member.model_quietly(Some(model)).await?;
                    let n_ctx = CTX_EXPLAINED.min(model.n_ctx_max);
                    let spec = SessionSpec::new(model.id, &model.manifest, n_ctx);
                    anyhow::Ok(WhyView::of(client, &spec, &id))
                };
                let unknown = |error: anyhow::Error| WhyView {
                    text: printable(&format!("{error:#}"), 300),
                    ..WhyView::default()
                };
                detail.why = Some(why.await.unwrap_or_else(unknown));
                Ok(detail)
            }
        }
    }

    /// Leaves the swarm, where it was joined.
    pub async fn leave(self) {
        if let Self::Member(member) = self {
            member.leave().await;
        }
    }
}

/// A server of this swarm on this machine that asks for no key.
async fn nearby(swarm: &str) -> Option<Server> {
    let bind = std::env::var("SHOAL_BIND").unwrap_or_else(|_| USUAL.into());
    let addr: SocketAddr = bind.parse().ok()?;
    if !addr.ip().is_loopback() || addr.port() == 0 {
        return None;
    }
    let url = format!("http://{addr}");
    let quick = Server::with_timeout(&url, None, NEARBY_TIMEOUT).ok()?;
    let asked = tokio::task::spawn_blocking(move || quick.get::<SwarmView>("/swarm"));
    let view = asked.await.ok()?.ok()?;
    (view.swarm == swarm).then(|| Server::new(&url, None).ok())?
}
