//! What the node of this machine does: layers, memory, and the shards that come and go. Its files and its process are
//! its owner's business and are not in it.

use node::control::{NodeStatus, ShardStatus, State};
use serde::{Deserialize, Serialize};

use super::view::NAME_CHARS_MAX;
use crate::fields::printable;

/// Shards on their way that are listed.
const SHARDS_MAX: usize = 32;

/// The node that runs in the same home.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its id.
    pub peer: String,
    /// What it does.
    pub state: State,
    /// Seconds since it was started.
    pub uptime_s: u64,
    /// Sessions that are open, of all models.
    pub sessions: usize,
    /// Bytes of KV that they hold.
    pub kv_bytes: u64,
    /// Bytes that they may hold together.
    pub kv_bytes_max: u64,
    /// Bytes of weights in memory.
    pub tensor_bytes: u64,
    /// Bytes of shards that came since the start.
    pub fetched_bytes: u64,
    /// Bytes of shards that went to peers.
    pub given_bytes: u64,
    /// Most bytes of shards that leave in a second; none where nothing was said.
    pub upload_bytes_s_max: Option<u64>,
    /// Bytes of fetched shards on the disk.
    pub disk_bytes: Option<u64>,
    /// What they may take.
    pub disk_bytes_max: Option<u64>,
    /// Shards that came whole.
    pub shards_done: usize,
    /// Shards of which some is here, the furthest first.
    pub coming: Vec<ShardView>,
}

/// A shard on its way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardView {
    /// What it is, for example `layer 3`.
    pub kind: String,
    /// The model it is of.
    pub model: String,
    /// Its length.
    pub bytes: u64,
    /// Bytes that came.
    pub fetched_bytes: u64,
}

impl From<&NodeStatus> for NodeView {
    fn from(status: &NodeStatus) -> Self {
        let sum = |of: fn(&node::control::ModelStatus) -> u64| {
            let each = status.models.iter().map(of);
            each.fold(0, u64::saturating_add)
        };
        let transfer = &status.transfer;
        let mut coming: Vec<&ShardStatus> = transfer.shards.iter().collect();
        coming.retain(|shard| shard.fetches == 0 && shard.fetched_bytes > 0);
        coming.sort_by_key(|shard| std::cmp::Reverse(shard.fetched_bytes));
        let done = transfer.shards.iter().filter(|shard| shard.fetches > 0);
        Self {
            peer: status.peer.clone(),
            state: status.state,
            uptime_s: status.uptime_s,
            sessions: status.sessions,
            kv_bytes: sum(|model| model.kv_bytes),
            kv_bytes_max: sum(|model| model.kv_bytes_max),
            tensor_bytes: sum(|model| model.tensor_bytes),
            fetched_bytes: transfer.fetched_bytes,
            given_bytes: (transfer.given_bytes).saturating_add(transfer.described_bytes),
            upload_bytes_s_max: transfer.upload_bytes_s_max,
            disk_bytes: status.disk_bytes,
            disk_bytes_max: status.disk_bytes_max,
            shards_done: done.count(),
            coming: coming.into_iter().take(SHARDS_MAX).map(shard).collect(),
        }
    }
}

fn shard(shard: &ShardStatus) -> ShardView {
    ShardView {
        kind: printable(&shard.kind, NAME_CHARS_MAX),
        model: shard.model.clone(),
        bytes: shard.bytes,
        fetched_bytes: shard.fetched_bytes,
    }
}
