//! Protocol and topic names: each carries the swarm id.

use swarm_proto::SwarmId;

/// What identify says first: names the swarm even to those who are not in it.
pub(super) fn identify_version(swarm: &SwarmId) -> String {
    format!("/shoal/{swarm}/1")
}

/// The swarm named by another peer's identify version.
pub(super) fn swarm_in(version: &str) -> Option<&str> {
    version.strip_prefix("/shoal/")?.split('/').next()
}

pub(super) fn kad(swarm: &SwarmId) -> String {
    format!("/shoal/{swarm}/kad/1")
}

pub(super) fn meshsub(swarm: &SwarmId) -> String {
    format!("/shoal/{swarm}/meshsub")
}

pub(super) fn advert_topic(swarm: &SwarmId) -> String {
    format!("shoal/{swarm}/adverts/1")
}
