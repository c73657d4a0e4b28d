//! What one client asks: it opens a session, decodes, sometimes thinks, takes back or gives up, and
//! holds every row against the whole chain.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::{ChainStage, Input, PREFILL_CHUNK, Slot, Stage, Step};
use node::{ClientError, Event, Routes, Session, SessionSpec};
use swarm_proto::{Form, Hop, Want, WantRows};
use tokio::time::{Instant, sleep, timeout};

use super::Model;
use super::dice::Dice;
use super::log::{Log, lock};

/// Longer than everything that may happen to a request takes, in turn.
const ENDED_WITHIN: Duration = Duration::from_secs(900);
/// Positions of the context that prompts leave to what comes after.
const PROMPT_MAX: usize = 100;

/// How a request ended.
#[derive(Debug, Clone)]
pub(super) enum Ended {
    Answered,
    /// The client wanted no more.
    GivenUp,
    Failed(ClientError),
    /// It did not end, or the answer was wrong: that is noted already.
    Broken,
}

/// What is known of a request while it runs, and after.
#[derive(Default)]
pub(super) struct Progress {
    /// Since when it tries to open; none once it has.
    pub(super) opening: Mutex<Option<Instant>>,
    /// The route it is on.
    pub(super) route: Mutex<Vec<Hop>>,
    /// How long the failures stopped it, from the last row before to the first after.
    pub(super) stalls: Mutex<Vec<Duration>>,
    pub(super) rows: Mutex<u64>,
}

/// One request.
pub(super) struct Request {
    pub(super) number: usize,
    pub(super) tokens: usize,
    pub(super) model: Model,
    pub(super) routes: Routes,
    pub(super) spec: SessionSpec,
    pub(super) dice: Dice,
    pub(super) log: Arc<Log>,
    pub(super) progress: Arc<Progress>,
}

impl Request {
    /// Runs it to its end.
    pub(super) async fn run(self) -> Ended {
        let (log, number) = (self.log.clone(), self.number);
        let progress = self.progress.clone();
        let ended = timeout(ENDED_WITHIN, self.ask()).await;
        lock(&progress.route).clear();
        let ended = ended.unwrap_or_else(|_| {
            let detail = format_args!("request {number} runs for {ENDED_WITHIN:?}");
            log.broken("every request ends", detail);
            Ended::Broken
        });
        match &ended {
            Ended::Failed(error) => log.note(format_args!("request {number} failed: {error}")),
            ended => log.note(format_args!("request {number}: {ended:?}")),
        }
        ended
    }

    async fn ask(self) -> Ended {
        *lock(&self.progress.opening) = Some(Instant::now());
        let patience = self.dice.millis(0, 60_000);
        let opened = self.routes.open_waiting(&self.spec, patience, |_| ()).await;
        let session = match opened {
            Ok(session) => session,
            Err(error) => return Ended::Failed(error),
        };
        let stalled = Arc::new(Mutex::new(false));
        let mut talk = Talk {
            whole: Whole::new(&self.model),
            session,
            due: VecDeque::new(),
            stalled: stalled.clone(),
            request: self,
        };
        *lock(&talk.request.progress.opening) = None;
        talk.note_route();
        let (log, number) = (talk.request.log.clone(), talk.request.number);
        talk.session.on_event(Box::new(move |event| {
            *lock(&stalled) = true;
            match event {
                Event::Lost(why) => log.note(format_args!("request {number} lost: {why}")),
                Event::Waiting { why, .. } => {
                    log.note(format_args!("request {number} waits: {why}"));
                }
                Event::Recovered(recovery) => {
                    log.note(format_args!("request {number} goes on: {recovery:?}"));
                }
            }
        }));
        let ended = talk.decode().await;
        let Talk { session, .. } = talk;
        if matches!(ended, Ended::GivenUp) {
            drop(session);
        } else {
            session.close().await;
        }
        ended
    }
}

/// A session under way.
struct Talk {
    request: Request,
    session: Session,
    whole: Whole,
    /// Rows that were asked for: position and right token.
    due: VecDeque<(u32, u32)>,
    /// Something was lost since the last row.
    stalled: Arc<Mutex<bool>>,
}

impl Talk {
    async fn decode(&mut self) -> Ended {
        match self.turns().await {
            Ok(ended) => ended,
            Err(error) => Ended::Failed(error),
        }
    }

    async fn turns(&mut self) -> Result<Ended, ClientError> {
        let dice = self.request.dice.clone();
        let gives_up_at = dice.percent(5).then(|| dice.below(self.request.tokens));
        let prompt = self.draw(1 + dice.below(PROMPT_MAX));
        let rows = if dice.percent(20) {
            WantRows::All
        } else {
            WantRows::Last
        };
        self.feed(&prompt, rows).await?;
        let mut answered = 0;
        while answered < self.request.tokens {
            if gives_up_at == Some(answered) {
                return Ok(Ended::GivenUp);
            }
            let Some(next) = self.rows().await? else {
                return Ok(Ended::Broken);
            };
            answered += 1;
            if dice.percent(3) {
                sleep(dice.millis(0, 4000)).await;
            }
            match dice.below(100) {
                // The user changes what was said.
                0..2 if self.session.pos() > 1 => {
                    let back = 1 + dice.below(12) as u32;
                    self.session
                        .truncate(self.session.pos().saturating_sub(back).max(1))?;
                    let again = self.draw(1 + dice.below(6));
                    self.feed(&again, WantRows::Last).await?;
                }
                // Drafts, all of which are right here.
                2..6 => {
                    let mut drafts = self.draw(1 + dice.below(4));
                    drafts[0] = next;
                    answered += drafts.len() - 1;
                    self.feed(&drafts, WantRows::All).await?;
                }
                _ => self.feed(&[next], WantRows::Last).await?,
            }
        }
        Ok(match self.rows().await? {
            Some(_) => Ended::Answered,
            None => Ended::Broken,
        })
    }

    fn draw(&self, n: usize) -> Vec<u32> {
        let dice = &self.request.dice;
        let n_vocab = self.request.model.n_vocab as usize;
        (0..n).map(|_| dice.below(n_vocab) as u32).collect()
    }

    async fn feed(&mut self, tokens: &[u32], rows: WantRows) -> Result<(), ClientError> {
        let pos0 = self.session.pos();
        // No room for the rest of what was drawn: the context is a little short then.
        let room = self.session.n_ctx().saturating_sub(pos0) as usize;
        let tokens = &tokens[..tokens.len().min(room)];
        let right = self.whole.feed(pos0, tokens);
        let from = match rows {
            WantRows::All => 0,
            _ => right.len().saturating_sub(1),
        };
        let due = (pos0..).zip(&right).skip(from);
        self.due.extend(due.map(|(pos, token)| (pos, *token)));
        let form = match self.request.number % 3 {
            0 => Form::Full,
            n => Form::Top(n as u16 * 4),
        };
        self.session.feed(tokens, Want { rows, form }).await
    }

    /// Takes all rows that are due; the last one's token. None where one was wrong.
    async fn rows(&mut self) -> Result<Option<u32>, ClientError> {
        let mut last = 0;
        while let Some((pos, token)) = self.due.pop_front() {
            let asked = Instant::now();
            let row = self.session.next_logits().await?;
            if std::mem::take(&mut *lock(&self.stalled)) {
                lock(&self.request.progress.stalls).push(asked.elapsed());
                self.note_route();
            }
            let got = (row.pos, row.argmax());
            if got != (pos, Some(token)) {
                self.wrong(&format_args!(
                    "row {got:?}, ({pos}, {token}) would be right"
                ));
                return Ok(None);
            }
            self.request.log.mark(&pos.to_le_bytes());
            *lock(&self.request.progress.rows) += 1;
            last = token;
            self.session.recycle(row);
        }
        Ok(Some(last))
    }

    fn wrong(&self, what: &dyn Display) {
        let detail = format_args!("request {}: {what}", self.request.number);
        self.request
            .log
            .broken("each layer exactly once for each token", detail);
    }

    fn note_route(&self) {
        let route = self.session.route().to_vec();
        let hops: Vec<String> = route
            .iter()
            .map(|hop| format!("{}:{}", hop.peer.0[0], hop.layers))
            .collect();
        let number = self.request.number;
        self.request
            .log
            .note(format_args!("request {number} on {}", hops.join(" ")));
        *lock(&self.request.progress.route) = route;
    }
}

/// The whole chain in one piece.
struct Whole {
    stage: ChainStage,
    slot: Option<Slot>,
    n_layer: u32,
    n_vocab: usize,
}

impl Whole {
    fn new(model: &Model) -> Self {
        let mut stage = model.stage(0..model.n_layer);
        let slot = stage.open(model.n_ctx, 0..model.n_layer).ok();
        Self {
            stage,
            slot,
            n_layer: model.n_layer,
            n_vocab: model.n_vocab as usize,
        }
    }

    /// The token that comes after each of these.
    fn feed(&mut self, pos0: u32, tokens: &[u32]) -> Vec<u32> {
        let Some(slot) = self.slot else {
            return Vec::new();
        };
        let (mut right, mut rows) = (Vec::new(), Vec::new());
        for (tokens, i) in tokens.chunks(PREFILL_CHUNK as usize).zip(0..) {
            let step = Step {
                slot,
                layers: 0..self.n_layer,
                pos0: pos0 + i * PREFILL_CHUNK,
                n_rows: tokens.len() as u32,
                want: engine::Want::All,
            };
            let ran = self.stage.run(&step, &Input::Tokens(tokens), &mut rows);
            if ran.is_ok() {
                right.extend(rows.chunks_exact(self.n_vocab).map(top));
            }
        }
        right
    }
}

fn top(row: &[f32]) -> u32 {
    let ids = (0u32..).zip(row);
    ids.max_by(|a, b| a.1.total_cmp(b.1))
        .map_or(0, |(id, _)| id)
}
