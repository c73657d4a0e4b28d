//! What a running node says of itself to its owner: plain data, and how it is gathered.

use std::{collections::BTreeMap, ops::Range, path::PathBuf, sync::PoisonError};

use serde::{Deserialize, Serialize};
use shard_registry::Manifest;
use swarm_proto::{ExpertSpan, ModelId, Peer};
use tokio::task::JoinError;

use super::Shared;
use crate::{
    experts::{HolderView, Island, LinkState, PlacedExpert},
    hosting::{Experts, Model, Serving},
    pause::Paused,
    transfer::Transfer,
};

/// A running node, as `shoal node status --json` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its id.
    pub peer: String,
    /// Its home directory.
    pub home: PathBuf,
    /// Its program's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Seconds since it was started.
    pub uptime_s: u64,
    /// What it does.
    pub state: State,
    /// Why it is paused and until when, where it is.
    pub paused: Option<Paused>,
    /// Where others reach it.
    pub addrs: Vec<String>,
    /// What it serves.
    pub models: Vec<ModelStatus>,
    /// Sessions that are open or being opened, of all models.
    pub sessions: usize,
    /// Shards from and to others.
    pub transfer: TransferStatus,
    /// Bytes of fetched shards on the disk; none where that cannot be read.
    pub disk_bytes: Option<u64>,
    /// What they may take; none where nothing was said.
    pub disk_bytes_max: Option<u64>,
}

/// What a node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It looks for its model, or for its first layer.
    Starting,
    /// It takes sessions.
    Serving,
    /// It takes none, and gives no shards.
    Paused,
}

/// A model, as far as the node holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// Its id.
    pub model: String,
    /// What it is called here.
    pub name: String,
    /// Its layers.
    pub n_layer: u16,
    /// Layers that are loaded, as `a..b`; a paused node offers none of them.
    pub live: Vec<String>,
    /// Layers that are loaded or will be, as `a..b`; none where it holds experts only.
    pub intended: Option<String>,
    /// Rows a second through one layer; none before it is measured.
    pub layer_tokens_s: Option<f32>,
    /// Seconds since that was measured.
    pub measured_s_ago: Option<u32>,
    /// Frames that wait for the stage worker.
    pub queue: usize,
    /// Sessions that hold KV.
    pub sessions: u32,
    /// Bytes that they hold.
    pub kv_bytes: u64,
    /// Bytes that they may hold together.
    pub kv_bytes_max: u64,
    /// Bytes of weights in memory.
    pub tensor_bytes: u64,
    /// Experts that it computes for the trunks of others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertsStatus>,
    /// Who computes the experts of its layers, where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub island: Option<IslandStatus>,
}

/// Experts of a model, as far as the node holds them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExpertsStatus {
    /// Those that are loaded, as `0-3,7 of 0..5`: experts of layers.
    pub live: Vec<String>,
    /// Those that are loaded or will be.
    pub intended: Vec<String>,
    /// How many are loaded.
    pub count: u32,
    /// Rows a second through one expert, one row at a time; none before it is measured.
    pub rows_s: Option<f32>,
    /// Calls of trunks that were answered.
    pub calls: u64,
    /// Rows that went through experts, counted once for each.
    pub rows: u64,
    /// Bytes of their weights in memory.
    pub tensor_bytes: u64,
}

/// Those who compute the experts of a trunk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IslandStatus {
    /// Who they are; this node itself first, where it is one.
    pub holders: Vec<HolderStatus>,
    /// Where each expert is computed.
    pub experts: Vec<ExpertStatus>,
}

/// A holder of experts, as a trunk sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HolderStatus {
    /// Its id; none: this node itself.
    pub peer: Option<String>,
    /// Why it is not asked now, where it is not.
    pub down: Option<String>,
    /// Experts that it holds.
    pub experts: usize,
    /// Calls that it answered.
    pub calls: u64,
    /// Rows in these answers.
    pub rows: u64,
    /// The least round trip, in microseconds.
    pub rtt_us: Option<u64>,
    /// What a call takes beyond its computing, in microseconds.
    pub wire_us: Option<u64>,
    /// What a row of one expert takes it, in microseconds.
    pub row_us: Option<u64>,
    /// Calls that others were asked, too, because it was late.
    pub hedges: u64,
    /// Times that it was lost.
    pub losses: u64,
}

/// An expert, as a trunk sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExpertStatus {
    /// Of which layer.
    pub layer: u16,
    /// Which.
    pub expert: u16,
    /// Ids of those who hold it, who would be asked first; `here`: this node itself.
    pub holders: Vec<String>,
    /// Rows it was picked for.
    pub rows: u64,
}

/// What was fetched and given since the start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferStatus {
    /// Bytes of shards that came, hashes included.
    pub fetched_bytes: u64,
    /// Bytes of shards that went to peers, hashes included.
    pub given_bytes: u64,
    /// Bytes of models' descriptions that went to peers.
    pub described_bytes: u64,
    /// Most bytes of shards that leave in a second; none where nothing was said.
    pub upload_bytes_s_max: Option<u64>,
    /// Those shards of which some was fetched or given.
    pub shards: Vec<ShardStatus>,
}

/// One shard's part of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShardStatus {
    /// A model that has it.
    pub model: String,
    /// Its hash.
    pub shard: String,
    /// What it is, for example `layer 3`; empty where the model is not here any more.
    pub kind: String,
    /// Its length.
    pub bytes: u64,
    /// How often all of it was fetched.
    pub fetches: u32,
    /// Bytes that came.
    pub fetched_bytes: u64,
    /// Bytes that went to peers.
    pub given_bytes: u64,
}

impl ModelStatus {
    fn of(model: &Model) -> Self {
        let mut status = Self {
            model: model.id.to_string(),
            name: model.name.clone(),
            n_layer: model.n_layer,
            live: Vec::new(),
            intended: model.window.map(|window| window.to_string()),
            layer_tokens_s: None,
            measured_s_ago: None,
            queue: 0,
            sessions: 0,
            kv_bytes: 0,
            kv_bytes_max: 0,
            tensor_bytes: 0,
            experts: model.experts.as_ref().map(ExpertsStatus::of),
            island: None,
        };
        if let Some(serving) = &model.serving {
            let Serving { worker, speed, .. } = serving;
            let stats = worker.stats();
            let measured = speed.get();
            let spans = stats.held.spans().iter();
            let text = |span: &Range<u32>| format!("{}..{}", span.start, span.end);
            status.live = spans.map(text).collect();
            status.layer_tokens_s = measured.map(|measured| measured.value);
            status.measured_s_ago = measured.map(|measured| measured.age_s);
            status.queue = worker.queued();
            status.sessions = stats.sessions;
            status.kv_bytes = stats.kv_bytes;
            status.kv_bytes_max = stats.kv_bytes_max;
            status.tensor_bytes = stats.tensor_bytes;
            status.island = serving.island.as_ref().map(IslandStatus::of);
        }
        if let Some(experts) = &status.experts {
            status.tensor_bytes = status.tensor_bytes.saturating_add(experts.tensor_bytes);
        }
        status
    }
}

impl ExpertsStatus {
    fn of(experts: &Experts) -> Self {
        let stats = experts.worker.as_ref().map(|worker| worker.stats());
        let stats = stats.unwrap_or_default();
        let text = |spans: &[ExpertSpan]| spans.iter().map(ToString::to_string).collect();
        Self {
            live: text(&experts.live),
            intended: text(&experts.intended),
            count: stats.experts,
            rows_s: stats.rows_s.map(|(rows_s, _)| rows_s as f32),
            calls: stats.calls,
            rows: stats.rows,
            tensor_bytes: stats.tensor_bytes,
        }
    }
}

impl IslandStatus {
    fn of(island: &std::sync::Arc<Island>) -> Self {
        Self {
            holders: island.stats().into_iter().map(HolderStatus::of).collect(),
            experts: island.placed().into_iter().map(ExpertStatus::of).collect(),
        }
    }
}

impl HolderStatus {
    fn of(view: HolderView) -> Self {
        Self {
            peer: view.peer.map(|peer| peer.to_string()),
            down: match view.state {
                LinkState::Up => None,
                LinkState::Opening => Some("it is being reached".into()),
                LinkState::Down(why) => Some(why),
            },
            experts: view.experts,
            calls: view.calls,
            rows: view.rows,
            rtt_us: view.rtt_us,
            wire_us: view.wire_us,
            row_us: view.row_us,
            hedges: view.hedges,
            losses: view.losses,
        }
    }
}

impl ExpertStatus {
    fn of(placed: PlacedExpert) -> Self {
        let name =
            |holder: Option<Peer>| holder.map_or_else(|| "here".into(), |peer| peer.to_string());
        Self {
            layer: placed.layer,
            expert: placed.expert,
            holders: placed.holders.into_iter().map(name).collect(),
            rows: placed.rows,
        }
    }
}

impl Shared {
    /// How things are. What needs the disk is read on a blocking thread.
    pub(super) async fn status(&self) -> Result<NodeStatus, JoinError> {
        let (net, transfer, serving) = {
            let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
            let parts = &*parts;
            (
                parts.net.clone(),
                parts.transfer.clone(),
                parts.serving.clone(),
            )
        };
        let models = serving.as_ref().map(|(_, board)| board.models());
        let models = models.unwrap_or_default();
        // It serves once it holds something of a model.
        let sessions = serving.filter(|_| !models.is_empty());
        let sessions = sessions.map(|(sessions, _)| sessions.count());
        let paused = self.pause.now();
        let mut status = NodeStatus {
            peer: self.peer.to_string(),
            home: self.home.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            state: match (paused, sessions) {
                (Some(_), _) => State::Paused,
                (None, Some(_)) => State::Serving,
                (None, None) => State::Starting,
            },
            paused,
            addrs: net.map(|net| net.listen_addrs()).unwrap_or_default(),
            models: models.iter().map(ModelStatus::of).collect(),
            sessions: sessions.unwrap_or(0),
            transfer: TransferStatus::default(),
            disk_bytes: None,
            disk_bytes_max: None,
        };
        if let Some(transfer) = transfer {
            status.disk_bytes_max = transfer.limits().quota.max_bytes;
            let read = move || (of(&transfer), transfer.store().fetched_bytes().ok());
            (status.transfer, status.disk_bytes) = tokio::task::spawn_blocking(read).await?;
        }
        Ok(status)
    }
}

fn of(transfer: &Transfer) -> TransferStatus {
    let mut manifests: BTreeMap<ModelId, Option<Manifest>> = BTreeMap::new();
    let mut shards = Vec::new();
    for (model, shard, count) in transfer.counts() {
        let manifest = manifests.entry(model);
        let manifest = manifest.or_insert_with(|| transfer.store().manifest(model).ok());
        let known = manifest.as_ref().map(|manifest| manifest.shards.iter());
        let entry = known.and_then(|mut shards| shards.find(|entry| entry.id == shard));
        shards.push(ShardStatus {
            model: model.to_string(),
            shard: shard.to_string(),
            kind: entry
                .map(|entry| entry.kind.to_string())
                .unwrap_or_default(),
            bytes: entry.map_or(0, |entry| entry.bytes),
            fetches: count.fetches,
            fetched_bytes: count.fetched_bytes,
            given_bytes: count.given_bytes,
        });
    }
    shards.sort_unstable_by(|a, b| (&a.model, &a.shard).cmp(&(&b.model, &b.shard)));
    TransferStatus {
        fetched_bytes: shards.iter().map(|shard| shard.fetched_bytes).sum(),
        given_bytes: shards.iter().map(|shard| shard.given_bytes).sum(),
        described_bytes: transfer.described_bytes(),
        upload_bytes_s_max: transfer.limits().upload_bytes_s,
        shards,
    }
}
