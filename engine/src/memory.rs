//! What sessions take of a stage's memory: KV, and what llama.cpp allocates
//! around it. `tests/memory.rs` holds the figures against the system's.

use std::iter::Sum;
use std::ops::{Add, Range, Sub};

use crate::PREFILL_CHUNK;
use crate::blueprint::Blueprint;

/// Working buffers that do not count against the budget: a whole idle node is
/// promised to stay within 64 MB of its tensors and KV, and this is part of it.
/// Contexts without a session may hold so much of them.
pub(crate) const WORK_FREE: u64 = 16 << 20;

/// Bytes of a context whatever its model: graphs and tables.
const CONTEXT_BYTES: u64 = 1_600_000;
/// Bytes that a layer's part of the graphs takes, twice, and once for each
/// expert that a row meets.
const NODES_BYTES: u64 = 16 << 10;
/// Bytes of a context's position beyond KV: a column of the mask for a chunk's
/// rows, and llama.cpp's table of cells.
const POSITION_BYTES: u64 = 250;

/// Bytes of such a position in a lane that nobody uses: the table alone, twice where there are windows.
const EMPTY_POSITION_BYTES: u64 = 60;
/// Bytes of a context with several lanes beyond one with one: graphs for rows of each of them.
const LANES_BYTES: u64 = 512 << 10;

/// Bytes of contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Need {
    /// Keys and values.
    pub kv: u64,
    /// Working buffers and tables.
    pub work: u64,
}

impl Need {
    /// What counts against the budget.
    pub(crate) fn counted(self) -> u64 {
        self.kv.saturating_add(self.work.saturating_sub(WORK_FREE))
    }

    pub(crate) fn bytes(self) -> u64 {
        self.kv.saturating_add(self.work)
    }
}

/// Positions that one more session may have beside `open` within `budget`, when
/// `none` is what it takes without any and `one` with one. Both what counts
/// always and what counts beyond [`WORK_FREE`] must fit.
pub(crate) fn positions_left(budget: u64, open: Need, none: Need, one: Need) -> u64 {
    let position = one - none;
    let taken = (open + none).bytes();
    let all = budget.saturating_add(WORK_FREE).saturating_sub(taken);
    let kv = budget.saturating_sub(open.kv);
    (all / position.bytes().max(1)).min(kv / position.kv.max(1))
}

impl Add for Need {
    type Output = Need;

    fn add(self, other: Need) -> Need {
        Need {
            kv: self.kv.saturating_add(other.kv),
            work: self.work.saturating_add(other.work),
        }
    }
}

impl Sub for Need {
    type Output = Need;

    fn sub(self, other: Need) -> Need {
        Need {
            kv: self.kv.saturating_sub(other.kv),
            work: self.work.saturating_sub(other.work),
        }
    }
}

impl Sum for Need {
    fn sum<I: Iterator<Item = Need>>(needs: I) -> Need {
        needs.fold(Need::default(), Add::add)
    }
}

impl Blueprint {
    /// A context of `class` positions for a group of layers, after a whole chunk
    /// of which every row's output was asked for.
    pub(crate) fn context_need(&self, group: &Range<u32>, class: u32) -> Need {
        self.base_need(group) + self.lane_need(group, class)
    }

    /// What a lane of `class` positions takes of a context as long as a session uses it.
    pub(crate) fn lane_need(&self, group: &Range<u32>, class: u32) -> Need {
        let cells: u64 = group.clone().map(|i| self.kv_cell_bytes(i)).sum();
        Need {
            kv: cells.saturating_mul(class.into()),
            work: self.tables(POSITION_BYTES, class),
        }
    }

    /// What it takes while nobody does.
    pub(crate) fn empty_lane_need(&self, class: u32) -> Need {
        Need {
            kv: 0,
            work: self.tables(EMPTY_POSITION_BYTES, class),
        }
    }

    /// What a context of several lanes takes beyond one of one, whatever uses it.
    pub(crate) fn several_lanes_need(&self) -> Need {
        Need {
            kv: 0,
            work: self.tables(LANES_BYTES, 1),
        }
    }

    fn tables(&self, position: u64, class: u32) -> u64 {
        let tables = if self.has_windows() { 2 } else { 1 };
        position * tables * u64::from(class)
    }

    /// What a context takes whatever its positions.
    pub(crate) fn base_need(&self, group: &Range<u32>) -> Need {
        let (n_layer, n_embd) = (u64::from(group.end - group.start), u64::from(self.n_embd()));
        let used = u64::from(self.n_expert_used().max(1));
        let mut row = 4 * self.n_ff() + (5 + used) * n_embd;
        if group.end == self.n_layer() {
            // Logits, as they are computed and as they are handed out.
            row += 2 * u64::from(self.n_vocab());
        }
        Need {
            kv: 0,
            work: CONTEXT_BYTES
                + n_layer * NODES_BYTES * (2 + used)
                + u64::from(PREFILL_CHUNK) * row * 4,
        }
    }

    /// Bytes that the only session of a stage of `layers` counts against
    /// [`crate::LoadOptions::kv_bytes_max`].
    pub fn session_bytes(&self, layers: &Range<u32>, n_ctx: u32) -> u64 {
        let class = self.context_class(n_ctx);
        let groups = self.groups(layers);
        let need: Need = groups
            .iter()
            .map(|group| self.context_need(group, class))
            .sum();
        need.counted()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_left_are_those_that_fit() {
        const MB: u64 = 1 << 20;
        let none = Need {
            kv: 0,
            work: 3 * MB,
        };
        let one = Need {
            kv: 1024,
            work: 3 * MB + 250,
        };
        for (budget, sessions) in [(MB, 0), (40 * MB, 3), (40 * MB, 9), (MB, 6)] {
            let each = Need {
                kv: MB / 4,
                work: 3 * MB,
            };
            let open: Need = (0..sessions).map(|_| each).sum();
            let left = positions_left(budget, open, none, one);
            let with = |n: u64| {
                let need = Need {
                    kv: 1024 * n,
                    work: 3 * MB + 250 * n,
                };
                (open + need).counted() <= budget
            };
            assert!(left == 0 || with(left), "{budget} {sessions}: {left}");
            assert!(!with(left + 1), "{budget} {sessions}: {left}");
        }
    }
}
