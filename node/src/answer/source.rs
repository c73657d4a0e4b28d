//! Where logits come from: a session over the swarm, or the whole model in this process. Both take
//! token ids in the same chunks and give the best candidates for the next one, so that everything
//! above does not know the difference, also where the one takes over from the other.

use std::time::Duration;

use engine::{Candidates, Want as Output, WholeModel};
use swarm_proto::{Form, Hop, Want, WantRows};
use tokio::time::Instant;

use super::answering::keep;
use super::cancel::Cancel;
use super::fed::Fed;
use crate::phases::{Phase, Phases, Sums};
use crate::recovery::{Listener, Recovery, Session};
use crate::session::{ClientError, Lender, log_sum_exp};

/// Saying goodbye to every hop may take this long; somebody may be waiting for it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The model that goes on in this process when no route is left.
pub trait Spare: Send {
    /// Loads it for a context of `n_ctx` positions, and says `why`. It may block.
    ///
    /// # Errors
    /// It cannot be loaded.
    fn load(&self, n_ctx: u32, why: &str, cancel: &Cancel) -> anyhow::Result<WholeModel>;
}

/// The logits of a position, as far as they were asked for.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// The likeliest tokens, best first.
    pub candidates: Candidates,
    /// ln Σ exp(logit) over the whole vocabulary.
    pub log_sum_exp: f32,
}

/// A growing sequence of tokens with a KV behind it.
pub struct Source {
    pub(super) kind: Kind,
    /// Tokens whose KV is held.
    pub(super) fed: Fed,
    /// How many of them were there as the session was opened; all count once something was computed here.
    spared: Option<usize>,
    /// Decoded tokens that may be fed again as one step.
    batch: u16,
    /// What goes on when the swarm cannot.
    spare: Option<Box<dyn Spare>>,
    left: Option<Left>,
    phases: Phases,
}

pub(super) enum Kind {
    Swarm(Box<Session>),
    Local(Box<WholeModel>, Vec<f32>),
}

/// What there is to say of the swarm after it was left.
#[derive(Clone, Debug, Default)]
pub struct Left {
    /// Tokens fed by then.
    pub pos: usize,
    /// Why it was left.
    pub why: String,
    /// Who computed until then.
    route: Vec<Hop>,
    standbys: Vec<Hop>,
    recoveries: Vec<Recovery>,
}

/// Why there are no candidates.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Whoever asked does not want more of it.
    #[error("interrupted")]
    Interrupted,
    /// The swarm.
    #[error(transparent)]
    Session(#[from] ClientError),
    /// This process.
    #[error(transparent)]
    Engine(#[from] engine::EngineError),
    /// A row that nothing can be chosen from.
    #[error(transparent)]
    Row(#[from] engine::SampleError),
    /// The swarm, and then this process.
    #[error("{lost}; and the fallback cannot go on")]
    Fallback {
        /// What the swarm said.
        lost: String,
        /// What this process said.
        source: anyhow::Error,
    },
}

impl Source {
    /// Over the swarm; `spare` goes on in this process when the swarm cannot. `batch`: decoded tokens that may be
    /// fed again as one step ([`crate::exact_batch`]).
    pub fn swarm(session: Session, batch: u16, spare: Option<Box<dyn Spare>>) -> Self {
        let mut fed = Fed::default();
        fed.push(session.tokens());
        Self {
            spare,
            fed,
            spared: Some(session.spared() as usize),
            phases: Phases::within(session.span().clone()),
            ..Self::new(Kind::Swarm(Box::new(session)), batch)
        }
    }

    /// Says its beginning to `to` from now on, so that another session can begin with it.
    pub fn lend(&mut self, to: Lender) {
        if let Kind::Swarm(session) = &mut self.kind {
            session.lend(to);
        }
    }

    /// Tokens of `prompt` that need not be computed again.
    pub fn spares(&self, prompt: &[u32]) -> usize {
        keep(self.held(), prompt).min(self.spared.unwrap_or(usize::MAX))
    }

    /// In this process.
    pub fn local(model: WholeModel, batch: u16) -> Self {
        Self::new(Kind::Local(Box::new(model), Vec::new()), batch)
    }

    /// Says that this process is it because no session could be opened.
    pub fn instead_because(&mut self, why: String) {
        self.left = Some(Left {
            why,
            ..Left::default()
        });
    }

    fn new(kind: Kind, batch: u16) -> Self {
        Self {
            kind,
            fed: Fed::default(),
            spared: None,
            batch,
            spare: None,
            left: None,
            phases: Phases::default(),
        }
    }

    /// Tokens whose KV is held.
    pub fn held(&self) -> &[u32] {
        self.fed.tokens()
    }

    /// Positions there are.
    pub fn n_ctx(&self) -> u32 {
        match &self.kind {
            Kind::Swarm(session) => session.n_ctx(),
            Kind::Local(model, _) => model.n_ctx(),
        }
    }

    /// Positions left.
    pub fn room(&self) -> u32 {
        self.n_ctx()
            .saturating_sub(u32::try_from(self.held().len()).unwrap_or(u32::MAX))
    }

    /// Tokens in the vocabulary, as whoever computes says.
    pub fn n_vocab(&self) -> u32 {
        match &self.kind {
            Kind::Swarm(session) => session.n_vocab(),
            Kind::Local(model, _) => model.n_vocab(),
        }
    }

    /// How and why this process took over from the swarm, where it did.
    pub fn left(&self) -> Option<&Left> {
        self.left.as_ref()
    }

    /// Who computes what, in order, or did before this process took over; nobody else where it was always
    /// this process.
    pub fn route(&self) -> Vec<Hop> {
        match &self.kind {
            Kind::Swarm(session) => session.route().to_vec(),
            Kind::Local(..) => self.left.clone().unwrap_or_default().route,
        }
    }

    /// Who stands by for which layers.
    pub fn standbys(&self) -> Vec<Hop> {
        match &self.kind {
            Kind::Swarm(session) => session.standbys(),
            Kind::Local(..) => self.left.clone().unwrap_or_default().standbys,
        }
    }

    /// Tells `listener` at once when the route is lost and found again; never where this process is it.
    pub fn on_event(&mut self, listener: Listener) {
        if let Kind::Swarm(session) = &mut self.kind {
            session.on_event(listener);
        }
    }

    /// Losses of hops that were got over.
    pub fn recoveries(&self) -> &[Recovery] {
        match &self.kind {
            Kind::Swarm(session) => session.recoveries(),
            Kind::Local(..) => self.left.as_ref().map_or(&[], |left| &left.recoveries),
        }
    }

    /// Forgets the tokens from `len` on.
    ///
    /// # Errors
    /// There are fewer.
    pub fn truncate(&mut self, len: usize) -> Result<(), SourceError> {
        self.fed.truncate(len);
        if let Kind::Swarm(session) = &mut self.kind {
            session.truncate(u32::try_from(len).unwrap_or(u32::MAX))?;
        }
        Ok(())
    }

    /// Appends `tokens` and gives the row for what follows the last one.
    ///
    /// # Errors
    /// See [`SourceError`].
    pub async fn step(
        &mut self,
        tokens: &[u32],
        form: Form,
        cancel: &Cancel,
    ) -> Result<Row, SourceError> {
        let row = match self.row(tokens, form, cancel).await {
            Err(SourceError::Session(lost)) if self.can_go_on(&lost) => {
                self.fall_back(&lost, cancel).await?;
                self.row(tokens, form, cancel).await?
            }
            row => row?,
        };
        self.fed.push(tokens);
        self.spared = None;
        Ok(row)
    }

    /// Feeds what another process had fed, in the same frames; nothing is held yet.
    ///
    /// # Errors
    /// See [`SourceError`].
    pub async fn replay(&mut self, fed: Fed, cancel: &Cancel) -> Result<(), SourceError> {
        match self.feed_again(&fed, cancel).await {
            Err(SourceError::Session(lost)) if self.can_go_on(&lost) => {
                self.fall_back(&lost, cancel).await?;
                self.feed_again(&fed, cancel).await?;
            }
            fed => fed?,
        }
        self.fed = fed;
        Ok(())
    }

    /// Frees the KV on every hop, within a deadline.
    pub async fn close(mut self) {
        self.phases.end();
        self.kind.close().await;
    }

    async fn row(
        &mut self,
        tokens: &[u32],
        form: Form,
        cancel: &Cancel,
    ) -> Result<Row, SourceError> {
        let pos = u32::try_from(self.held().len()).unwrap_or(u32::MAX);
        match &mut self.kind {
            Kind::Swarm(session) => tokio::select! {
                biased;
                () = cancel.wait() => Err(SourceError::Interrupted),
                row = over_swarm(session, tokens, form, &mut self.phases) => row,
            },
            Kind::Local(model, row) => {
                tokio::task::block_in_place(|| here(model, row, pos, tokens, form, cancel))
            }
        }
    }

    async fn feed_again(&mut self, fed: &Fed, cancel: &Cancel) -> Result<(), SourceError> {
        let frames = fed.frames(self.batch);
        match &mut self.kind {
            Kind::Swarm(session) => tokio::select! {
                biased;
                () = cancel.wait() => Err(SourceError::Interrupted),
                fed = again_over_swarm(session, &frames) => Ok(fed?),
            },
            Kind::Local(model, row) => {
                tokio::task::block_in_place(|| again_here(model, row, &frames, cancel))
            }
        }
    }

    /// Whether this ends the session but not the answer.
    fn can_go_on(&self, lost: &ClientError) -> bool {
        self.spare.is_some() && matches!(lost, ClientError::Exhausted { .. })
    }

    /// The whole model takes over, with everything fed so far.
    async fn fall_back(&mut self, lost: &ClientError, cancel: &Cancel) -> Result<(), SourceError> {
        let Some(spare) = self.spare.take() else {
            return Err(lost.clone().into());
        };
        let (why, n_ctx) = (lost.to_string(), self.n_ctx());
        let loaded = tokio::task::block_in_place(|| spare.load(n_ctx, &why, cancel));
        let whole = loaded.map_err(|source| SourceError::Fallback {
            lost: why.clone(),
            source,
        })?;
        self.left = Some(Left {
            pos: self.held().len(),
            why,
            route: self.route(),
            standbys: self.standbys(),
            recoveries: self.recoveries().to_vec(),
        });
        let session = std::mem::replace(&mut self.kind, Kind::Local(Box::new(whole), Vec::new()));
        session.close().await;
        let held = self.fed.clone();
        self.feed_again(&held, cancel).await
    }
}

impl Kind {
    async fn close(self) {
        if let Kind::Swarm(session) = self {
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, session.close()).await;
        }
    }
}

async fn over_swarm(
    session: &mut Session,
    tokens: &[u32],
    form: Form,
    phases: &mut Phases,
) -> Result<Row, SourceError> {
    let rows = WantRows::Last;
    phases.begin(Phase::of(tokens.len(), true), false);
    let begun = Instant::now();
    session.feed(tokens, Want { rows, form }).await?;
    let logits = session.next_logits().await?;
    let compute = Duration::from_micros(logits.spent_us.into());
    let times = Sums {
        frames: 1,
        rows: tokens.len() as u64,
        compute,
        elsewhere: begun.elapsed().saturating_sub(compute),
        ..Sums::default()
    };
    phases.add(times, false);
    let candidates = match form {
        Form::Top(_) => Candidates::new(logits.top.clone())?,
        // Nothing is chosen from hidden rows: a row that is none is an error.
        Form::Full | Form::Normed => Candidates::top_of_row(&logits.full, 0)?,
    };
    let row = Row {
        candidates,
        log_sum_exp: logits.log_sum_exp,
    };
    session.recycle(logits);
    Ok(row)
}

async fn again_over_swarm(
    session: &mut Session,
    frames: &[(usize, &[u32])],
) -> Result<(), ClientError> {
    for (_, frame) in frames {
        session.feed(frame, Want::NONE).await?;
    }
    Ok(())
}

fn here(
    model: &mut WholeModel,
    row: &mut Vec<f32>,
    mut pos: u32,
    tokens: &[u32],
    form: Form,
    cancel: &Cancel,
) -> Result<Row, SourceError> {
    for chunk in tokens.chunks(engine::PREFILL_CHUNK as usize) {
        if cancel.is_set() {
            return Err(SourceError::Interrupted);
        }
        model.feed(pos, chunk, row)?;
        pos = pos.saturating_add(chunk.len() as u32);
    }
    let k = match form {
        Form::Top(k) => usize::from(k),
        Form::Full | Form::Normed => 0,
    };
    Ok(Row {
        candidates: Candidates::top_of_row(row, k)?,
        // Every value is finite, or there would be no candidates.
        log_sum_exp: log_sum_exp(row).unwrap_or(f32::NAN),
    })
}

fn again_here(
    model: &mut WholeModel,
    row: &mut Vec<f32>,
    frames: &[(usize, &[u32])],
    cancel: &Cancel,
) -> Result<(), SourceError> {
    for (pos, frame) in frames {
        if cancel.is_set() {
            return Err(SourceError::Interrupted);
        }
        let pos = u32::try_from(*pos).unwrap_or(u32::MAX);
        model.run(pos, frame, Output::None, row)?;
    }
    Ok(())
}
