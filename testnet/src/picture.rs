//! The layers being covered, as lines of text: pure.
//!
//! ```text
//!   7 of 24 nodes serve · 8 of 8 layers held · 2.1 s
//!    1 ███·····   2 ···███··   3 ·····███   4 ██······
//!   nodes that hold each layer  2 2 1 1 1 2 2 1
//! ```

use std::ops::Range;
use std::time::Duration;

use crate::swarm::gaps;

/// More layers than this are drawn several to a character.
const CELLS_MAX: u32 = 64;

/// What the picture shows.
#[derive(Debug)]
pub struct Scene<'a> {
    /// The layers that each node serves; empty while it starts.
    pub live: &'a [Vec<Range<u32>>],
    /// Those that it will serve, where that is known.
    pub intended: &'a [Range<u32>],
    /// How many nodes there will be.
    pub nodes: usize,
    /// The model's layers.
    pub n_layer: u32,
    /// Since the first node was started.
    pub elapsed: Duration,
}

impl Scene<'_> {
    /// How many nodes serve.
    pub fn serving(&self) -> usize {
        self.live.iter().filter(|spans| !spans.is_empty()).count()
    }

    /// Whether every layer is held.
    pub fn covered(&self) -> bool {
        self.gaps() == 0
    }

    /// The first line alone says what is held; the others draw it.
    pub fn draw(&self, width: usize) -> Vec<String> {
        let serving = self.serving();
        let held = self.n_layer as usize - self.gaps();
        let seconds = self.elapsed.as_secs_f64();
        let head = format!(
            "  {serving} of {} nodes serve · {held} of {} layers held · {seconds:.1} s",
            self.nodes, self.n_layer
        );
        let mut lines = vec![head];
        lines.extend(self.rows(width));
        lines.push(format!("  nodes that hold each layer  {}", self.copies()));
        lines
    }

    fn rows(&self, width: usize) -> Vec<String> {
        let cells: Vec<String> = (0..self.nodes)
            .map(|node| format!("{:>3} {}", node + 1, self.bar(node)))
            .collect();
        let cell_width = cells.first().map_or(1, |cell| cell.chars().count() + 2);
        let per_row = (width.saturating_sub(2) / cell_width).max(1);
        cells
            .chunks(per_row)
            .map(|row| format!("  {}", row.join("  ")))
            .collect()
    }

    fn gaps(&self) -> usize {
        let live: Vec<Range<u32>> = self.live.iter().flatten().cloned().collect();
        gaps(&live, self.n_layer).len()
    }

    fn bar(&self, node: usize) -> String {
        let live = self.live.get(node).map(Vec::as_slice).unwrap_or_default();
        let intended = self.intended.get(node).cloned().unwrap_or(0..0);
        let step = self.n_layer.div_ceil(CELLS_MAX).max(1);
        let cell = |first: u32| {
            let meets = |span: &Range<u32>| first < span.end && span.start < first + step;
            match () {
                () if live.iter().any(meets) => '█',
                () if meets(&intended) => '░',
                () => '·',
            }
        };
        (0..self.n_layer).step_by(step as usize).map(cell).collect()
    }

    fn copies(&self) -> String {
        let copies = |layer| {
            let holds = |spans: &&Vec<Range<u32>>| spans.iter().any(|span| span.contains(&layer));
            self.live.iter().filter(holds).count()
        };
        let all: Vec<usize> = (0..self.n_layer).map(copies).collect();
        if self.n_layer > CELLS_MAX / 2 {
            return format!(
                "{} to {}",
                all.iter().min().unwrap_or(&0),
                all.iter().max().unwrap_or(&0)
            );
        }
        all.iter()
            .map(usize::to_string)
            .collect::<Vec<_>>()
            .join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_shows_what_each_node_holds() {
        let scene = Scene {
            live: &[vec![0..2, 2..3], vec![2..4, 4..5], vec![]],
            intended: &[0..3, 2..6],
            nodes: 4,
            n_layer: 8,
            elapsed: Duration::from_millis(2100),
        };
        let lines = scene.draw(80);
        assert_eq!(
            lines[0],
            "  2 of 4 nodes serve · 5 of 8 layers held · 2.1 s"
        );
        assert_eq!(
            lines[1],
            "    1 ███·····    2 ··███░··    3 ········    4 ········"
        );
        assert_eq!(lines[2], "  nodes that hold each layer  1 1 2 1 1 0 0 0");
    }

    #[test]
    fn a_deep_model_fits_the_terminal() {
        let scene = Scene {
            live: &[vec![0..1, 1..2], vec![70..75, 75..80]],
            intended: &[],
            nodes: 2,
            n_layer: 80,
            elapsed: Duration::ZERO,
        };
        assert!(scene.draw(80).iter().all(|line| line.chars().count() <= 80));
        assert!(scene.draw(80)[1].contains('█'));
    }
}
