//! Whether a node serves others just now: its owner may pause it, for some hours or until further notice.
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
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

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
}

/// An owner's pause, as the file holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Asked {
    /// Seconds since 1970.
    until: Option<u64>,
}

impl Rules {
    fn at(&self, now_s: u64) -> Option<Paused> {
        let asked = self.asked?;
        let lasts = asked.until.is_none_or(|until| now_s < until);
        lasts.then_some(Paused {
            why: Why::Owner,
            until: asked.until,
        })
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
    pub(crate) fn load(home: &Path) -> Self {
        let path = home.join(FILE);
        let asked = fs::read_to_string(&path).ok();
        let rules = Rules {
            asked: asked.and_then(|text| serde_json::from_str(&text).ok()),
        };
        let now = watch::Sender::new(rules.at(now_s()));
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
        let until = lasts.map(|lasts| now_s().saturating_add(lasts.as_secs().max(1)));
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

    /// Serves again.
    ///
    /// # Errors
    /// What the owner said cannot be taken back: then nothing changes.
    pub(crate) fn resume(&self) -> io::Result<()> {
        match fs::remove_file(&self.inner.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.rules().asked = None;
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
        let now = self.rules().at(now_s());
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

fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
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

    #[test]
    fn a_pause_outlives_its_node_and_ends_by_itself_or_by_its_owner() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(Pause::load(home.path()).now(), None);
        Pause::load(home.path()).pause(None).unwrap();
        let again = Pause::load(home.path());
        let for_ever = Paused {
            why: Why::Owner,
            until: None,
        };
        assert_eq!(again.now(), Some(for_ever), "it was started again");
        again.resume().unwrap();
        assert_eq!(again.now(), None);
        again.resume().unwrap();
        assert_eq!(Pause::load(home.path()).now(), None);

        again.pause(Some(Duration::from_secs(7200))).unwrap();
        let until = again.now().and_then(|paused| paused.until).unwrap();
        let rules = again.rules().clone();
        assert!(rules.at(until - 1).is_some());
        assert_eq!(rules.at(until), None, "two hours are over");
        assert!(Pause::load(home.path()).now().is_some());
        fs::write(home.path().join(FILE), "{\"until\":12}").unwrap();
        assert_eq!(
            Pause::load(home.path()).now(),
            None,
            "over while it was off"
        );
        fs::write(home.path().join(FILE), "nonsense").unwrap();
        assert_eq!(Pause::load(home.path()).now(), None);
    }
}
