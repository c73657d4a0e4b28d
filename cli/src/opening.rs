//! How `run` and `chat` come to a model that takes tokens: a session over the swarm, the whole model in this
//! process, or the one where the other was wanted and cannot be had.

use std::time::{Duration, Instant};

use engine::Vocab;
use node::answer::{Source, Spare};
use node::exact_batch;
use swarm_proto::Numerics;

use crate::fallback::{Fallback, WHY_CHARS_MAX};
use crate::figures;
use crate::interrupt::Interrupt;
use crate::local_models::WholeFile;
use crate::run_report::Privacy;
use crate::session_args::SessionArgs;
use crate::swarm::{Member, Swarm, SwarmModel};
use crate::terminal;

/// A model that is ready to take tokens, and what there is to say about it.
pub struct Ready {
    /// Takes the tokens.
    pub source: Source,
    /// The tokenizer, where the model has one.
    pub vocab: Option<Vocab>,
    /// What the model is called.
    pub model: String,
    /// Its id, where it has one.
    pub model_id: Option<String>,
    /// Who can read what is fed.
    pub privacy: Privacy,
    /// The network of a session; it ends with it.
    pub member: Option<Member>,
    /// Finding the swarm and its adverts, or loading the model.
    pub connect: Duration,
    /// Opening the session on every hop.
    pub open: Duration,
}

/// The flags that say what to open.
pub struct Opening<'a> {
    /// Which swarm.
    pub swarm: &'a Swarm,
    /// Which model, if it was said.
    pub model: Option<&'a str>,
    /// How.
    pub session: &'a SessionArgs,
    /// Compute threads of this process, if it was said.
    pub threads: Option<u32>,
    /// Whether files are hashed before they are loaded.
    pub verify: bool,
    /// Ctrl-C.
    pub interrupt: &'a Interrupt,
}

/// Says how much context to open, once the tokenizer and the longest possible context are known.
pub trait Room: FnOnce(Option<&Vocab>, u32) -> anyhow::Result<u32> {}
impl<T: FnOnce(Option<&Vocab>, u32) -> anyhow::Result<u32>> Room for T {}

impl Opening<'_> {
    /// A session over the swarm, or the fallback where none can be opened.
    pub async fn over_swarm(&self, room: impl Room) -> anyhow::Result<Ready> {
        let begun = Instant::now();
        let settings = self.swarm.settings(self.session.trusted())?;
        let threads = self.threads.or(settings.file.threads);
        let fallback = match &self.session.local_fallback {
            Some(name) => Some(Fallback::find(&settings.home, name, threads, self.verify)?),
            None => None,
        };
        let asked = self.model.or(settings.file.first_model());
        let (member, model) = match (self.reach().await, fallback.as_ref()) {
            (Ok(reached), _) => reached,
            (Err(error), Some(fallback)) if fallback.is_meant(&settings.home, asked) => {
                return self.instead(fallback, &error, room);
            }
            (Err(error), _) => return Err(error),
        };
        if let Some(fallback) = &fallback {
            fallback.must_be(model.id, &model.name)?;
        }
        let n_ctx = room(model.vocab.as_ref(), model.n_ctx_max)?;
        let connected = Instant::now();
        let opened = member
            .open(&model, self.session.travel.ask(n_ctx, Numerics::Exact))
            .await;
        let session = match (opened, &fallback) {
            (Ok(session), _) => session,
            (Err(error), Some(fallback)) => {
                member.leave().await;
                return self.instead(fallback, &error, |_: Option<&Vocab>, _| Ok(n_ctx));
            }
            (Err(error), None) => return Err(error),
        };
        let batch = exact_batch(model.manifest.tensors.iter().map(|tensor| tensor.ty));
        let spare = fallback.map(|fallback| Box::new(fallback) as Box<dyn Spare>);
        Ok(Ready {
            source: Source::swarm(session, batch, spare),
            vocab: model.vocab,
            model: model.name,
            model_id: Some(model.id.to_string()),
            privacy: member.privacy(),
            member: Some(member),
            connect: connected - begun,
            open: connected.elapsed(),
        })
    }

    /// The whole model in this process; `name` is what it is called.
    pub fn here(&self, name: &str, file: &WholeFile, room: impl Room) -> anyhow::Result<Ready> {
        let begun = Instant::now();
        let settings = self.swarm.settings(false)?;
        let description = file.describe()?;
        let n_ctx = room(description.vocab.as_ref(), description.n_ctx_train)?;
        if self.verify {
            file.verify(self.interrupt)?;
        }
        let whole = file.load(name, n_ctx, self.threads.or(settings.file.threads))?;
        Ok(Ready {
            source: Source::local(whole, description.batch),
            vocab: description.vocab,
            model: name.to_owned(),
            model_id: file.id.map(|id| id.to_string()),
            privacy: Privacy::Local,
            member: None,
            connect: begun.elapsed(),
            open: Duration::ZERO,
        })
    }

    /// Nothing of the prompt has left this process.
    fn instead(
        &self,
        fallback: &Fallback,
        error: &anyhow::Error,
        room: impl Room,
    ) -> anyhow::Result<Ready> {
        let why = figures::printable(&format!("{error:#}"), WHY_CHARS_MAX);
        terminal::warn(format!(
            "{why}; the answer comes from this process, with `{}`",
            fallback.name
        ));
        let here = || self.here(&fallback.name, &fallback.file, room);
        let mut ready = tokio::task::block_in_place(here)?;
        ready.source.instead_because(why);
        Ok(ready)
    }

    async fn reach(&self) -> anyhow::Result<(Member, SwarmModel)> {
        let member = self.swarm.join(self.session.trusted()).await?;
        let model = member.model(self.model).await?;
        Ok((member, model))
    }
}
