//! A node behind a forwarded port: others are told the address in front of it, and none behind it.
#![allow(clippy::expect_used)] // helpers of tests

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use node::{
    Access, Identity, Net, NetConfig, Proto,
    net::{Announcement, NetError},
};
use tokio::net::{TcpListener, TcpStream};

const DEADLINE: Duration = Duration::from_secs(20);

fn config() -> NetConfig {
    let config = NetConfig::client(Identity::generate(), "t".parse().expect("swarm id"));
    NetConfig {
        listen: vec!["/ip4/127.0.0.1/tcp/0".into()],
        ..config
    }
}

/// Forwards every connection to `to`, and counts them.
async fn forward(listener: TcpListener, to: u16, count: Arc<AtomicUsize>) {
    while let Ok((mut outside, _)) = listener.accept().await {
        count.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let mut inside = TcpStream::connect(("127.0.0.1", to)).await?;
            tokio::io::copy_bidirectional(&mut outside, &mut inside).await
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_dial_the_announced_address_and_never_learn_the_other() {
    let front = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let front_port = front.local_addr().expect("bound").port();
    let announced = format!("/ip4/127.0.0.1/tcp/{front_port}");
    let behind = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let behind_port = behind.local_addr().expect("bound").port();
    drop(behind);

    // The end reaches the node through what the middle one learnt of it: gossip and identify.
    let middle = Net::start(config()).await.expect("starts");
    let node = NetConfig {
        listen: vec![format!("/ip4/127.0.0.1/tcp/{behind_port}")],
        announce: vec![announced.clone()],
        bootstrap: middle.listen_addrs(),
        ..config()
    };
    let node = Net::start(node).await.expect("starts");
    let count = Arc::new(AtomicUsize::new(0));
    tokio::spawn(forward(front, behind_port, count.clone()));
    assert_eq!(
        node.listen_addrs(),
        [format!("{announced}/p2p/{}", node.me())]
    );
    node.publish(Announcement::default()).await;

    let end = NetConfig {
        listen: Vec::new(),
        bootstrap: middle.listen_addrs(),
        access: Access::DialListed(HashSet::from([middle.me(), node.me()])),
        ..config()
    };
    let end = Net::start(end).await.expect("starts");
    let mut changes = end.adverts().changes();
    let heard = async {
        while end.adverts().addrs(&node.me()).is_empty() {
            changes.changed().await.expect("network lives");
        }
    };
    tokio::time::timeout(DEADLINE, heard)
        .await
        .expect("in time");
    assert_eq!(end.adverts().addrs(&node.me()), [announced]);
    let accepted = node.accept(Proto::Session).expect("free");
    for _ in 0..2 {
        let stream = end.open(node.me(), &[], Proto::Session, DEADLINE).await;
        stream.expect("opens");
    }
    assert_eq!(count.load(Ordering::Relaxed), 1, "one connection, in front");
    drop(accepted);
}

#[tokio::test]
async fn an_address_that_nobody_can_dial_is_not_announced() {
    for wrong in [
        "/ip4/0.0.0.0/tcp/4001",
        "/ip4/203.0.113.7/tcp/0",
        "/ip4/203.0.113.7/tcp/1/p2p/12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5",
        "203.0.113.7:4001",
    ] {
        let config = NetConfig {
            announce: vec![wrong.into()],
            ..config()
        };
        let refused = Net::start(config).await.err();
        assert!(
            matches!(&refused, Some(NetError::Address { addr, .. }) if addr == wrong),
            "{wrong}: {refused:?}"
        );
    }
}
