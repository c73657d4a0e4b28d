//! Names of protocols and topics. Each carries the swarm's id, so that strangers on one network do
//! not merge, and a version, so that two versions can live beside each other.

use crate::{ModelId, SwarmId};

/// The version in every name: peers of two versions share none of them, and identify tells them so.
pub const PROTOCOL_VERSION: u32 = 3;

impl SwarmId {
    /// Rows from hop to hop.
    pub fn session_protocol(&self) -> String {
        format!("/shoal/{self}/session/{PROTOCOL_VERSION}")
    }

    /// Logits from the tail to the client.
    pub fn answer_protocol(&self) -> String {
        format!("/shoal/{self}/answer/{PROTOCOL_VERSION}")
    }

    /// Snapshots of adverts, manifests, metadata.
    pub fn fetch_protocol(&self) -> String {
        format!("/shoal/{self}/fetch/{PROTOCOL_VERSION}")
    }

    /// Parts of shards.
    pub fn transfer_protocol(&self) -> String {
        format!("/shoal/{self}/transfer/{PROTOCOL_VERSION}")
    }

    /// Rows for experts, from trunk to holder and back.
    pub fn experts_protocol(&self) -> String {
        format!("/shoal/{self}/experts/{PROTOCOL_VERSION}")
    }

    /// Kademlia.
    pub fn kad_protocol(&self) -> String {
        format!("/shoal/{self}/kad/{PROTOCOL_VERSION}")
    }

    /// What identify says first.
    pub fn identify_protocol(&self) -> String {
        format!("/shoal/{self}/{PROTOCOL_VERSION}")
    }

    /// The swarm and the version that a peer's identify names; none where it is no peer of ours.
    pub fn of_identify(version: &str) -> Option<(SwarmId, u32)> {
        let (swarm, version) = version.strip_prefix("/shoal/")?.split_once('/')?;
        Some((swarm.parse().ok()?, version.parse().ok()?))
    }

    /// Gossip of all adverts.
    pub fn advert_topic(&self) -> String {
        format!("shoal/{self}/adverts/{PROTOCOL_VERSION}")
    }

    /// Gossip of the adverts of one model.
    pub fn model_advert_topic(&self, model: &ModelId) -> String {
        format!("{}/{model}", self.advert_topic())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identify_names_a_swarm_and_a_version() {
        let swarm: SwarmId = "home".parse().expect("a swarm id");
        let ours = SwarmId::of_identify(&swarm.identify_protocol());
        assert_eq!(ours, Some((swarm.clone(), PROTOCOL_VERSION)));
        let newer = SwarmId::of_identify("/shoal/home/7");
        assert_eq!(newer, Some((swarm, 7)));
        for other in [
            "",
            "/ipfs/0.1.0",
            "/shoal/home",
            "/shoal/No One/1",
            "/shoal/home/one",
        ] {
            assert_eq!(SwarmId::of_identify(other), None, "{other}");
        }
    }
}
