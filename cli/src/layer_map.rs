//! The picture `shoal status` draws: one row a peer, one column a layer (or a group of layers when
//! the terminal is too narrow), and below them how many copies each layer has. Pure: facts in, lines
//! out, so that a test can read the picture.
//!
//! ```text
//!          0       4       8      serves    speed  heard
//! …Ab3dEf  ████████··············  0..4        812    3 s
//! …Zz91kQ  ········████████░░░░··  4..8        640    1 s
//! copies   1 1 1 1 1 1 1 1 0 0 0
//! ```

use std::ops::Range;

/// One peer's row.
pub struct Row {
    /// What stands left of the picture.
    pub label: String,
    /// Layers it serves now.
    pub live: Vec<Range<usize>>,
    /// Layers it is loading or means to load.
    pub intended: Vec<Range<usize>>,
    /// What stands right of the picture.
    pub remark: String,
}

/// What one character of the picture says, so that the caller picks the colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ink {
    /// Text beside the picture.
    Plain,
    /// Layer numbers, and what the remarks are.
    Head,
    /// Served.
    Live,
    /// Some of the layers of this column are served.
    Partly,
    /// Promised, not served yet.
    Intended,
    /// Nothing.
    Empty,
    /// A layer that nobody holds.
    Gap,
}

/// A run of text in one ink.
pub type Span = (Ink, String);

/// How layers share the columns.
struct Grid {
    n_layer: usize,
    /// Layers in one cell; 1 unless the terminal is too narrow.
    layers_per_cell: usize,
    /// Characters of one cell; wider cells make a small model readable.
    cell_width: usize,
}

/// Characters of the widest cell: beyond it a small model's picture gets no clearer.
const CELL_WIDTH_MAX: usize = 3;

impl Grid {
    fn new(n_layer: usize, width: usize) -> Self {
        let width = width.max(8);
        let layers_per_cell = n_layer.div_ceil(width).max(1);
        let cell_width = if layers_per_cell > 1 {
            1
        } else {
            (width / n_layer.max(1)).clamp(1, CELL_WIDTH_MAX)
        };
        Self {
            n_layer,
            layers_per_cell,
            cell_width,
        }
    }

    fn cells(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        (0..self.n_layer)
            .step_by(self.layers_per_cell)
            .map(|start| start..(start + self.layers_per_cell).min(self.n_layer))
    }

    fn width(&self) -> usize {
        self.n_layer.div_ceil(self.layers_per_cell) * self.cell_width
    }

    /// Layer numbers above the columns, as many as fit without touching.
    fn ruler(&self) -> String {
        let mut line = String::new();
        for (column, cell) in self.cells().enumerate() {
            let at = column * self.cell_width;
            let number = cell.start.to_string();
            let round = cell.start % (4 * self.layers_per_cell) == 0;
            let clear = line.is_empty() || line.len() + 2 <= at;
            if round && clear && at + number.len() <= self.width() {
                line.push_str(&" ".repeat(at - line.len()));
                line.push_str(&number);
            }
        }
        line
    }
}

/// How many peers serve each layer.
pub fn copies(n_layer: usize, rows: &[Row]) -> Vec<usize> {
    (0..n_layer)
        .map(|layer| rows.iter().filter(|row| holds(&row.live, layer)).count())
        .collect()
}

/// The layers that nobody serves, as ranges.
pub fn gaps(copies: &[usize]) -> Vec<Range<usize>> {
    let mut gaps: Vec<Range<usize>> = Vec::new();
    for layer in (0..copies.len()).filter(|&layer| copies[layer] == 0) {
        match gaps.last_mut() {
            Some(last) if last.end == layer => last.end = layer + 1,
            _ => gaps.push(layer..layer + 1),
        }
    }
    gaps
}

/// Draws the picture into lines; `remarks` heads the remarks, `width` is that of the terminal.
pub fn draw(n_layer: usize, rows: &[Row], remarks: &str, width: usize) -> Vec<Vec<Span>> {
    draw_of(rows, &copies(n_layer, rows), remarks, width)
}

/// The same of some of the holders, where it is known how many each layer has in all.
pub fn draw_of(rows: &[Row], copies: &[usize], remarks: &str, width: usize) -> Vec<Vec<Span>> {
    let label_width = rows
        .iter()
        .map(|row| row.label.chars().count())
        .max()
        .unwrap_or(0)
        .max(6)
        + 2;
    let remark_width = rows
        .iter()
        .map(|row| row.remark.chars().count())
        .chain([remarks.chars().count()])
        .max()
        .unwrap_or(0)
        + 2;
    let grid = Grid::new(
        copies.len(),
        width.saturating_sub(label_width + remark_width),
    );
    let ruler = format!("{:<width$}", grid.ruler(), width = grid.width());
    let head = format!("{:label_width$}{ruler}  {remarks}", "");
    let mut lines = vec![vec![(Ink::Head, head)]];
    for row in rows {
        let mut line = vec![(Ink::Plain, format!("{:label_width$}", row.label))];
        for cell in grid.cells() {
            push(&mut line, ink_of(row, &cell), grid.cell_width);
        }
        line.push((Ink::Plain, format!("  {}", row.remark)));
        lines.push(line);
    }
    lines.push(copies_line(&grid, copies, label_width));
    lines
}

/// The weakest layer of a cell decides its figure: a group is as good as its worst layer.
fn copies_line(grid: &Grid, copies: &[usize], label_width: usize) -> Vec<Span> {
    let mut line = vec![(Ink::Plain, format!("{:label_width$}", "copies"))];
    for cell in grid.cells() {
        let least = copies[cell].iter().copied().min().unwrap_or(0);
        let figure = if least > 9 {
            "+".into()
        } else {
            least.to_string()
        };
        let ink = if least == 0 { Ink::Gap } else { Ink::Plain };
        line.push((ink, format!("{figure:<width$}", width = grid.cell_width)));
    }
    line
}

fn ink_of(row: &Row, cell: &Range<usize>) -> Ink {
    let live = cell
        .clone()
        .filter(|&layer| holds(&row.live, layer))
        .count();
    if live == cell.len() {
        Ink::Live
    } else if live > 0 {
        Ink::Partly
    } else if cell.clone().any(|layer| holds(&row.intended, layer)) {
        Ink::Intended
    } else {
        Ink::Empty
    }
}

fn push(line: &mut Vec<Span>, ink: Ink, width: usize) {
    let glyph = match ink {
        Ink::Live => "█",
        Ink::Partly => "▓",
        Ink::Intended => "░",
        _ => "·",
    };
    let text = glyph.repeat(width);
    match line.last_mut() {
        Some((last, run)) if *last == ink => run.push_str(&text),
        _ => line.push((ink, text)),
    }
}

fn holds(ranges: &[Range<usize>], layer: usize) -> bool {
    ranges.iter().any(|range| range.contains(&layer))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(label: &str, live: Range<usize>, intended: Range<usize>) -> Row {
        Row {
            label: label.into(),
            live: vec![live],
            intended: vec![intended],
            remark: String::new(),
        }
    }

    fn text(lines: &[Vec<Span>]) -> Vec<String> {
        lines
            .iter()
            .map(|line| {
                line.iter()
                    .map(|(_, text)| text.as_str())
                    .collect::<String>()
                    .trim_end()
                    .to_string()
            })
            .collect()
    }

    #[test]
    fn a_small_model_gets_wide_cells_and_a_gap_is_seen() {
        let rows = [row("…Ab3dEf", 0..4, 0..4), row("…Zz91kQ", 3..6, 3..7)];
        let lines = draw(8, &rows, "", 40);
        assert_eq!(
            text(&lines),
            [
                "         0           4",
                "…Ab3dEf  ████████████············",
                "…Zz91kQ  ·········█████████░░░···",
                "copies   1  1  1  2  1  1  0  0",
            ]
        );
        assert_eq!(
            lines[3].iter().filter(|(ink, _)| *ink == Ink::Gap).count(),
            2
        );
        assert_eq!(format!("{:?}", gaps(&copies(8, &rows))), "[6..8]");
    }

    #[test]
    fn many_layers_share_columns_and_the_weakest_counts() {
        let rows = [row("a", 0..80, 0..80), row("b", 0..41, 0..41)];
        let lines = draw(80, &rows, "", 52);
        let drawn = text(&lines);
        assert_eq!(drawn[1], format!("a       {}", "█".repeat(40)));
        assert_eq!(
            drawn[2],
            format!("b       {}▓{}", "█".repeat(20), "·".repeat(19))
        );
        assert_eq!(
            drawn[3],
            format!("copies  {}{}", "2".repeat(20), "1".repeat(20))
        );
    }

    #[test]
    fn every_layer_count_and_width_draws_every_layer_once() {
        for n_layer in [1, 2, 7, 28, 61, 128, 1000] {
            for width in [0, 20, 80, 200] {
                let grid = Grid::new(n_layer, width);
                let covered: Vec<usize> = grid.cells().flatten().collect();
                assert_eq!(
                    covered,
                    (0..n_layer).collect::<Vec<_>>(),
                    "{n_layer} layers in {width}"
                );
                assert!(grid.width() <= width.max(8), "{n_layer} layers in {width}");
                assert!(grid.ruler().len() <= grid.width());
            }
        }
    }

    #[test]
    fn nobody_at_all_is_one_gap() {
        assert_eq!(format!("{:?}", gaps(&copies(5, &[]))), "[0..5]");
        assert!(gaps(&[]).is_empty());
    }
}
