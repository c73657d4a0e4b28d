//! How the layers held were loaded: those of a group share a llama.cpp model and leave together. Pure.

use std::ops::Range;

use swarm_proto::LayerRange;

/// The groups, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Groups(Vec<LayerRange>);

impl Groups {
    /// Takes groups in; those that they meet are gone, as in [`engine::Stage::add`].
    pub(super) fn add(&mut self, groups: impl IntoIterator<Item = Range<u32>>) {
        for group in groups {
            let group = super::span(&group);
            self.0
                .retain(|old| old.end <= group.start || group.end <= old.start);
            let at = self.0.partition_point(|old| old.start < group.start);
            self.0.insert(at, group);
        }
    }

    pub(super) fn remove(&mut self, group: LayerRange) {
        self.0.retain(|held| *held != group);
    }

    /// The group of a layer.
    pub(super) fn of(&self, layer: u16) -> Option<LayerRange> {
        self.0.iter().copied().find(|group| group.contains(layer))
    }

    pub(super) fn contains(&self, group: LayerRange) -> bool {
        self.0.contains(&group)
    }

    /// All layers, in order.
    pub(super) fn layers(&self) -> Vec<u16> {
        self.0.iter().flat_map(LayerRange::layers).collect()
    }
}

/// What is loaded anew of a group that `leaving` leaves: what lies in the window in one piece, and each that will
/// leave later by itself.
pub(super) fn rest(group: LayerRange, leaving: u16, window: LayerRange) -> Vec<LayerRange> {
    let stays = |layer: &u16| window.contains(*layer) && *layer != leaving;
    let mut rest = LayerRange::merge(group.layers().filter(stays).map(LayerRange::one).collect());
    let later = |layer: &u16| !window.contains(*layer) && *layer != leaving;
    rest.extend(group.layers().filter(later).map(LayerRange::one));
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u16, end: u16) -> LayerRange {
        LayerRange { start, end }
    }

    #[test]
    fn a_group_that_meets_another_replaces_it_whole() {
        let mut groups = Groups::default();
        groups.add([4..6, 0..4]);
        assert_eq!(groups.of(3), Some(span(0, 4)));
        groups.add(std::iter::once(1..4));
        assert_eq!(groups.layers(), [1, 2, 3, 4, 5], "layer 0 left");
        assert!(groups.contains(span(1, 4)) && !groups.contains(span(0, 4)));
        groups.remove(span(4, 6));
        assert_eq!((groups.of(4), groups.layers().len()), (None, 3));
    }

    #[test]
    fn what_leaves_later_is_loaded_by_itself() {
        let window = span(3, 8);
        assert_eq!(
            rest(span(0, 5), 1, window),
            [span(3, 5), span(0, 1), span(2, 3)]
        );
        assert_eq!(rest(span(0, 1), 0, window), []);
    }
}
