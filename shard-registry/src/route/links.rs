//! The delays that peers measured between each other, in the form that a search reads: for each giver its
//! takers, the nearest first. Looking them all up costs more than a search, and they hardly change, so they
//! are kept beside the adverts from one plan to the next.

use std::sync::{Arc, Mutex, PoisonError};

use swarm_proto::{Advert, LayerRange, ModelId, Peer};

use super::index::Index;

/// Seats of one model: more peers than an advert table knows.
pub(super) const SEATS_MAX: usize = (1 << 13) - 1;
/// Models whose links are kept; who plans for more looks some up each time.
const MODELS_KEPT: usize = 4;
/// One changed advert of so many is reason to look all links up anew. Round trips are the least of minutes:
/// those of an advert before are as good for finding a route, which is priced by the newest.
const CHANGED_SHARE: usize = 4;

/// A delay that was measured, from one end's view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Link {
    /// The smallest round trip that either end measured.
    pub(super) rtt_us: u32,
    /// The other end's seat.
    pub(super) to: u16,
}

/// Where somebody who served the model sits, and the links between them.
#[derive(Debug, Default)]
pub(super) struct Links {
    /// Sorted by peer: whose advert was read, and his seat. Seats follow each other as their layers do.
    seats: Vec<(Peer, u64, u32)>,
    /// Of each giver the nearest taker first.
    takers: Ends,
    /// Of each taker the round trip to the nearest giver, `u32::MAX` where there is none.
    nearest: Vec<u32>,
}

/// Links by one of their ends.
#[derive(Debug, Default)]
struct Ends {
    /// Where each seat's links begin; one more for the end.
    from: Vec<u32>,
    links: Vec<Link>,
}

/// Links of a few models, the one that was asked for last at the end.
#[derive(Debug, Default)]
pub(crate) struct Cell(Mutex<Vec<Kept>>);

#[derive(Debug, Clone)]
struct Kept {
    model: ModelId,
    n_layer: u16,
    links: Arc<Links>,
}

/// Somebody who serves the model, as far as links are concerned.
pub(super) struct Server<'a> {
    pub(super) advert: &'a Advert,
    /// From the first of its layers to the last.
    pub(super) extent: LayerRange,
}

impl Cell {
    /// A cell that begins with what this one holds now.
    pub(crate) fn fork(&self) -> Cell {
        Cell(Mutex::new(self.lock().clone()))
    }

    /// The links between those who serve a model, sorted by peer, and where each of them sits. Who has come
    /// since they were looked up has a seat behind all others and no links.
    pub(super) fn of(
        &self,
        model: ModelId,
        n_layer: u16,
        servers: &[Server],
    ) -> (Arc<Links>, Vec<u32>) {
        let of_model = |kept: &Kept| kept.model == model && kept.n_layer == n_layer;
        let kept = self.lock().iter().find(|kept| of_model(kept)).cloned();
        if let Some(Kept { links, .. }) = kept
            && let Some(seats) = links.seats_of(servers)
        {
            return (links, seats);
        }
        // Not under the lock: others plan meanwhile.
        let links = Arc::new(Links::between(servers));
        let seats = links.seats_of(servers).unwrap_or_default();
        let mut all = self.lock();
        all.retain(|kept| !of_model(kept));
        if all.len() >= MODELS_KEPT {
            all.remove(0);
        }
        all.push(Kept {
            model,
            n_layer,
            links: Arc::clone(&links),
        });
        (links, seats)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Kept>> {
        // Nothing is half done under it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Links {
    fn between(servers: &[Server]) -> Links {
        let servers = &servers[..servers.len().min(SEATS_MAX)];
        let mut order: Vec<u32> = (0u32..).take(servers.len()).collect();
        order.sort_by_key(|at| servers[*at as usize].extent.start);
        let mut seat = vec![0; servers.len()];
        for (n, at) in (0u32..).zip(&order) {
            seat[*at as usize] = n;
        }
        let mut seats = Vec::with_capacity(servers.len());
        for (server, seat) in servers.iter().zip(&seat) {
            seats.push((server.advert.peer, server.advert.seq, *seat));
        }
        let mut takers = Ends::by(servers.len(), &pairs(servers, &seat));
        takers.nearest_first();
        let mut nearest = vec![u32::MAX; servers.len()];
        for link in &takers.links {
            let nearest = &mut nearest[usize::from(link.to)];
            *nearest = link.rtt_us.min(*nearest);
        }
        Links {
            seats,
            takers,
            nearest,
        }
    }

    /// Where each of these sits; `None` where too many of their adverts are newer.
    fn seats_of(&self, servers: &[Server]) -> Option<Vec<u32>> {
        let mut known = self.seats.iter().peekable();
        let mut next = self.seats.len() as u32;
        let mut newer = 0;
        let mut seats = Vec::with_capacity(servers.len());
        for server in servers {
            let Advert { peer, seq, .. } = server.advert;
            while known.next_if(|seat| seat.0 < *peer).is_some() {
                newer += 1;
            }
            match known.next_if(|seat| seat.0 == *peer) {
                Some((_, read, seat)) => {
                    newer += usize::from(read != seq);
                    seats.push(*seat);
                }
                None => {
                    newer += 1;
                    seats.push(next);
                    next += 1;
                }
            }
        }
        newer += known.count();
        let full = servers.len() > SEATS_MAX && self.seats.len() == SEATS_MAX;
        (full || newer * CHANGED_SHARE <= servers.len()).then_some(seats)
    }

    /// Seats of those who were there when the links were looked up.
    pub(super) fn len(&self) -> usize {
        self.seats.len()
    }

    /// The links of a giver, the nearest taker first.
    pub(super) fn takers(&self, giver: u16) -> &[Link] {
        self.takers.of(giver)
    }

    /// The round trip to a taker's nearest giver, where one was measured.
    pub(super) fn nearest_giver(&self, taker: u16) -> Option<u32> {
        let nearest = self.nearest.get(usize::from(taker)).copied();
        nearest.filter(|rtt_us| *rtt_us < u32::MAX)
    }

    /// Whether the delay between them was measured.
    pub(super) fn measured(&self, giver: u16, taker: u16) -> bool {
        self.takers(giver).iter().any(|link| link.to == taker)
    }
}

impl Ends {
    /// Links given with the seat of the end by which they are found.
    fn by(n_seats: usize, links: &[(u16, Link)]) -> Ends {
        let mut from = vec![0; n_seats + 1];
        for (seat, _) in links {
            from[usize::from(*seat) + 1] += 1;
        }
        for seat in 1..from.len() {
            from[seat] += from[seat - 1];
        }
        let mut next = from.clone();
        let mut sorted = vec![Link { rtt_us: 0, to: 0 }; links.len()];
        for (seat, link) in links {
            let next = &mut next[usize::from(*seat)];
            sorted[*next as usize] = *link;
            *next += 1;
        }
        Ends {
            from,
            links: sorted,
        }
    }

    /// Sorts each seat's links, and keeps the nearest to each other end.
    fn nearest_first(&mut self) {
        let mut seen = vec![u16::MAX; self.from.len()];
        let mut kept = 0;
        for seat in 0..self.from.len() - 1 {
            let of_seat = self.from[seat] as usize..self.from[seat + 1] as usize;
            self.links[of_seat.clone()].sort_unstable();
            self.from[seat] = kept as u32;
            for at in of_seat {
                let link = self.links[at];
                let last = &mut seen[usize::from(link.to)];
                if usize::from(*last) != seat {
                    *last = seat as u16;
                    self.links[kept] = link;
                    kept += 1;
                }
            }
        }
        self.links.truncate(kept);
        if let Some(end) = self.from.last_mut() {
            *end = kept as u32;
        }
    }

    fn of(&self, seat: u16) -> &[Link] {
        let seat = usize::from(seat);
        match self.from.get(seat..seat + 2) {
            Some(ends) => &self.links[ends[0] as usize..ends[1] as usize],
            None => &[],
        }
    }
}

/// What either end measured, with the giver's seat. Only where the giver may hold a layer and the taker the one
/// behind it.
fn pairs(servers: &[Server], seat: &[u32]) -> Vec<(u16, Link)> {
    let index = Index::of(servers.iter().map(|server| &server.advert.peer));
    let n_rtts = servers.iter().map(|server| server.advert.rtts.len()).sum();
    let mut pairs = Vec::with_capacity(n_rtts);
    for (a, server) in servers.iter().enumerate() {
        for (other, rtt_us) in &server.advert.rtts {
            let Some(b) = index.find(other).filter(|b| *b != a) else {
                continue;
            };
            for (giver, taker) in [(a, b), (b, a)] {
                if meet(servers[giver].extent, servers[taker].extent) {
                    let (rtt_us, to) = (*rtt_us, seat[taker] as u16);
                    pairs.push((seat[giver] as u16, Link { rtt_us, to }));
                }
            }
        }
    }
    pairs
}

/// Whether rows can be handed over between peers that serve layers within these.
fn meet(giver: LayerRange, taker: LayerRange) -> bool {
    taker.start <= giver.end && giver.start + 1 < taker.end
}
