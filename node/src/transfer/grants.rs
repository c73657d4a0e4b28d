//! Each shard is given once: who asks later is told who has it, or is getting it, so that the first holder's uplink
//! is not all there is. Where the uplink is limited, shards are begun one after the other: what everybody shares
//! nobody has soon. Pure: time, and who is there, are passed in.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use swarm_proto::{Peer, ShardId, transfer::ELSEWHERE_MAX};

/// A grant that nothing was asked for by for so long, before it was used up, is void: its peer has it from
/// others, or gave up.
const IDLE: Duration = Duration::from_secs(15);
/// Shards that are on their way at once over an uplink that is full: the second goes on while the first one's peer
/// turns to its next.
const TOGETHER: usize = 2;
/// Over one that is not full, another is begun after so long: by then the last one has shown what it takes.
const SETTLED: Duration = Duration::from_secs(1);
/// Shards that are remembered.
const SHARDS_MAX: usize = 4096;

#[derive(Debug)]
struct Grant {
    peer: Peer,
    sent: u64,
    /// Of the whole shard.
    bytes: u64,
    begun: Instant,
    /// When it last asked, or was sent something.
    asked: Instant,
}

impl Grant {
    fn under_way(&self, now: Instant) -> bool {
        self.sent < self.bytes && now < self.asked + IDLE
    }
}

/// Who got which shard from us.
#[derive(Debug, Default)]
pub(super) struct Grants {
    shards: HashMap<ShardId, Vec<Grant>>,
}

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Serve,
    /// Others come first.
    Later,
    Elsewhere(Vec<Peer>),
}

/// What leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Uplink {
    /// As much as goes.
    Free,
    /// No more than its owner wants; whether it was full lately.
    Limited { full: bool },
}

/// Who asks, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker {
    pub(super) peer: Peer,
    /// Will give it on.
    pub(super) shares: bool,
    /// Those that we named did not give it.
    pub(super) in_vain: bool,
}

impl Grants {
    /// `bytes` of the whole shard; `live` says who is there.
    pub(super) fn ask(
        &mut self,
        shard: ShardId,
        bytes: u64,
        asker: Asker,
        now: Instant,
        uplink: Uplink,
        live: impl Fn(&Peer) -> bool,
    ) -> Verdict {
        let may_begin = !asker.shares || self.may_begin(now, uplink);
        if self.shards.len() >= SHARDS_MAX && !self.shards.contains_key(&shard) {
            self.forget_oldest();
        }
        let grants = self.shards.entry(shard).or_default();
        if let Some(mine) = grants.iter_mut().find(|grant| grant.peer == asker.peer) {
            mine.asked = now;
            return Verdict::Serve;
        }
        grants.retain(|grant| live(&grant.peer) && (grant.sent >= bytes || grant.under_way(now)));
        if asker.in_vain || grants.is_empty() {
            if !may_begin {
                return Verdict::Later;
            }
            if asker.shares {
                if grants.len() == ELSEWHERE_MAX {
                    grants.remove(0);
                }
                grants.push(Grant {
                    peer: asker.peer,
                    sent: 0,
                    bytes,
                    begun: now,
                    asked: now,
                });
            }
            return Verdict::Serve;
        }
        // The latest first: it has the fewest askers.
        let peers = grants.iter().rev().map(|grant| grant.peer);
        Verdict::Elsewhere(peers.collect())
    }

    /// Whether a shard may be begun beside those that are on their way.
    fn may_begin(&self, now: Instant, uplink: Uplink) -> bool {
        let Uplink::Limited { full } = uplink else {
            return true;
        };
        let all = self.shards.values().flatten();
        let begun: Vec<Instant> = all
            .filter(|grant| grant.under_way(now))
            .map(|grant| grant.begun)
            .collect();
        let settled = || begun.iter().all(|begun| now >= *begun + SETTLED);
        begun.len() < TOGETHER || !full && settled()
    }

    /// Bytes of a shard are on their way to a peer: it is not idle, however slow.
    pub(super) fn sending(&mut self, shard: &ShardId, peer: &Peer, now: Instant) {
        let grants = self.shards.get_mut(shard).into_iter().flatten();
        for grant in grants.filter(|grant| grant.peer == *peer) {
            grant.asked = now;
        }
    }

    /// Bytes of a shard went to a peer.
    pub(super) fn sent(&mut self, shard: &ShardId, peer: &Peer, bytes: u64) {
        let grants = self.shards.get_mut(shard).into_iter().flatten();
        for grant in grants.filter(|grant| grant.peer == *peer) {
            grant.sent = grant.sent.saturating_add(bytes);
        }
    }

    fn forget_oldest(&mut self) {
        let asked = |grants: &Vec<Grant>| grants.iter().map(|grant| grant.asked).max();
        let oldest = self
            .shards
            .iter()
            .min_by_key(|(shard, grants)| (asked(grants), **shard));
        if let Some(shard) = oldest.map(|(shard, _)| *shard) {
            self.shards.remove(&shard);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_proto::Hash;

    const FREE: Uplink = Uplink::Free;

    fn asker(n: u8) -> Asker {
        Asker {
            peer: Peer([n; 32]),
            shares: true,
            in_vain: false,
        }
    }

    fn elsewhere(peers: &[u8]) -> Verdict {
        Verdict::Elsewhere(peers.iter().map(|n| Peer([*n; 32])).collect())
    }

    #[test]
    fn a_shard_is_granted_once_and_again_when_its_holder_is_gone_or_does_not_give_it() {
        let (mut grants, now) = (Grants::default(), Instant::now());
        let shard = ShardId(Hash([1; 32]));
        let all = |_: &Peer| true;
        let idle = now + IDLE;
        assert_eq!(
            grants.ask(shard, 100, asker(1), now, FREE, all),
            Verdict::Serve
        );
        assert_eq!(
            grants.ask(shard, 100, asker(1), now, FREE, all),
            Verdict::Serve,
            "the next range"
        );
        assert_eq!(
            grants.ask(shard, 100, asker(2), now, FREE, all),
            elsewhere(&[1])
        );
        let other = ShardId(Hash([2; 32]));
        assert_eq!(
            grants.ask(other, 100, asker(2), now, FREE, all),
            Verdict::Serve,
            "each shard for itself"
        );

        let vain = Asker {
            in_vain: true,
            ..asker(3)
        };
        assert_eq!(grants.ask(shard, 100, vain, now, FREE, all), Verdict::Serve);
        assert_eq!(
            grants.ask(shard, 100, asker(4), now, FREE, all),
            elsewhere(&[3, 1])
        );
        assert_eq!(
            grants.ask(shard, 100, asker(4), now, FREE, |peer| peer.0[0] != 3),
            elsewhere(&[1]),
            "3 is gone"
        );
        grants.sent(&shard, &Peer([1; 32]), 100);
        assert_eq!(
            grants.ask(shard, 100, asker(4), idle, FREE, all),
            elsewhere(&[1]),
            "1 has all of it"
        );
        assert_eq!(
            grants.ask(other, 100, asker(4), idle, FREE, all),
            Verdict::Serve,
            "2 gave up"
        );
    }

    #[test]
    fn who_gives_nothing_on_is_served_and_never_named() {
        let (mut grants, now) = (Grants::default(), Instant::now());
        let shard = ShardId(Hash([1; 32]));
        let client = Asker {
            shares: false,
            ..asker(1)
        };
        assert_eq!(
            grants.ask(shard, 9, client, now, FREE, |_| true),
            Verdict::Serve
        );
        assert_eq!(
            grants.ask(shard, 9, asker(2), now, FREE, |_| true),
            Verdict::Serve
        );
        assert_eq!(
            grants.ask(shard, 9, client, now, FREE, |_| true),
            elsewhere(&[2])
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut grants, now) = (Grants::default(), Instant::now());
        for n in 0..2 * SHARDS_MAX as u64 {
            let shard = ShardId(Hash::of(&n.to_le_bytes()));
            grants.ask(shard, 9, asker(1), now, FREE, |_| true);
        }
        assert_eq!(grants.shards.len(), SHARDS_MAX);
        let shard = ShardId(Hash::of(b"x"));
        for n in 0..100 {
            let vain = Asker {
                in_vain: true,
                ..asker(n)
            };
            grants.ask(shard, 9, vain, now, FREE, |_| true);
        }
        assert_eq!(grants.shards[&shard].len(), ELSEWHERE_MAX);
    }

    #[test]
    fn over_a_full_uplink_shards_are_begun_one_after_the_other() {
        let (mut grants, now) = (Grants::default(), Instant::now());
        let all = |_: &Peer| true;
        let shard = |n: u8| ShardId(Hash([n; 32]));
        let full = Uplink::Limited { full: true };
        for n in 1..=2 {
            assert_eq!(
                grants.ask(shard(n), 100, asker(n), now, full, all),
                Verdict::Serve
            );
        }
        let soon = now + SETTLED;
        assert_eq!(
            grants.ask(shard(3), 100, asker(3), soon, full, all),
            Verdict::Later
        );
        let vain = Asker {
            in_vain: true,
            ..asker(3)
        };
        assert_eq!(
            grants.ask(shard(1), 100, vain, soon, full, all),
            Verdict::Later
        );
        assert_eq!(
            grants.ask(shard(1), 100, asker(1), soon, full, all),
            Verdict::Serve,
            "its next range"
        );
        assert_eq!(
            grants.ask(shard(1), 100, asker(3), soon, full, all),
            elsewhere(&[1])
        );
        let client = Asker {
            shares: false,
            ..asker(4)
        };
        assert_eq!(
            grants.ask(shard(4), 100, client, soon, full, all),
            Verdict::Serve,
            "who shares nothing waits for nobody"
        );

        let room = Uplink::Limited { full: false };
        let early = now + SETTLED / 2;
        assert_eq!(
            grants.ask(shard(3), 100, asker(3), early, room, all),
            Verdict::Later,
            "who knows yet"
        );
        assert_eq!(
            grants.ask(shard(3), 100, asker(3), soon, room, all),
            Verdict::Serve,
            "slow askers leave room"
        );
        assert_eq!(
            grants.ask(shard(5), 100, asker(5), soon, room, all),
            Verdict::Later,
            "one at a time"
        );
        for n in 1..=2 {
            grants.sent(&shard(n), &Peer([n; 32]), 100);
        }
        assert_eq!(
            grants.ask(shard(5), 100, asker(5), soon, full, all),
            Verdict::Serve,
            "two are through"
        );
    }

    #[test]
    fn who_is_sent_something_is_not_idle() {
        let (mut grants, now) = (Grants::default(), Instant::now());
        let (shard, all) = (ShardId(Hash([1; 32])), |_: &Peer| true);
        grants.ask(shard, 100, asker(1), now, FREE, all);
        let later = now + IDLE / 2;
        grants.sending(&shard, &Peer([1; 32]), later);
        assert_eq!(
            grants.ask(shard, 100, asker(2), now + IDLE, FREE, all),
            elsewhere(&[1])
        );
        assert_eq!(
            grants.ask(shard, 100, asker(2), later + IDLE, FREE, all),
            Verdict::Serve
        );
    }
}
