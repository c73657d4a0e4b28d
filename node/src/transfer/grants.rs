//! Each shard is given once: who asks later is told who has it, or is getting it, so that the first holder's uplink
//! is not all there is. Pure: time, and who is there, are passed in.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use swarm_proto::{Peer, ShardId, transfer::ELSEWHERE_MAX};

/// A grant that nothing was asked for by for so long, before it was used up, is void: its peer has it from
/// others, or gave up.
const IDLE: Duration = Duration::from_secs(15);
/// Shards that are remembered.
const SHARDS_MAX: usize = 4096;

#[derive(Debug)]
struct Grant {
    peer: Peer,
    sent: u64,
    asked: Instant,
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
    Elsewhere(Vec<Peer>),
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
        live: impl Fn(&Peer) -> bool,
    ) -> Verdict {
        if self.shards.len() >= SHARDS_MAX && !self.shards.contains_key(&shard) {
            self.forget_oldest();
        }
        let grants = self.shards.entry(shard).or_default();
        if let Some(mine) = grants.iter_mut().find(|grant| grant.peer == asker.peer) {
            mine.asked = now;
            return Verdict::Serve;
        }
        grants
            .retain(|grant| live(&grant.peer) && (grant.sent >= bytes || now < grant.asked + IDLE));
        if asker.in_vain || grants.is_empty() {
            if asker.shares {
                if grants.len() == ELSEWHERE_MAX {
                    grants.remove(0);
                }
                grants.push(Grant {
                    peer: asker.peer,
                    sent: 0,
                    asked: now,
                });
            }
            return Verdict::Serve;
        }
        // The latest first: it has the fewest askers.
        let peers = grants.iter().rev().map(|grant| grant.peer);
        Verdict::Elsewhere(peers.collect())
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
        assert_eq!(grants.ask(shard, 100, asker(1), now, all), Verdict::Serve);
        assert_eq!(
            grants.ask(shard, 100, asker(1), now, all),
            Verdict::Serve,
            "the next range"
        );
        assert_eq!(grants.ask(shard, 100, asker(2), now, all), elsewhere(&[1]));
        let other = ShardId(Hash([2; 32]));
        assert_eq!(
            grants.ask(other, 100, asker(2), now, all),
            Verdict::Serve,
            "each shard for itself"
        );

        let vain = Asker {
            in_vain: true,
            ..asker(3)
        };
        assert_eq!(grants.ask(shard, 100, vain, now, all), Verdict::Serve);
        assert_eq!(
            grants.ask(shard, 100, asker(4), now, all),
            elsewhere(&[3, 1])
        );
        assert_eq!(
            grants.ask(shard, 100, asker(4), now, |peer| peer.0[0] != 3),
            elsewhere(&[1]),
            "3 is gone"
        );
        grants.sent(&shard, &Peer([1; 32]), 100);
        assert_eq!(
            grants.ask(shard, 100, asker(4), idle, all),
            elsewhere(&[1]),
            "1 has all of it"
        );
        assert_eq!(
            grants.ask(other, 100, asker(4), idle, all),
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
        assert_eq!(grants.ask(shard, 9, client, now, |_| true), Verdict::Serve);
        assert_eq!(
            grants.ask(shard, 9, asker(2), now, |_| true),
            Verdict::Serve
        );
        assert_eq!(grants.ask(shard, 9, client, now, |_| true), elsewhere(&[2]));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut grants, now) = (Grants::default(), Instant::now());
        for n in 0..2 * SHARDS_MAX as u64 {
            let shard = ShardId(Hash::of(&n.to_le_bytes()));
            grants.ask(shard, 9, asker(1), now, |_| true);
        }
        assert_eq!(grants.shards.len(), SHARDS_MAX);
        let shard = ShardId(Hash::of(b"x"));
        for n in 0..100 {
            let vain = Asker {
                in_vain: true,
                ..asker(n)
            };
            grants.ask(shard, 9, vain, now, |_| true);
        }
        assert_eq!(grants.shards[&shard].len(), ELSEWHERE_MAX);
    }
}
