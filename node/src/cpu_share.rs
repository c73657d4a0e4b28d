//! How much of the time a node's compute threads may work. Pure.

use std::{str::FromStr, time::Duration};

/// Below it a prompt would take longer than its client waits.
const PERCENT_MIN: u8 = 5;
/// The longest rest: the deadlines of sessions reckon with slow hops, not with sleeping ones.
const REST_MAX: Duration = Duration::from_secs(4);

/// A share of the time, in percent; all of it by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuShare(u8);

impl Default for CpuShare {
    fn default() -> Self {
        Self(100)
    }
}

impl CpuShare {
    /// What is left of a rate that all of the time would give.
    pub fn of(self, rate: f64) -> f64 {
        rate * f64::from(self.0) / 100.0
    }

    /// How long to rest after a step that took so long.
    pub fn rest(self, took: Duration) -> Duration {
        let percent = u32::from(self.0);
        let rest = took.saturating_mul(100u32.saturating_sub(percent)) / percent.max(1);
        rest.min(REST_MAX)
    }
}

impl FromStr for CpuShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.trim().trim_end_matches('%').parse().ok();
        let share = number.filter(|percent| (PERCENT_MIN..=100).contains(percent));
        share.map(Self).ok_or_else(|| {
            format!("{text:?} is no share in percent: {PERCENT_MIN} to 100, for example 50")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_leaves_the_share_and_is_never_long() {
        let ms = Duration::from_millis;
        let rest = |share: &str, took| share.parse::<CpuShare>().unwrap().rest(took);
        assert_eq!(rest("100", ms(10)), ms(0));
        assert_eq!(rest("50%", ms(10)), ms(10));
        assert_eq!(rest("25", ms(10)), ms(30));
        assert_eq!(rest("5", ms(10)), ms(190));
        assert_eq!(rest("5", Duration::MAX), REST_MAX);
        let rate = "25".parse::<CpuShare>().unwrap().of(200.0);
        assert!((rate - 50.0).abs() < 1e-9, "{rate}");
        assert_eq!(CpuShare::default().rest(ms(10)), ms(0));
        for wrong in ["", "0", "4", "101", "-5", "half", "300"] {
            assert!(wrong.parse::<CpuShare>().is_err(), "{wrong}");
        }
    }
}
