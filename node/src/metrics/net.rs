//! The network that a process is part of.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::{Reading, TRAFFIC};
use crate::Net;

/// Peers, adverts, and what sessions send and get.
#[derive(Debug)]
pub(crate) struct NetMetrics(Net);

impl NetMetrics {
    pub(crate) fn new(net: &Net) -> Self {
        Self(net.clone())
    }
}

impl Collector for NetMetrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Reading(encoder);
        let peers = self.0.peers().borrow().len();
        to.gauge(
            "shoal_peers_connected",
            "Peers that this one is connected to",
            peers,
        )?;
        let adverts = self.0.adverts().snapshot().adverts.len();
        let help = "Adverts of nodes that are valid now, this one's included";
        to.gauge("shoal_adverts_known", help, adverts)?;
        let directions = |(came, went): (u64, u64)| {
            [
                ([("direction", "in")], came),
                ([("direction", "out")], went),
            ]
        };
        let help = "Frames of sessions and answers";
        to.counters("shoal_stream_frames", help, directions(TRAFFIC.frames()))?;
        let help = "Bytes of sessions and answers, before encryption";
        to.counters("shoal_stream_bytes", help, directions(TRAFFIC.bytes()))
    }
}
