//! What goes wrong, drawn from a seed: which hop of a running route, at which token, how, for how long. Pure.

use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

use crate::plan::Seeded;
use crate::relay::{Link, Links};

/// How often a flapping node goes and comes back, at most: an answer is over before.
const FLAPS: usize = 40;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A process dies without a word, and is started again after the answer.
    Kill,
    /// A process stands still and goes on.
    Freeze,
    /// A node's links carry nothing, in both directions or in one.
    Partition,
    /// A node's links are late, narrow, or lose packets.
    Slow,
    /// What a node sends or is sent is changed on its way.
    Corrupt,
    /// A node freezes, or loses its connections, and is back, again and again.
    Flap,
}

impl Kind {
    /// All of them, as `all` runs them.
    pub const ALL: [Kind; 6] = [
        Kind::Kill,
        Kind::Freeze,
        Kind::Partition,
        Kind::Slow,
        Kind::Corrupt,
        Kind::Flap,
    ];

    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Kill => "kill",
            Kind::Freeze => "freeze",
            Kind::Partition => "partition",
            Kind::Slow => "slow",
            Kind::Corrupt => "corrupt",
            Kind::Flap => "flap",
        }
    }
}

/// Kinds as they are typed: `all`, or names with commas between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kinds(pub Vec<Kind>);

impl FromStr for Kinds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self(Kind::ALL.to_vec()));
        }
        let kind = |name: &str| {
            let known = Kind::ALL.into_iter().find(|kind| kind.name() == name);
            known.ok_or_else(|| {
                let names = Kind::ALL.map(Kind::name).join(", ");
                format!("{name:?} is no kind of fault: {names}, or all")
            })
        };
        text.split(',')
            .map(kind)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// What is done to a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Harm {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT at its end.
    Freeze,
    /// Its links are like this, and sound at its end.
    Links(Links),
    /// Its connections break.
    Reset,
}

/// A harm, for how long, and how long the node is left alone after it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beat {
    /// What is done.
    pub harm: Harm,
    /// For so long; or until the answer has ended.
    pub lasts: Duration,
    /// Then nothing, for so long.
    pub pause: Duration,
}

/// One fault of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// Its kind.
    pub kind: Kind,
    /// Which hop of the route, counted round and round.
    pub hop: u64,
    /// After how many tokens; 0 is while the prompt is computed.
    pub token: u32,
    /// What is done, in order.
    pub beats: Vec<Beat>,
}

impl Fault {
    /// The `number`th fault of a kind, into an answer of `n` tokens. It depends on nothing else, so that a kind has
    /// the same faults alone and among others.
    pub fn draw(kind: Kind, number: u32, n: u32, seed: u64) -> Self {
        let place = Kind::ALL.iter().position(|other| *other == kind);
        let stream = (place.unwrap_or(0) as u64) << 32 | u64::from(number);
        let mut seeded = Seeded::new(Seeded::new(seed).next_u64() ^ stream);
        let hop = seeded.next_u64();
        // In the first half, so that there is something left to lose.
        let token = u32::try_from(seeded.below(u64::from(n / 2).max(1))).unwrap_or(0);
        Self {
            kind,
            hop,
            token,
            beats: beats(kind, &mut seeded),
        }
    }
}

impl std::fmt::Display for Fault {
    /// `at token 7 frozen for 1200 ms`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "at token {}", self.token)?;
        let Some(beat) = self.beats.first() else {
            return Ok(());
        };
        let lasts = format!("for {} ms", beat.lasts.as_millis());
        match beat.harm {
            Harm::Kill => write!(f, " killed")?,
            Harm::Freeze => write!(f, " frozen {lasts}")?,
            Harm::Reset => write!(f, " its connections broken")?,
            Harm::Links(Links { from, to }) if from == to => {
                write!(f, " {from} both ways {lasts}")?
            }
            Harm::Links(Links { from, to }) if to == Link::default() => {
                write!(f, " {from} on the way out {lasts}")?;
            }
            Harm::Links(Links { to, .. }) => write!(f, " {to} on the way in {lasts}")?,
        }
        if self.beats.len() > 1 {
            write!(f, ", again and again")?;
        }
        Ok(())
    }
}

fn beats(kind: Kind, seeded: &mut Seeded) -> Vec<Beat> {
    let harm = match kind {
        Kind::Flap => return flaps(seeded),
        Kind::Kill => Harm::Kill,
        Kind::Freeze => Harm::Freeze,
        Kind::Partition => Harm::Links(cut(seeded)),
        Kind::Slow => Harm::Links(Links::both(slow(seeded))),
        Kind::Corrupt => Harm::Links(flipped(seeded)),
    };
    vec![Beat {
        harm,
        // From what is sat out to what is not: silence is taken for a loss after 0.6 s.
        lasts: ms(seeded, 300, 3000),
        pause: Duration::ZERO,
    }]
}

fn cut(seeded: &mut Seeded) -> Links {
    let cut = Link {
        cut: true,
        ..Link::default()
    };
    match seeded.below(3) {
        0 => Links::both(cut),
        way => one_way(cut, way == 1),
    }
}

fn flipped(seeded: &mut Seeded) -> Links {
    let flip = Link {
        flip: true,
        ..Link::default()
    };
    one_way(flip, seeded.below(2) == 0)
}

fn one_way(link: Link, out: bool) -> Links {
    let sound = Link::default();
    if out {
        Links {
            from: link,
            to: sound,
        }
    } else {
        Links {
            from: sound,
            to: link,
        }
    }
}

/// Each of them a link that people have: far away, a thin line, a bad radio.
fn slow(seeded: &mut Seeded) -> Link {
    match seeded.below(3) {
        0 => Link {
            delay: ms(seeded, 5, 40),
            jitter: ms(seeded, 0, 20),
            ..Link::default()
        },
        1 => Link {
            bytes_per_s: 1000 * (20 + seeded.below(80)),
            ..Link::default()
        },
        _ => Link {
            lost_per_mille: 20 + seeded.below(80),
            ..Link::default()
        },
    }
}

fn flaps(seeded: &mut Seeded) -> Vec<Beat> {
    let freezes = seeded.below(2) == 0;
    let beat = |_| Beat {
        harm: if freezes { Harm::Freeze } else { Harm::Reset },
        lasts: ms(seeded, 50, 800),
        pause: ms(seeded, 20, 300),
    };
    (0..FLAPS).map(beat).collect()
}

fn ms(seeded: &mut Seeded, from: u64, to: u64) -> Duration {
    Duration::from_millis(from + seeded.below(to - from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_read_as_they_are_typed() {
        assert_eq!("all".parse(), Ok(Kinds(Kind::ALL.to_vec())));
        assert_eq!("kill,flap".parse(), Ok(Kinds(vec![Kind::Kill, Kind::Flap])));
        let wrong = "kill,frieze".parse::<Kinds>().unwrap_err();
        assert!(
            wrong.contains("frieze") && wrong.contains("partition"),
            "{wrong}"
        );
    }

    #[test]
    fn a_seed_draws_the_same_faults_and_another_seed_others() {
        let all = |seed| -> Vec<Fault> {
            let of_kind = |kind| (0..20).map(move |number| Fault::draw(kind, number, 160, seed));
            Kind::ALL.into_iter().flat_map(of_kind).collect()
        };
        let first = all(7);
        assert_eq!(first, all(7));
        let other = all(8);
        assert!(first.iter().zip(&other).all(|(a, b)| a.hop != b.hop));
        assert!(first.iter().all(|fault| fault.token < 80), "{first:?}");
        let hops: Vec<u64> = first.iter().map(|fault| fault.hop % 3).collect();
        assert!((0..3).all(|hop| hops.contains(&hop)), "{hops:?}");
    }

    #[test]
    fn a_fault_is_told_in_words() {
        let said = |kind| -> Vec<String> {
            let faults = (0..20).map(move |number| Fault::draw(kind, number, 160, 1));
            faults.map(|fault| fault.to_string()).collect()
        };
        for (kind, part) in [
            (Kind::Kill, " killed"),
            (Kind::Freeze, " frozen for "),
            (Kind::Partition, " cut on the way in for "),
            (Kind::Partition, " cut both ways for "),
            (Kind::Slow, " bytes/s both ways"),
            (Kind::Corrupt, " with flipped bits on the way out"),
            (Kind::Flap, ", again and again"),
        ] {
            let said = said(kind);
            assert!(
                said.iter().any(|line| line.contains(part)),
                "{part}: {said:?}"
            );
        }
    }

    #[test]
    fn every_form_of_a_fault_is_drawn() {
        let drawn = |kind| (0..40).flat_map(move |n| Fault::draw(kind, n, 160, 1).beats);
        let links = |kind| -> Vec<Links> {
            let links = |beat: Beat| match beat.harm {
                Harm::Links(links) => Some(links),
                _ => None,
            };
            drawn(kind).filter_map(links).collect()
        };
        let partitions = links(Kind::Partition);
        for (from, to) in [(true, true), (true, false), (false, true)] {
            assert!(
                partitions
                    .iter()
                    .any(|l| (l.from.cut, l.to.cut) == (from, to))
            );
        }
        let slow = links(Kind::Slow);
        assert!(slow.iter().any(|links| links.to.delay > Duration::ZERO));
        assert!(slow.iter().any(|links| links.to.bytes_per_s > 0));
        assert!(slow.iter().any(|links| links.to.lost_per_mille > 0));
        let corrupt = links(Kind::Corrupt);
        assert!(corrupt.iter().all(|links| links.from.flip != links.to.flip));
        let mut flaps = drawn(Kind::Flap).map(|beat| beat.harm);
        assert!(
            flaps.clone().any(|harm| harm == Harm::Reset) && flaps.any(|harm| harm == Harm::Freeze)
        );
    }
}
