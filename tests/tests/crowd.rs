//! Two hundred clients at once, half of whom hang up wherever they are: nobody who stays is treated badly, and when
//! they are gone nothing of them is left.
//!
//! `SHOAL_CROWD_S=120` in the environment says for how long, `SHOAL_CROWD_SEED` what it is drawn from.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tests::http::Api;
use tests::{PATIENCE, serve, until};
use tokio::io::AsyncReadExt;
use tokio::time::{sleep, timeout};

const CLIENTS: u64 = 200;
const PROMPT: &str = "Once upon a time there was a little";
/// Far above what is aimed at (100 ms on a quiet machine): one that runs other tests too is slow, not wrong.
const HEALTH_P99_MAX: Duration = Duration::from_secs(3);
/// What a crowd may leave behind: the allocator keeps some of what was used.
const GROWTH_MAX_KIB: u64 = 128 << 10;

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

/// Open files and resident memory of the server, in KiB.
fn held(api: &Api) -> Result<(usize, u64)> {
    let process = format!("/proc/{}", api.child.id().context("it has ended")?);
    let files = std::fs::read_dir(format!("{process}/fd"))?.count();
    let status = std::fs::read_to_string(format!("{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok((files, kib.context("no VmRSS")?.parse()?))
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_that_comes_and_goes_leaves_nothing_behind() -> Result<()> {
    let seed = number("SHOAL_CROWD_SEED", 1);
    let lasting = Duration::from_secs(number("SHOAL_CROWD_S", 8));
    let mut swarm = serve("demo", &["0..4", "4..8"], &[]).await?;
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
    let (files, kib) = held(&api)?;

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
    let p99 = took.get(took.len() * 99 / 100).context("no health")?;
    println!(
        "seed {seed}: {seen:?}, /health p99 {p99:?} of {}",
        took.len()
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

    let left = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["answering"] == 0 && held(&api).ok()?.0 <= files + 4).then_some(())
    };
    until("everybody is gone", Duration::from_secs(20), left).await?;
    let after = api.post("/v1/completions", &ask).await?.json(200)?;
    assert_eq!(after["choices"], before["choices"]);
    let (_, kib_after) = held(&api)?;
    println!("resident: {kib} KiB before, {kib_after} KiB after");
    ensure!(
        kib_after < kib + GROWTH_MAX_KIB,
        "{kib} KiB before, {kib_after} KiB after"
    );
    swarm.stop().await;
    Ok(())
}
