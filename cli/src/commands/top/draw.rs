//! Frames: the map with its rows, requests below it, the keys at the bottom. What colour says, a letter or a mark says
//! too.
//!
//! ```text
//! shoal top  swarm home · 24 peers · 312 tokens/s              as http://… sees it
//! demo  8 layers · complete · 24 holders                        sorted by layers
//!          0   2   4   6       tok/s    RTT heard queue
//! …Ab3dEf  ████████········     1,210 0.4ms   3 s     0
//! copies   3 3 2 2 2 2 3 3
//! requests  2 running · 14 answered · 0 failed · 1 stall · 2 failovers
//! #16 demo  answers   301.2/s   64 tok  last 0.0 s  …Ab3dEf 0..3 → …Zz91kQ 3..8
//! q quit  ↑↓ choose  Enter why  …
//! ```

use api::swarm::{HolderView, LiveView, ModelView, PeerView, RequestView, Stage};
use ratatui::Frame;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::app::{App, Pane, Sort};
use super::peer;
use crate::figures::{self, printable};
use crate::layer_map::{self, Ink, Row};

const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const GOOD: Style = Style::new().fg(Color::Green);
const WARN: Style = Style::new().fg(Color::Yellow);
/// Seen without colours, too.
const BAD: Style = Style::new()
    .fg(Color::Red)
    .add_modifier(Modifier::BOLD)
    .add_modifier(Modifier::REVERSED);
const HINT: Style = Style::new().fg(Color::Cyan);

/// Lines for requests at most; the map is what matters.
const REQUESTS_MAX: usize = 10;
/// Rows of one frame as text.
const TEXT_ROWS_MAX: u16 = 200;
/// An advert comes every ten seconds.
const OLD_S: f64 = 25.0;
const REMARKS: &str = "  tok/s     RTT  heard  q";

/// Draws what is shown.
pub fn draw(frame: &mut Frame<'_>, app: &mut App) {
    let parts = [
        Constraint::Length(1),
        Constraint::Min(0),
        Constraint::Length(1),
    ];
    let [head, body, foot] = Layout::vertical(parts).areas(frame.area());
    title(frame, head, app);
    match &app.pane {
        Pane::Map => main(frame, body, app),
        Pane::Peer { peer, detail } => {
            let lines = peer::lines(peer, detail.as_deref());
            let text = Paragraph::new(lines).wrap(ratatui::widgets::Wrap { trim: false });
            frame.render_widget(text, body);
        }
        Pane::Help => frame.render_widget(Paragraph::new(help()), body),
    }
    keys(frame, foot, app);
}

/// One frame as text, as high as it needs to be.
///
/// # Errors
/// None that a screen in memory has.
pub fn text_of(app: &mut App, width: usize) -> anyhow::Result<String> {
    let width = u16::try_from(width).unwrap_or(u16::MAX).clamp(40, 400);
    let rows = app.rows().len() + request_lines(app, width).len() + 8;
    let height = u16::try_from(rows)
        .unwrap_or(u16::MAX)
        .clamp(12, TEXT_ROWS_MAX);
    let mut terminal = Terminal::new(TestBackend::new(width, height))?;
    terminal.draw(|frame| draw(frame, app))?;
    let buffer = terminal.backend().buffer();
    let line = |y: u16| {
        let cells = (0..width).map(|x| buffer.cell((x, y)).map_or(" ", |cell| cell.symbol()));
        cells.collect::<String>().trim_end().to_owned()
    };
    // The keys are of no use on paper.
    let lines: Vec<String> = (0..height.saturating_sub(1)).map(line).collect();
    Ok(lines.join("\n").trim_end().to_owned())
}

fn title(frame: &mut Frame<'_>, area: Rect, app: &App) {
    let mut left = vec![Span::styled("shoal top", BOLD.patch(HINT)), "  ".into()];
    match &app.view {
        None => left.push("looking for the swarm…".into()),
        Some(view) => {
            let peers = view.peers.len() + view.peers_left_out;
            left.push(Span::styled(printable(&view.swarm, 40), BOLD));
            left.push(format!(" · {}", figures::plural(peers, "peer")).into());
            if app.sees_requests {
                let rate = figures::rate(Some(app.tokens_per_s));
                left.push(format!(" · {rate} tokens/s").into());
            }
        }
    }
    let right = match &app.trouble {
        Some(why) => Span::styled(format!(" {} ", printable(why, 120)), BAD),
        None => Span::styled(app.origin.clone(), DIM),
    };
    both(frame, area, Line::from(left), Line::from(right));
}

/// A line with something at each end; the left one gives way where both do not fit, but for a warning.
fn both(frame: &mut Frame<'_>, area: Rect, left: Line<'_>, right: Line<'_>) {
    let width = u16::try_from(right.width()).unwrap_or(u16::MAX);
    let needed = u16::try_from(left.width())
        .unwrap_or(u16::MAX)
        .saturating_add(2);
    let room = area.width.saturating_sub(needed);
    let width = width.min(room.max(area.width / 3));
    let [a, b] = Layout::horizontal([Constraint::Min(0), Constraint::Length(width)]).areas(area);
    frame.render_widget(Paragraph::new(left), a);
    frame.render_widget(Paragraph::new(right), b);
}

fn main(frame: &mut Frame<'_>, area: Rect, app: &mut App) {
    let requests = request_lines(app, area.width);
    let wanted = requests.len().min(usize::from(area.height / 2));
    let below = u16::try_from(wanted).unwrap_or(0);
    // The map is as high as it needs to be, and gives way to requests.
    let needed = u16::try_from(app.rows().len() + 2).unwrap_or(u16::MAX);
    let room = area.height.saturating_sub(below + 2).max(3);
    let parts = [
        Constraint::Length(1),
        Constraint::Length(needed.min(room)),
        Constraint::Length(1),
        Constraint::Min(below),
    ];
    let [about, map, _, under] = Layout::vertical(parts).areas(area);
    match app.model() {
        Some(model) => about_model(frame, about, model, app.sort),
        None => frame.render_widget(Paragraph::new(nobody(app)), about),
    }
    rows(frame, map, app);
    frame.render_widget(Paragraph::new(requests), under);
}

fn nobody(app: &App) -> Line<'static> {
    match &app.view {
        None => Line::default(),
        Some(view) if view.peers.is_empty() => Line::from(vec![
            "no peers yet; ".into(),
            Span::styled("`shoal node --model demo` starts one", HINT),
        ]),
        Some(_) => "nobody serves a model yet".into(),
    }
}

fn about_model(frame: &mut Frame<'_>, area: Rect, model: &ModelView, sort: Sort) {
    let name = match model.name.as_str() {
        "" => figures::short_hash(&model.id).to_owned(),
        name => printable(name, 40),
    };
    let holders = model.holders.len() + model.holders_left_out;
    let state = if model.complete {
        Span::styled("complete", GOOD)
    } else {
        let gaps = model.gaps.iter().take(4).map(|[a, b]| format!("{a}..{b}"));
        let gaps: Vec<String> = gaps.collect();
        Span::styled(format!(" nobody holds {} ", gaps.join(", ")), BAD)
    };
    let left = Line::from(vec![
        Span::styled(name, BOLD),
        format!("  {} · ", figures::plural(model.n_layer.into(), "layer")).into(),
        state,
        format!(" · {}", figures::plural(holders, "holder")).into(),
    ]);
    let right = Line::styled(format!("by {}", sort.name()), DIM);
    both(frame, area, left, right);
}

/// The map, scrolled so that the chosen row is in it.
fn rows(frame: &mut Frame<'_>, area: Rect, app: &mut App) {
    let room = usize::from(area.height).saturating_sub(2).max(1);
    let (lines, top) = {
        let all = app.rows();
        let Some(model) = app.model() else {
            return;
        };
        let at = app.selected(&all);
        let top = app.top.min(at).max((at + 1).saturating_sub(room));
        let top = top.min(all.len().saturating_sub(room));
        let shown: Vec<Row> = (all.iter().skip(top).take(room))
            .map(|(holder, peer)| row(holder, peer))
            .collect();
        let copies: Vec<usize> = model.copies.iter().map(|n| *n as usize).collect();
        let drawn = layer_map::draw_of(&shown, &copies, REMARKS, usize::from(area.width));
        let marked = |(n, line): (usize, Vec<layer_map::Span>)| {
            let chosen = n == at - top + 1 && n <= shown.len();
            painted(line, chosen)
        };
        let lines: Vec<Line<'static>> = drawn.into_iter().enumerate().map(marked).collect();
        (lines, top)
    };
    (app.top, app.page) = (top, room);
    frame.render_widget(Paragraph::new(lines), area);
}

fn row(holder: &HolderView, peer: &PeerView) -> Row {
    let ranges = |spans: &[[u16; 2]]| {
        let each = spans.iter().map(|[a, b]| usize::from(*a)..usize::from(*b));
        each.collect()
    };
    let mark = match peer {
        _ if peer.unreachable => "unreachable",
        _ if peer.leaving => "leaving",
        _ if peer.left_alone_s > 0 => "left alone",
        _ if !holder.experts.is_empty() => "experts",
        _ if holder.live.is_empty() => "loading",
        _ if peer.heard_s_ago > OLD_S => "silent",
        _ => "",
    };
    let rtt = match peer.rtt_ms {
        None => "–".into(),
        Some(ms) if ms < 99.95 => format!("{ms:.1} ms"),
        Some(ms) => format!("{ms:.0} ms"),
    };
    let speed = figures::rate(holder.layer_tokens_s.map(f64::from));
    let heard = format!("{:.0} s", peer.heard_s_ago);
    Row {
        label: figures::short_peer(&printable(&holder.peer, 64)),
        live: ranges(&holder.live),
        intended: ranges(&holder.intended),
        remark: format!("{speed:>7} {rtt:>7} {heard:>6} {:>2} {mark}", peer.queue)
            .trim_end()
            .to_owned(),
    }
}

/// The chosen row is marked beside its bar: the bar itself would be turned inside out.
fn painted(line: Vec<layer_map::Span>, chosen: bool) -> Line<'static> {
    let beside = match chosen {
        true => Style::new().add_modifier(Modifier::REVERSED),
        false => Style::new(),
    };
    let span = |(ink, text): layer_map::Span| {
        let style = match ink {
            Ink::Plain => beside,
            Ink::Live => GOOD,
            Ink::Partly | Ink::Intended => WARN,
            Ink::Empty | Ink::Head => DIM,
            Ink::Gap => BAD,
        };
        Span::styled(text, style)
    };
    line.into_iter().map(span).collect()
}

fn request_lines(app: &App, width: u16) -> Vec<Line<'static>> {
    let Some(view) = &app.view else {
        return Vec::new();
    };
    if !app.sees_requests {
        let mut lines = vec![Line::styled(
            "requests are known to the server that answers them: --url http://HOST:8080",
            DIM,
        )];
        lines.extend(node_line(&view.live));
        return lines;
    }
    let live = &view.live;
    let totals = &live.totals;
    let running = live.requests.len() + live.requests_left_out;
    let head = format!(
        "  {running} running · {} answered · {} stopped · {} failed · {} · {}",
        totals.answered,
        totals.hung_up,
        totals.failed,
        plural_of(totals.stalls, "stall"),
        plural_of(totals.recoveries, "failover"),
    );
    let mut lines = vec![Line::from(vec![
        Span::styled("requests", BOLD),
        head.into(),
    ])];
    for request in live.requests.iter().take(REQUESTS_MAX) {
        lines.extend(request_line(request, width));
    }
    let shown = live.requests.len().min(REQUESTS_MAX);
    if running > shown {
        lines.push(Line::styled(format!("… and {} more", running - shown), DIM));
    }
    if running == 0 {
        for ended in live.finished.iter().take(4) {
            let outcome = match ended.outcome {
                api::swarm::Outcome::Answered => "answered",
                api::swarm::Outcome::HungUp => "stopped",
                api::swarm::Outcome::Failed => "failed",
            };
            let words = format!(
                "#{} {}  {outcome} {:.0} s ago  {} tokens at {}/s  {}",
                ended.id,
                printable(&ended.model, 24),
                ended.s_ago,
                ended.tokens,
                figures::rate(Some(ended.tokens_per_s)),
                plural_of(ended.recoveries as u64, "failover"),
            );
            lines.push(Line::styled(words, DIM));
        }
    }
    lines.extend(node_line(live));
    lines
}

fn plural_of(n: u64, word: &str) -> String {
    figures::plural(usize::try_from(n).unwrap_or(usize::MAX), word)
}

/// A line of a request, and one of what is wrong with it.
fn request_line(request: &RequestView, width: u16) -> Vec<Line<'static>> {
    let (stage, style) = match request.stage {
        Stage::Begins => ("begins", DIM),
        Stage::Opens => ("opens", WARN),
        Stage::Prompt => ("prompt", HINT),
        Stage::Answers if request.last_token_s_ago > 1.5 => ("stands", WARN),
        Stage::Answers => ("answers", GOOD),
        Stage::Reroutes => ("REROUTES", BAD),
        Stage::Waits => ("WAITS", BAD),
    };
    let hops = request.route.iter().map(|hop| {
        let [start, end] = hop.layers;
        format!(
            "{} {start}..{end}",
            figures::short_peer(&printable(&hop.peer, 64))
        )
    });
    let route = hops.collect::<Vec<_>>().join(" → ");
    let facts = format!(
        " {:>6}/s {:>5} tok  pos {:<5} last {:>4.1} s  ",
        figures::rate(Some(request.tokens_per_s)),
        request.tokens,
        request.pos,
        request.last_token_s_ago,
    );
    let name = format!("#{} {} ", request.id, printable(&request.model, 16));
    let mut lines = vec![Line::from(vec![
        Span::styled(name, BOLD),
        Span::styled(format!("{stage:<8}"), style),
        facts.into(),
    ])];
    // On a narrow terminal the route has a line of its own.
    if lines[0].width() + route.chars().count() <= usize::from(width) {
        lines[0].push_span(Span::styled(route, DIM));
    } else if !route.is_empty() {
        lines.push(Line::styled(format!("   {route}"), DIM));
    }
    if let Some(lost) = &request.lost {
        lines.push(Line::styled(format!("   {}", printable(lost, 200)), WARN));
    } else if let Some(last) = request.recoveries.last() {
        let words = format!(
            "   {}, last at {}: new route after {:.0} ms",
            figures::plural(request.recoveries.len(), "failover"),
            last.pos,
            last.took_ms
        );
        lines.push(Line::styled(words, WARN));
    }
    lines
}

fn node_line(live: &LiveView) -> Option<Line<'static>> {
    let node = live.node.as_ref()?;
    let state = format!("{:?}", node.state).to_lowercase();
    let coming = node.coming.first().map(|shard| {
        let part = shard.fetched_bytes as f64 / shard.bytes.max(1) as f64;
        format!(" · {} {:.0} %", printable(&shard.kind, 24), part * 100.0)
    });
    let words = format!(
        "  {state} · {} · fetched {} · gave {}{}",
        figures::plural(node.sessions, "session"),
        figures::bytes(node.fetched_bytes),
        figures::bytes(node.given_bytes),
        coming.unwrap_or_default()
    );
    Some(Line::from(vec![
        Span::styled("node here", BOLD),
        words.into(),
    ]))
}

fn keys(frame: &mut Frame<'_>, area: Rect, app: &App) {
    let all: &[(&str, &str)] = match app.pane {
        Pane::Map => &[
            ("q", "quit"),
            ("↑↓", "choose"),
            ("Enter", "why"),
            ("Tab", "model"),
            ("l s r h u", "sort"),
            ("?", "help"),
        ],
        _ => &[("q", "quit"), ("Esc", "back")],
    };
    let spans = all.iter().flat_map(|(key, what)| {
        let key = Span::styled(
            format!(" {key} "),
            Style::new().add_modifier(Modifier::REVERSED),
        );
        [key, Span::raw(format!(" {what}  "))]
    });
    frame.render_widget(Paragraph::new(spans.collect::<Line<'_>>()), area);
}

fn help() -> Vec<Line<'static>> {
    let mut lines = vec![
        Line::default(),
        Line::styled("  The map", BOLD),
        "  One row a peer, layers from left to right: █ served, ▓ some of them, ░ being loaded.".into(),
        "  copies: how many peers serve each layer; a 0 is a layer that nobody serves.".into(),
        "  tok/s: rows a second through one layer; RTT: from here; heard: age of its advert; q: queue.".into(),
        Line::default(),
        Line::styled("  Keys", BOLD),
        "  ↑ ↓ k j, PgUp PgDn, Home End   choose a peer".into(),
        "  Enter                          who it is, what was seen of it, why it is or is not used".into(),
        "  Tab                            the next model".into(),
    ];
    for (_, key, name) in Sort::ALL {
        lines.push(format!("  {key}                              sort by {name}").into());
    }
    lines.push("  Esc                            back".into());
    lines.push("  q, Ctrl-C                      quit".into());
    lines
}

#[cfg(test)]
mod tests;
