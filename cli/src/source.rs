//! Where logits come from: a session over the swarm, or the whole model in this process. Both take
//! token ids in the same chunks and give the best candidates for the next one, so that everything
//! above does not know the difference.

use engine::{Candidates, WholeModel};
use node::{ClientError, Recovery, Session};
use swarm_proto::{Form, Want, WantRows};

use crate::interrupt::{CLOSE_TIMEOUT, Interrupt};
use crate::run_report::Hop;

/// A growing sequence of tokens with a KV behind it.
pub struct Source {
    kind: Kind,
    /// Tokens whose KV is held.
    held: Vec<u32>,
    /// Candidates asked for.
    top: u16,
}

enum Kind {
    Swarm(Box<Session>),
    Local(Box<WholeModel>, Vec<f32>),
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
}

impl Source {
    /// Over the swarm.
    pub fn swarm(session: Session, top: u16) -> Self {
        Self {
            kind: Kind::Swarm(Box::new(session)),
            held: Vec::new(),
            top,
        }
    }

    /// In this process.
    pub fn local(model: WholeModel, top: u16) -> Self {
        Self {
            kind: Kind::Local(Box::new(model), Vec::new()),
            held: Vec::new(),
            top,
        }
    }

    /// Tokens whose KV is held.
    pub fn held(&self) -> &[u32] {
        &self.held
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
            .saturating_sub(u32::try_from(self.held.len()).unwrap_or(u32::MAX))
    }

    /// Tokens in the vocabulary, as whoever computes says.
    pub fn n_vocab(&self) -> u32 {
        match &self.kind {
            Kind::Swarm(session) => session.n_vocab(),
            Kind::Local(model, _) => model.n_vocab(),
        }
    }

    /// Who computes what, in order; nobody else where it is this process.
    pub fn route(&self) -> Vec<Hop> {
        match &self.kind {
            Kind::Swarm(session) => session.route().iter().map(Hop::from).collect(),
            Kind::Local(..) => Vec::new(),
        }
    }

    /// Who stands by for which layers.
    pub fn standbys(&self) -> Vec<Hop> {
        match &self.kind {
            Kind::Swarm(session) => session.standbys().iter().map(Hop::from).collect(),
            Kind::Local(..) => Vec::new(),
        }
    }

    /// Losses of hops that were got over.
    pub fn recoveries(&self) -> &[Recovery] {
        match &self.kind {
            Kind::Swarm(session) => session.recoveries(),
            Kind::Local(..) => &[],
        }
    }

    /// Forgets the tokens from `len` on.
    pub fn truncate(&mut self, len: usize) -> Result<(), SourceError> {
        self.held.truncate(len);
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
        let pos = u32::try_from(self.held.len()).unwrap_or(u32::MAX);
        let candidates = match &mut self.kind {
            Kind::Swarm(session) => tokio::select! {
                biased;
                () = interrupt.wait() => return Err(SourceError::Interrupted),
                candidates = over_swarm(session, tokens, self.top) => candidates?,
            },
            Kind::Local(model, row) => {
                let top = usize::from(self.top);
                tokio::task::block_in_place(|| here(model, row, pos, tokens, top, interrupt))?
            }
        };
        self.held.extend_from_slice(tokens);
        Ok(candidates)
    }

    /// Frees the KV on every hop, within a deadline.
    pub async fn close(self) {
        if let Kind::Swarm(session) = self.kind {
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
