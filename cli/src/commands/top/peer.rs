//! One peer, as `shoal top` shows it.

use api::swarm::{HeldView, PeerDetail, WhyView};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use crate::figures::{self, printable};

const HEAD: Style = Style::new().add_modifier(Modifier::BOLD);
const NAME: Style = Style::new().add_modifier(Modifier::DIM);
const GOOD: Style = Style::new().fg(Color::Green).add_modifier(Modifier::BOLD);
const WARN: Style = Style::new().fg(Color::Yellow);

/// Addresses and neighbours that are shown.
const SHOWN_MAX: usize = 6;

/// What there is to say; `detail` comes a moment after the peer was chosen.
pub fn lines(peer: &str, detail: Option<&PeerDetail>) -> Vec<Line<'static>> {
    let mut lines = vec![Line::styled(format!("peer {}", printable(peer, 80)), HEAD)];
    let Some(it) = detail else {
        lines.push("looking…".into());
        return lines;
    };
    if let Some(why) = &it.why {
        lines.extend(why_lines(why));
    }
    lines.push(Line::styled("seen from here", HEAD));
    let connection = match (it.unreachable, it.connected) {
        (true, _) => "could not be reached",
        (false, true) => "connected",
        (false, false) => "not connected",
    };
    let rtt = it.rtt_ms.map(|ms| format!(", {ms:.2} ms"));
    lines.push(fact(
        "connection",
        connection.to_owned() + &rtt.unwrap_or_default(),
    ));
    match &it.seen {
        None => lines.push(fact("failures", "none that is not forgiven".into())),
        Some(seen) => {
            let times = figures::plural(seen.failures as usize, "failure");
            let state = match seen.left_alone_s {
                0 => "asked again when needed".into(),
                s => format!("left alone for another {s} s"),
            };
            let words = format!("{times}, the last {} s ago · {state}", seen.s_ago);
            lines.push(Line::from(vec![
                name("failures"),
                Span::styled(words, WARN),
            ]));
            lines.push(fact("the last", printable(&seen.last, 300)));
        }
    }
    if !it.alive {
        lines.push(Line::styled("it advertises nothing now", WARN));
        return lines;
    }
    for held in &it.models {
        lines.extend(held_lines(held));
    }
    if it.models.is_empty() {
        lines.push("it holds nothing now: it is paused, or has just come".into());
    }
    lines.extend(said_lines(it));
    lines
}

fn said_lines(it: &PeerDetail) -> Vec<Line<'static>> {
    let mut lines = vec![Line::styled("it says", HEAD)];
    lines.push(fact("program", printable(&it.agent, 64)));
    lines.push(fact(
        "heard",
        format!("{:.1} s ago, queue {}", it.heard_s_ago, it.queue),
    ));
    let uplink = it.uplink_bytes_s.map(|bytes| {
        let ago = it.uplink_s_ago.unwrap_or(0);
        format!("{}/s, measured {ago} s ago", figures::bytes(bytes as u64))
    });
    lines.push(fact(
        "uplink",
        uplink.unwrap_or_else(|| "not measured".into()),
    ));
    for addr in it.addrs.iter().take(SHOWN_MAX) {
        lines.push(fact("address", printable(addr, 128)));
    }
    let near = it.neighbours.iter().take(SHOWN_MAX);
    let near = near.map(|other| {
        let peer = figures::short_peer(&printable(&other.peer, 64));
        format!("{peer} {:.1} ms", other.rtt_ms)
    });
    let near: Vec<String> = near.collect();
    if !near.is_empty() {
        lines.push(fact("round trips", near.join(", ")));
    }
    lines
}

fn why_lines(why: &WhyView) -> Vec<Line<'static>> {
    let (verdict, style) = match (&why.layers[..], &why.stands_by[..]) {
        ([], []) => ("not used now".to_owned(), HEAD),
        ([], spans) => (format!("stands by for {}", list(spans)), WARN),
        (spans, _) => (format!("used for {}", list(spans)), GOOD),
    };
    let mut lines = vec![
        Line::styled(verdict, style),
        fact("because", printable(&why.text, 300)),
    ];
    if let Some(parts) = &why.parts {
        let about = if parts.network_measured { "" } else { "≈ " };
        let words = format!(
            "network {about}{:.3} ms · queue {:.3} · hop {:.3} · compute {:.3}",
            parts.network, parts.queue, parts.overhead, parts.compute
        );
        lines.push(fact("a token", words));
    }
    lines
}

fn held_lines(held: &HeldView) -> Vec<Line<'static>> {
    let of = printable(&held.name, 64);
    let speed = figures::rate(held.layer_tokens_s.map(f64::from));
    let ago = held.measured_s_ago.map(|s| format!(", measured {s} s ago"));
    let mut lines = vec![
        Line::styled(format!("holds of {of}"), HEAD),
        fact("serves", list(&held.live)),
        fact("will serve", list(&held.intended)),
        fact("gives shards", list(&held.stored)),
        fact(
            "speed",
            format!("{speed} tokens/s·layer{}", ago.unwrap_or_default()),
        ),
        fact(
            "free KV",
            format!(
                "{} positions of one layer, context {}",
                held.free_cells, held.n_ctx_max
            ),
        ),
        fact("numerics", printable(&held.numerics, 32)),
    ];
    if !held.experts.is_empty() {
        lines.push(fact("experts", printable(&held.experts.join("; "), 300)));
    }
    if !held.island.is_empty() {
        let peers = held
            .island
            .iter()
            .map(|peer| figures::short_peer(&printable(peer, 64)));
        lines.push(fact("island", peers.collect::<Vec<_>>().join(" ")));
    }
    lines
}

fn list(spans: &[[u16; 2]]) -> String {
    match spans {
        [] => "none".into(),
        spans => {
            let each = spans.iter().map(|[a, b]| format!("{a}..{b}"));
            each.collect::<Vec<_>>().join(", ")
        }
    }
}

fn name(name: &str) -> Span<'static> {
    Span::styled(format!("  {name:<13}"), NAME)
}

fn fact(about: &str, words: String) -> Line<'static> {
    Line::from(vec![name(about), Span::raw(words)])
}
