//! Every decoder on inputs that were hurt at random: no panic, no large allocation. The bodies are
//! those of the fuzz targets; `SHOAL_SEED` repeats a run, `SHOAL_ROUNDS` makes it longer.

// Clippy takes the functions between the tests for production code.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::fmt::Write as _;

use shoal_fuzz::{TARGETS, seeds};

/// Inputs of each target.
const ROUNDS: u64 = 20_000;
/// What all of them together may add to this process: the decoders' own limits are far below.
const GROWTH_MAX_KIB: u64 = 256 * 1024;

/// splitmix64.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Changes that reach lengths, tags and ends: bits, interesting bytes, cuts, copies, insertions.
fn hurt(input: &mut Vec<u8>, draw: &mut Draw) {
    const BYTES: [u8; 10] = [0, 1, 0x7f, 0x80, 0xff, 250, 251, 252, 253, 254];
    for _ in 0..=draw.below(4) {
        let at = draw.below(input.len());
        match draw.below(7) {
            0 if at < input.len() => input[at] ^= 1 << draw.below(8),
            1 if at < input.len() => input[at] = BYTES[draw.below(BYTES.len())],
            2 => input.truncate(at),
            3 => input.insert(at, draw.next() as u8),
            4 if at < input.len() => {
                let end = (at + 1 + draw.below(16)).min(input.len());
                let copy = input[at..end].to_vec();
                let to = draw.below(input.len());
                input.splice(to..to, copy);
            }
            5 if at + 8 <= input.len() => {
                let word = [0, 1, u64::MAX, 1 << 31, 1 << 40, draw.next()][draw.below(6)];
                input[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
            _ => {
                let end = (at + draw.below(16)).min(input.len());
                input.drain(at..end);
            }
        }
    }
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

#[test]
fn no_input_makes_a_decoder_panic_or_take_much_memory() {
    let (seed, rounds) = (number("SHOAL_SEED", 1), number("SHOAL_ROUNDS", ROUNDS));
    let before = peak_kib();
    for (name, body) in TARGETS {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "{name} has no seed");
        for round in 0..rounds {
            let mut draw = Draw(seed ^ (round << 20));
            let mut input = seeds[draw.below(seeds.len())].clone();
            if round >= seeds.len() as u64 {
                hurt(&mut input, &mut draw);
            }
            let done = std::panic::catch_unwind(|| body(&input));
            assert!(
                done.is_ok(),
                "{name}, SHOAL_SEED={seed}, round {round}: {}",
                hex(&input)
            );
        }
    }
    let growth = peak_kib().saturating_sub(before);
    assert!(
        growth < GROWTH_MAX_KIB,
        "{growth} KiB of memory, {GROWTH_MAX_KIB} are allowed"
    );
}

/// A seed that no decoder accepts would test nothing.
#[test]
fn seeds_are_accepted() {
    use swarm_proto::{
        Advert, Answer, Ask, Attach, Down, ExpertAsk, ExpertGive, Fetch, Found, Give, Ticket, Up,
        codec::decode,
    };
    for seed in seeds("manifest") {
        assert!(shard_registry::Manifest::decode(&seed).is_ok());
    }
    for seed in seeds("gguf_header") {
        let len = seed.len() as u64;
        assert!(gguf::Header::read(&mut std::io::Cursor::new(seed), len).is_ok());
    }
    assert!(
        seeds("down")
            .iter()
            .all(|seed| decode::<Down>(seed).is_ok())
    );
    assert!(seeds("up").iter().all(|seed| decode::<Up>(seed).is_ok()));
    assert!(
        seeds("answer")
            .iter()
            .all(|seed| decode::<Answer>(seed).is_ok())
    );
    assert!(
        seeds("attach")
            .iter()
            .all(|seed| decode::<Attach>(seed).is_ok())
    );
    assert!(
        seeds("fetch")
            .iter()
            .all(|seed| decode::<Fetch>(seed).is_ok())
    );
    assert!(
        seeds("found")
            .iter()
            .all(|seed| decode::<Found>(seed).is_ok())
    );
    assert!(seeds("ask").iter().all(|seed| decode::<Ask>(seed).is_ok()));
    assert!(
        seeds("give")
            .iter()
            .all(|seed| decode::<Give>(seed).is_ok())
    );
    assert!(
        seeds("expert_ask")
            .iter()
            .all(|seed| decode::<ExpertAsk>(seed).is_ok())
    );
    assert!(
        seeds("expert_give")
            .iter()
            .all(|seed| decode::<ExpertGive>(seed).is_ok())
    );
    assert!(
        seeds("advert")
            .iter()
            .any(|seed| decode::<Advert>(seed).is_ok())
    );
    let ticket = String::from_utf8(seeds("ticket").remove(0)).unwrap();
    assert!(ticket.parse::<Ticket>().is_ok());
}

/// Largest memory of this process so far; 0 where the system does not say.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap_or(0)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
