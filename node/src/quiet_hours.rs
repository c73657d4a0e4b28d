//! Hours of the day in which a node is paused, as its owner writes them: `22:00-07:00,12:30-13:30`. Pure: the time of
//! day is passed in.

use std::str::FromStr;

/// Seconds of a day by the clock.
const DAY_S: u32 = 24 * 3600;
/// More is a mistake.
const RANGES_MAX: usize = 24;

/// Ranges of the day; none by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QuietHours {
    /// Seconds since midnight; one that ends before it begins goes over midnight.
    ranges: Vec<(u32, u32)>,
}

impl QuietHours {
    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Seconds until the quiet hours that it is in the middle of are over; none where it is not. `second` counts from
    /// midnight.
    pub fn left(&self, second: u32) -> Option<u32> {
        let left = |&(from, to): &(u32, u32)| match () {
            () if from < to => (from <= second && second < to).then(|| to - second),
            () if second >= from => Some(DAY_S.saturating_sub(second).saturating_add(to)),
            () => (second < to).then(|| to - second),
        };
        self.ranges.iter().filter_map(left).max()
    }
}

impl FromStr for QuietHours {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |part: &str| {
            format!(
                "{part:?} are no hours of the day; write for example 22:00-07:00, or several with commas between them"
            )
        };
        let parts: Vec<&str> = text.split(',').map(str::trim).collect();
        if parts.len() > RANGES_MAX {
            return Err(format!(
                "{} ranges of hours, at most {RANGES_MAX} make sense",
                parts.len()
            ));
        }
        let range = |part: &&str| {
            let (from, to) = part.split_once('-')?;
            let (from, to) = (time(from)?, time(to)?);
            (from != to && from < DAY_S).then_some((from, to))
        };
        let ranges = parts
            .iter()
            .map(|part| range(part).ok_or_else(|| wrong(part)));
        Ok(Self {
            ranges: ranges.collect::<Result<_, _>>()?,
        })
    }
}

/// Seconds since midnight; 24:00 is the end of the day.
fn time(text: &str) -> Option<u32> {
    let (hour, minute) = text.trim().split_once(':')?;
    let digits = |text: &str| text.len() <= 2 && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(hour) || minute.len() != 2 || !digits(minute) {
        return None;
    }
    let (hour, minute): (u32, u32) = (hour.parse().ok()?, minute.parse().ok()?);
    let second = hour * 3600 + minute * 60;
    (minute < 60 && second <= DAY_S).then_some(second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_go_over_midnight_and_touch() {
        let quiet: QuietHours = "22:00-07:00, 12:30-13:30".parse().unwrap();
        let at = |hour: u32, minute: u32| quiet.left(hour * 3600 + minute * 60);
        assert_eq!(at(21, 59), None);
        assert_eq!(at(22, 0), Some(9 * 3600));
        assert_eq!(at(0, 0), Some(7 * 3600));
        assert_eq!(at(6, 59), Some(60));
        assert_eq!(at(7, 0), None);
        assert_eq!(at(12, 30), Some(3600));
        assert_eq!(at(13, 30), None);
        let always: QuietHours = "00:00-24:00".parse().unwrap();
        assert_eq!(always.left(0), Some(DAY_S));
        assert_eq!(always.left(DAY_S - 1), Some(1));
        let evening: QuietHours = "9:00-10:00,9:30-24:00".parse().unwrap();
        assert_eq!(evening.left(9 * 3600 + 1800), Some(DAY_S - 9 * 3600 - 1800));
        assert_eq!(QuietHours::default().left(0), None);
    }

    #[test]
    fn what_are_no_hours_is_refused() {
        let many = "1:00-2:00,".repeat(30) + "1:00-2:00";
        for wrong in [
            "",
            "22-7",
            "22:00",
            "22:00-22:00",
            "25:00-26:00",
            "24:00-01:00",
            "22:60-23:00",
            "22:00-07:00,",
            "+1:00-2:00",
            "22:0-7:00",
            "-",
            "::-::",
            &many,
        ] {
            assert!(wrong.parse::<QuietHours>().is_err(), "{wrong}");
        }
    }
}
