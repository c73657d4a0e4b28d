//! What is shown, and what keys change in it.

use std::cmp::Ordering;
use std::collections::HashMap;

use api::swarm::{HolderView, ModelView, PeerDetail, PeerView, SwarmView};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

/// By what the peers are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Their first layer.
    #[default]
    Layers,
    /// The fastest first.
    Speed,
    /// The nearest first.
    Rtt,
    /// Those heard last first.
    Heard,
    /// The busiest first.
    Queue,
}

impl Sort {
    /// Its name and key.
    pub const ALL: [(Sort, char, &'static str); 5] = [
        (Sort::Layers, 'l', "layers"),
        (Sort::Speed, 's', "speed"),
        (Sort::Rtt, 'r', "round trip"),
        (Sort::Heard, 'h', "heard"),
        (Sort::Queue, 'u', "queue"),
    ];

    /// What the screen calls it.
    pub fn name(self) -> &'static str {
        let all = Self::ALL.iter();
        all.filter(|(sort, ..)| *sort == self)
            .map(|(.., name)| *name)
            .next()
            .unwrap_or("")
    }
}

/// What covers the screen.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Pane {
    /// The map, and requests below it.
    #[default]
    Map,
    /// One peer; `detail` comes a moment later.
    Peer {
        /// Who.
        peer: String,
        /// What is known of it.
        detail: Option<Box<PeerDetail>>,
    },
    /// The keys.
    Help,
}

/// What a key asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing but another frame.
    Nothing,
    /// To stop.
    End,
    /// To look at a peer, for a model.
    LookAt(String, String),
}

/// What is shown.
pub struct App {
    /// The last view; none before the first.
    pub view: Option<SwarmView>,
    /// Who sees it.
    pub origin: String,
    /// Whether requests are in the view.
    pub sees_requests: bool,
    /// Why there is no newer view.
    pub trouble: Option<String>,
    /// What covers the screen.
    pub pane: Pane,
    /// By what peers are sorted.
    pub sort: Sort,
    /// The first row that is shown.
    pub top: usize,
    /// Rows that fit, as the last frame had them.
    pub page: usize,
    /// Tokens a second since the view before.
    pub tokens_per_s: f64,
    model: usize,
    selected: Option<String>,
}

impl App {
    /// Nothing is seen yet.
    pub fn new(origin: String, sees_requests: bool) -> Self {
        Self {
            view: None,
            origin,
            sees_requests,
            trouble: None,
            pane: Pane::Map,
            sort: Sort::default(),
            top: 0,
            page: 1,
            tokens_per_s: 0.0,
            model: 0,
            selected: None,
        }
    }

    /// A newer view.
    pub fn see(&mut self, view: SwarmView) {
        if let Some(before) = &self.view {
            let ms = view.live.at_ms.saturating_sub(before.live.at_ms);
            let tokens = (view.live.totals.tokens).saturating_sub(before.live.totals.tokens);
            if ms > 0 {
                self.tokens_per_s = tokens as f64 * 1000.0 / ms as f64;
            }
        }
        self.trouble = None;
        self.view = Some(view);
    }

    /// What is known of the peer that was looked at.
    pub fn look(&mut self, looked: PeerDetail) {
        if let Pane::Peer { peer, detail } = &mut self.pane
            && *peer == looked.peer
        {
            *detail = Some(Box::new(looked));
        }
    }

    /// Nothing newer came.
    pub fn miss(&mut self, why: String) {
        self.trouble = Some(why);
    }

    /// The model of the map.
    pub fn model(&self) -> Option<&ModelView> {
        let models = &self.view.as_ref()?.models;
        models.get(self.model).or_else(|| models.first())
    }

    /// Its holders in order, with what else is known of each.
    pub fn rows(&self) -> Vec<(&HolderView, PeerView)> {
        let (Some(view), Some(model)) = (&self.view, self.model()) else {
            return Vec::new();
        };
        let peers: HashMap<&str, &PeerView> = view
            .peers
            .iter()
            .map(|peer| (peer.peer.as_str(), peer))
            .collect();
        let known = |holder: &HolderView| {
            let peer = peers.get(holder.peer.as_str());
            peer.map(|peer| (*peer).clone()).unwrap_or_default()
        };
        let rows = model.holders.iter();
        let mut rows: Vec<_> = rows.map(|holder| (holder, known(holder))).collect();
        // They come by their first layer, and a stable order keeps that among equals.
        rows.sort_by(|(a, x), (b, y)| self.order((a, x), (b, y)));
        rows
    }

    fn order(&self, a: (&HolderView, &PeerView), b: (&HolderView, &PeerView)) -> Ordering {
        let known = |value: Option<f64>| value.unwrap_or(f64::INFINITY);
        let speed = |holder: &HolderView| f64::from(holder.layer_tokens_s.unwrap_or(0.0));
        match self.sort {
            Sort::Layers => Ordering::Equal,
            Sort::Speed => speed(b.0).total_cmp(&speed(a.0)),
            Sort::Rtt => known(a.1.rtt_ms).total_cmp(&known(b.1.rtt_ms)),
            Sort::Heard => a.1.heard_s_ago.total_cmp(&b.1.heard_s_ago),
            Sort::Queue => b.1.queue.cmp(&a.1.queue),
        }
    }

    /// The row that is chosen.
    pub fn selected(&self, rows: &[(&HolderView, PeerView)]) -> usize {
        let at = |peer: &String| rows.iter().position(|(holder, _)| holder.peer == *peer);
        self.selected.as_ref().and_then(at).unwrap_or(0)
    }

    /// What a key asks for.
    pub fn key(&mut self, key: KeyEvent) -> Act {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return Act::End,
            KeyCode::Char('q') => return Act::End,
            KeyCode::Esc => self.pane = Pane::Map,
            KeyCode::Char('?') => {
                self.pane = match self.pane {
                    Pane::Help => Pane::Map,
                    _ => Pane::Help,
                };
            }
            KeyCode::Tab | KeyCode::Char('m') => {
                let models = self.view.as_ref().map_or(0, |view| view.models.len());
                self.model = (self.model + 1) % models.max(1);
                (self.top, self.selected) = (0, None);
            }
            KeyCode::Enter => return self.look_at(),
            KeyCode::Up | KeyCode::Char('k') => self.step(-1),
            KeyCode::Down | KeyCode::Char('j') => self.step(1),
            KeyCode::PageUp => self.step(-(self.page as isize)),
            KeyCode::PageDown | KeyCode::Char(' ') => self.step(self.page as isize),
            KeyCode::Home => self.step(isize::MIN),
            KeyCode::End => self.step(isize::MAX),
            KeyCode::Char(letter) => {
                let mut all = Sort::ALL.iter();
                if let Some((sort, ..)) = all.find(|(_, key, _)| *key == letter) {
                    self.sort = *sort;
                }
            }
            _ => {}
        }
        Act::Nothing
    }

    fn step(&mut self, by: isize) {
        let rows = self.rows();
        let last = rows.len().saturating_sub(1);
        let at = self.selected(&rows).saturating_add_signed(by).min(last);
        self.selected = rows.get(at).map(|(holder, _)| holder.peer.clone());
        if let Pane::Peer { .. } = self.pane {
            self.pane = Pane::Map;
        }
    }

    fn look_at(&mut self) -> Act {
        if self.pane != Pane::Map {
            self.pane = Pane::Map;
            return Act::Nothing;
        }
        let rows = self.rows();
        let chosen = rows.get(self.selected(&rows));
        let chosen = chosen.map(|(holder, _)| holder.peer.clone());
        let model = self.model().map(|model| model.id.clone());
        let (Some(peer), Some(model)) = (chosen, model) else {
            return Act::Nothing;
        };
        self.selected = Some(peer.clone());
        self.pane = Pane::Peer {
            peer: peer.clone(),
            detail: None,
        };
        Act::LookAt(peer, model)
    }
}
