//! How sizes, times, rates and peers are written for people. Pure; JSON output never goes through here.

use std::time::Duration;

/// `1536` → `1.5 KiB`; exact below one KiB.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{} {}", three_digits(value), UNITS[unit])
    }
}

/// `1_235_814_400` → `1.24 B`: parameters and other plain counts.
pub fn count(n: u64) -> String {
    const UNITS: [&str; 5] = ["", " k", " M", " B", " T"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        n.to_string()
    } else {
        format!("{}{}", three_digits(value), UNITS[unit])
    }
}

/// `0.0000874 s` → `87.4 µs`; minutes from 120 s on, hours from 120 min on.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs_f64();
    if s < 1e-3 {
        format!("{} µs", three_digits(s * 1e6))
    } else if s < 1.0 {
        format!("{} ms", three_digits(s * 1e3))
    } else if s < 120.0 {
        format!("{} s", three_digits(s))
    } else if s < 7200.0 {
        format!("{} min", three_digits(s / 60.0))
    } else {
        format!("{} h", three_digits(s / 3600.0))
    }
}

/// Tokens per second, or a dash when nothing was measured.
pub fn rate(tokens_per_s: Option<f64>) -> String {
    match tokens_per_s {
        Some(rate) if rate.is_finite() && rate > 0.0 => three_digits(rate),
        _ => "–".into(),
    }
}

/// The last characters of a peer id: the first twelve are the same for every ed25519 key.
pub fn short_peer(peer: &str) -> String {
    let start = peer
        .char_indices()
        .rev()
        .nth(PEER_TAIL - 1)
        .map_or(0, |(at, _)| at);
    if start == 0 {
        peer.to_string()
    } else {
        format!("…{}", &peer[start..])
    }
}

/// 58^6 is 4·10^10: two peers of one swarm will not share them by accident.
const PEER_TAIL: usize = 6;

/// The first characters of a hash, enough to type back as a prefix.
pub fn short_hash(hex: &str) -> &str {
    hex.get(..12).unwrap_or(hex)
}

/// A word and its count: `1 layer`, `3 layers`.
pub fn plural(n: usize, word: &str) -> String {
    if n == 1 {
        format!("1 {word}")
    } else {
        format!("{n} {word}s")
    }
}

/// How much of a model is here: `8 of 8 layers`, `3 of 8 layers (0..3)`.
pub fn layers_here(spans: &[String], n_layer: u16) -> String {
    let ranges = spans.iter().filter_map(|span| {
        let (start, end) = span.split_once("..")?;
        end.parse::<u16>().ok()?.checked_sub(start.parse().ok()?)
    });
    let here: u16 = ranges.fold(0, u16::saturating_add);
    let some = format!("{here} of {}", plural(n_layer.into(), "layer"));
    if here == 0 || here == n_layer {
        some
    } else {
        format!("{some} ({})", list(spans))
    }
}

/// Things one after another: `0..4, 6..8`.
pub fn list(things: &[impl ToString]) -> String {
    let texts: Vec<String> = things.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

/// Text from a file or a peer, fit for a terminal: control characters replaced, length bounded.
pub fn printable(text: &str, chars_max: usize) -> String {
    let mut clean: String = text
        .chars()
        .take(chars_max)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if text.chars().nth(chars_max).is_some() {
        clean.push('…');
    }
    clean
}

fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_keep_three_digits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16384 PiB");
        assert_eq!(count(1_235_814_400), "1.24 B");
        assert_eq!(count(999), "999");
    }

    #[test]
    fn times_choose_their_unit() {
        assert_eq!(duration(Duration::from_nanos(87_400)), "87.4 µs");
        assert_eq!(duration(Duration::from_millis(312)), "312 ms");
        assert_eq!(duration(Duration::from_secs(90)), "90 s");
        assert_eq!(duration(Duration::from_secs(600)), "10 min");
        assert_eq!(duration(Duration::from_secs(9000)), "2.5 h");
    }

    #[test]
    fn rates_that_were_not_measured_are_a_dash() {
        assert_eq!(rate(None), "–");
        assert_eq!(rate(Some(f64::NAN)), "–");
        assert_eq!(rate(Some(812.4)), "812");
    }

    #[test]
    fn peers_are_told_apart_by_their_end() {
        assert_eq!(short_peer("12D3KooWGzBWabcdef"), "…abcdef");
        assert_eq!(short_peer("abc"), "abc");
    }

    #[test]
    fn a_name_from_a_peer_cannot_move_the_cursor() {
        assert_eq!(printable("a\x1b[2Jb", 64), "a\u{fffd}[2Jb");
        assert_eq!(printable("abcdef", 3), "abc…");
    }
}
