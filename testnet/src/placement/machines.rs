//! The machines of a swarm and how long they stay, drawn from a seed: each from a stream of its own, so
//! that both rules see the same ones.

use node::Random;
use swarm_proto::{Advert, Hash, LayerRange, Measured, ModelAdvert, ModelId, Peer};

use super::{FRAME_BYTES, LAYER_BYTES, N_LAYER};

/// Memory that layers may fill.
const LAYER_SHARE: f64 = 0.85;
/// The fewest layers that any machine holds.
const FIT_MIN: usize = 4;
/// Of a hundred nodes so many stay for about a day, the rest for about an hour.
const LONG_PERCENT: u64 = 30;

/// A machine: what it is, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Machine {
    pub(super) peer: Peer,
    /// Layer-tokens a second.
    pub(super) layer_tokens_s: f64,
    /// Rows a second of its uplink.
    pub(super) rows_s: f64,
    /// Seconds for one layer by its downlink.
    pub(super) load_s: f64,
    /// Bytes of memory.
    pub(super) memory: f64,
    /// Seconds from when it comes until it goes.
    pub(super) life_s: f64,
}

/// A kind of machine: its share of a hundred, memory bandwidth in GB/s, tokens in a batch for the time of one,
/// memory in GB.
struct Kind {
    percent: u64,
    bandwidth: (f64, f64),
    batch: f64,
    memory: &'static [f64],
}

/// A laptop's CPU, a Mac, a consumer's GPU, a large GPU.
const KINDS: [Kind; 4] = [
    Kind {
        percent: 35,
        bandwidth: (30.0, 80.0),
        batch: 3.0,
        memory: &[4.0, 6.0, 10.0, 12.0],
    },
    Kind {
        percent: 25,
        bandwidth: (100.0, 400.0),
        batch: 6.0,
        memory: &[8.0, 12.0, 20.0, 24.0],
    },
    Kind {
        percent: 30,
        bandwidth: (300.0, 1000.0),
        batch: 12.0,
        memory: &[6.0, 8.0, 10.0, 20.0],
    },
    Kind {
        percent: 10,
        bandwidth: (900.0, 2000.0),
        batch: 20.0,
        memory: &[20.0, 40.0, 40.0],
    },
];

impl Machine {
    /// The machine of this number in the swarm of this seed.
    pub(super) fn draw(seed: u64, number: u64) -> Machine {
        let name = [seed.to_le_bytes(), number.to_le_bytes()].concat();
        let mut peer = *blake3::hash(&name).as_bytes();
        let word = peer
            .first_chunk()
            .map_or(0, |word| u64::from_le_bytes(*word));
        let dice = Random::seeded(word);
        let mut of_100 = dice.u64() % 100;
        let kind = KINDS.iter().find(|kind| {
            let here = of_100 < kind.percent;
            of_100 = of_100.saturating_sub(kind.percent);
            here
        });
        let kind = kind.unwrap_or(&KINDS[0]);
        let (least, most) = kind.bandwidth;
        let bandwidth = least + dice.fraction() * (most - least);
        let memory = kind.memory[(dice.u64() % kind.memory.len() as u64) as usize];
        let uplink = lognormal(&dice, 60.0, 1.0).clamp(10.0, 2000.0);
        let downlink = lognormal(&dice, 200.0, 0.9).clamp(30.0, 5000.0);
        let mean_s = if dice.u64() % 100 < LONG_PERCENT {
            86_400.0
        } else {
            3600.0
        };
        let life_s = -(1.0 - dice.fraction()).ln() * mean_s;
        // The last byte of a peer's id says its region here.
        peer[31] = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3][(dice.u64() % 10) as usize];
        Machine {
            peer: Peer(peer),
            layer_tokens_s: bandwidth * 1e9 / LAYER_BYTES as f64 * kind.batch,
            rows_s: uplink * 1e6 / 8.0 / FRAME_BYTES as f64,
            load_s: LAYER_BYTES as f64 / (downlink * 1e6 / 8.0),
            memory: memory * 1e9,
            life_s,
        }
    }

    /// Layers that fit.
    pub(super) fn fit(&self) -> usize {
        let fit = (self.memory * LAYER_SHARE / LAYER_BYTES as f64) as usize;
        fit.clamp(FIT_MIN, N_LAYER)
    }

    /// Its part of the upper bound.
    pub(super) fn part(&self) -> (f64, f64, usize) {
        (self.layer_tokens_s, self.rows_s, self.fit())
    }

    /// What it says of itself; how fast it is only once it has `measured` that.
    pub(super) fn advert(&self, live: &[u16], intended: &[u16], measured: bool) -> Advert {
        let figure = |value: f64| Measured {
            value: value as f32,
            age_s: 0,
        };
        let model = ModelAdvert {
            model: MODEL,
            name: String::new(),
            n_layer: N_LAYER as u16,
            live: spans(live),
            intended: spans(intended),
            layer_tokens_s: measured.then(|| figure(self.layer_tokens_s)),
            n_ctx_max: 4096,
            free_cells: 1 << 20,
            n_embd: 8192,
            numerics: 0,
            stored: Vec::new(),
            layer_bytes_max: Some(self.fit() as u64 * LAYER_BYTES),
            experts: None,
        };
        Advert {
            peer: self.peer,
            seq: 1,
            ttl_ms: 45_000,
            addrs: Vec::new(),
            models: vec![model],
            uplink_bytes_s: measured.then(|| figure(self.rows_s * FRAME_BYTES as f64)),
            queue: 0,
            rtts: Vec::new(),
            leaving: false,
            agent: String::new(),
        }
    }
}

/// The model of all runs.
pub(super) const MODEL: ModelId = ModelId(Hash([80; 32]));

/// Where a peer is: 0 to 3.
pub(super) fn region(peer: &Peer) -> u8 {
    peer.0[31]
}

fn spans(layers: &[u16]) -> Vec<LayerRange> {
    let single = layers.iter().filter_map(|l| LayerRange::new(*l, l + 1));
    LayerRange::merge(single.collect())
}

/// By Box and Muller.
fn lognormal(dice: &Random, median: f64, sigma: f64) -> f64 {
    let (u, v) = (1.0 - dice.fraction(), dice.fraction());
    let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
    median * (sigma * normal).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_those_of_the_workload() {
        let machines: Vec<Machine> = (0..4000).map(|n| Machine::draw(1, n)).collect();
        let share = |is: &dyn Fn(&Machine) -> bool| {
            machines.iter().filter(|m| is(m)).count() as f64 / machines.len() as f64
        };
        let near = |share: f64, expected: f64| (share - expected).abs() < 0.03;
        for (number, expected) in [(0, 0.4), (1, 0.3), (2, 0.2), (3, 0.1)] {
            assert!(near(share(&|m| region(&m.peer) == number), expected));
        }
        let uplink = |m: &Machine| m.rows_s * FRAME_BYTES as f64 * 8.0 / 1e6;
        assert!(near(share(&|m| uplink(m) < 60.0), 0.5), "the median uplink");
        assert!(near(share(&|m| uplink(m) < 163.1), 0.84), "one sigma above");
        assert!(
            near(share(&|m| m.load_s > 20.0), 0.5),
            "the median downlink"
        );
        assert!(near(share(&|m| m.layer_tokens_s <= 480.0), 0.35), "laptops");
        assert!(
            near(share(&|m| m.layer_tokens_s >= 36_000.0), 0.1),
            "large GPUs"
        );
        assert!(machines.iter().all(|m| (6..=68).contains(&m.fit())));
        let hour = share(&|m| m.life_s < 3600.0);
        assert!(near(hour, 0.7 * 0.632 + 0.3 * 0.041), "{hour}");
    }
}
