//! Names of protocols and topics. Each carries the swarm's id, so that strangers on one network do
//! not merge, and a version, so that two versions can live beside each other.

use crate::{ModelId, SwarmId};

impl SwarmId {
    /// Rows from hop to hop.
    pub fn session_protocol(&self) -> String {
        format!("/shoal/{self}/session/1")
    }

    /// Logits from the tail to the client.
    pub fn answer_protocol(&self) -> String {
        format!("/shoal/{self}/answer/1")
    }

    /// Snapshots of adverts, manifests, metadata.
    pub fn fetch_protocol(&self) -> String {
        format!("/shoal/{self}/fetch/1")
    }

    /// Kademlia.
    pub fn kad_protocol(&self) -> String {
        format!("/shoal/{self}/kad/1")
    }

    /// What identify says first.
    pub fn identify_protocol(&self) -> String {
        format!("/shoal/{self}/1")
    }

    /// Gossip of all adverts.
    pub fn advert_topic(&self) -> String {
        format!("shoal/{self}/adverts/1")
    }

    /// Gossip of the adverts of one model.
    pub fn model_advert_topic(&self, model: &ModelId) -> String {
        format!("shoal/{self}/adverts/1/{model}")
    }
}
