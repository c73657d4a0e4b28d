//! Where logits come from: a session over the swarm, or the whole model in this process. Both take
//! token ids in the same chunks and give the best candidates for the next one, so that everything
//! above does not know the difference, also where the one takes over from the other.

use engine::{Candidates, Want as Output, WholeModel};
use node::{ClientError, Recovery, Session};
use swarm_proto::{Form, Want, WantRows};

use crate::fallback::Fallback;
use crate::fed::Fed;
use crate::figures;
use crate::interrupt::{CLOSE_TIMEOUT, Interrupt};
use crate::run_report::Hop;
use crate::terminal;

/// A growing sequence of tokens with a KV behind it.
pub struct Source {
    kind: Kind,
    /// Tokens whose KV is held.
    fed: Fed,
    /// Candidates asked for.
    top: u16,
    /// Decoded tokens that may be fed again as one step.
    batch: u16,
    /// What goes on when the swarm cannot.
    fallback: Option<Fallback>,
    left: Option<Left>,
}

enum Kind {
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
    route: Vec<Hop>,
    standbys: Vec<Hop>,
    recoveries: Vec<Recovery>,
}

/// Why there are no candidates.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Ctrl-C.
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
    /// Over the swarm; `fallback` goes on in this process when the swarm cannot.
    pub fn swarm(session: Session, top: u16, batch: u16, fallback: Option<Fallback>) -> Self {
        Self {
            fallback,
            ..Self::new(Kind::Swarm(Box::new(session)), top, batch)
        }
    }

    /// In this process.
    pub fn local(model: WholeModel, top: u16, batch: u16) -> Self {
        Self::new(Kind::Local(Box::new(model), Vec::new()), top, batch)
    }

    /// Says that this process is it because no session could be opened.
    pub fn instead_because(&mut self, why: String) {
        self.left = Some(Left {
            why,
            ..Left::default()
        });
    }

    fn new(kind: Kind, top: u16, batch: u16) -> Self {
        Self {
            kind,
            fed: Fed::default(),
            top,
            batch,
            fallback: None,
            left: None,
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
            Kind::Swarm(session) => session.route().iter().map(Hop::from).collect(),
            Kind::Local(..) => self.left.clone().unwrap_or_default().route,
        }
    }

    /// Who stands by for which layers.
    pub fn standbys(&self) -> Vec<Hop> {
        match &self.kind {
            Kind::Swarm(session) => session.standbys().iter().map(Hop::from).collect(),
            Kind::Local(..) => self.left.clone().unwrap_or_default().standbys,
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
    pub fn truncate(&mut self, len: usize) -> Result<(), SourceError> {
        self.fed.truncate(len);
        if let Kind::Swarm(session) = &mut self.kind {
            session.truncate(u32::try_from(len).unwrap_or(u32::MAX))?;
        }
        Ok(())
    }

    /// Appends `tokens` and gives the candidates for what follows the last one.
    pub async fn step(
        &mut self,
        tokens: &[u32],
        interrupt: &Interrupt,
    ) -> Result<Candidates, SourceError> {
        let candidates = match self.candidates(tokens, interrupt).await {
            Err(SourceError::Session(lost)) if self.can_go_on(&lost) => {
                self.fall_back(&lost, interrupt).await?;
                self.candidates(tokens, interrupt).await?
            }
            candidates => candidates?,
        };
        self.fed.push(tokens);
        Ok(candidates)
    }

    /// Feeds what another process had fed, in the same frames; nothing is held yet.
    pub async fn replay(&mut self, fed: Fed, interrupt: &Interrupt) -> Result<(), SourceError> {
        match self.feed_again(&fed, interrupt).await {
            Err(SourceError::Session(lost)) if self.can_go_on(&lost) => {
                self.fall_back(&lost, interrupt).await?;
                self.feed_again(&fed, interrupt).await?;
            }
            fed => fed?,
        }
        self.fed = fed;
        Ok(())
    }

    /// Frees the KV on every hop, within a deadline.
    pub async fn close(self) {
        self.kind.close().await;
    }

    async fn candidates(
        &mut self,
        tokens: &[u32],
        interrupt: &Interrupt,
    ) -> Result<Candidates, SourceError> {
        let pos = u32::try_from(self.held().len()).unwrap_or(u32::MAX);
        match &mut self.kind {
            Kind::Swarm(session) => tokio::select! {
                biased;
                () = interrupt.wait() => Err(SourceError::Interrupted),
                candidates = over_swarm(session, tokens, self.top) => candidates,
            },
            Kind::Local(model, row) => {
                let top = usize::from(self.top);
                tokio::task::block_in_place(|| here(model, row, pos, tokens, top, interrupt))
            }
        }
    }

    async fn feed_again(&mut self, fed: &Fed, interrupt: &Interrupt) -> Result<(), SourceError> {
        let frames = fed.frames(self.batch);
        match &mut self.kind {
            Kind::Swarm(session) => tokio::select! {
                biased;
                () = interrupt.wait() => Err(SourceError::Interrupted),
                fed = again_over_swarm(session, &frames) => Ok(fed?),
            },
            Kind::Local(model, row) => {
                tokio::task::block_in_place(|| again_here(model, row, &frames, interrupt))
            }
        }
    }

    /// Whether this ends the session but not the answer.
    fn can_go_on(&self, lost: &ClientError) -> bool {
        self.fallback.is_some() && matches!(lost, ClientError::Exhausted { .. })
    }

    /// The whole model takes over, with everything fed so far.
    async fn fall_back(
        &mut self,
        lost: &ClientError,
        interrupt: &Interrupt,
    ) -> Result<(), SourceError> {
        let Some(fallback) = self.fallback.take() else {
            return Err(lost.clone().into());
        };
        let why = figures::printable(&lost.to_string(), WHY_CHARS_MAX);
        terminal::warn(format!(
            "{why}; the answer goes on in this process with `{}`",
            fallback.name
        ));
        let n_ctx = self.n_ctx();
        let loaded = tokio::task::block_in_place(|| fallback.load(n_ctx, interrupt));
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
        self.feed_again(&held, interrupt).await
    }
}

/// Of a reason in words; a peer may have put some of them there.
pub const WHY_CHARS_MAX: usize = 300;

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
    top: u16,
) -> Result<Candidates, SourceError> {
    session
        .feed(
            tokens,
            Want {
                rows: WantRows::Last,
                form: Form::Top(top),
            },
        )
        .await?;
    let row = session.next_logits().await?;
    let candidates = Candidates::new(row.top.clone())?;
    session.recycle(row);
    Ok(candidates)
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
    top: usize,
    interrupt: &Interrupt,
) -> Result<Candidates, SourceError> {
    for chunk in tokens.chunks(engine::PREFILL_CHUNK as usize) {
        if interrupt.is_set() {
            return Err(SourceError::Interrupted);
        }
        model.feed(pos, chunk, row)?;
        pos = pos.saturating_add(chunk.len() as u32);
    }
    Ok(Candidates::top_of_row(row, top)?)
}

fn again_here(
    model: &mut WholeModel,
    row: &mut Vec<f32>,
    frames: &[(usize, &[u32])],
    interrupt: &Interrupt,
) -> Result<(), SourceError> {
    for (pos, frame) in frames {
        if interrupt.is_set() {
            return Err(SourceError::Interrupted);
        }
        let pos = u32::try_from(*pos).unwrap_or(u32::MAX);
        model.run(pos, frame, Output::None, row)?;
    }
    Ok(())
}
