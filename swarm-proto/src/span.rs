//! Ranges of layers.

use std::{fmt, ops::Range, str::FromStr};

use bincode::{
    de::Decoder,
    error::{DecodeError, EncodeError},
};

/// Layers `start` to `end`, `end` not included; written `8..12`. On the wire never empty.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(into = "String", try_from = "String")]
pub struct LayerRange {
    /// First layer.
    pub start: u16,
    /// One after the last layer.
    pub end: u16,
}

/// Why a text is no range of layers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a range of layers such as 8..12 (the end is not included)")]
pub struct LayerRangeError {
    /// What was given, shortened.
    pub text: String,
}

impl LayerRange {
    /// One layer.
    pub fn one(layer: u16) -> Self {
        Self {
            start: layer,
            end: layer.saturating_add(1),
        }
    }

    /// The range, unless it is empty.
    pub fn new(start: u16, end: u16) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    /// Number of layers.
    pub fn len(&self) -> u16 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether they share a layer.
    pub fn meets(&self, other: LayerRange) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether `layer` is one of them.
    pub fn contains(&self, layer: u16) -> bool {
        (self.start..self.end).contains(&layer)
    }

    /// Whether every layer of `other` is one of them.
    pub fn covers(&self, other: LayerRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The layers' indices.
    pub fn layers(&self) -> Range<u16> {
        self.start..self.end
    }

    /// Joins ranges that touch or overlap; sorted, empty ones dropped.
    pub fn merge(mut ranges: Vec<LayerRange>) -> Vec<LayerRange> {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_unstable();
        let mut out: Vec<LayerRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match out.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => out.push(range),
            }
        }
        out
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl fmt::Debug for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for LayerRange {
    type Err = LayerRangeError;

    fn from_str(text: &str) -> Result<Self, LayerRangeError> {
        text.split_once("..")
            .and_then(|(start, end)| Self::new(start.parse().ok()?, end.parse().ok()?))
            .ok_or_else(|| LayerRangeError {
                text: text.chars().take(64).collect(),
            })
    }
}

impl From<LayerRange> for String {
    fn from(range: LayerRange) -> String {
        range.to_string()
    }
}

impl TryFrom<String> for LayerRange {
    type Error = LayerRangeError;

    fn try_from(text: String) -> Result<Self, LayerRangeError> {
        text.parse()
    }
}

impl bincode::Encode for LayerRange {
    fn encode<E: bincode::enc::Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.start.encode(encoder)?;
        self.end.encode(encoder)
    }
}

impl<C> bincode::Decode<C> for LayerRange {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let (start, end) = (u16::decode(decoder)?, u16::decode(decoder)?);
        Self::new(start, end)
            .ok_or_else(|| DecodeError::OtherString(format!("empty layer range {start}..{end}")))
    }
}

bincode::impl_borrow_decode!(LayerRange);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_both_ways_and_empty_ranges_are_refused() {
        assert_eq!("8..12".parse(), Ok(LayerRange { start: 8, end: 12 }));
        assert_eq!(LayerRange { start: 8, end: 12 }.to_string(), "8..12");
        for text in ["8..8", "9..8", "", "8", "..", "a..b", "-1..2", "0..65536"] {
            assert!(text.parse::<LayerRange>().is_err(), "{text}");
        }
    }

    #[test]
    fn merging_joins_what_touches() {
        let ranges = ["4..6", "0..2", "2..3", "5..9", "11..12"].map(|r| r.parse().unwrap());
        let merged = LayerRange::merge(ranges.to_vec());
        assert_eq!(format!("{merged:?}"), "[0..3, 4..9, 11..12]");
    }
}
