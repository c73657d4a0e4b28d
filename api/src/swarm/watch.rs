//! `GET /swarm`, `/swarm/peers/ID`, `/swarm/peers/ID/MODEL` and `/swarm/events`: what there is to see, once or as it changes.
//!
//! Nothing is looked at while nobody looks; however many do, it is looked at once a second.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::HeaderMap;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use axum::middleware::{Next, from_fn};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream;
use node::control::NodeStatus;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::live::Live;
use super::node_view::NodeView;
use super::page;
use super::peer::PeerDetail;
use super::view::SwarmView;
use crate::error::ApiError;
use crate::state::State as Shared;

/// How often something is said.
const PERIOD: Duration = Duration::from_secs(1);
/// What was made so short ago is as good as new.
const FRESH: Duration = Duration::from_millis(900);
/// Who may watch at once: each keeps a connection, and costs what is sent to it.
const WATCHERS_MAX: usize = 16;
/// All of a large swarm is sent more seldom: so many bytes a second to each who looks.
const BYTES_S_MAX: usize = 64 << 10;
/// How long the node of this home may take to say how it is, before what it said last has to do.
const NODE_TIMEOUT: Duration = Duration::from_millis(500);
/// How often it is asked: it has to look at its disk.
const NODE_PERIOD: Duration = Duration::from_secs(2);
/// One that did not answer is not asked again for so long.
const NODE_PAUSE: Duration = Duration::from_secs(10);
/// How long looking at a peer may take: it plans a route, and may have to fetch what describes the model.
const PEER_TIMEOUT: Duration = Duration::from_secs(15);
/// Peers that are looked at at once: planning takes a core.
const PEERS_MAX: usize = 2;

/// What can be seen of the swarm from here; a part of [`crate::Models`].
pub trait Seeing: Send + Sync + 'static {
    /// The swarm as this process sees it; what runs is added to it.
    fn swarm(&self) -> SwarmView;

    /// A peer, and why it is or is not used for a model: by name or id, none for the one that is meant then.
    fn peer<'a>(
        &'a self,
        peer: &'a str,
        model: Option<&'a str>,
    ) -> BoxFuture<'a, Result<PeerDetail, ApiError>>;

    /// The node that runs in the same home, where one does.
    fn node(&self) -> BoxFuture<'_, Option<NodeStatus>>;
}

/// What those who look share.
pub struct Watch {
    /// What runs.
    pub live: Live,
    watchers: Arc<Semaphore>,
    looking: Semaphore,
    frame: tokio::sync::Mutex<Option<(Instant, Frame)>>,
    node: tokio::sync::Mutex<Node>,
}

/// What is said of one moment.
#[derive(Clone)]
struct Frame {
    /// Everything.
    all: Arc<str>,
    /// What runs.
    live: Arc<str>,
}

#[derive(Default)]
struct Node {
    view: Option<NodeView>,
    not_before: Option<Instant>,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            live: Live::default(),
            watchers: Arc::new(Semaphore::new(WATCHERS_MAX)),
            looking: Semaphore::new(PEERS_MAX),
            frame: Default::default(),
            node: Default::default(),
        }
    }
}

/// The page and what it asks for.
pub fn routes() -> Router<Arc<Shared>> {
    let data = Router::new()
        .route("/swarm", get(swarm))
        .route("/swarm/events", get(events))
        .route("/swarm/peers/{peer}", get(peer))
        .route("/swarm/peers/{peer}/{*model}", get(peer_for))
        .layer(from_fn(own_pages));
    data.merge(page::routes())
}

/// A page of somebody else cannot read what is here, but could hold all places of those who look.
async fn own_pages(request: Request, next: Next) -> Result<Response, ApiError> {
    if is_foreign(request.headers()) {
        return Err(ApiError::foreign_page());
    }
    Ok(next.run(request).await)
}

/// Who asks by the rules for foreign pages is let in or not by those.
fn is_foreign(headers: &HeaderMap) -> bool {
    let said = |name: &str| headers.get(name).and_then(|it| it.to_str().ok());
    said("sec-fetch-site") == Some("cross-site") && said("sec-fetch-mode") != Some("cors")
}

async fn swarm(State(state): State<Arc<Shared>>) -> Response {
    let frame = state.frame().await;
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (headers, frame.all.to_string()).into_response()
}

async fn peer(
    State(state): State<Arc<Shared>>,
    Path(peer): Path<String>,
) -> Result<Response, ApiError> {
    looked_at(&state, &peer, None).await
}

async fn peer_for(
    State(state): State<Arc<Shared>>,
    Path((peer, model)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    looked_at(&state, &peer, Some(&model)).await
}

async fn looked_at(state: &Shared, peer: &str, model: Option<&str>) -> Result<Response, ApiError> {
    let look = async {
        // Never closed.
        let _one_of_few = state.watch.looking.acquire().await;
        state.models.peer(peer, model).await
    };
    let looked = timeout(PEER_TIMEOUT, look).await;
    let detail = looked.map_err(|_| ApiError::unavailable("looking at that peer took too long"))?;
    let headers = [(CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    Ok((headers, axum::Json(detail?)).into_response())
}

/// The swarm now, then what runs once a second, and all of it again as often as its size allows.
async fn events(
    State(state): State<Arc<Shared>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let places = Arc::clone(&state.watch.watchers);
    let place = places.try_acquire_owned();
    let place = place.map_err(|_| ApiError::too_many_watchers(WATCHERS_MAX))?;
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let watcher = Watcher {
        state,
        ticks,
        next_whole: Instant::now(),
        _place: place,
    };
    tracing::debug!(agent = ?headers.get("user-agent"), "somebody looks");
    let said = stream::unfold(watcher, async |mut watcher| {
        let event = watcher.next().await?;
        Some((Ok::<Event, Infallible>(event), watcher))
    });
    let mut response = Sse::new(said.boxed()).into_response();
    let no_store = HeaderValue::from_static("no-store");
    response.headers_mut().insert(CACHE_CONTROL, no_store);
    Ok(response)
}

struct Watcher {
    state: Arc<Shared>,
    ticks: tokio::time::Interval,
    /// When all of the swarm is said again.
    next_whole: Instant,
    _place: OwnedSemaphorePermit,
}

impl Watcher {
    /// None when this server ends.
    async fn next(&mut self) -> Option<Event> {
        tokio::select! {
            biased;
            () = self.state.closing.wait() => return None,
            _ = self.ticks.tick() => {}
        }
        let frame = self.state.frame().await;
        if Instant::now() < self.next_whole {
            return Some(Event::default().event("live").data(&*frame.live));
        }
        let wait = frame.all.len() as f64 / BYTES_S_MAX as f64;
        self.next_whole = Instant::now() + Duration::from_secs_f64(wait);
        Some(Event::default().event("swarm").data(&*frame.all))
    }
}

impl Shared {
    /// How things are, made anew if the last look is some time ago.
    async fn frame(&self) -> Frame {
        let mut last = self.watch.frame.lock().await;
        if let Some((at, frame)) = &*last
            && at.elapsed() < FRESH
        {
            return frame.clone();
        }
        // Before the node is asked, which may take a while: who looks a second later gets another one.
        let begin = Instant::now();
        let live = self.watch.live.view(self.node().await);
        let mut all = self.models.swarm();
        let said = serde_json::to_string(&live).unwrap_or_default();
        all.live = live;
        let frame = Frame {
            all: serde_json::to_string(&all).unwrap_or_default().into(),
            live: said.into(),
        };
        *last = Some((begin, frame.clone()));
        frame
    }

    async fn node(&self) -> Option<NodeView> {
        let mut node = self.watch.node.lock().await;
        if node.not_before.is_some_and(|then| Instant::now() < then) {
            return node.view.clone();
        }
        match timeout(NODE_TIMEOUT, self.models.node()).await {
            Ok(status) => {
                node.view = status.as_ref().map(NodeView::from);
                node.not_before = Some(Instant::now() + NODE_PERIOD);
            }
            Err(_) => node.not_before = Some(Instant::now() + NODE_PAUSE),
        }
        node.view.clone()
    }
}
