//! A gate in front of each node, through which everything towards it passes, and which can be a bad link: slow,
//! narrow, lossy, cut in one direction, or one that changes bytes. In user space, for every system and any user.
//!
//! ```text
//!   dialler ─▶ gate (the address a node announces) ─ pump ─▶ node          a connection is two pumps,
//!           ◀──────────────────────────────────────── pump ─┘             one for each direction
//! ```
//! What a node dials passes the gate of whom it dials; the gate knows a dialling node by its port, because nodes dial
//! from the port they listen on. So the [`Links`] of a node hold for all its connections, whoever dialled.
//!
//! It carries TCP, as TCP: nothing is lost or reordered. A lost packet is a wait for its retransmission, and what a
//! cut holds back arrives when it heals.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::client::poll_pause;
use crate::plan::Seeded;

/// What is read at once: a frame of a testnet's model and more.
const CHUNK_BYTES: usize = 16 * 1024;
/// Bytes a pump holds back before it stops reading, as a router's queue would drop.
const QUEUE_BYTES: usize = 256 * 1024;
/// How long a lost packet is waited for: the least retransmission timeout of common systems.
const RETRANSMISSION: Duration = Duration::from_millis(200);
/// Files for the sockets of many nodes; macOS gives 256 unasked.
const OPEN_FILES: u64 = 4096;

/// What is wrong with one direction of a node's connections; by default nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// Nothing passes; it is kept, and passes when the cut heals.
    pub cut: bool,
    /// Each chunk is late by this.
    pub delay: Duration,
    /// And by up to this more.
    pub jitter: Duration,
    /// At most so many bytes a second; 0 for as many as there are.
    pub bytes_per_s: u64,
    /// So many of 1,000 chunks wait for 200 ms as for a retransmission, and what follows waits behind them.
    pub lost_per_mille: u64,
    /// One bit of each chunk is another.
    pub flip: bool,
}

impl Link {
    /// One link after the other.
    fn then(self, next: Self) -> Self {
        Self {
            cut: self.cut || next.cut,
            delay: self.delay + next.delay,
            jitter: self.jitter + next.jitter,
            bytes_per_s: match (self.bytes_per_s, next.bytes_per_s) {
                (0, other) | (other, 0) => other,
                (one, other) => one.min(other),
            },
            lost_per_mille: self.lost_per_mille.max(next.lost_per_mille),
            flip: self.flip || next.flip,
        }
    }
}

impl std::fmt::Display for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut parts = Vec::new();
        if self.cut {
            parts.push("cut".to_owned());
        }
        if self.delay + self.jitter > Duration::ZERO {
            let (least, most) = (
                self.delay.as_millis(),
                (self.delay + self.jitter).as_millis(),
            );
            parts.push(format!("late by {least} to {most} ms"));
        }
        if self.bytes_per_s > 0 {
            parts.push(format!("with {} bytes/s", self.bytes_per_s));
        }
        if self.lost_per_mille > 0 {
            parts.push(format!("with {} ‰ lost", self.lost_per_mille));
        }
        if self.flip {
            parts.push("with flipped bits".to_owned());
        }
        f.write_str(&parts.join(", "))
    }
}

/// Both directions of a node's connections.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Links {
    /// What it sends.
    pub from: Link,
    /// What it is sent.
    pub to: Link,
}

impl Links {
    /// The same in both directions.
    pub fn both(link: Link) -> Self {
        Self {
            from: link,
            to: link,
        }
    }
}

/// A node behind its gate.
#[derive(Clone, Debug)]
struct Behind {
    /// Where it listens, and dials from.
    port: u16,
    links: Links,
    /// How often its connections were broken.
    resets: u64,
}

/// The gates of a swarm. They close, and all connections with them, when this is dropped.
#[derive(Debug)]
pub struct Relay {
    nodes: watch::Sender<Vec<Behind>>,
    gates: JoinSet<()>,
    seed: u64,
}

impl Relay {
    /// No gates yet; `seed` is what jitter, loss and the flipped bits are drawn from.
    pub fn new(seed: u64) -> Self {
        raise_open_files();
        Self {
            nodes: watch::Sender::new(Vec::new()),
            gates: JoinSet::new(),
            seed,
        }
    }

    /// Opens a gate in front of `behind`, a port on loopback, and returns its own port there. Gates have numbers
    /// from 0, in the order in which they are opened. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the system gives no port.
    pub fn open(&mut self, behind: u16) -> Result<u16> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| {
                listener.set_nonblocking(true)?;
                TcpListener::from_std(listener)
            })
            .context("cannot open a gate")?;
        let port = listener.local_addr()?.port();
        let number = self.nodes.borrow().len();
        self.nodes.send_modify(|nodes| {
            nodes.push(Behind {
                port: behind,
                links: Links::default(),
                resets: 0,
            });
        });
        let seeded = Seeded::new(self.seed ^ (number as u64) << 32);
        self.gates
            .spawn(gate(listener, number, self.nodes.subscribe(), seeded));
        Ok(port)
    }

    /// The node of a gate listens elsewhere from now on.
    pub fn moved(&self, number: usize, behind: u16) {
        self.change(number, |node| node.port = behind);
    }

    /// How a node's connections are from now on.
    pub fn set(&self, number: usize, links: Links) {
        self.change(number, |node| node.links = links);
    }

    /// Breaks a node's connections; new ones are as before.
    pub fn reset(&self, number: usize) {
        self.change(number, |node| node.resets += 1);
    }

    fn change(&self, number: usize, change: impl FnOnce(&mut Behind)) {
        self.nodes.send_modify(|nodes| {
            if let Some(node) = nodes.get_mut(number) {
                change(node);
            }
        });
    }
}

/// Fewer than wanted will do for few nodes.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < OPEN_FILES) {
        let current = Some(limit.maximum.map_or(OPEN_FILES, |max| max.min(OPEN_FILES)));
        let _ = setrlimit(Resource::Nofile, Rlimit { current, ..limit });
    }
}

type Nodes = watch::Receiver<Vec<Behind>>;

async fn gate(listener: TcpListener, number: usize, nodes: Nodes, mut seeded: Seeded) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((dialler, from)) => {
                    let seed = Seeded::new(seeded.next_u64());
                    connections.spawn(connection(dialler, from, number, nodes.clone(), seed));
                }
                // No file is left: one may be soon.
                Err(_) => poll_pause().await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Who is at an end of a connection.
#[derive(Clone, Copy, Debug)]
enum End {
    /// The node of this gate.
    Gate(usize),
    /// Whoever dials from this port: a node, or a client.
    Port(u16),
}

impl End {
    fn find(self, nodes: &[Behind]) -> Option<&Behind> {
        match self {
            End::Gate(number) => nodes.get(number),
            End::Port(port) => nodes.iter().find(|node| node.port == port),
        }
    }
}

async fn connection(
    dialler: TcpStream,
    from: SocketAddr,
    number: usize,
    mut nodes: Nodes,
    mut seeded: Seeded,
) -> io::Result<()> {
    let ends = (End::Port(from.port()), End::Gate(number));
    let resets = |nodes: &[Behind]| {
        let of = |end: End| end.find(nodes).map_or(0, |node| node.resets);
        of(ends.0) + of(ends.1)
    };
    let (before, port) = {
        let nodes = nodes.borrow_and_update();
        let port = ends.1.find(&nodes).map_or(0, |node| node.port);
        (resets(&nodes), port)
    };
    let node = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    dialler.set_nodelay(true)?;
    node.set_nodelay(true)?;
    let (from_dialler, to_dialler) = dialler.into_split();
    let (from_node, to_node) = node.into_split();
    let there = Pump::new(ends, nodes.clone(), seeded.next_u64());
    let back = Pump::new((ends.1, ends.0), nodes.clone(), seeded.next_u64());
    let both = async {
        tokio::try_join!(
            there.run(from_dialler, to_node),
            back.run(from_node, to_dialler)
        )
    };
    tokio::select! {
        done = both => done.map(drop),
        _ = nodes.wait_for(|nodes| resets(nodes) != before) => Ok(()),
    }
}

/// One direction of a connection.
struct Pump {
    ends: (End, End),
    nodes: Nodes,
    seeded: Seeded,
    /// What waits, each with the time at which it goes on.
    queue: VecDeque<(Instant, Vec<u8>)>,
    queued_bytes: usize,
    /// When the narrowest part of the link has sent all it was given.
    free_at: Instant,
}

impl Pump {
    fn new(ends: (End, End), nodes: Nodes, seed: u64) -> Self {
        Self {
            ends,
            nodes,
            seeded: Seeded::new(seed),
            queue: VecDeque::new(),
            queued_bytes: 0,
            free_at: Instant::now(),
        }
    }

    fn link(&mut self) -> Link {
        let nodes = self.nodes.borrow_and_update();
        let links = |end: End| end.find(&nodes).map(|node| node.links).unwrap_or_default();
        links(self.ends.0).from.then(links(self.ends.1).to)
    }

    /// Carries bytes until one side closes or breaks, or the gates close.
    async fn run(mut self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut ended = false;
        while !(ended && self.queue.is_empty()) {
            let link = self.link();
            let next = self.queue.front().map(|(at, _)| *at);
            let due = async {
                match next {
                    Some(at) if !link.cut => sleep_until(at).await,
                    _ => std::future::pending().await,
                }
            };
            let room = !ended && !link.cut && self.queued_bytes < QUEUE_BYTES;
            tokio::select! {
                biased;
                changed = self.nodes.changed() => if changed.is_err() {
                    return Ok(());
                },
                () = due => if let Some((_, bytes)) = self.queue.pop_front() {
                    self.queued_bytes -= bytes.len();
                    to.write_all(&bytes).await?;
                },
                read = from.read(&mut chunk), if room => {
                    let bytes = &mut chunk[..read?];
                    ended = bytes.is_empty();
                    if link == Link::default() && self.queue.is_empty() {
                        // A timer would add up to a millisecond.
                        to.write_all(bytes).await?;
                    } else if !ended {
                        self.hold(link, bytes);
                    }
                }
            }
        }
        to.shutdown().await
    }

    /// Queues a chunk for the time at which this link would deliver it, behind what is before it.
    fn hold(&mut self, link: Link, bytes: &mut [u8]) {
        let now = Instant::now();
        if link.flip {
            let bit = self.seeded.below(bytes.len() as u64 * 8);
            bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
        }
        let nanos = (bytes.len() as u64 * 1_000_000_000).checked_div(link.bytes_per_s);
        self.free_at = self.free_at.max(now) + Duration::from_nanos(nanos.unwrap_or(0));
        let jitter = Duration::from_nanos(self.seeded.below(link.jitter.as_nanos() as u64));
        let mut at = self.free_at + link.delay + jitter;
        if self.seeded.below(1000) < link.lost_per_mille {
            at += RETRANSMISSION;
        }
        let at = self.queue.back().map_or(at, |(before, _)| at.max(*before));
        self.queued_bytes += bytes.len();
        self.queue.push_back((at, bytes.to_vec()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The port of one that sends everything back.
    async fn echoing() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.into_split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        port
    }

    /// A gate in front of it, and a connection through that.
    async fn echo() -> (Relay, TcpStream) {
        let mut relay = Relay::new(1);
        let port = relay.open(echoing().await).unwrap();
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        (relay, stream)
    }

    async fn back(stream: &mut TcpStream, bytes: &[u8]) -> (Vec<u8>, Duration) {
        let begun = Instant::now();
        stream.write_all(bytes).await.unwrap();
        let mut got = vec![0; bytes.len()];
        stream.read_exact(&mut got).await.unwrap();
        (got, begun.elapsed())
    }

    /// Whether a byte comes back within `limit`.
    async fn comes(stream: &mut TcpStream, limit: Duration) -> bool {
        let read = tokio::time::timeout(limit, stream.read_u8()).await;
        read.is_ok_and(|read| read.is_ok())
    }

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn a_sound_link_changes_nothing() {
        let (_relay, mut stream) = echo().await;
        let bytes: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        let (mut from, mut to) = stream.split();
        let mut got = vec![0; bytes.len()];
        let (sent, read) = tokio::join!(to.write_all(&bytes), from.read_exact(&mut got));
        sent.and(read.map(drop)).unwrap();
        assert!(got == bytes);
        to.shutdown().await.unwrap();
        assert_eq!(stream.read(&mut got).await.unwrap(), 0, "the end arrives");
    }

    #[tokio::test]
    async fn a_delay_holds_in_both_directions_and_keeps_the_order() {
        let (relay, mut stream) = echo().await;
        let delay = Duration::from_millis(60);
        relay.set(
            0,
            Links::both(Link {
                delay,
                jitter: delay,
                ..Link::default()
            }),
        );
        for round in 0..5u8 {
            let (got, took) = back(&mut stream, &[round; 3]).await;
            assert_eq!(got, [round; 3]);
            assert!(took >= 2 * delay, "{took:?}");
        }
        let numbers: Vec<u8> = (0..40).collect();
        for number in &numbers {
            stream.write_all(&[*number]).await.unwrap();
        }
        let mut got = vec![0; numbers.len()];
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(got, numbers);
        relay.set(0, Links::default());
        let (_, took) = back(&mut stream, b"x").await;
        assert!(took < 2 * delay, "{took:?}");
    }

    #[tokio::test]
    async fn a_cut_of_one_way_leaves_the_other_and_keeps_what_it_holds_back() {
        let (relay, mut stream) = echo().await;
        back(&mut stream, b"x").await;
        let cut = Link {
            cut: true,
            ..Link::default()
        };
        for (links, reaches_the_node) in [
            (
                Links {
                    to: cut,
                    ..Links::default()
                },
                false,
            ),
            (
                Links {
                    from: cut,
                    ..Links::default()
                },
                true,
            ),
        ] {
            relay.set(0, links);
            stream.write_all(b"a").await.unwrap();
            assert!(!comes(&mut stream, SHORT).await, "{links:?}");
            // What reached the node waits on its way back, and comes although the way there is cut now.
            let other = Links {
                from: links.to,
                to: links.from,
            };
            relay.set(0, other);
            assert_eq!(
                comes(&mut stream, SHORT).await,
                reaches_the_node,
                "{links:?}"
            );
            relay.set(0, Links::default());
            if !reaches_the_node {
                assert!(comes(&mut stream, LONG).await, "{links:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_narrow_link_takes_its_time() {
        let (relay, mut stream) = echo().await;
        let narrow = Link {
            bytes_per_s: 20_000,
            ..Link::default()
        };
        relay.set(
            0,
            Links {
                to: narrow,
                ..Links::default()
            },
        );
        let (_, took) = back(&mut stream, &[7; 10_000]).await;
        assert!(took >= Duration::from_millis(490), "{took:?}");
    }

    #[tokio::test]
    async fn a_lost_packet_is_a_wait() {
        let (relay, mut stream) = echo().await;
        let lossy = Link {
            lost_per_mille: 1000,
            ..Link::default()
        };
        relay.set(
            0,
            Links {
                from: lossy,
                ..Links::default()
            },
        );
        let (got, took) = back(&mut stream, b"late").await;
        assert_eq!(got, b"late");
        assert!(took >= RETRANSMISSION, "{took:?}");
    }

    #[tokio::test]
    async fn a_flipped_bit_is_one_bit() {
        let (relay, mut stream) = echo().await;
        let flip = Link {
            flip: true,
            ..Link::default()
        };
        relay.set(
            0,
            Links {
                to: flip,
                ..Links::default()
            },
        );
        let (got, _) = back(&mut stream, &[0; 64]).await;
        let ones: u32 = got.iter().map(|byte| byte.count_ones()).sum();
        assert_eq!(ones, 1, "{got:?}");
    }

    #[tokio::test]
    async fn links_hold_for_what_a_node_dials_too_and_a_reset_breaks_it() {
        let mut relay = Relay::new(1);
        let port = relay.open(echoing().await).unwrap();
        let node = tokio::net::TcpSocket::new_v4().unwrap();
        node.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        relay.open(node.local_addr().unwrap().port()).unwrap();
        let mut stream = node.connect(([127, 0, 0, 1], port).into()).await.unwrap();
        back(&mut stream, b"x").await;
        let delay = Duration::from_millis(60);
        let slow = Link {
            delay,
            ..Link::default()
        };
        relay.set(
            1,
            Links {
                from: slow,
                ..Links::default()
            },
        );
        let (_, took) = back(&mut stream, b"x").await;
        assert!(took >= delay, "{took:?}");
        relay.reset(1);
        let ended = tokio::time::timeout(LONG, stream.read_u8()).await;
        assert!(matches!(ended, Ok(Err(_))), "{ended:?}");
    }
}
