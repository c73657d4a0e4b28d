//! The owner's word to a running node: a Unix socket in its home, one line of JSON each way.
//!
//! ```text
//! shoal node status|pause|resume ─▶ $home/node.sock ─▶ Shared ─▶ NodeStatus
//!                                                        └─▶ Pause ─▶ sessions, transfer, advert
//! ```
//! Only the owner can open the socket (mode 0600), so whoever speaks on it is believed. All the same, connections,
//! bytes and time are bounded: a program of theirs may hang. It reads what the parts of the node say of themselves,
//! and changes nothing but the pause.

mod ask;
mod status;

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use swarm_proto::Peer;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::JoinHandle,
    time::timeout,
};

use crate::{
    hosting::Board,
    metrics::{Facts, Metrics, ServingMetrics},
    net::Net,
    pause::Pause,
    quiet_hours::QuietHours,
    session::Sessions,
    transfer::Transfer,
};

pub use ask::{AskError, ask};
pub use status::{
    ExpertStatus, ExpertsStatus, HolderStatus, IslandStatus, ModelStatus, NodeStatus, ShardStatus,
    State, TransferStatus,
};

/// The socket's name in the home.
pub const SOCKET: &str = "node.sock";
/// Longest request: an object of a few words.
const REQUEST_BYTES_MAX: u64 = 4 * 1024;
/// Longest answer: a model of experts has thousands of shards, 300 bytes each.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// Who may be answered at once; more wait in the system's own queue.
const CONNECTIONS_MAX: usize = 8;
/// How long one may take to ask, and to read.
const DEADLINE: Duration = Duration::from_secs(5);

/// What the owner wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// To know how things are.
    Status,
    /// Nothing more for others.
    Pause {
        /// For so many seconds; none: until told otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        for_s: Option<u64>,
    },
    /// To serve again.
    Resume,
}

/// What the node says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    /// How things are, after what was asked for.
    Status(Box<NodeStatus>),
    /// Why not.
    Refused(String),
}

/// The node's side. The socket goes when this is dropped.
pub(crate) struct Control {
    shared: Arc<Shared>,
    /// The socket and what listens on it; none where it could not be made.
    open: Option<(PathBuf, JoinHandle<()>)>,
    clock: JoinHandle<()>,
}

struct Shared {
    peer: Peer,
    home: PathBuf,
    started: Instant,
    pause: Pause,
    parts: Mutex<Parts>,
}

/// What there is by now.
#[derive(Default)]
struct Parts {
    net: Option<Net>,
    transfer: Option<Transfer>,
    serving: Option<(Sessions, Board)>,
}

impl Control {
    /// Listens in this home, whose lock the caller holds: what lies there in the socket's place is a dead node's. A
    /// home where no socket can be made does without.
    pub(crate) fn open(home: &Path, peer: Peer, quiet: QuietHours) -> Self {
        let pause = Pause::load(home, quiet);
        if let Some(paused) = pause.now() {
            tracing::warn!(why = ?paused.why, until = ?paused.until, "paused: `shoal node resume` ends it");
        }
        let shared = Arc::new(Shared {
            peer,
            home: home.to_owned(),
            started: Instant::now(),
            pause: pause.clone(),
            parts: Mutex::default(),
        });
        let path = home.join(SOCKET);
        let open = match listen(home, &path) {
            Ok(listener) => Some((path, tokio::spawn(serve(listener, shared.clone())))),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no control socket: `shoal node status` cannot ask this node");
                None
            }
        };
        let clock = tokio::spawn(pause.keep());
        Self {
            shared,
            open,
            clock,
        }
    }

    /// Whether the node is paused, for those who ask by themselves.
    pub(crate) fn pause(&self) -> &Pause {
        &self.shared.pause
    }

    /// Shows what the node does among what the process counts, as far as its parts are there.
    pub(crate) fn counts(&self, metrics: &Metrics) {
        let shared = Arc::downgrade(&self.shared);
        let facts = ServingMetrics::new(move || shared.upgrade().map(|shared| shared.facts()));
        metrics.register(|registry| registry.register_collector(Box::new(facts)));
    }

    /// The network is there.
    pub(crate) fn knows(&self, net: &Net, transfer: &Transfer) {
        let mut parts = self.parts();
        parts.net = Some(net.clone());
        parts.transfer = Some(transfer.clone());
    }

    /// What a pause means for each part of the node, for as long as it runs: no new sessions, no shards for others,
    /// an advert that says so, and sessions that run go on elsewhere, where others serve their layers. Layers stay
    /// loaded. Sessions are taken from now on.
    pub(crate) fn serves(
        &self,
        sessions: &Sessions,
        transfer: &Transfer,
        board: &Board,
    ) -> JoinHandle<()> {
        self.parts().serving = Some((sessions.clone(), board.clone()));
        let (sessions, transfer, board) = (sessions.clone(), transfer.clone(), board.clone());
        let mut changes = self.shared.pause.changes();
        tokio::spawn(async move {
            loop {
                let paused = *changes.borrow_and_update();
                sessions.pause(paused.is_some());
                transfer.pause(paused.is_some());
                board.publish().await;
                if paused.is_some() {
                    let handed_over = board.hand_over(&sessions);
                    tracing::info!(handed_over, "sessions go on elsewhere");
                }
                if changes.changed().await.is_err() {
                    return;
                }
                match *changes.borrow() {
                    Some(paused) => {
                        tracing::info!(why = ?paused.why, until = ?paused.until, "paused")
                    }
                    None => tracing::info!("serving again"),
                }
            }
        })
    }

    fn parts(&self) -> std::sync::MutexGuard<'_, Parts> {
        let parts = &self.shared.parts;
        parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.clock.abort();
        if let Some((path, serving)) = &self.open {
            serving.abort();
            // Who asks a socket that is left hears that no node runs.
            let _ = fs::remove_file(path);
        }
    }
}

/// Makes the socket in a folder that nobody else may enter, and moves it to its place: it is never there with other
/// permissions, and what was there is replaced at once.
fn listen(home: &Path, path: &Path) -> io::Result<UnixListener> {
    // Not longer than the socket's own name: the path of one is bounded by the system.
    let folder = tempfile::Builder::new()
        .prefix(".")
        .rand_bytes(5)
        .tempdir_in(home)?;
    let made = folder.path().join("s");
    let listener = UnixListener::bind(&made)?;
    fs::set_permissions(&made, Permissions::from_mode(0o600))?;
    fs::rename(&made, path)?;
    Ok(listener)
}

async fn serve(listener: UnixListener, shared: Arc<Shared>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors: others let go of theirs.
                tracing::debug!(%error, "a connection to the control socket failed");
                tokio::time::sleep(DEADLINE).await;
                continue;
            }
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            if let Err(error) = shared.answer(stream).await {
                tracing::debug!(%error, "a question on the control socket was not answered");
            }
            drop(place);
        });
    }
}

impl Shared {
    fn facts(&self) -> Facts {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let (sessions, board) = parts.serving.clone().unzip();
        let board: Option<Board> = board;
        Facts {
            paused: self.pause.now().is_some(),
            transfer: parts.transfer.clone(),
            sessions,
            models: board.map(|board| board.models()).unwrap_or_default(),
        }
    }

    async fn answer(&self, stream: UnixStream) -> io::Result<()> {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        let asked = (&mut stream).take(REQUEST_BYTES_MAX);
        tokio::pin!(asked);
        timeout(DEADLINE, asked.read_until(b'\n', &mut line)).await??;
        let mut answer = match serde_json::from_slice(&line) {
            Ok(request) => self.act(request).await,
            Err(error) => Answer::Refused(format!("not a request that is known: {error}")),
        };
        let mut line = serde_json::to_vec(&answer)?;
        if line.len() as u64 >= ANSWER_BYTES_MAX {
            answer = Answer::Refused("there is more to say than an answer holds".into());
            line = serde_json::to_vec(&answer)?;
        }
        line.push(b'\n');
        timeout(DEADLINE, stream.write_all(&line)).await?
    }

    async fn act(&self, request: Request) -> Answer {
        let done = match request {
            Request::Status => Ok(()),
            Request::Pause { for_s } => self.pause.pause(for_s.map(Duration::from_secs)),
            Request::Resume => self.pause.resume(),
        };
        if let Err(error) = done {
            let home = self.home.display();
            return Answer::Refused(format!("it cannot be written down in {home}: {error}"));
        }
        match self.status().await {
            Ok(status) => Answer::Status(Box::new(status)),
            Err(error) => Answer::Refused(format!("internal: {error}")),
        }
    }
}

#[cfg(test)]
mod tests;
