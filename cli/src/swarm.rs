//! Joining the swarm as a client: settings, the first adverts, and the model that is meant.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::Vocab;
use node::config::{Settings, SwarmArgs};
use node::metrics::Metrics;
use node::telemetry::{self, Telemetry, TelemetryConfig};
use node::{
    Access, Client, Event, Identity, KnownPeers, NetConfig, OpenError, PeerBook, Privacy, Session,
    SessionSpec, SwarmNode,
};
use shard_registry::{Manifest, Resolved};
use swarm_proto::{Dtype, LayerRange, ModelId, Numerics};
use tracing::Instrument;

use crate::choose_model::choose;
use crate::failure::Failure;
use crate::swarm_report::{ModelReport, SwarmReport};
use crate::{figures, local_models, terminal, tokens};

/// Which swarm, as whom, and whom to trust.
#[derive(clap::Args, Clone, Debug)]
pub struct Swarm {
    #[command(flatten)]
    args: SwarmArgs,
}

impl Swarm {
    /// Flags given by the program itself, for benches.
    pub fn of(args: SwarmArgs) -> Self {
        Self { args }
    }

    /// The flags as given.
    pub fn args(&self) -> &SwarmArgs {
        &self.args
    }

    /// All sources of settings, merged.
    pub fn settings(&self, trusted: bool) -> anyhow::Result<Settings> {
        let mut args = self.args.clone();
        args.trusted |= trusted;
        Ok(args.resolve()?)
    }

    /// The home directory alone.
    pub fn home(&self) -> anyhow::Result<PathBuf> {
        Ok(self.args.home_dir()?)
    }

    /// Connects, asks for the adverts and leaves: for commands that only look.
    pub fn report(&self) -> anyhow::Result<SwarmReport> {
        let swarm = self.clone();
        node::runtime::run(async move {
            let member = swarm.join(false).await?;
            let report = member.report();
            member.leave().await;
            Ok(report)
        })?
    }

    /// Sets logging up for this process, connects and waits, a bounded time, for the first adverts.
    pub async fn join(&self, trusted: bool) -> anyhow::Result<Member> {
        let settings = self.settings(trusted)?;
        let telemetry = Self::telemetry(&settings, LOG_DEFAULT)?;
        let member = Self::connect(settings, telemetry).await?;
        member.or_alone().await
    }

    /// The same where nobody may be there yet, for who waits for them.
    pub async fn join_early(&self, trusted: bool, log: &str) -> anyhow::Result<Member> {
        let settings = self.settings(trusted)?;
        let telemetry = Self::telemetry(&settings, log)?;
        Self::connect(settings, telemetry).await
    }

    /// Connects without logging: a measurement joins several swarms of its own making.
    pub async fn join_quietly(&self) -> anyhow::Result<Member> {
        let member = Self::connect(self.settings(false)?, Telemetry::default()).await?;
        member.or_alone().await
    }

    fn telemetry(settings: &Settings, log: &str) -> anyhow::Result<Telemetry> {
        Ok(telemetry::init(&TelemetryConfig {
            filter: Some(settings.log.clone().unwrap_or_else(|| log.into())),
            json: settings.log_json,
            otlp: settings.otlp.clone(),
            service: "shoal",
        })?)
    }

    async fn connect(settings: Settings, telemetry: Telemetry) -> anyhow::Result<Member> {
        let known = KnownPeers::new(&settings.home, &settings.swarm);
        if settings.peers.is_empty() && !settings.mdns && known.addrs().is_empty() {
            return Err(Failure::new(
                "no peer is known: mDNS is off, and there is neither a ticket nor --peer",
            )
            .try_this("`shoal join TICKET`, or --peer /ip4/HOST/tcp/PORT")
            .into());
        }
        let (identity, lock) = client_identity(&settings.home)?;
        let config = NetConfig {
            key: settings.key,
            access: settings.access.clone(),
            bootstrap: settings.peers.clone(),
            mdns: settings.mdns,
            ..NetConfig::client(identity.clone(), settings.swarm.clone())
        };
        let privacy = privacy(&settings.access);
        let wheel = terminal::wheel(format!("looking for swarm {}", settings.swarm));
        let client = Client::connect(config, privacy, Some(&known)).await?;
        let client = client.with_book(PeerBook::of_home(&settings.home, &settings.swarm));
        drop(wheel);
        let metrics = Metrics::new("shoal");
        metrics.register_net(client.net());
        Ok(Member {
            client,
            metrics,
            known,
            settings,
            trace: tracing::info_span!("client"),
            telemetry,
            _lock: lock,
        })
    }
}

/// Whom hidden states may pass: who may be dialled.
fn privacy(access: &Access) -> Privacy {
    match access {
        Access::Open => Privacy::Open,
        Access::Listed(peers) | Access::DialListed(peers) => {
            Privacy::Trusted(peers.iter().copied().collect())
        }
    }
}

/// A connected client and what it was told.
pub struct Member {
    /// The client.
    pub client: Client,
    /// The settings it was made with.
    pub settings: Settings,
    /// Peers met before, and from now on.
    known: KnownPeers,
    /// What this process counts.
    pub metrics: Metrics,
    /// The root of the trace that the hops continue.
    trace: tracing::Span,
    telemetry: Telemetry,
    _lock: Option<File>,
}

/// Who this client is. Not the node of this home: the two may run side by side, and a peer cannot dial
/// its own id. The client's id lasts, so that others may list it with --allow; a second client at the
/// same time is somebody new.
fn client_identity(home: &Path) -> anyhow::Result<(Identity, Option<File>)> {
    let home = home.join(CLIENT_DIR);
    let identity = Identity::load_or_create(&home)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(home.join("lock"))
        .map_err(|e| {
            Failure::new(format!("{}: {e}", home.display()))
                .try_this("a home directory that this user can write: --home DIR")
        })?;
    match lock.try_lock() {
        Ok(()) => Ok((identity, Some(lock))),
        Err(_) => Ok((Identity::generate(), None)),
    }
}

/// What a client logs when nobody says: what goes wrong reaches the user as an error anyway.
const LOG_DEFAULT: &str = "error";

/// Folder of the client's identity in the home directory.
pub const CLIENT_DIR: &str = "client";

/// What is asked of a session.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Positions that it must hold.
    pub n_ctx: u32,
    /// How rows travel between hops.
    pub dtype: Dtype,
    /// What may be done with its numbers.
    pub numerics: Numerics,
    /// Whether other peers stand by.
    pub standby: bool,
    /// How long to wait for a place, and for a lost route to come back.
    pub patience: Duration,
}

impl Ask {
    /// The session to open.
    pub fn spec(&self, id: ModelId, manifest: &Manifest) -> SessionSpec {
        SessionSpec {
            dtype: self.dtype,
            numerics: self.numerics,
            standby: self.standby,
            patience: self.patience,
            ..SessionSpec::new(id, manifest, self.n_ctx)
        }
    }

    /// Exact rows, nobody stands by, no waiting: for measurements.
    pub fn plain(n_ctx: u32) -> Self {
        Self {
            n_ctx,
            dtype: Dtype::F32,
            numerics: Numerics::Exact,
            standby: false,
            patience: Duration::ZERO,
        }
    }
}

/// A model of the swarm with what a client needs of it.
pub struct SwarmModel {
    /// Its id.
    pub id: ModelId,
    /// What it is called here.
    pub name: String,
    /// Its description.
    pub manifest: Manifest,
    /// Its tokenizer, where it has one.
    pub vocab: Option<Vocab>,
    /// The longest context that the model and the peers allow.
    pub n_ctx_max: u32,
}

/// A route that was lost and found again is told of when the answer is complete; a wait at once.
fn announce(event: Event<'_>) {
    if let Event::Waiting { why, left } = event {
        terminal::warn(format!(
            "{why}; waiting up to {} s for peers that bring this back, then the answer goes on (Ctrl-C to stop)",
            left.as_secs()
        ));
    }
}

impl Member {
    /// A client that shares a node's network, and uses the node's own layers like anybody's: to others it is the
    /// node (`docs/decisions/0130`). It ends with the node; [`Member::remember`] is its goodbye.
    pub fn of_node(node: &SwarmNode, settings: Settings) -> Self {
        let mut privacy = privacy(&settings.access);
        if let Privacy::Trusted(peers) = &mut privacy {
            peers.push(node.peer());
        }
        let book = PeerBook::of_home(&settings.home, &settings.swarm);
        Self {
            client: Client::over(node.net().clone(), privacy).with_book(book),
            known: KnownPeers::new(&settings.home, &settings.swarm),
            settings,
            metrics: node.metrics().clone(),
            trace: tracing::info_span!("client"),
            telemetry: Telemetry::default(),
            _lock: None,
        }
    }

    /// The same, unless nobody is there.
    async fn or_alone(self) -> anyhow::Result<Self> {
        if self.client.net().peers().borrow().is_empty() && self.client.adverts().adverts.is_empty()
        {
            let nobody = self.nobody();
            self.leave().await;
            return Err(nobody.into());
        }
        Ok(self)
    }

    /// The privacy level this client keeps.
    pub fn privacy(&self) -> crate::run_report::Privacy {
        match self.client.privacy() {
            Privacy::Open => crate::run_report::Privacy::Open,
            Privacy::Trusted(_) => crate::run_report::Privacy::Trusted,
        }
    }

    /// What the swarm looks like now.
    pub fn report(&self) -> SwarmReport {
        SwarmReport::new(
            self.settings.swarm.to_string(),
            &self.client.adverts().adverts,
            now_ms(),
        )
        .with_book(self.client.book().entries())
    }

    /// Writes down who was there, and who failed.
    pub fn remember(&self) {
        let remembered = self.known.remember(self.client.net());
        if let Err(error) = remembered.and_then(|()| self.client.book().save()) {
            tracing::debug!(%error, "peers are not remembered");
        }
    }

    /// Leaves the swarm, within a deadline, and remembers who was there.
    pub async fn leave(self) {
        self.remember();
        drop(self.trace);
        let telemetry = self.telemetry;
        // Exporting the last spans blocks.
        let exported = tokio::task::spawn_blocking(|| telemetry.shutdown());
        let _ = tokio::time::timeout(crate::interrupt::CLOSE_TIMEOUT, exported).await;
        let _ = tokio::time::timeout(crate::interrupt::CLOSE_TIMEOUT, self.client.shutdown()).await;
    }

    /// The model that is meant, with its description and tokenizer, fetched by hash where they are
    /// not here already.
    pub async fn model(&self, asked: Option<&str>) -> anyhow::Result<SwarmModel> {
        let wheel = terminal::wheel("fetching what describes the model");
        let model = self.model_quietly(asked).await;
        drop(wheel);
        model
    }

    /// The same without a wheel on the terminal.
    pub async fn model_quietly(&self, asked: Option<&str>) -> anyhow::Result<SwarmModel> {
        let served = self.report().models;
        let (id, name) = self.meant(asked, &served)?;
        let (manifest, vocab) = self.described(&id).await?;
        let n_ctx_max = longest(&manifest, served.iter().find(|model| model.id == id));
        Ok(SwarmModel {
            id,
            name,
            manifest,
            vocab,
            n_ctx_max,
        })
    }

    /// Which of the served models is meant, and what it is called.
    pub fn meant(
        &self,
        asked: Option<&str>,
        served: &[ModelReport],
    ) -> Result<(ModelId, String), Failure> {
        let asked = asked.or(self.settings.file.first_model());
        let alias = asked.and_then(|name| self.alias(name, served));
        let id = choose(asked, alias, served)?;
        let report = served.iter().find(|model| model.id == id);
        let name = match (report, asked) {
            (Some(report), _) if !report.name.is_empty() => report.name.clone(),
            (_, Some(asked)) => figures::printable(asked, 80),
            _ => id.short(),
        };
        Ok((id, name))
    }

    /// A model's manifest and tokenizer, fetched by hash where they are not here already.
    pub async fn described(&self, id: &ModelId) -> anyhow::Result<(Manifest, Option<Vocab>)> {
        let (manifest, metadata) = self.description(id).await?;
        let vocab = if metadata.is_empty() {
            None
        } else {
            tokens::vocab(&manifest.vocab_header(&metadata)?)?
        };
        Ok((manifest, vocab))
    }

    /// Opens a session with it; where everybody is busy, waits for a place.
    pub async fn open(&self, model: &SwarmModel, ask: Ask) -> anyhow::Result<Session> {
        let patience = ask.patience;
        let spec = ask.spec(model.id, &model.manifest);
        let wheel = terminal::wheel(format!("opening a route for {}", model.name));
        let busy = |layers: &[LayerRange]| {
            wheel.note(format!(
                "every holder of layers {} is busy; waiting up to {} s (Ctrl-C to stop)",
                figures::list(layers),
                patience.as_secs()
            ));
        };
        let opened = self.client.open_waiting(&spec, patience, busy);
        let opened = opened.instrument(self.trace.clone()).await;
        drop(wheel);
        let mut session = opened.map_err(|error| no_session(error, model))?;
        session.on_event(Box::new(announce));
        Ok(session)
    }

    /// What this machine's own store knows the name as, or the file: the user's word comes first, if
    /// the swarm serves what it stands for.
    fn alias(&self, name: &str, served: &[ModelReport]) -> Option<ModelId> {
        let store = local_models::store(&self.settings.home).ok()?;
        let id = match store.resolve(name).ok()? {
            Resolved::Model(id) => id,
            // A file that nobody serves is still what was asked for: the error names it then.
            Resolved::File(_) => return local_models::find(&self.settings.home, name).ok(),
        };
        served.iter().any(|model| model.id == id).then_some(id)
    }

    /// The manifest and the metadata shard: from the store, else from whoever holds them, kept for the
    /// next time.
    async fn description(&self, id: &ModelId) -> anyhow::Result<(Manifest, Vec<u8>)> {
        let store = local_models::store(&self.settings.home)?;
        if let (Ok(manifest), Ok(metadata)) = (store.manifest(*id), store.metadata(*id)) {
            return Ok((manifest, metadata));
        }
        let manifest = self.client.manifest(id).await?;
        let metadata = self.client.metadata(id, &manifest).await?;
        if let Err(error) = store.put_fetched(&manifest.encode()?, &metadata) {
            tracing::warn!(%error, "the model's description is not kept");
        }
        Ok((manifest, metadata))
    }

    /// Why there is nobody to ask: who answered and is of no use says most.
    fn nobody(&self) -> Failure {
        let swarm = &self.settings.swarm;
        let given = &self.settings.peers;
        let nobody = if given.is_empty() {
            format!("no peer of swarm {swarm} was found on the local network")
        } else {
            let addrs: Vec<String> = given
                .iter()
                .take(4)
                .map(|addr| figures::printable(addr, 160))
                .collect();
            format!("nobody of swarm {swarm} answered at {}", addrs.join(", "))
        };
        let strangers = self.client.net().strangers();
        let Some(stranger) = strangers.first() else {
            let remedy = if given.is_empty() {
                "`shoal node --model demo` here, `shoal join TICKET`, or --peer /ip4/HOST/tcp/PORT"
            } else {
                "see that the node runs and that its swarm and key are the same; `shoal doctor` looks at this machine"
            };
            return Failure::new(nobody).try_this(remedy);
        };
        let failure = Failure::new(format!("{nobody}: {stranger}"));
        match stranger {
            OpenError::OtherSwarm { theirs, .. } => {
                failure.try_this(format!("--swarm {theirs}, or an address of {swarm}"))
            }
            _ => failure.try_this(
                "the same version on both; `shoal --version` and `shoal-node --version` say which",
            ),
        }
    }
}

/// A layer is as long as the longest context of its holders; the model as its shortest layer.
pub fn longest(manifest: &Manifest, report: Option<&ModelReport>) -> u32 {
    let trained = if manifest.n_ctx_train == 0 {
        CTX_UNKNOWN
    } else {
        manifest.n_ctx_train
    };
    report.map_or(trained, |report| report.n_ctx_max().min(trained))
}

/// For models that do not say what they were trained on.
const CTX_UNKNOWN: u32 = 4096;

/// Names the layers that are missing and how to serve them.
fn no_session(error: node::ClientError, model: &SwarmModel) -> anyhow::Error {
    let name = &model.name;
    let remedy = match &error {
        node::ClientError::NoRoute(none) => none.missing.first().map(|gap| {
            format!("start a node: `shoal-node --model {name} --layers {gap}`; `shoal status` shows who holds what")
        }),
        node::ClientError::Busy { layers, .. } => layers.first().map(|full| {
            format!("a longer --wait, or another node: `shoal-node --model {name} --layers {full}`")
        }),
        node::ClientError::Untrusted { .. } => Some("list them with --allow PEER, or use --privacy open".into()),
        _ => Some("`shoal status` shows who is there; try again, routes avoid peers that failed".into()),
    };
    let failure = Failure::new(format!("{name}: {error}"));
    match remedy {
        Some(remedy) => failure.try_this(remedy).into(),
        None => failure.into(),
    }
}

/// Milliseconds since 1970: what adverts are dated with.
pub fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
