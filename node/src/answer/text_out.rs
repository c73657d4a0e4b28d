//! From token ids to the text that is shown: whole characters only, and nothing that a stop text may
//! still take back. Pure.

use engine::Detokenizer;

/// The answer so far.
#[derive(Default)]
pub struct TextOut {
    detokenizer: Detokenizer,
    stops: Vec<String>,
    text: String,
    /// Bytes of `text` that were handed out.
    shown: usize,
    /// Which of `stops` came.
    stopped: Option<usize>,
}

impl TextOut {
    /// Nothing yet; ends before the first of `stops`.
    pub fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            ..Self::default()
        }
    }

    /// Takes a token's bytes and gives what can be shown now.
    pub fn push(&mut self, piece: &[u8]) -> &str {
        if self.stopped() {
            return "";
        }
        let before = self.text.len();
        self.detokenizer.push_bytes(piece, &mut self.text);
        self.look_for_stops(before);
        let end = if self.stopped() {
            self.text.len()
        } else {
            self.text.len() - self.held_back()
        };
        self.show(end)
    }

    /// Whether a stop text came.
    pub fn stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// The one that came.
    pub fn stop_text(&self) -> Option<&str> {
        self.stops.get(self.stopped?).map(String::as_str)
    }

    /// No more tokens come: gives what was held back.
    pub fn finish(&mut self) -> &str {
        if !self.stopped() {
            let before = self.text.len();
            self.detokenizer.finish(&mut self.text);
            self.look_for_stops(before);
        }
        self.show(self.text.len())
    }

    /// Everything, without the stop text.
    pub fn into_text(self) -> String {
        self.text
    }

    fn show(&mut self, end: usize) -> &str {
        let start = self.shown.min(end);
        self.shown = end.max(start);
        &self.text[start..self.shown]
    }

    /// The earliest stop text cuts; only what came since `before`, and what it may have completed, is
    /// looked at.
    fn look_for_stops(&mut self, before: usize) {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = floor_char_boundary(&self.text, before.saturating_sub(longest));
        let stops = self.stops.iter().enumerate();
        let found = stops
            .filter_map(|(which, stop)| Some((self.text[from..].find(stop.as_str())?, which)))
            .min();
        if let Some((at, which)) = found {
            self.text.truncate(from + at);
            self.stopped = Some(which);
        }
    }

    /// Bytes at the end that may be the beginning of a stop text.
    fn held_back(&self) -> usize {
        let starts = |stop: &String| {
            let longest = (stop.len() - 1).min(self.text.len());
            (1..=longest)
                .rev()
                .find(|&n| stop.is_char_boundary(n) && self.text.ends_with(&stop[..n]))
                .unwrap_or(0)
        };
        self.stops.iter().map(starts).max().unwrap_or(0)
    }
}

fn floor_char_boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds pieces; gives what was shown and the text at the end.
    fn shown(stops: &[&str], pieces: &[&[u8]]) -> (String, String) {
        let mut out = TextOut::new(stops.iter().map(ToString::to_string).collect());
        let mut seen = String::new();
        for piece in pieces {
            seen.push_str(out.push(piece));
        }
        seen.push_str(out.finish());
        (seen, out.into_text())
    }

    #[test]
    fn what_is_shown_is_the_text_however_it_is_cut() {
        let text = "Es war einmal 🐟 ein Fisch, der sang.\nENDE und mehr";
        for stops in [
            &[][..],
            &["ENDE"],
            &["\nEND", "ENDE"],
            &["nowhere"],
            &["🐟 x", "sang.\n"],
        ] {
            let expected = stops
                .iter()
                .filter_map(|stop| text.find(stop))
                .min()
                .map_or(text, |at| &text[..at]);
            for size in 1..12 {
                let pieces: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
                let (seen, whole) = shown(stops, &pieces);
                assert_eq!(seen, expected, "{stops:?} in pieces of {size}");
                assert_eq!(whole, expected);
            }
        }
    }

    #[test]
    fn a_beginning_that_goes_on_otherwise_is_shown_late_but_shown() {
        let mut out = TextOut::new(vec!["\nUser:".into()]);
        assert_eq!(out.push(b"Hello\nUs"), "Hello");
        assert_eq!(out.push(b"es it"), "\nUses it");
        assert_eq!(out.push(b"\nUser: hi"), "");
        assert!(out.stopped());
        assert_eq!(out.push(b"more"), "");
        assert_eq!(out.stop_text(), Some("\nUser:"));
        assert_eq!(out.into_text(), "Hello\nUses it");
    }

    #[test]
    fn half_a_character_at_the_end_is_replaced() {
        let (seen, whole) = shown(&[], &[b"a\xf0\x9f"]);
        assert_eq!(seen, "a\u{fffd}");
        assert_eq!(whole, seen);
    }
}
