//! The daemon: flags, logging, signals, exit codes around a `SwarmNode`. Prints nothing: who starts it gets the ready
//! line's facts, may run something beside the node, and ends it before the node.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::ValueEnum;
use swarm_proto::ExpertSpan;

use crate::{
    Hosted,
    config::{ConfigError, FileConfig, Settings, SwarmArgs, parse_bool, parse_bytes, parse_layers},
    cpu_share::CpuShare,
    experts::IslandOptions,
    hosting::Hold,
    keys::Keys,
    load::LoadError,
    metrics::{MetricsAddr, ServerError},
    quiet_hours::QuietHours,
    swarm_node::{NodeConfig, ServeMetrics, StartError, SwarmNode},
    telemetry::{self, Telemetry, TelemetryConfig, TelemetryError},
    transfer::Limits,
};
use shard_registry::blobs::Quota;

/// Both transports on every interface, ports by the system.
const DEFAULT_LISTEN: [&str; 2] = ["/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1"];

/// How often nodes look whether layers should move, where nobody says.
const TURN: Duration = Duration::from_secs(60);

/// Flags of a serving node.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Model to serve: an alias, a GGUF file (imported in place), demo, or the id or name of one that peers have: its
    /// layers are fetched from them. May be given several times; the models share the memory by their size.
    #[arg(long, value_name = "NAME|ID|FILE", env = "SHOAL_MODEL")]
    pub model: Vec<String>,
    /// Layers to serve, for example 0..4, and to stay with [default: those that are needed most, others when that
    /// changes].
    #[arg(long, value_name = "A..B", env = "SHOAL_LAYERS", value_parser = parse_layers)]
    pub layers: Option<Range<u32>>,
    /// Memory for layers and KV, for example 4G [default: half of what is free].
    #[arg(long, value_name = "SIZE", env = "SHOAL_MEMORY", value_parser = parse_bytes)]
    pub memory: Option<u64>,
    /// What of a mixture of experts this node holds: whole layers; trunks, which are layers whose experts near peers
    /// compute; or experts, for the trunks of near peers [default: auto, whole layers where one fits].
    #[arg(long, value_name = "WHAT", env = "SHOAL_HOLD", value_enum)]
    pub hold: Option<Hold>,
    /// The longest round trip, in milliseconds, to peers that compute experts for this node's trunks; beyond half a
    /// millisecond whole layers are faster [default: 0.5].
    #[arg(long, value_name = "MS", env = "SHOAL_ISLAND_RTT", value_parser = parse_millis)]
    pub island_rtt: Option<Duration>,
    /// Seconds between two looks whether layers should move to where they are needed more; the same on all nodes of a
    /// swarm [default: 60].
    #[arg(long, value_name = "SECONDS", env = "SHOAL_TURN", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub turn: Option<u64>,
    /// Address to listen on; may be given several times [default: TCP and QUIC, any free port].
    #[arg(long, value_name = "ADDR", env = "SHOAL_LISTEN", value_delimiter = ',')]
    pub listen: Vec<String>,
    /// Address at which others reach this node, told them instead of those it listens on (a forwarded port, for
    /// example /ip4/203.0.113.7/tcp/4001); may be given several times.
    #[arg(
        long,
        value_name = "ADDR",
        env = "SHOAL_ANNOUNCE",
        value_delimiter = ','
    )]
    pub announce: Vec<String>,
    /// Compute threads [default: physical cores; 1 for a few small layers].
    #[arg(long, value_name = "N", env = "SHOAL_THREADS", value_parser = clap::value_parser!(u32).range(1..=512))]
    pub threads: Option<u32>,
    /// Most that shards may take of the uplink in a second, for example 10M; 0 gives none [default: as much as
    /// there is].
    #[arg(long, value_name = "SIZE", env = "SHOAL_UPLOAD_LIMIT", value_parser = parse_bytes)]
    pub upload_limit: Option<u64>,
    /// Most that fetched shards may take of the disk, for example 20G [default: all but a reserve].
    #[arg(long, value_name = "SIZE", env = "SHOAL_DISK", value_parser = parse_bytes)]
    pub disk: Option<u64>,
    /// Most of the time that the compute threads may work, in percent; the node rests after each step, and its measured
    /// speed says so [default: 100].
    #[arg(long, value_name = "PERCENT", env = "SHOAL_CPU_SHARE")]
    pub cpu_share: Option<CpuShare>,
    /// Hours of the day, by this machine's clock, in which the node is paused, for example 22:00-07:00,12:30-13:30.
    #[arg(long, value_name = "HOURS", env = "SHOAL_QUIET_HOURS")]
    pub quiet_hours: Option<QuietHours>,
    /// Serve what this node counts to Prometheus at this port or address, under /metrics: 9464 is
    /// http://127.0.0.1:9464/metrics. Other machines can read it only if you say so here, and then with a key.
    #[arg(
        long,
        value_name = "[HOST:]PORT",
        env = "SHOAL_METRICS",
        help_heading = "Metrics"
    )]
    pub metrics: Option<MetricsAddr>,
    /// A file of keys, one a line, of which whoever reads metrics must have one (Authorization: Bearer KEY).
    #[arg(
        long,
        value_name = "FILE",
        env = "SHOAL_METRICS_KEY_FILE",
        help_heading = "Metrics"
    )]
    pub metrics_key_file: Option<PathBuf>,
    /// Let other machines read metrics without a key.
    #[arg(long, env = "SHOAL_METRICS_WITHOUT_KEY", value_parser = parse_bool, help_heading = "Metrics")]
    pub metrics_without_key: bool,
    /// Print one line of JSON on standard output once sessions are served.
    #[arg(long)]
    pub ready_json: bool,
    /// Which swarm, as whom.
    #[command(flatten)]
    pub swarm: SwarmArgs,
}

/// What is known once a node serves.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Ready {
    /// Its id.
    pub peer: String,
    /// Where others reach it.
    pub addrs: Vec<String>,
    /// What it serves.
    pub models: Vec<ReadyModel>,
    /// Where it answers HTTP, if it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
    /// Where its metrics are, if they are served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
}

/// A model that is served.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ReadyModel {
    /// Which.
    pub model: String,
    /// Its layers, as `a..b`, those included that are still to come; empty where it holds experts only.
    pub layers: String,
    /// What of them it holds.
    pub hold: Hold,
    /// The experts it holds, those included that are still to come.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<ExpertSpan>,
}

/// Why the daemon ended other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A setting of the config file.
    #[error("config file: {key} = {value:?}: {reason}")]
    Value {
        /// Which key.
        key: &'static str,
        /// What it says.
        value: String,
        /// Why that is wrong.
        reason: String,
    },
    /// The file with keys for metrics.
    #[error("{}: {reason}", .path.display())]
    Keys {
        /// Which.
        path: PathBuf,
        /// Why it is of no use.
        reason: String,
    },
    /// No model was named.
    #[error("no model was named: use --model NAME, for example --model demo")]
    NoModel,
    /// Layers of which?
    #[error(
        "--layers says which layers of one model, and {count} models were named: leave it out, or name one"
    )]
    LayersOfMany {
        /// How many.
        count: usize,
    },
    /// Logging.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// The node did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The stage worker's thread panicked.
    #[error(
        "the stage worker died, as the log says: start this node again; if it comes back, report it"
    )]
    Died,
    /// The system refused threads or signals.
    #[error("the system refuses to run this: {0}")]
    System(#[from] std::io::Error),
}

impl DaemonError {
    /// 2 where the user said something that cannot be, 1 where something failed.
    pub fn exit_code(&self) -> ExitCode {
        let usage = matches!(
            self,
            DaemonError::Config(_)
                | DaemonError::Value { .. }
                | DaemonError::Keys { .. }
                | DaemonError::NoModel
                | DaemonError::LayersOfMany { .. }
                | DaemonError::Telemetry(_)
                | DaemonError::Start(
                    StartError::Load(LoadError::Unknown(_) | LoadError::Layers { .. })
                        | StartError::Metrics(ServerError::Open(_))
                )
        );
        ExitCode::from(if usage { 2 } else { 1 })
    }
}

/// A node that serves, and what a program around it needs: settings, signals, logs.
#[derive(Debug)]
pub struct Daemon {
    node: SwarmNode,
    settings: Settings,
    signals: Signals,
    telemetry: Telemetry,
}

impl Daemon {
    /// Sets logging up for this process and starts a node; none where SIGINT or SIGTERM came first. Needs the
    /// runtime of [`crate::runtime::run`].
    ///
    /// # Errors
    /// See [`DaemonError`].
    pub async fn start(args: &Args) -> Result<Option<Self>, DaemonError> {
        let settings = args.swarm.resolve()?;
        let telemetry = telemetry::init(&TelemetryConfig {
            filter: settings.log.clone(),
            json: settings.log_json,
            otlp: settings.otlp.clone(),
            service: "shoal-node",
        })?;
        let config = node_config(args, settings.clone())?;
        let mut signals = Signals::new()?;
        let node = tokio::select! {
            node = SwarmNode::start(config) => node?,
            () = signals.next() => {
                tracing::info!("stopped while starting");
                return Ok(None);
            }
        };
        Ok(Some(Self {
            node,
            settings,
            signals,
            telemetry,
        }))
    }

    /// The node.
    pub fn node(&self) -> &SwarmNode {
        &self.node
    }

    /// All sources of settings, merged.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The ready line's facts, which are logged too.
    pub fn ready(&self) -> Ready {
        let model = |hosted: &Hosted| ReadyModel {
            model: hosted.model.to_string(),
            layers: match hosted.layers.is_empty() {
                true => String::new(),
                false => format!("{}..{}", hosted.layers.start, hosted.layers.end),
            },
            hold: hosted.hold,
            experts: hosted.experts.clone(),
        };
        let facts = Ready {
            peer: self.node.peer().to_string(),
            addrs: self.node.net().listen_addrs(),
            models: self.node.hosted().iter().map(model).collect(),
            api: None,
            metrics: self.node.metrics_url(),
        };
        for ReadyModel {
            model,
            layers,
            hold,
            ..
        } in &facts.models
        {
            tracing::info!(peer = %facts.peer, model, layers, %hold, addrs = ?facts.addrs, "serving");
        }
        facts
    }

    /// Waits until the node is told to stop, or cannot serve any more.
    ///
    /// # Errors
    /// An end that nobody asked for is one, so that a supervisor starts the node again.
    pub async fn until_told(&mut self) -> Result<(), DaemonError> {
        tokio::select! {
            () = self.signals.next() => Ok(()),
            () = self.node.died() => Err(DaemonError::Died),
        }
    }

    /// Ends what runs `beside` the node while it serves on, then the node; a second signal does not wait for the
    /// goodbyes.
    pub async fn stop(self, beside: impl Future<Output = ()>) {
        let (node, mut signals) = (self.node, self.signals);
        let goodbyes = async {
            beside.await;
            tracing::info!(
                sessions = node.sessions(),
                "stopping: withdrawing, letting sessions end"
            );
            node.shutdown().await;
        };
        tokio::select! {
            () = goodbyes => {}
            () = signals.next() => tracing::warn!("told twice: stopping at once"),
        }
        // Exporting the last spans blocks.
        let telemetry = self.telemetry;
        let _ = tokio::task::spawn_blocking(|| telemetry.shutdown()).await;
    }
}

fn node_config(args: &Args, settings: Settings) -> Result<NodeConfig, DaemonError> {
    let file = &settings.file;
    let layers = match (&args.layers, &file.layers) {
        (None, Some(text)) => Some(filed("layers", text, parse_layers)?),
        (flag, _) => flag.clone(),
    };
    let bytes = |flag: Option<u64>, key, filed_text: &Option<String>| match (flag, filed_text) {
        (None, Some(text)) => filed(key, text, parse_bytes).map(Some),
        (flag, _) => Ok(flag),
    };
    let memory = bytes(args.memory, "memory", &file.memory)?;
    let (hold, island_rtt) = of_mixtures(args, file)?;
    let upload_bytes_s = bytes(args.upload_limit, "upload-limit", &file.upload_limit)?;
    let max_bytes = bytes(args.disk, "disk", &file.disk)?;
    let cpu_share = match (args.cpu_share, file.cpu_share) {
        (None, Some(percent)) => filed("cpu-share", &percent.to_string(), |text| text.parse())?,
        (flag, _) => flag.unwrap_or_default(),
    };
    let quiet_hours = match (&args.quiet_hours, &file.quiet_hours) {
        (None, Some(text)) => filed("quiet-hours", text, |text| text.parse())?,
        (flag, _) => flag.clone().unwrap_or_default(),
    };
    let listen = listen(args, settings.key.is_some(), file);
    let announce = match args.announce.is_empty() {
        true => file.announce.clone(),
        false => args.announce.clone(),
    };
    let models = match args.model.is_empty() {
        true => file.model.clone(),
        false => args.model.clone(),
    };
    match models.len() {
        0 => return Err(DaemonError::NoModel),
        count if count > 1 && layers.is_some() => return Err(DaemonError::LayersOfMany { count }),
        _ => {}
    }
    Ok(NodeConfig {
        models,
        layers,
        memory,
        hold,
        island_rtt,
        turn: args.turn.or(file.turn).map_or(TURN, Duration::from_secs),
        listen,
        announce,
        threads: args.threads.or(file.threads.map(|n| n.clamp(1, 512))),
        transfer: Limits {
            upload_bytes_s,
            quota: Quota {
                max_bytes,
                ..Quota::default()
            },
        },
        cpu_share,
        quiet_hours,
        metrics: serve_metrics(args, file)?,
        settings,
    })
}

/// What of a mixture it holds, and how far its island may be.
fn of_mixtures(args: &Args, file: &FileConfig) -> Result<(Hold, Duration), DaemonError> {
    let hold = match (args.hold, &file.hold) {
        (None, Some(text)) => filed("hold", text, |text| Hold::from_str(text, false))?,
        (flag, _) => flag.unwrap_or_default(),
    };
    let island_rtt = match (args.island_rtt, file.island_rtt) {
        (None, Some(millis)) => filed("island-rtt", &millis.to_string(), parse_millis)?,
        (flag, _) => flag.unwrap_or(IslandOptions::default().rtt_max),
    };
    Ok((hold, island_rtt))
}

fn listen(args: &Args, with_key: bool, file: &FileConfig) -> Vec<String> {
    let mut listen = if args.listen.is_empty() {
        file.listen.clone()
    } else {
        args.listen.clone()
    };
    if listen.is_empty() {
        // A pre-shared key covers TCP only.
        let usable = if with_key { 1 } else { DEFAULT_LISTEN.len() };
        listen = DEFAULT_LISTEN
            .iter()
            .take(usable)
            .map(|addr| String::from(*addr))
            .collect();
    }
    listen
}

fn parse_millis(text: &str) -> Result<Duration, String> {
    let millis: Option<f64> = text.parse().ok();
    let fits = millis.filter(|millis| (0.0..=60_000.0).contains(millis));
    let wrong = || format!("{text:?} is not a number of milliseconds from 0 to 60000");
    fits.map(|millis| Duration::from_secs_f64(millis / 1e3))
        .ok_or_else(wrong)
}

fn serve_metrics(args: &Args, file: &FileConfig) -> Result<Option<ServeMetrics>, DaemonError> {
    let metrics = match (args.metrics, &file.metrics) {
        (None, Some(text)) => Some(filed("metrics", text, |text| text.parse())?),
        (flag, _) => flag,
    };
    let keys = match args
        .metrics_key_file
        .as_ref()
        .or(file.metrics_key_file.as_ref())
    {
        Some(file) => metrics_keys(file)?,
        None => Keys::default(),
    };
    Ok(metrics.map(|at| ServeMetrics {
        at,
        keys,
        without_key: args.metrics_without_key,
    }))
}

fn metrics_keys(file: &Path) -> Result<Keys, DaemonError> {
    let wrong = |reason: String| DaemonError::Keys {
        path: file.to_owned(),
        reason,
    };
    let text = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    let keys = Keys::of_file(&text);
    if keys.is_empty() {
        return Err(wrong("there is no key in it".into()));
    }
    Ok(keys)
}

fn filed<T>(
    key: &'static str,
    text: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<T, DaemonError> {
    parse(text).map_err(|reason| DaemonError::Value {
        key,
        value: text.to_owned(),
        reason,
    })
}

/// SIGINT and SIGTERM.
#[derive(Debug)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_user_said_wrong_is_a_usage_error() {
        assert_eq!(DaemonError::Died.exit_code(), ExitCode::FAILURE);
        assert_eq!(DaemonError::NoModel.exit_code(), ExitCode::from(2));
    }
}
