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
    /// The layers of each node; empty while it starts.
    pub spans: &'a [Range<u32>],
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
        self.spans.iter().filter(|span| !span.is_empty()).count()
    }

    /// Whether every layer is held.
    pub fn covered(&self) -> bool {
        gaps(self.spans, self.n_layer).is_empty()
    }

    /// The first line alone says what is held; the others draw it.
    pub fn draw(&self, width: usize) -> Vec<String> {
        let serving = self.serving();
        let held = self.n_layer as usize - gaps(self.spans, self.n_layer).len();
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
            .map(|node| {
                format!(
                    "{:>3} {}",
                    node + 1,
                    self.bar(self.spans.get(node).unwrap_or(&(0..0)))
                )
            })
            .collect();
        let cell_width = cells.first().map_or(1, |cell| cell.chars().count() + 2);
        let per_row = (width.saturating_sub(2) / cell_width).max(1);
        cells
            .chunks(per_row)
            .map(|row| format!("  {}", row.join("  ")))
            .collect()
    }

    fn bar(&self, span: &Range<u32>) -> String {
        let step = self.n_layer.div_ceil(CELLS_MAX).max(1);
        let cell = |first: u32| {
            if first < span.end && span.start < first + step {
                '█'
            } else {
                '·'
            }
        };
        (0..self.n_layer).step_by(step as usize).map(cell).collect()
    }

    fn copies(&self) -> String {
        let copies = |layer| {
            self.spans
                .iter()
                .filter(|span| span.contains(&layer))
                .count()
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
        let spans = [0..3, 2..5, 0..0];
        let scene = Scene {
            spans: &spans,
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
            "    1 ███·····    2 ··███···    3 ········    4 ········"
        );
        assert_eq!(lines[2], "  nodes that hold each layer  1 1 2 1 1 0 0 0");
    }

    #[test]
    fn a_deep_model_fits_the_terminal() {
        let scene = Scene {
            spans: &[0..1, 70..80],
            nodes: 2,
            n_layer: 80,
            elapsed: Duration::ZERO,
        };
        assert!(scene.draw(80).iter().all(|line| line.chars().count() <= 80));
        assert!(scene.draw(80)[1].contains('█'));
    }
}
