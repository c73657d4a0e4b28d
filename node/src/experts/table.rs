//! Who holds which expert just now. Pure.

use std::collections::HashSet;

use super::choose::LOCAL;

/// An expert, by layer of the whole model and index.
pub(super) type Expert = (u16, u16);

/// Which layers of a model have experts, and how many.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    /// For each layer of the model its place among those with experts.
    slots: Vec<Option<usize>>,
    layers: Vec<u16>,
    n_expert: u16,
}

impl Shape {
    pub(super) fn new(layers: &[u16], n_expert: u16) -> Self {
        let mut layers = layers.to_vec();
        layers.sort_unstable();
        layers.dedup();
        let end = layers.last().map_or(0, |last| usize::from(*last) + 1);
        let mut slots = vec![None; end];
        for (slot, layer) in layers.iter().enumerate() {
            slots[usize::from(*layer)] = Some(slot);
        }
        Self {
            slots,
            layers,
            n_expert,
        }
    }

    /// The place of an expert in a list of all; none where the model has no such expert.
    pub(super) fn at(&self, layer: u32, expert: u32) -> Option<usize> {
        let slot = (*self.slots.get(layer as usize)?)?;
        let fits = expert < u32::from(self.n_expert);
        fits.then(|| slot * usize::from(self.n_expert) + expert as usize)
    }

    /// How many experts there are.
    pub(super) fn len(&self) -> usize {
        self.layers.len() * usize::from(self.n_expert)
    }

    /// Experts of a layer.
    pub(super) fn n_expert(&self) -> u16 {
        self.n_expert
    }

    /// The layers that have experts.
    pub(super) fn layers(&self) -> &[u16] {
        &self.layers
    }

    /// Every expert, in the order of their places.
    pub(super) fn each(&self) -> impl Iterator<Item = Expert> {
        let n_expert = self.n_expert;
        let layers = self.layers.iter();
        layers.flat_map(move |layer| (0..n_expert).map(move |expert| (*layer, expert)))
    }
}

/// Holders of each expert, ascending.
#[derive(Debug, Default)]
pub(super) struct Table {
    by_expert: Vec<Vec<u32>>,
}

impl Table {
    /// `local` is computed by the trunk itself, the others by those of that number.
    pub(super) fn new<'a>(
        shape: &Shape,
        local: impl Iterator<Item = Expert>,
        others: impl Iterator<Item = (u32, &'a HashSet<Expert>, &'a HashSet<Expert>)>,
    ) -> Self {
        let mut by_expert = vec![Vec::new(); shape.len()];
        let mut put = |(layer, expert): Expert, holder| {
            if let Some(at) = shape.at(layer.into(), expert.into()) {
                by_expert[at].push(holder);
            }
        };
        local.for_each(|expert| put(expert, LOCAL));
        for (holder, held, denied) in others {
            let held = held.iter().filter(|expert| !denied.contains(*expert));
            held.for_each(|expert| put(*expert, holder));
        }
        by_expert
            .iter_mut()
            .for_each(|holders| holders.sort_unstable());
        Self { by_expert }
    }

    /// Who holds it.
    pub(super) fn holders(&self, at: Option<usize>) -> &[u32] {
        at.and_then(|at| self.by_expert.get(at))
            .map_or(&[], Vec::as_slice)
    }

    /// All lists, in the order of [`Shape::each`].
    pub(super) fn all(&self) -> &[Vec<u32>] {
        &self.by_expert
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_have_places_and_holders() {
        let shape = Shape::new(&[5, 2, 2], 3);
        assert_eq!(shape.layers(), [2, 5]);
        let each: Vec<_> = shape.each().collect();
        assert_eq!(each.len(), shape.len());
        for (at, (layer, expert)) in each.into_iter().enumerate() {
            assert_eq!(shape.at(layer.into(), expert.into()), Some(at));
        }
        for (layer, expert) in [(0, 0), (2, 3), (6, 0), (u32::MAX, 0), (5, u32::MAX)] {
            assert_eq!(shape.at(layer, expert), None);
        }
        let held = HashSet::from([(2, 0), (5, 2), (9, 9)]);
        let denied = HashSet::from([(5, 2)]);
        let none = HashSet::new();
        let others = [(7, &held, &none), (3, &held, &denied)];
        let local = [(2, 0), (2, 1)].into_iter();
        let table = Table::new(&shape, local, others.into_iter());
        assert_eq!(table.holders(shape.at(2, 0)), [0, 3, 7]);
        assert_eq!(table.holders(shape.at(2, 1)), [0]);
        assert_eq!(table.holders(shape.at(5, 2)), [7]);
        assert_eq!(table.holders(None), [0u32; 0]);
    }
}
