//! Frames of swarms that never were, read from a screen in memory.

use api::swarm::{
    FailedView, HolderView, HopView, LiveView, ModelView, PeerDetail, PeerView, RecoveryView,
    RequestView, Stage, SwarmView, Totals, WhyView,
};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::super::app::{Act, App, Pane};
use super::draw;

fn id(n: usize) -> String {
    format!("12D3KooWpeer{n:06}")
}

fn holder(n: usize, layers: [u16; 2], speed: f32) -> HolderView {
    HolderView {
        peer: id(n),
        live: vec![layers],
        intended: vec![layers],
        layer_tokens_s: Some(speed),
        ..HolderView::default()
    }
}

fn peer(n: usize) -> PeerView {
    PeerView {
        peer: id(n),
        heard_s_ago: n as f64,
        rtt_ms: Some(10.0 - n as f64),
        connected: true,
        ..PeerView::default()
    }
}

/// Three peers on eight layers, the last of which nobody has, and a request that lost a hop.
fn small() -> SwarmView {
    SwarmView {
        swarm: "home".into(),
        peers: (1..=3).map(peer).collect(),
        models: vec![ModelView {
            id: "ab".repeat(32),
            name: "demo".into(),
            n_layer: 8,
            complete: false,
            gaps: vec![[7, 8]],
            copies: vec![2, 2, 2, 1, 1, 1, 1, 0],
            holders: vec![
                holder(1, [0, 4], 1200.0),
                holder(2, [0, 3], 2400.0),
                holder(3, [4, 7], 600.0),
            ],
            holders_left_out: 0,
        }],
        live: LiveView {
            at_ms: 1000,
            requests: vec![RequestView {
                id: 7,
                model: "demo".into(),
                stage: Stage::Reroutes,
                tokens: 48,
                pos: 60,
                tokens_per_s: 312.0,
                route: vec![HopView {
                    peer: id(1),
                    layers: [0, 4],
                }],
                lost: Some("hop 2 is lost".into()),
                recoveries: vec![RecoveryView::default()],
                ..RequestView::default()
            }],
            totals: Totals {
                answered: 5,
                tokens: 100,
                recoveries: 1,
                ..Totals::default()
            },
            ..LiveView::default()
        },
        ..SwarmView::default()
    }
}

fn app(view: SwarmView) -> App {
    let mut app = App::new("as http://x sees it".into(), true);
    app.see(view);
    app
}

fn frame(app: &mut App, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a screen");
    terminal.draw(|frame| draw(frame, app)).expect("draws");
    let buffer = terminal.backend().buffer();
    let line = |y| {
        let cells = (0..width).map(|x| buffer.cell((x, y)).map_or(" ", |cell| cell.symbol()));
        cells.collect::<String>().trim_end().to_owned()
    };
    (0..height).map(line).collect()
}

fn key(app: &mut App, code: KeyCode) -> Act {
    app.key(KeyEvent::new(code, KeyModifiers::NONE))
}

/// The line that has `words`.
fn line<'a>(frame: &'a [String], words: &str) -> &'a str {
    let found = frame.iter().find(|line| line.contains(words));
    found.unwrap_or_else(|| panic!("no {words:?} in:\n{}", frame.join("\n")))
}

#[test]
fn a_small_terminal_shows_the_map_the_gap_and_the_request() {
    let mut app = app(small());
    let shown = frame(&mut app, 80, 24);
    assert!(
        shown[0].starts_with("shoal top  home · 3 peers"),
        "{}",
        shown[0]
    );
    assert!(line(&shown, "demo  8 layers").contains("nobody holds 7..8"));
    let first = line(&shown, "…000001");
    assert!(first.contains("████") && first.contains("1200"), "{first}");
    assert!(line(&shown, "copies").contains('0'));
    let request = line(&shown, "#7 demo");
    assert!(
        request.contains("REROUTES") && request.contains("48 tok"),
        "{request}"
    );
    line(&shown, "…000001 0..4");
    line(&shown, "hop 2 is lost");
    line(
        &shown,
        "1 running · 5 answered · 0 stopped · 0 failed · 0 stalls · 1 failover",
    );
    assert!(shown[23].contains("q  quit"), "{}", shown[23]);
}

#[test]
fn letters_sort_and_arrows_choose() {
    let mut app = app(small());
    let order = |app: &App| -> Vec<String> {
        let rows = app.rows();
        rows.iter().map(|(holder, _)| holder.peer.clone()).collect()
    };
    assert_eq!(order(&app), [id(1), id(2), id(3)]);
    key(&mut app, KeyCode::Char('s'));
    assert_eq!(order(&app), [id(2), id(1), id(3)]);
    key(&mut app, KeyCode::Char('r'));
    assert_eq!(order(&app), [id(3), id(2), id(1)]);
    key(&mut app, KeyCode::Char('h'));
    assert_eq!(order(&app), [id(1), id(2), id(3)]);
    key(&mut app, KeyCode::Down);
    let looked = key(&mut app, KeyCode::Enter);
    assert_eq!(looked, Act::LookAt(id(2), "ab".repeat(32)));
    assert!(line(&frame(&mut app, 80, 24), id(2).as_str()).starts_with("peer"));
    app.look(PeerDetail {
        peer: id(2),
        alive: true,
        seen: Some(FailedView {
            failures: 2,
            last: "it was silent".into(),
            left_alone_s: 30,
            ..FailedView::default()
        }),
        why: Some(WhyView {
            text: "2 ms dearer, at best for 0..2".into(),
            ..WhyView::default()
        }),
        ..PeerDetail::default()
    });
    let shown = frame(&mut app, 80, 24);
    line(&shown, "not used now");
    line(&shown, "2 ms dearer, at best for 0..2");
    line(
        &shown,
        "2 failures, the last 0 s ago · left alone for another 30 s",
    );
    key(&mut app, KeyCode::Esc);
    assert_eq!(app.pane, Pane::Map);
    assert_eq!(key(&mut app, KeyCode::Char('q')), Act::End);
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(app.key(control_c), Act::End);
}

#[test]
fn a_thousand_peers_on_eighty_layers_scroll() {
    let mut view = small();
    view.peers = (0..1000).map(peer).collect();
    view.models[0].n_layer = 80;
    view.models[0].copies = vec![125; 80];
    view.models[0].gaps.clear();
    view.models[0].complete = true;
    let span = |n: usize| [(n % 8 * 10) as u16, (n % 8 * 10 + 10) as u16];
    view.models[0].holders = (0..1000).map(|n| holder(n, span(n), n as f32)).collect();
    let mut app = app(view);
    key(&mut app, KeyCode::End);
    let shown = frame(&mut app, 80, 24);
    line(&shown, "…000999");
    assert!(line(&shown, "copies").contains('+'));
    key(&mut app, KeyCode::PageUp);
    let shown = frame(&mut app, 80, 24);
    assert!(app.top < 1000 - app.page, "{} {}", app.top, app.page);
    line(&shown, &format!("…{:06}", 999 - app.page));
    key(&mut app, KeyCode::Home);
    line(&frame(&mut app, 80, 24), "…000000");
}

#[test]
fn what_a_peer_says_moves_no_cursor_and_no_size_is_too_small() {
    let mut view = small();
    let nasty = "\u{1b}[2J\u{7}\r\n".repeat(500);
    view.swarm.clone_from(&nasty);
    view.models[0].name.clone_from(&nasty);
    view.models[0].holders[0].peer.clone_from(&nasty);
    view.live.requests[0].model.clone_from(&nasty);
    view.live.requests[0].lost = Some(nasty.clone());
    view.live.requests[0].route[0].peer.clone_from(&nasty);
    let mut app = app(view);
    app.miss(nasty);
    for (width, height) in [(80, 24), (20, 6), (5, 3), (1, 1), (300, 90)] {
        let shown = frame(&mut app, width, height).concat();
        assert!(!shown.chars().any(char::is_control), "{width}x{height}");
    }
    let mut empty = App::new(String::new(), false);
    for (width, height) in [(80, 24), (3, 2)] {
        frame(&mut empty, width, height);
    }
    empty.see(SwarmView::default());
    line(&frame(&mut empty, 80, 24), "no peers yet");
    assert_eq!(key(&mut empty, KeyCode::Enter), Act::Nothing);
    key(&mut empty, KeyCode::Tab);
    key(&mut empty, KeyCode::Char('?'));
    line(&frame(&mut empty, 80, 24), "Ctrl-C");
}

#[test]
fn one_frame_as_text_has_everything() {
    let mut app = app(small());
    let text = super::text_of(&mut app, 100).expect("a frame");
    for words in ["…000003", "copies", "#7 demo", "hop 2 is lost"] {
        assert!(text.contains(words), "{words} not in:\n{text}");
    }
    assert!(!text.contains('\u{1b}'));
}
