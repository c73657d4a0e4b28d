//! Who is in an island: follows the adverts, keeps a stream to each holder near enough, opens it again when it is
//! lost.
//!
//! ```text
//! advert ─▶ same model, same numerics ─▶ stream, hello, round trips ─▶ near: up ─▶ lost: again, later each time
//!                                                                    └▶ far: in half a minute
//! ```
//! A holder whose round trip nobody knows is found out by asking it: four pings on the stream, the least counts.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use swarm_proto::{ExpertSpan, Peer, experts::ISLAND_PEERS_MAX};
use tokio::{task::JoinHandle, time::timeout};

use super::{
    holder::{Holder, LinkState},
    island::Shared,
    link::{self, Ended, Link},
    table::Expert,
};
use crate::net::Proto;

/// How long opening a stream may take.
const OPEN_DEADLINE: Duration = Duration::from_secs(5);
/// How long after a loss a holder is tried again, and how long at most after several.
const AGAIN_FIRST: Duration = Duration::from_millis(100);
const AGAIN_MAX: Duration = Duration::from_secs(5);
/// A stream that lasted so long was no failure to open.
const LASTED: Duration = Duration::from_secs(10);
/// How long after one that is too far is measured again.
const FAR_AGAIN: Duration = Duration::from_secs(30);
/// Who is known to be so many times too far is not even asked: the figure would have to be very wrong.
const FAR_TIMES: u32 = 8;
/// How often what changes without an advert is looked at: who is left alone no more.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Adverts that come together are looked at together.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// Keeps an island until it is closed.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut adverts = shared.net.adverts().changes();
    let mut stop = shared.stop.subscribe();
    let mut links: HashMap<u32, JoinHandle<()>> = HashMap::new();
    let work = async {
        loop {
            adverts.borrow_and_update();
            look(&shared, &mut links);
            let _ = timeout(LOOK_EVERY, adverts.changed()).await;
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    };
    let stopped = async {
        // An island that is gone is closed.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    tokio::select! {
        biased;
        () = stopped => {}
        () = work => {}
    }
    links.into_values().for_each(|link| link.abort());
}

/// Looks at who says that it holds experts, and has a task for each.
fn look(shared: &Arc<Shared>, links: &mut HashMap<u32, JoinHandle<()>>) {
    let mut said = HashMap::new();
    for (peer, experts) in candidates(shared) {
        let holder = shared.holder_for(peer);
        said.insert(holder.number, experts);
        let running = links
            .get(&holder.number)
            .is_some_and(|link| !link.is_finished());
        if !running {
            let task = keep(shared.clone(), holder.clone());
            links.insert(holder.number, shared.runtime.spawn(task));
        }
    }
    let gone: Vec<u32> = links
        .keys()
        .filter(|number| !said.contains_key(number))
        .copied()
        .collect();
    shared.set_held(said);
    for number in gone {
        if let Some(link) = links.remove(&number) {
            link.abort();
        }
    }
}

/// Peers that say they hold experts of the model and compute the same bits, the nearest first.
fn candidates(shared: &Shared) -> Vec<(Peer, HashSet<Expert>)> {
    let facts = &shared.facts;
    let me = shared.net.me();
    let alone = shared.book.left_alone();
    let rtts: HashMap<Peer, Duration> = shared.net.rtts().into_iter().collect();
    let far = shared.options.rtt_max.saturating_mul(FAR_TIMES);
    let mut found = Vec::new();
    for advert in &shared.net.adverts().snapshot().adverts {
        let peer = advert.peer;
        let rtt = rtts.get(&peer).copied();
        if peer == me || advert.leaving || alone.contains(&peer) || rtt.is_some_and(|rtt| rtt > far)
        {
            continue;
        }
        let model = advert.models.iter().find(|model| {
            let same_bits = model.numerics == facts.numerics && model.n_embd == facts.n_embd;
            model.model == facts.model && same_bits
        });
        let live = model.and_then(|model| Some(&model.experts.as_ref()?.live));
        let experts: HashSet<Expert> =
            live.map_or_else(HashSet::new, |live| ExpertSpan::each(live).collect());
        if !experts.is_empty() {
            found.push((rtt.unwrap_or(Duration::MAX), peer, experts));
        }
    }
    found.sort_by_key(|(rtt, peer, _)| (*rtt, *peer));
    found.truncate(ISLAND_PEERS_MAX);
    found
        .into_iter()
        .map(|(_, peer, experts)| (peer, experts))
        .collect()
}

/// Keeps a stream to one holder.
async fn keep(shared: Arc<Shared>, holder: Arc<Holder>) {
    let mut again = AGAIN_FIRST;
    loop {
        let begun = tokio::time::Instant::now();
        let ended = connect(&shared, &holder).await;
        tracing::debug!(peer = %holder.peer, why = %ended, "link to a holder of experts ended");
        holder.set_state(LinkState::Down(ended.to_string()));
        match &ended {
            Ended::Closed => return,
            Ended::Lied(why) => {
                // It is no candidate from now on, until the book has it otherwise.
                let why = format!("as a holder of experts: {why}");
                shared.book.failed(holder.peer, &why);
                return;
            }
            Ended::Lost(_) | Ended::Silent | Ended::Stuck => holder.lost(),
            _ => {}
        }
        if begun.elapsed() > LASTED {
            again = AGAIN_FIRST;
        }
        let wait = match ended {
            Ended::Far(_) => FAR_AGAIN,
            _ => again,
        };
        tokio::time::sleep(wait).await;
        again = again.saturating_mul(2).min(AGAIN_MAX);
    }
}

async fn connect(shared: &Arc<Shared>, holder: &Arc<Holder>) -> Ended {
    let opened = shared
        .net
        .open(holder.peer, &[], Proto::Experts, OPEN_DEADLINE);
    let stream = match opened.await {
        Ok(stream) => stream,
        Err(why) => return Ended::Open(why.to_string()),
    };
    let facts = &shared.facts;
    let welcome = match link::greet(stream, facts.model, facts.n_embd).await {
        Ok(welcome) => welcome,
        Err(ended) => return ended,
    };
    holder.set_rtt(welcome.rtt);
    let rtt_max = shared.options.rtt_max;
    if welcome.rtt > rtt_max {
        return Ended::Far(welcome.rtt);
    }
    let (up, requests) = Up::new(shared.clone(), holder.clone());
    Link::new(welcome, up, requests, facts.n_embd, rtt_max)
        .run()
        .await
}

/// A holder that can be asked, until this is dropped.
pub(super) struct Up {
    shared: Arc<Shared>,
    holder: Arc<Holder>,
}

impl Up {
    fn new(
        shared: Arc<Shared>,
        holder: Arc<Holder>,
    ) -> (Self, tokio::sync::mpsc::Receiver<link::Request>) {
        let requests = holder.connect();
        shared.linked(holder.number);
        (Self { shared, holder }, requests)
    }

    pub(super) fn holder(&self) -> &Holder {
        &self.holder
    }

    /// It is asked no more.
    pub(super) fn down(&self) {
        if self.holder.disconnect() {
            self.shared.relinked();
        }
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.down();
    }
}
