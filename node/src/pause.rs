//! Whether a node serves others just now: its owner may pause it, for some hours, until further notice, or at certain
//! hours of each day.
//!
//! ```text
//! shoal node pause ─▶ Rules ─┐
//! the clock ─────────────────┴─▶ Option<Paused> ─▶ everybody who must know (a watch)
//! ```
//! What the owner said is kept in the home, so that a node that is started again does not forget it. What a
//! pause means for each part of a node says `control`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::quiet_hours::QuietHours;

/// What the owner said, in the home.
const FILE: &str = "paused";
/// How often the clock is looked at. It is the wall's: it may jump, and a laptop may have slept.
const LOOK: Duration = Duration::from_secs(1);

/// Why a node is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// Its owner said so.
    Owner,
    /// It is the time of day.
    QuietHours,
}

/// That a node is paused, and until when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paused {
    /// Why.
    pub why: Why,
    /// When it will be over, in seconds since 1970; none: when its owner says so.
    pub until: Option<u64>,
}

/// What decides it: pure.
#[derive(Debug, Clone, Default)]
struct Rules {
    /// What the owner said.
    asked: Option<Asked>,
    quiet: QuietHours,
    /// The owner wants it to serve until then, in seconds since 1970, quiet hours or not.
    awake_until: u64,
}

/// What the clock says.
#[derive(Debug, Clone, Copy)]
struct Time {
    /// Seconds since 1970.
    s: u64,
    /// Seconds since midnight, where the machine is.
    of_day: u32,
}

/// An owner's pause, as the file holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Asked {
    /// Seconds since 1970.
    until: Option<u64>,
}

impl Rules {
    fn at(&self, now: Time) -> Option<Paused> {
        let asked = self
            .asked
            .filter(|asked| asked.until.is_none_or(|until| now.s < until));
        let by_owner = asked.map(|asked| Paused {
            why: Why::Owner,
            until: asked.until,
        });
        let by_the_hour = || {
            let until = self
                .quiet_until(now)
                .filter(|_| now.s >= self.awake_until)?;
            Some(Paused {
                why: Why::QuietHours,
                until: Some(until),
            })
        };
        by_owner.or_else(by_the_hour)
    }

    /// When the quiet hours are over that it is in the middle of.
    fn quiet_until(&self, now: Time) -> Option<u64> {
        Some(now.s.saturating_add(self.quiet.left(now.of_day)?.into()))
    }
}

/// A node's pause; clones share it.
#[derive(Debug, Clone)]
pub struct Pause {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    rules: Mutex<Rules>,
    now: watch::Sender<Option<Paused>>,
}

impl Pause {
    /// What was said in this home. A file that says nothing that can be understood counts as none.
    pub(crate) fn load(home: &Path, quiet: QuietHours) -> Self {
        let path = home.join(FILE);
        let asked = fs::read_to_string(&path).ok();
        let rules = Rules {
            asked: asked.and_then(|text| serde_json::from_str(&text).ok()),
            quiet,
            awake_until: 0,
        };
        let now = watch::Sender::new(rules.at(now()));
        let rules = Mutex::new(rules);
        Self {
            inner: Arc::new(Inner { path, rules, now }),
        }
    }

    /// What holds now.
    pub fn now(&self) -> Option<Paused> {
        *self.inner.now.borrow()
    }

    /// Told of each change.
    pub(crate) fn changes(&self) -> watch::Receiver<Option<Paused>> {
        self.inner.now.subscribe()
    }

    /// Waits until the node is not paused.
    pub(crate) async fn over(&self) {
        let mut changes = self.changes();
        // The sender is ours: it is not gone.
        let _ = changes.wait_for(Option::is_none).await;
    }

    /// Pauses from now on, for so long or until [`Pause::resume`].
    ///
    /// # Errors
    /// It cannot be written down: then nothing changes.
    pub(crate) fn pause(&self, lasts: Option<Duration>) -> io::Result<()> {
        let until = lasts.map(|lasts| now().s.saturating_add(lasts.as_secs().max(1)));
        let asked = Asked { until };
        let home = self.inner.path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(home)?;
        serde_json::to_writer(&mut file, &asked)?;
        file.persist(&self.inner.path)
            .map_err(|error| error.error)?;
        self.rules().asked = Some(asked);
        self.look();
        Ok(())
    }

    /// Serves again; in quiet hours until the next ones begin.
    ///
    /// # Errors
    /// What the owner said cannot be taken back: then nothing changes.
    pub(crate) fn resume(&self) -> io::Result<()> {
        match fs::remove_file(&self.inner.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut rules = self.rules();
        rules.asked = None;
        rules.awake_until = rules.quiet_until(now()).unwrap_or(0);
        drop(rules);
        self.look();
        Ok(())
    }

    /// Looks at the clock for as long as it is polled.
    pub(crate) async fn keep(self) {
        let mut look = tokio::time::interval(LOOK);
        loop {
            look.tick().await;
            self.look();
        }
    }

    fn look(&self) {
        let now = self.rules().at(now());
        self.inner.now.send_if_modified(|held| {
            let changed = *held != now;
            *held = now;
            changed
        });
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.inner
            .rules
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> Time {
    let now = jiff::Zoned::now();
    let hand = |n: i8| u32::try_from(n).unwrap_or(0);
    Time {
        s: u64::try_from(now.timestamp().as_second()).unwrap_or(0),
        of_day: hand(now.hour()) * 3600 + hand(now.minute()) * 60 + hand(now.second()),
    }
}

/// A span of time as people write it: `90s`, `30m`, `2h`, `1d`, `1h30m`.
///
/// # Errors
/// Says what is expected.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a span of time; write for example 30m, 2h or 1h30m");
    let mut seconds = 0u64;
    let mut rest = text.trim();
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, unit_on) = rest.split_at(digits);
        let after = unit_on.find(|c: char| !c.is_ascii_alphabetic());
        let (unit, left) = unit_on.split_at(after.unwrap_or(unit_on.len()));
        let unit = match unit {
            "s" => 1,
            "m" | "min" => 60,
            "h" => 3600,
            "d" => 24 * 3600,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let part = number.checked_mul(unit).ok_or_else(wrong)?;
        seconds = seconds.checked_add(part).ok_or_else(wrong)?;
        rest = left.trim_start();
    }
    match seconds {
        0 => Err(wrong()),
        // Ten years: more is meant as for ever, and the clock's arithmetic stays far from its ends.
        s if s > 10 * 366 * 24 * 3600 => Err(wrong()),
        s => Ok(Duration::from_secs(s)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_time_are_read_as_people_write_them() {
        let read = |text| parse_duration(text).map(|span| span.as_secs());
        assert_eq!(read("90s"), Ok(90));
        assert_eq!(read("2h"), Ok(7200));
        assert_eq!(read("1h30m"), Ok(5400));
        assert_eq!(read("1d 2h"), Ok(93_600));
        for wrong in [
            "",
            "2",
            "h",
            "0s",
            "-1h",
            "2 h",
            "3w",
            "99999999999999999999h",
            "4000d",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    fn load(home: &Path) -> Pause {
        Pause::load(home, QuietHours::default())
    }

    #[test]
    fn a_pause_outlives_its_node_and_ends_by_itself_or_by_its_owner() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(load(home.path()).now(), None);
        load(home.path()).pause(None).unwrap();
        let again = load(home.path());
        let for_ever = Paused {
            why: Why::Owner,
            until: None,
        };
        assert_eq!(again.now(), Some(for_ever), "it was started again");
        again.resume().unwrap();
        assert_eq!(again.now(), None);
        again.resume().unwrap();
        assert_eq!(load(home.path()).now(), None);

        again.pause(Some(Duration::from_secs(7200))).unwrap();
        let until = again.now().and_then(|paused| paused.until).unwrap();
        let rules = again.rules().clone();
        let at = |s| rules.at(Time { s, of_day: 0 });
        assert!(at(until - 1).is_some());
        assert_eq!(at(until), None, "two hours are over");
        assert!(load(home.path()).now().is_some());
        fs::write(home.path().join(FILE), "{\"until\":12}").unwrap();
        assert_eq!(load(home.path()).now(), None, "over while it was off");
        fs::write(home.path().join(FILE), "nonsense").unwrap();
        assert_eq!(load(home.path()).now(), None);
    }

    #[test]
    fn in_quiet_hours_it_is_paused_unless_its_owner_wants_it_awake() {
        let mut rules = Rules {
            quiet: "22:00-07:00".parse().unwrap(),
            ..Rules::default()
        };
        // Midnight of some day, and seven hours on.
        let (midnight, morning) = (1_800_000_000, 1_800_000_000 + 7 * 3600);
        let night = Time {
            s: midnight,
            of_day: 0,
        };
        let quiet = Paused {
            why: Why::QuietHours,
            until: Some(morning),
        };
        assert_eq!(rules.at(night), Some(quiet));
        let day = Time {
            s: morning,
            of_day: 7 * 3600,
        };
        assert_eq!(rules.at(day), None);
        rules.awake_until = rules.quiet_until(night).unwrap();
        assert_eq!(rules.at(night), None, "told to serve");
        let next = Time {
            s: midnight + 22 * 3600,
            of_day: 22 * 3600,
        };
        assert_eq!(
            rules.at(next).map(|paused| paused.why),
            Some(Why::QuietHours),
            "and the next night"
        );
        rules.asked = Some(Asked { until: None });
        assert_eq!(rules.at(next).map(|paused| paused.why), Some(Why::Owner));
    }
}
