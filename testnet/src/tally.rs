//! What faults cost, against the undisturbed answer: tokens that are missing, others or there twice, and how long
//! the answer stood still. Pure.

use serde::Serialize;

use crate::client::Recovery;
use crate::faults::Kind;

/// What came of one run with a fault.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Tokens of the undisturbed answer that did not come.
    pub lost: usize,
    /// Tokens that came in the place of others.
    pub changed: usize,
    /// Tokens that came and are not in the undisturbed answer.
    pub doubled: usize,
    /// Routes that were replaced.
    pub recoveries: Vec<Recovery>,
    /// The longest time without a token from the fault on.
    pub stall_ms: f64,
    /// Why there is no whole answer.
    pub failed: Option<String>,
}

impl Outcome {
    /// Whether the answer is the undisturbed one.
    pub fn held(&self) -> bool {
        self.lost + self.changed + self.doubled == 0 && self.failed.is_none()
    }

    /// Compares an answer with the undisturbed one.
    pub fn compare(calm: &[u32], got: &[u32]) -> Self {
        let common = longest_common(calm, got);
        let (missing, extra) = (calm.len() - common, got.len() - common);
        let changed = missing.min(extra);
        Self {
            lost: missing - changed,
            changed,
            doubled: extra - changed,
            ..Self::default()
        }
    }
}

/// The longest gap in milliseconds between two tokens, the first of which is the last one before a fault that came
/// after `token` tokens. `at_ms` counts from the prompt.
pub fn stall_ms(at_ms: &[f64], token: u32) -> f64 {
    let times: Vec<f64> = std::iter::once(0.0).chain(at_ms.iter().copied()).collect();
    let from = times.get(token as usize..).unwrap_or_default();
    let gaps = from.windows(2).map(|pair| pair[1] - pair[0]);
    gaps.fold(0.0, f64::max)
}

/// The figures of some faults. The names are those of the report file.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// How many there were.
    pub faults: usize,
    /// Routes that were replaced; a fault that is sat out needs none.
    pub recoveries: usize,
    /// See [`Outcome::lost`].
    pub tokens_lost: usize,
    /// See [`Outcome::changed`].
    pub tokens_changed: usize,
    /// See [`Outcome::doubled`].
    pub tokens_doubled: usize,
    /// Runs without a whole answer.
    pub runs_failed: usize,
    /// The median of the longest times without a token, in milliseconds.
    pub stall_ms_p50: f64,
    /// Their 99th percentile: with fewer than a hundred faults, the longest of all.
    pub stall_ms_p99: f64,
}

impl Figures {
    fn of<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Self {
        let mut figures = Self::default();
        let mut stalls = Vec::new();
        for outcome in outcomes {
            figures.faults += 1;
            figures.recoveries += outcome.recoveries.len();
            figures.tokens_lost += outcome.lost;
            figures.tokens_changed += outcome.changed;
            figures.tokens_doubled += outcome.doubled;
            match outcome.failed {
                Some(_) => figures.runs_failed += 1,
                None => stalls.push(outcome.stall_ms),
            }
        }
        stalls.sort_by(f64::total_cmp);
        let at = |hundredth: usize| {
            let rank = (stalls.len() * hundredth).div_ceil(100).saturating_sub(1);
            stalls.get(rank).copied().unwrap_or(0.0)
        };
        (figures.stall_ms_p50, figures.stall_ms_p99) = (at(50), at(99));
        figures
    }

    fn row(&self, name: &str) -> String {
        format!(
            "  {name:<10}{:>7}{:>12}{:>6}{:>9}{:>9}{:>8}{:>9.0} ms{:>8.0} ms",
            self.faults,
            self.recoveries,
            self.tokens_lost,
            self.tokens_changed,
            self.tokens_doubled,
            self.runs_failed,
            self.stall_ms_p50,
            self.stall_ms_p99
        )
    }
}

/// The figures of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct OfKind {
    /// Which.
    pub kind: Kind,
    /// Its figures.
    #[serde(flatten)]
    pub figures: Figures,
}

/// The figures of all faults of a run, and of each kind.
#[derive(Clone, Debug, Serialize)]
pub struct Tally {
    /// All together.
    #[serde(flatten)]
    pub all: Figures,
    /// The longest time without a token in an undisturbed answer.
    pub undisturbed_ms: f64,
    /// In the order of the run.
    pub by_kind: Vec<OfKind>,
}

impl Tally {
    /// Adds up.
    pub fn new(outcomes: &[(Kind, Outcome)], undisturbed_ms: f64) -> Self {
        let mut kinds: Vec<Kind> = outcomes.iter().map(|(kind, _)| *kind).collect();
        kinds.dedup();
        let of_kind = |kind| OfKind {
            kind,
            figures: Figures::of(outcomes.iter().filter(|of| of.0 == kind).map(|of| &of.1)),
        };
        Self {
            all: Figures::of(outcomes.iter().map(|(_, outcome)| outcome)),
            undisturbed_ms,
            by_kind: kinds.into_iter().map(of_kind).collect(),
        }
    }

    /// Whether every answer was the undisturbed one.
    pub fn held(&self) -> bool {
        let all = &self.all;
        all.tokens_lost + all.tokens_changed + all.tokens_doubled + all.runs_failed == 0
    }

    /// The table that a person reads.
    pub fn lines(&self) -> Vec<String> {
        let head =
            "  fault      faults  recoveries  lost  changed  doubled  failed   stall p50    p99";
        let rows = self.by_kind.iter();
        let rows = rows.map(|of| of.figures.row(of.kind.name()));
        let all = (self.by_kind.len() > 1).then(|| self.all.row("all"));
        let calm = format!(
            "  longest time without a token in an undisturbed answer: {:.0} ms",
            self.undisturbed_ms
        );
        let lines = [head.to_owned()].into_iter().chain(rows).chain(all);
        lines.chain([calm]).collect()
    }
}

/// The length of the longest sequence that both contain, in order.
fn longest_common(a: &[u32], b: &[u32]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (at, y) in b.iter().enumerate() {
            let above = row[at + 1];
            row[at + 1] = if x == y {
                diagonal + 1
            } else {
                above.max(row[at])
            };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(got: &[u32]) -> (usize, usize, usize) {
        let outcome = Outcome::compare(&[1, 2, 3, 4, 5], got);
        (outcome.lost, outcome.changed, outcome.doubled)
    }

    #[test]
    fn each_difference_is_counted_as_what_it_is() {
        assert_eq!(compared(&[1, 2, 3, 4, 5]), (0, 0, 0));
        assert_eq!(compared(&[1, 2, 4, 5]), (1, 0, 0));
        assert_eq!(compared(&[1, 2, 3]), (2, 0, 0));
        assert_eq!(compared(&[1, 2, 9, 4, 5]), (0, 1, 0));
        assert_eq!(compared(&[1, 2, 2, 3, 4, 5]), (0, 0, 1));
        assert_eq!(compared(&[]), (5, 0, 0));
        assert!(!Outcome::compare(&[1], &[2]).held());
    }

    #[test]
    fn a_stall_is_the_longest_gap_from_the_fault_on() {
        let at = [30.0, 31.0, 90.0, 91.0, 131.0];
        assert_eq!(stall_ms(&at, 0), 59.0);
        assert_eq!(
            stall_ms(&at, 2),
            59.0,
            "the gap that the second token begins"
        );
        assert_eq!(stall_ms(&at, 3), 40.0);
        assert_eq!(stall_ms(&at, 9), 0.0);
        assert_eq!(stall_ms(&[700.0], 0), 700.0);
    }

    #[test]
    fn figures_add_up_by_kind_and_in_all() {
        let outcome = |stall_ms| Outcome {
            stall_ms,
            recoveries: vec![Recovery::default()],
            ..Outcome::default()
        };
        let mut outcomes: Vec<_> = (1..=3)
            .map(|n| (Kind::Kill, outcome(f64::from(n))))
            .collect();
        outcomes.push((
            Kind::Slow,
            Outcome {
                recoveries: Vec::new(),
                ..outcome(9.0)
            },
        ));
        let tally = Tally::new(&outcomes, 0.5);
        assert!(tally.held());
        assert_eq!((tally.all.faults, tally.all.recoveries), (4, 3));
        let kill = &tally.by_kind[0].figures;
        assert_eq!((kill.stall_ms_p50, kill.stall_ms_p99), (2.0, 3.0));
        assert_eq!(tally.lines().len(), 5);
        let failed = Outcome {
            failed: Some("no route".into()),
            ..Outcome::default()
        };
        assert!(!Tally::new(&[(Kind::Kill, failed)], 0.5).held());
        let json = serde_json::to_value(&tally).unwrap();
        assert_eq!(json["tokens_lost"], 0);
        assert_eq!(json["by_kind"][1]["kind"], "slow");
        assert_eq!(json["by_kind"][1]["stall_ms_p99"], 9.0);
    }
}
