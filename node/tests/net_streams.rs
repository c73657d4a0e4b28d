//! Streams between networks in one process, over loopback: opened, refused, bounded.
#![allow(clippy::expect_used)] // helpers of tests

use std::{collections::HashSet, time::Duration};

use node::{Access, Identity, Net, NetConfig, OpenError, Proto, Stream};
use swarm_proto::{PROTOCOL_VERSION, Peer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};

const DEADLINE: Duration = Duration::from_secs(20);
const TCP: &str = "/ip4/127.0.0.1/tcp/0";
const QUIC: &str = "/ip4/127.0.0.1/udp/0/quic-v1";

fn config(swarm: &str) -> NetConfig {
    NetConfig::client(Identity::generate(), swarm.parse().expect("swarm id"))
}

fn listening(swarm: &str, addr: &str) -> NetConfig {
    NetConfig {
        listen: vec![addr.into()],
        ..config(swarm)
    }
}

async fn start(config: NetConfig) -> Net {
    // `RUST_LOG=node=debug` shows what happened in a failing test.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_test_writer()
        .try_init();
    Net::start(config).await.expect("network starts")
}

async fn echo(mut streams: mpsc::Receiver<(Peer, Stream)>) {
    while let Some((_, mut stream)) = streams.recv().await {
        tokio::spawn(async move {
            let mut buf = vec![0; 64 * 1024];
            while let Ok(n @ 1..) = stream.read(&mut buf).await {
                if stream.write_all(&buf[..n]).await.is_err() || stream.flush().await.is_err() {
                    break;
                }
            }
            let _ = stream.shutdown().await;
        });
    }
}

async fn echoes_over(addr: &str) {
    let (server, client) = (start(listening("t", addr)).await, start(config("t")).await);
    tokio::spawn(echo(server.accept(Proto::Session).expect("free")));
    let addrs = server.listen_addrs();
    let mut stream = client
        .open(server.me(), &addrs, Proto::Session, DEADLINE)
        .await
        .expect("opens");
    stream.write_all(b"hello").await.expect("writes");
    stream.flush().await.expect("flushes");
    let mut back = [0; 5];
    stream.read_exact(&mut back).await.expect("reads");
    assert_eq!(&back, b"hello");
    stream.shutdown().await.expect("closes our half");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.expect("end of stream");
    assert!(rest.is_empty());
    client.shutdown().await;
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_echoes_over_tcp() {
    echoes_over(TCP).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_echoes_over_quic() {
    echoes_over(QUIC).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_echoes_under_a_shared_key_and_not_under_another() {
    let key = |byte| Some([byte; 32]);
    let server = start(NetConfig {
        key: key(1),
        ..listening("t", TCP)
    })
    .await;
    tokio::spawn(echo(server.accept(Proto::Session).expect("free")));
    let addrs = server.listen_addrs();
    let friend = start(NetConfig {
        key: key(1),
        ..config("t")
    })
    .await;
    friend
        .open(server.me(), &addrs, Proto::Session, DEADLINE)
        .await
        .expect("same key");
    for other in [key(2), None] {
        let stranger = start(NetConfig {
            key: other,
            ..config("t")
        })
        .await;
        let refused = stranger
            .open(server.me(), &addrs, Proto::Session, DEADLINE)
            .await;
        let refused = refused.expect_err("other key");
        assert!(
            matches!(
                refused,
                OpenError::Unreachable { .. } | OpenError::Timeout { .. }
            ),
            "{refused}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quic_under_a_shared_key_is_refused_at_start() {
    let private = NetConfig {
        key: Some([1; 32]),
        ..listening("t", QUIC)
    };
    let error = Net::start(private)
        .await
        .expect_err("QUIC is not covered by the key");
    assert!(error.to_string().contains("QUIC"), "{error}");
}

/// What two versions share.
#[derive(libp2p::swarm::NetworkBehaviour)]
struct Newer {
    identify: libp2p::identify::Behaviour,
    ping: libp2p::ping::Behaviour,
}

/// A peer of swarm `t` that speaks a later version of everything.
async fn newer_peer() -> (Peer, String) {
    use futures::StreamExt;
    use libp2p::{SwarmBuilder, identify, noise, swarm::SwarmEvent, tcp, yamux};
    let behaviour = |key: &libp2p::identity::Keypair| Newer {
        identify: identify::Behaviour::new(identify::Config::new(
            format!("/shoal/t/{}", PROTOCOL_VERSION + 1),
            key.public(),
        )),
        ping: Default::default(),
    };
    let mut newer = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(
            tcp::Config::default(),
            noise::Config::new,
            yamux::Config::default,
        )
        .expect("a transport")
        .with_behaviour(behaviour)
        .expect("a behaviour")
        .build();
    newer
        .listen_on(TCP.parse().expect("an address"))
        .expect("listens");
    let addr = loop {
        if let SwarmEvent::NewListenAddr { address, .. } = newer.select_next_some().await {
            break address;
        }
    };
    let peer = newer.local_peer_id().to_string();
    tokio::spawn(async move {
        loop {
            newer.select_next_some().await;
        }
    });
    let addr = format!("{addr}/p2p/{peer}");
    (peer.parse().expect("an ed25519 id"), addr)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_version_is_named_in_the_error() {
    let (peer, addr) = newer_peer().await;
    let client = start(config("t")).await;
    let refused = client
        .open(peer, &[addr], Proto::Session, DEADLINE)
        .await
        .expect_err("another version");
    assert_eq!(
        refused.to_string(),
        format!(
            "peer {peer} speaks another version of Shoal (theirs {}, ours {PROTOCOL_VERSION}): update the older one",
            PROTOCOL_VERSION + 1
        )
    );
    let strangers = client.strangers();
    assert!(
        matches!(strangers[..], [OpenError::OtherVersion { theirs, .. }] if theirs == PROTOCOL_VERSION + 1),
        "{strangers:?}"
    );
    assert!(client.peers().borrow().is_empty(), "it is none of us");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_published_nothing_leaves_at_once_and_what_was_heard_has_arrived() {
    let server = start(listening("t", TCP)).await;
    let mut accepted = server.accept(Proto::Session).expect("free");
    let mut quickest = DEADLINE;
    // A loaded machine may be slow once; waiting for gossip that is not there would be slow each time.
    for _ in 0..5 {
        let client = start(config("t")).await;
        let opened = client
            .open(
                server.me(),
                &server.listen_addrs(),
                Proto::Session,
                DEADLINE,
            )
            .await;
        let mut stream = opened.expect("opens");
        let say = async {
            stream.write_all(b"goodbye").await.expect("writes");
            stream.shutdown().await.expect("closes");
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.expect("is closed");
            let begun = std::time::Instant::now();
            client.shutdown().await;
            begun.elapsed()
        };
        let hear = async {
            let (_, mut theirs) = accepted.recv().await.expect("a stream");
            let mut heard = Vec::new();
            theirs.read_to_end(&mut heard).await.expect("reads");
            theirs.shutdown().await.expect("closes");
            heard
        };
        let (took, heard) = tokio::join!(say, hear);
        quickest = quickest.min(took);
        assert_eq!(heard, b"goodbye");
    }
    assert!(quickest < Duration::from_millis(250), "{quickest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("addr").port();
    let error = Net::start(listening("t", &format!("/ip4/127.0.0.1/tcp/{port}"))).await;
    let error = error.expect_err("in use").to_string();
    assert!(
        error.contains("in use") && error.contains(&port.to_string()),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_allow_list_refuses_others_in_both_directions() {
    let friend = start(config("t")).await;
    let stranger = start(listening("t", TCP)).await;
    tokio::spawn(echo(stranger.accept(Proto::Session).expect("free")));
    let access = Access::Listed(HashSet::from([friend.me()]));
    let server = start(NetConfig {
        access,
        ..listening("t", TCP)
    })
    .await;
    tokio::spawn(echo(server.accept(Proto::Session).expect("free")));
    let addrs = server.listen_addrs();
    friend
        .open(server.me(), &addrs, Proto::Session, DEADLINE)
        .await
        .expect("listed");
    let inbound = stranger
        .open(server.me(), &addrs, Proto::Session, DEADLINE)
        .await;
    inbound.expect_err("not listed: its connection is closed at once");
    let outbound = server
        .open(
            stranger.me(),
            &stranger.listen_addrs(),
            Proto::Session,
            DEADLINE,
        )
        .await;
    let outbound = outbound.expect_err("not listed: not dialled");
    assert!(
        matches!(outbound, OpenError::NotAllowed { .. }),
        "{outbound}"
    );
    let mut peers = server.peers();
    let known = peers.wait_for(|peers| !peers.is_empty());
    let known = tokio::time::timeout(DEADLINE, known)
        .await
        .expect("in time");
    assert_eq!(*known.expect("network lives"), [friend.me()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_swarm_is_named_in_the_error() {
    let (server, client) = (
        start(listening("theirs", TCP)).await,
        start(config("ours")).await,
    );
    tokio::spawn(echo(server.accept(Proto::Session).expect("free")));
    let refused = client
        .open(
            server.me(),
            &server.listen_addrs(),
            Proto::Session,
            DEADLINE,
        )
        .await;
    let refused = refused.expect_err("another swarm");
    assert!(matches!(refused, OpenError::OtherSwarm { .. }), "{refused}");
    let text = refused.to_string();
    assert!(text.contains("speaks swarm theirs, we are ours"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_protocol_not_offered_is_a_version_mismatch_that_says_what_is() {
    let (server, client) = (start(listening("t", TCP)).await, start(config("t")).await);
    let _fetch = server.accept(Proto::Fetch).expect("free");
    let refused = client
        .open(
            server.me(),
            &server.listen_addrs(),
            Proto::Session,
            DEADLINE,
        )
        .await;
    let refused = refused.expect_err("no session protocol there").to_string();
    let name = |what: &str| format!("/shoal/t/{what}/{PROTOCOL_VERSION}");
    assert!(refused.contains(&name("session")), "{refused}");
    assert!(refused.contains(&name("fetch")), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_is_unreachable_and_no_address_says_so() {
    let gone = start(listening("t", TCP)).await;
    let (peer, addrs) = (gone.me(), gone.listen_addrs());
    gone.shutdown().await;
    let client = start(config("t")).await;
    let dead = client
        .open(peer, &addrs, Proto::Session, DEADLINE)
        .await
        .expect_err("gone");
    assert!(matches!(dead, OpenError::Unreachable { .. }), "{dead}");
    let nowhere = client
        .open(peer, &[], Proto::Session, DEADLINE)
        .await
        .expect_err("nowhere");
    assert!(matches!(nowhere, OpenError::NoAddress { .. }), "{nowhere}");
    client.shutdown().await;
    let down = client
        .open(peer, &addrs, Proto::Session, DEADLINE)
        .await
        .expect_err("down");
    assert!(matches!(down, OpenError::ShuttingDown), "{down}");
}

/// Nobody takes the streams of the server: its queue fills, then every opener hears no, and the
/// driver goes on serving others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_a_thousand_openings_is_bounded_and_refused_visibly() {
    let (server, client) = (start(listening("t", TCP)).await, start(config("t")).await);
    let kept = server.accept(Proto::Session).expect("free");
    tokio::spawn(echo(server.accept(Proto::Answer).expect("free")));
    let addrs = server.listen_addrs();
    let one = |net: Net, peer, addrs: Vec<String>| async move {
        net.open(peer, &addrs, Proto::Session, DEADLINE).await
    };
    let all: Vec<_> = (0..1000)
        .map(|_| tokio::spawn(one(client.clone(), server.me(), addrs.clone())))
        .collect();
    let (mut open, mut refused) = (Vec::new(), 0);
    for task in all {
        match task.await.expect("no panic") {
            Ok(stream) => open.push(stream),
            Err(OpenError::Refused { .. } | OpenError::Busy { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(open.len() + refused, 1000);
    assert!(!open.is_empty() && open.len() <= 64, "{} open", open.len());
    assert_eq!(
        kept.len(),
        open.len(),
        "each admitted stream is in the queue"
    );
    let mut other = client
        .open(server.me(), &addrs, Proto::Answer, DEADLINE)
        .await
        .expect("alive");
    other.write_all(b"x").await.expect("writes");
    assert_eq!(other.read_u8().await.expect("reads"), b'x');
}
