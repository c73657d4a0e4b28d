//! What a peer says of the experts of a mixture.

use std::{collections::BTreeMap, fmt};

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::{
    LayerRange, Measured, Peer,
    codec::{CheckError, at_most, wrong},
};

/// Most experts of a layer.
pub const EXPERTS_MAX: usize = 1024;
/// Most separate spans of experts of one model: a span a layer of the deepest models.
pub const EXPERT_SPANS_MAX: usize = 256;
/// Most holders that a trunk names.
pub const ISLAND_PEERS_MAX: usize = 64;
/// Most experts that a trunk calls hot.
pub const HOT_EXPERTS_MAX: usize = 64;

/// Some of the experts of a layer: a bit an expert, the lowest first, no byte more than it takes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Encode, Decode)]
pub struct ExpertSet(Vec<u8>);

impl ExpertSet {
    /// Whether `expert` is among them.
    pub fn contains(&self, expert: u16) -> bool {
        let byte = self.0.get(usize::from(expert / 8));
        byte.is_some_and(|byte| byte >> (expert % 8) & 1 == 1)
    }

    /// Their indices, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        let bits = self.0.len().saturating_mul(8).min(EXPERTS_MAX) as u16;
        (0..bits).filter(|expert| self.contains(*expert))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }

    fn check(&self) -> Result<(), CheckError> {
        at_most("bytes of a set of experts", self.0.len(), EXPERTS_MAX / 8)?;
        match self.0.last() {
            None => Err(wrong("a set of no experts")),
            Some(0) => Err(wrong("a set of experts with a last byte of 0")),
            Some(_) => Ok(()),
        }
    }
}

impl FromIterator<u16> for ExpertSet {
    /// Those from [`EXPERTS_MAX`] on are left out.
    fn from_iter<I: IntoIterator<Item = u16>>(experts: I) -> Self {
        let mut bytes = Vec::new();
        for expert in experts {
            let (byte, bit) = (usize::from(expert / 8), expert % 8);
            if usize::from(expert) < EXPERTS_MAX {
                bytes.resize(bytes.len().max(byte + 1), 0);
                bytes[byte] |= 1 << bit;
            }
        }
        Self(bytes)
    }
}

impl fmt::Display for ExpertSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = LayerRange::merge(self.iter().map(LayerRange::one).collect());
        for (i, run) in runs.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match run.len() {
                1 => write!(f, "{comma}{}", run.start)?,
                _ => write!(f, "{comma}{}-{}", run.start, run.end - 1)?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for ExpertSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for ExpertSet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The same experts of several layers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct ExpertSpan {
    /// Which layers.
    pub layers: LayerRange,
    /// Which experts of each.
    pub experts: ExpertSet,
}

impl ExpertSpan {
    /// Experts, by layer and index, as spans: layers in order, each once, those that follow each other with
    /// the same experts together.
    pub fn of(experts: impl IntoIterator<Item = (u16, u16)>) -> Vec<ExpertSpan> {
        let mut by_layer = BTreeMap::<u16, Vec<u16>>::new();
        for (layer, expert) in experts {
            by_layer.entry(layer).or_default().push(expert);
        }
        let mut spans: Vec<ExpertSpan> = Vec::new();
        for (layer, experts) in by_layer {
            let experts: ExpertSet = experts.into_iter().collect();
            match spans.last_mut() {
                Some(last) if last.layers.end == layer && last.experts == experts => {
                    last.layers.end = layer + 1;
                }
                _ => spans.push(ExpertSpan {
                    layers: LayerRange::one(layer),
                    experts,
                }),
            }
        }
        spans
    }

    /// Every expert, by layer and index.
    pub fn each(spans: &[ExpertSpan]) -> impl Iterator<Item = (u16, u16)> {
        spans.iter().flat_map(|span| {
            let layers = span.layers.layers();
            layers.flat_map(|layer| span.experts.iter().map(move |expert| (layer, expert)))
        })
    }

    /// Whether an expert of a layer is among them.
    pub fn hold(spans: &[ExpertSpan], layer: u16, expert: u16) -> bool {
        let mut of_layer = spans.iter().filter(|span| span.layers.contains(layer));
        of_layer.any(|span| span.experts.contains(expert))
    }
}

/// As `0-3,7 of 0..5`: experts of layers.
impl fmt::Display for ExpertSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.experts, self.layers)
    }
}

/// An expert that a trunk's routers pick more often than others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct HotExpert {
    /// Of which layer.
    pub layer: u16,
    /// Which.
    pub expert: u16,
    /// Its share of the layer's picks, in thousandths.
    pub per_mille: u16,
}

/// What a peer says of the experts of a model.
#[derive(Debug, Clone, Default, PartialEq, Encode, Decode, Serialize)]
pub struct ExpertsAdvert {
    /// Experts that it computes now, for any trunk.
    pub live: Vec<ExpertSpan>,
    /// Experts that it will compute.
    pub intended: Vec<ExpertSpan>,
    /// Measured rows a second through one expert, one row at a time.
    pub rows_s: Option<Measured>,
    /// Who computes the experts of its live layers, where that is not itself alone: its island.
    pub island: Vec<Peer>,
    /// Experts that its routers pick most, the most picked first: another holder of them would help.
    pub hot: Vec<HotExpert>,
}

impl ExpertsAdvert {
    pub(crate) fn check(&self, n_layer: u16) -> Result<(), CheckError> {
        for (what, spans) in [
            ("spans of live experts", &self.live),
            ("spans of intended experts", &self.intended),
        ] {
            at_most(what, spans.len(), EXPERT_SPANS_MAX)?;
            for span in spans {
                span.experts.check()?;
                if span.layers.is_empty() || span.layers.end > n_layer {
                    let layers = span.layers;
                    return Err(wrong(format!(
                        "experts of layers {layers} of a model that has {n_layer} layers"
                    )));
                }
            }
            // In order and apart: a layer is said once.
            if !spans.is_sorted_by(|a, b| a.layers.end <= b.layers.start) {
                return Err(wrong(format!("{what} that are not in order")));
            }
        }
        at_most("peers of an island", self.island.len(), ISLAND_PEERS_MAX)?;
        at_most("hot experts", self.hot.len(), HOT_EXPERTS_MAX)?;
        let wild = |hot: &&HotExpert| {
            hot.layer >= n_layer || usize::from(hot.expert) >= EXPERTS_MAX || hot.per_mille > 1000
        };
        if let Some(hot) = self.hot.iter().find(wild) {
            return Err(wrong(format!(
                "expert {} of layer {} picked for {} of 1000 rows",
                hot.expert, hot.layer, hot.per_mille
            )));
        }
        crate::advert::check_figure("experts' speed", self.rows_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(experts: &[u16]) -> ExpertSet {
        experts.iter().copied().collect()
    }

    #[test]
    fn sets_and_spans_give_back_what_they_were_made_of() {
        let some = [0, 1, 2, 9, 63, 200];
        assert_eq!(set(&some).iter().collect::<Vec<_>>(), some);
        assert_eq!(set(&some).to_string(), "0-2,9,63,200");
        assert_eq!((set(&some).len(), set(&[]).is_empty()), (6, true));
        assert!(set(&[2000]).is_empty());
        let all = [(2, 1), (2, 0), (3, 0), (3, 1), (4, 1), (7, 1)];
        let spans = ExpertSpan::of(all);
        let text: Vec<_> = spans
            .iter()
            .map(|span| format!("{} {}", span.layers, span.experts))
            .collect();
        assert_eq!(text, ["2..4 0-1", "4..5 1", "7..8 1"]);
        let mut sorted = all;
        sorted.sort_unstable();
        assert_eq!(ExpertSpan::each(&spans).collect::<Vec<_>>(), sorted);
        assert!(ExpertSpan::hold(&spans, 4, 1) && !ExpertSpan::hold(&spans, 4, 0));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let span = |start, end, experts: &[u16]| ExpertSpan {
            layers: LayerRange { start, end },
            experts: set(experts),
        };
        let live = |live: Vec<ExpertSpan>| ExpertsAdvert {
            live,
            ..ExpertsAdvert::default()
        };
        assert_eq!(
            live(vec![span(0, 2, &[1]), span(2, 8, &[3, 1023])]).check(8),
            Ok(())
        );
        let mut padded = span(0, 1, &[1]);
        padded.experts.0.push(0);
        let hot = |layer, expert, per_mille| ExpertsAdvert {
            hot: vec![HotExpert {
                layer,
                expert,
                per_mille,
            }],
            ..ExpertsAdvert::default()
        };
        let mut large = span(0, 1, &[1]);
        large.experts.0 = vec![1; EXPERTS_MAX / 8 + 1];
        for wrong in [
            live(vec![span(0, 9, &[1])]),
            live(vec![span(3, 3, &[1])]),
            live(vec![span(0, 1, &[])]),
            live(vec![span(1, 2, &[1]), span(0, 1, &[1])]),
            live(vec![span(0, 2, &[1]), span(1, 3, &[2])]),
            live(vec![span(0, 1, &[1]); EXPERT_SPANS_MAX + 1]),
            live(vec![padded]),
            live(vec![large]),
            hot(8, 0, 1),
            hot(0, 1024, 1),
            hot(0, 0, 1001),
            ExpertsAdvert {
                island: vec![Peer([1; 32]); ISLAND_PEERS_MAX + 1],
                ..ExpertsAdvert::default()
            },
            ExpertsAdvert {
                rows_s: Some(Measured {
                    value: f32::NAN,
                    age_s: 0,
                }),
                ..ExpertsAdvert::default()
            },
        ] {
            assert!(wrong.check(8).is_err(), "{wrong:?}");
        }
    }
}
