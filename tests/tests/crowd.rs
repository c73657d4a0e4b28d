//! Two hundred clients at once, half of whom hang up wherever they are: nobody who stays is treated badly, and when
//! they are gone nothing of them is left, on the server and on the nodes: no session, KV, file or memory.
//!
//! `SHOAL_CROWD_S=120` in the environment says for how long, `SHOAL_CROWD_SEED` what it is drawn from.

// The figures, for whoever runs it for real.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testnet::swarm::Swarm;
use tests::http::Api;
use tests::metrics::{scrape, scrape_nodes, sum};
use tests::{PATIENCE, serve, until};
use tokio::io::AsyncReadExt;
use tokio::time::{sleep, timeout};

const CLIENTS: u64 = 200;
const PROMPT: &str = "Once upon a time there was a little";
/// Far above what is aimed at (100 ms on a quiet machine): one that runs other tests too is slow, not wrong.
const HEALTH_P99_MAX: Duration = Duration::from_secs(3);
/// What a crowd may leave behind: the allocator keeps some of what was used.
const GROWTH_MAX_MIB: f64 = 128.0;
/// Files that a process may have more than before.
const FILES_MORE: f64 = 4.0;
/// A session whose client is lost is kept so long for it to come back (20 s).
const GONE_WITHIN: Duration = Duration::from_secs(40);

fn number(name: &str, usual: u64) -> u64 {
    let said = std::env::var(name).ok().and_then(|text| text.parse().ok());
    said.unwrap_or(usual)
}

/// SplitMix64: the same seed, the same crowd.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % limit
    }
}

/// One client: asks again and again; gives how often it got which status, 0 where it hung up.
async fn client(api: Arc<Api>, mut dice: Dice, end: Instant) -> Result<BTreeMap<u16, u32>> {
    let mut seen = BTreeMap::new();
    while Instant::now() < end {
        let ask = json!({"prompt": PROMPT, "max_tokens": 1 + dice.below(48), "stream": dice.below(2) == 0});
        if dice.below(2) == 0 {
            let headers = ["Content-Type: application/json"];
            let body = ask.to_string();
            let sent = usize::try_from(dice.below(body.len() as u64 * 2))?.min(body.len());
            let mut stream = api
                .send(
                    "POST",
                    "/v1/completions",
                    &headers,
                    &body.as_bytes()[..sent],
                )
                .await?;
            // In the middle of the request, before the answer, or somewhere in it.
            let mut some = vec![0; 1 + usize::try_from(dice.below(2000))?];
            let patience = Duration::from_millis(dice.below(300));
            let _ = timeout(patience, stream.read(&mut some)).await;
            *seen.entry(0).or_default() += 1;
            continue;
        }
        let answer = api.post("/v1/completions", &ask).await?;
        *seen.entry(answer.status).or_default() += 1;
        if answer.status != 200 {
            ensure!(answer.header("retry-after").is_some(), "{answer:?}");
            sleep(Duration::from_millis(100 + dice.below(400))).await;
        }
    }
    Ok(seen)
}

/// How long `/health` takes, again and again.
async fn health(api: Arc<Api>, end: Instant) -> Result<Vec<Duration>> {
    let mut took = Vec::new();
    while Instant::now() < end {
        let begun = Instant::now();
        api.get("/health").await?.json(200)?;
        took.push(begun.elapsed());
        sleep(Duration::from_millis(20)).await;
    }
    took.sort();
    Ok(took)
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Holds {
    sessions: f64,
    kv_bytes: f64,
    files: f64,
    resident_mib: f64,
}

impl Holds {
    fn of(metrics: &str) -> Self {
        let sessions = [
            "shoal_client_sessions",
            "shoal_sessions_open",
            "shoal_stage_sessions",
        ];
        Self {
            sessions: sessions.iter().map(|name| sum(metrics, name)).sum(),
            kv_bytes: sum(metrics, "shoal_stage_kv_bytes"),
            files: sum(metrics, "process_open_fds"),
            resident_mib: sum(metrics, "process_resident_memory_bytes") / f64::from(1 << 20),
        }
    }

    /// Whether nothing of the crowd is left, memory aside; a few files may be peers that came to know each other.
    fn as_before(&self, before: &Self) -> bool {
        self.sessions == 0.0
            && self.kv_bytes <= before.kv_bytes
            && self.files <= before.files + FILES_MORE
    }
}

/// What the server holds, and each node.
async fn held(api: &Api, swarm: &Swarm) -> Result<Vec<Holds>> {
    let mut all = vec![Holds::of(&scrape(&api.url).await?)];
    let nodes = scrape_nodes(swarm).await?;
    all.extend(nodes.iter().map(|node| Holds::of(node)));
    Ok(all)
}

/// Prints what the crowd met, and holds it against what is promised.
fn told(seed: u64, lasting: Duration, seen: &BTreeMap<u16, u32>, took: &[Duration]) -> Result<()> {
    let p99 = took.get(took.len() * 99 / 100).context("no health")?;
    println!(
        "seed {seed}, {} s: {} answered, {} refused with 429, {} hung up; /health p50 {:?}, p99 {p99:?}, longest {:?} of {}",
        lasting.as_secs(),
        seen.get(&200).unwrap_or(&0),
        seen.get(&429).unwrap_or(&0),
        seen.get(&0).unwrap_or(&0),
        took[took.len() / 2],
        took[took.len() - 1],
        took.len(),
    );
    ensure!(
        seen.keys().all(|status| [0, 200, 429].contains(status)),
        "{seen:?}"
    );
    ensure!(
        seen.get(&200).is_some_and(|answered| *answered > 20),
        "{seen:?}"
    );
    ensure!(*p99 < HEALTH_P99_MAX, "/health took {p99:?}");
    Ok(())
}

fn has_not_grown(held_before: &[Holds], held_after: &[Holds]) -> Result<()> {
    for (who, (before, after)) in held_before.iter().zip(held_after).enumerate() {
        let who = if who == 0 {
            "server".into()
        } else {
            format!("node {who}")
        };
        println!("{who}: before {before:?}");
        println!("{who}: after  {after:?}");
        ensure!(
            after.resident_mib < before.resident_mib + GROWTH_MAX_MIB,
            "{who} grew from {before:?} to {after:?}"
        );
    }
    Ok(())
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_that_comes_and_goes_leaves_nothing_behind() -> Result<()> {
    let seed = number("SHOAL_CROWD_SEED", 1);
    let lasting = Duration::from_secs(number("SHOAL_CROWD_S", 8));
    let mut swarm = serve("demo", &["0..4", "4..8"], &["--metrics", "0"]).await?;
    swarm.client("client").until_covered(8, PATIENCE).await?;
    let api = Api::start(
        &swarm.client("api"),
        &["--queue", "1", "--requests", "32", "--keep", "0"],
    )
    .await?;
    let api = Arc::new(api);
    let ready = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["ready"] == true).then_some(())
    };
    until("the server knows a whole model", PATIENCE, ready).await?;
    let ask = json!({"prompt": PROMPT, "max_tokens": 24, "temperature": 0});
    let before = api.post("/v1/completions", &ask).await?.json(200)?;
    let quiet = async || {
        let held = held(&api, &swarm).await.ok()?;
        held.iter().all(|it| it.sessions == 0.0).then_some(held)
    };
    let held_before = until("the first answer is over everywhere", PATIENCE, quiet).await?;

    let end = Instant::now() + lasting;
    let clients = (0..CLIENTS).map(|n| client(Arc::clone(&api), Dice(seed * 1000 + n), end));
    let clients: Vec<_> = clients.map(tokio::spawn).collect();
    let took = health(Arc::clone(&api), end).await?;
    let mut seen: BTreeMap<u16, u32> = BTreeMap::new();
    for client in clients {
        for (status, times) in client.await?? {
            *seen.entry(status).or_default() += times;
        }
    }
    told(seed, lasting, &seen, &took)?;

    let gone = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        let now = held(&api, &swarm).await.ok()?;
        let gone = now
            .iter()
            .zip(&held_before)
            .all(|(now, before)| now.as_before(before));
        (health["answering"] == 0 && gone).then_some(now)
    };
    let held_after = until("everybody is gone", GONE_WITHIN, gone).await;
    let held_after = match held_after {
        Ok(held) => held,
        Err(error) => {
            let now = held(&api, &swarm).await?;
            return Err(error.context(format!("before: {held_before:?}, now: {now:?}")));
        }
    };
    let after = api.post("/v1/completions", &ask).await?.json(200)?;
    assert_eq!(after["choices"], before["choices"]);
    has_not_grown(&held_before, &held_after)?;
    swarm.stop().await;
    Ok(())
}
