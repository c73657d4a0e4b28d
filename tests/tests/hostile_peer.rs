//! A member that behaves badly, against real nodes: bytes that are no frames, adverts that are not true. The nodes
//! stay up, stay small, and go on answering.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use node::net::Announcement;
use node::{Identity, Net, NetConfig, Proto};
use swarm_proto::{LayerRange, Measured, ModelAdvert, ModelId, Peer};
use testnet::client::Ask;
use testnet::plan::Seeded;
use testnet::swarm::Swarm;
use tests::{FOUR_SPANS, PATIENCE, serve, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// A node may wait for the rest of a frame before it gives up on a stream.
const REFUSED_WITHIN: Duration = Duration::from_secs(60);

/// What a node may grow by under nonsense: connections and their buffers, far from the sizes that are announced.
const GROWTH_MAX: u64 = 32 << 20;

/// Printed with a failure.
const SEED: u64 = 20_261_121;

async fn intruder(swarm: &Swarm) -> Result<Net> {
    let ready = swarm
        .nodes()
        .first()
        .and_then(|node| node.ready.as_ref())
        .context("no node")?;
    let config = NetConfig {
        bootstrap: ready.dialable(),
        listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
        ..NetConfig::client(Identity::generate(), swarm.id().parse()?)
    };
    Ok(Net::start(config).await?)
}

/// The same few kinds of nonsense for every protocol, then random bytes.
fn nonsense() -> Vec<Vec<u8>> {
    let mut seeded = Seeded::new(SEED);
    let mut random = |len: usize| {
        (0..len)
            .map(|_| seeded.below(256) as u8)
            .collect::<Vec<u8>>()
    };
    let announced = |total: u32, header: u16| {
        [
            &total.to_le_bytes()[..],
            &header.to_le_bytes()[..],
            &[0; 64],
        ]
        .concat()
    };
    let mut all = vec![
        announced(u32::MAX, 16),
        announced(1 << 30, u16::MAX),
        announced(4, u16::MAX),
        announced(0, 0),
        announced(66, 64),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ];
    all.extend((0..8).map(|_| random(4096)));
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_no_frames_are_refused_and_nothing_is_lost() -> Result<()> {
    let mut swarm = serve("demo", &["0..8"], &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let ask = Ask::text("demo", "Once upon a time", 16);
    let before = client.ask(&ask, PATIENCE).await?;
    let rss_before = swarm.nodes()[0].process.rss_bytes();

    let intruder = intruder(&swarm).await?;
    let ready = swarm.nodes()[0].ready.clone().context("not ready")?;
    let peer: Peer = ready.peer.parse()?;
    for proto in Proto::ALL {
        for (number, bytes) in nonsense().into_iter().enumerate() {
            let case = format!("{proto:?} {number}, seed {SEED}");
            let mut stream = intruder
                .open(peer, &ready.dialable(), proto, PATIENCE)
                .await
                .context(case.clone())?;
            // The node may have closed the stream before all is written.
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            let ended = timeout(REFUSED_WITHIN, async {
                let mut said = Vec::new();
                let _ = stream.read_to_end(&mut said).await;
                said.len()
            });
            let said = ended
                .await
                .with_context(|| format!("the stream stays open: {case}"))?;
            ensure!(
                said < 4096,
                "the node says {said} bytes to nonsense: {case}"
            );
        }
    }
    intruder.shutdown().await;

    let process = &mut swarm.nodes_mut()[0].process;
    ensure!(process.is_running(), "it died:\n{}", process.log_tail());
    if let (Some(before), Some(after)) = (rss_before, process.rss_bytes()) {
        ensure!(
            after < before + GROWTH_MAX,
            "it grew from {before} to {after} bytes"
        );
    }
    let after = client.ask(&ask, PATIENCE).await?;
    ensure!(after.same(&before), "before: {before:?}\nafter: {after:?}");
    swarm.stop().await;
    Ok(())
}

/// Claims to hold all of `model`, fast, and serves nothing.
fn lie(model: ModelId) -> Announcement {
    let everything = vec![LayerRange { start: 0, end: 8 }];
    Announcement {
        models: vec![ModelAdvert {
            model,
            name: "demo".into(),
            n_layer: 8,
            live: everything.clone(),
            intended: everything,
            layer_tokens_s: Some(Measured {
                value: 1e9,
                age_s: 0,
            }),
            n_ctx_max: 1 << 20,
            free_cells: 1 << 30,
            n_embd: 256,
            numerics: 1,
            stored: Vec::new(),
            layer_bytes_max: None,
            experts: None,
        }],
        ..Announcement::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_holds_nothing_of_what_it_advertises_is_routed_around() -> Result<()> {
    let mut swarm = serve("demo", &FOUR_SPANS, &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let mut args = vec!["status".to_owned(), "--json".to_owned()];
    args.extend(client.swarm_args());
    let status: serde_json::Value = client.json(&args, PATIENCE).await?;
    let model: ModelId = status["models"][0]["model"]
        .as_str()
        .context("no model")?
        .parse()?;

    let liar = intruder(&swarm).await?;
    liar.publish(lie(model)).await;
    let id = liar.me().to_string();
    until("the lie is believed", PATIENCE, async || {
        let layers = client.layers(PATIENCE).await.ok()?;
        layers
            .iter()
            .all(|layer| layer.holders.contains(&id))
            .then_some(())
    })
    .await?;

    let ask = Ask::text("demo", "Once upon a time", 16);
    let staged = client.ask(&ask, PATIENCE).await?;
    let whole = client.ask_local(&ask, PATIENCE).await?;
    ensure!(staged.same(&whole), "staged: {staged:?}\nwhole: {whole:?}");
    ensure!(
        staged.route.iter().all(|hop| hop.peer != id),
        "{:?}",
        staged.route
    );
    liar.shutdown().await;
    swarm.stop().await;
    Ok(())
}
