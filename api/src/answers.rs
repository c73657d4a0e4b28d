//! What is asked, as a task of its own that gives events. Whoever drops its end hangs up: the session is closed on
//! every hop at once, in whatever state it is.
//!
//! ```text
//! place ─▶ find the model ─▶ tokenize ─▶ open ─▶ Begun ─▶ Piece, Piece, … Ended ─▶ next answer … ─▶ Over
//!                                                                                   any ─▶ Failed
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use engine::{SampleError, Sampler, SamplerOptions, Vocab};
use node::answer::{
    Answer, Answering, Cancel, Piece, PromptError, Question, Row, Source, Stop, Words, n_ctx,
    not_empty, of_chat, of_text,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::timeout;
use tracing::{Instrument, Span};

use crate::ask::{Ask, Prompt};
use crate::error::ApiError;
use crate::extra::Extra;
use crate::metrics::{Counted, Outcome};
use crate::models::{Asked, Found};
use crate::observe::told_later;
use crate::state::State;
use crate::swarm::Seen;
use crate::tools::{Call, Spoken, Tools};

/// Events that may wait for a slow reader; then the answer waits.
const EVENTS_MAX: usize = 64;
/// Who does not read for so long has left, whatever the connection says.
const READER_TIMEOUT: Duration = Duration::from_secs(60);

/// What happens to an answer.
#[derive(Debug)]
pub enum Event {
    /// A session is open; said once.
    Begun(Begun),
    /// A token was chosen, or text that was held back is shown.
    Piece {
        /// Which answer.
        index: u32,
        /// What can be shown now; may be empty.
        text: String,
        /// Of the chosen token, where this was asked for.
        chance: Option<Chance>,
    },
    /// An answer is complete.
    Ended {
        /// Which answer.
        index: u32,
        /// How.
        ended: Ended,
    },
    /// All of them are.
    Over(Usage),
    /// Nothing more comes.
    Failed(ApiError),
}

/// What is known when an answer begins.
#[derive(Clone, Debug)]
pub struct Begun {
    /// What the model is called.
    pub model: String,
    /// Its id.
    pub model_id: String,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Those of the first that a session holds already.
    pub cached_tokens: usize,
}

/// How an answer ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Why.
    pub stop: Stop,
    /// The stop text that came.
    pub stop_text: Option<String>,
    /// What the model calls.
    pub calls: Vec<Call>,
    /// What else there is to say.
    pub extra: Extra,
}

impl Ended {
    /// As OpenAI's API says it.
    pub fn reason(&self) -> &'static str {
        match self.stop {
            _ if !self.calls.is_empty() => "tool_calls",
            Stop::Length | Stop::ContextFull | Stop::Interrupted => "length",
            Stop::EndOfText | Stop::Text => "stop",
        }
    }
}

/// What all answers of a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Those of them that were not computed: a session held them already.
    pub cached_tokens: usize,
    /// Tokens of all answers.
    pub completion_tokens: usize,
}

/// How likely a chosen token was, and which others there were.
#[derive(Clone, Debug, PartialEq)]
pub struct Chance {
    /// The token's bytes.
    pub bytes: Vec<u8>,
    /// ln p.
    pub logprob: f32,
    /// The likeliest ones with theirs, best first.
    pub top: Vec<(Vec<u8>, f32)>,
}

impl Chance {
    fn new(vocab: &Vocab, token: u32, row: &Row, top: u16) -> Self {
        let pairs = row.candidates.pairs();
        let logprob = |logit: f32| (logit - row.log_sum_exp).min(0.0);
        let chosen = pairs.iter().find(|(id, _)| *id == token);
        let shown = pairs.iter().take(usize::from(top));
        Self {
            bytes: vocab.piece(token),
            logprob: chosen.map_or(f32::MIN, |(_, logit)| logprob(*logit)),
            top: shown
                .map(|(id, logit)| (vocab.piece(*id), logprob(*logit)))
                .collect(),
        }
    }
}

/// The reader's end of a running request. Dropping it hangs up.
pub struct Answers {
    events: mpsc::Receiver<Event>,
    _hang_up: HangUp,
}

struct HangUp(Cancel);

impl Drop for HangUp {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// All of a request that was not streamed.
pub struct Whole {
    /// What was known at the beginning.
    pub begun: Begun,
    /// Its answers, in order.
    pub choices: Vec<Choice>,
    /// What they took.
    pub usage: Usage,
}

/// One answer.
pub struct Choice {
    /// What was said.
    pub text: String,
    /// Of each token, where this was asked for.
    pub chances: Vec<Chance>,
    /// How it ended.
    pub ended: Ended,
}

impl Answers {
    /// Starts to answer.
    ///
    /// # Errors
    /// As many requests as this server takes are running.
    pub fn begin(state: &Arc<State>, ask: Ask) -> Result<Self, ApiError> {
        let place = place(state).inspect_err(|full| {
            state.metrics.ended(Outcome::Failed(full));
        })?;
        told_later();
        let (events, receive) = mpsc::channel(EVENTS_MAX);
        let cancel = Cancel::new();
        let run = Run {
            state: Arc::clone(state),
            ask,
            asked: Instant::now(),
            seen: state.watch.live.enter(),
            usage: Mutex::default(),
            cancel: cancel.clone(),
            events,
        };
        let place = (place, state.metrics.running());
        tokio::spawn(run.finish(place).in_current_span());
        Ok(Self {
            events: receive,
            _hang_up: HangUp(cancel),
        })
    }

    /// The next event; none after the last.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Waits until the first session is open, so that a failure still has a status of its own.
    ///
    /// # Errors
    /// Nothing was opened.
    pub async fn begun(&mut self) -> Result<Begun, ApiError> {
        match self.next().await {
            Some(Event::Begun(begun)) => Ok(begun),
            Some(Event::Failed(error)) => Err(error),
            _ => Err(ApiError::internal("the answer did not begin")),
        }
    }

    /// Waits for everything.
    ///
    /// # Errors
    /// An answer failed.
    pub async fn whole(mut self) -> Result<Whole, ApiError> {
        let begun = self.begun().await?;
        let mut choices = Vec::new();
        let (mut said, mut chances) = (String::new(), Vec::new());
        while let Some(event) = self.next().await {
            match event {
                Event::Piece { text, chance, .. } => {
                    said += &text;
                    chances.extend(chance);
                }
                // Answers come one after the other.
                Event::Ended { ended, .. } => choices.push(Choice {
                    text: std::mem::take(&mut said),
                    chances: std::mem::take(&mut chances),
                    ended,
                }),
                Event::Over(usage) => {
                    return Ok(Whole {
                        begun,
                        choices,
                        usage,
                    });
                }
                Event::Failed(error) => return Err(error),
                Event::Begun(_) => {}
            }
        }
        Err(ApiError::internal("the answer broke off"))
    }
}

/// Why a run ends early.
enum Ends {
    /// With something to say.
    With(ApiError),
    /// Nobody listens any more.
    Unheard,
}

impl<E: Into<ApiError>> From<E> for Ends {
    fn from(error: E) -> Self {
        Ends::With(error.into())
    }
}

/// A request under way.
struct Run {
    state: Arc<State>,
    ask: Ask,
    asked: Instant,
    seen: Seen,
    /// Tokens so far.
    usage: Mutex<Usage>,
    cancel: Cancel,
    events: mpsc::Sender<Event>,
}

impl Run {
    async fn finish(self, place: (OwnedSemaphorePermit, Counted)) {
        let work = self.work();
        tokio::pin!(work);
        let ended = tokio::select! {
            ended = &mut work => ended,
            () = self.state.ending.wait() => {
                self.cancel.set();
                work.await
            }
        };
        // Who asks again at once must find the place free.
        drop(place);
        match &ended {
            Ok(()) => self.seen.answered(),
            Err(Ends::With(error)) => self.seen.failed(error),
            Err(Ends::Unheard) => {}
        }
        self.log(match &ended {
            Ok(()) => Outcome::Answered,
            Err(Ends::With(error)) => Outcome::Failed(error),
            Err(Ends::Unheard) => Outcome::HungUp,
        });
        if let Err(Ends::With(error)) = ended {
            let _ = self.send(Event::Failed(error)).await;
        }
    }

    async fn work(&self) -> Result<(), Ends> {
        let found = self.state.models.find(self.ask.model.as_deref());
        let model = self.or_hung_up(found).await??;
        let (prompts, tools) = (self.ask.prompts.clone(), self.ask.tools.clone());
        let prompts = tokenize(prompts, self.ask.param, tools, &model).await?;
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        self.used(|usage| usage.prompt_tokens = prompt_tokens);
        Span::current().record("model", &*model.name);
        self.seen.model(&model.name, &model.id, prompt_tokens);
        for (at, prompt) in (0u32..).zip(&prompts) {
            let positions = n_ctx(prompt.len(), self.max_tokens(), model.n_ctx_max);
            let waiting = self.state.metrics.waiting();
            let models = &*self.state.models;
            let caller = self.ask.caller;
            let asked = Asked { caller, prompt };
            let mut source = match models.kept(&model, asked, positions) {
                Some(kept) => kept,
                None => {
                    let opened = models.open_for(&model, asked, positions);
                    self.or_hung_up(opened).await??
                }
            };
            self.seen.opened(&mut source, prompt.len());
            waiting.opened();
            let _session = self.state.metrics.session();
            let cached_tokens = source.spares(prompt);
            self.used(|usage| usage.cached_tokens += cached_tokens);
            if at == 0 {
                self.send(Event::Begun(Begun {
                    model: model.name.clone(),
                    model_id: model.id.clone(),
                    prompt_tokens,
                    cached_tokens,
                }))
                .await?;
            }
            let first = at.saturating_mul(self.ask.n);
            let answered = self.answers(&model, &mut source, prompt, first).await;
            self.state.metrics.recovered(&source);
            match answered {
                Ok(()) => models.keep(&model, asked, source).await,
                Err(ends) => {
                    source.close().await;
                    return Err(ends);
                }
            }
        }
        let usage = self.used(|_| ());
        self.send(Event::Over(usage)).await
    }

    /// Changes what was used, and gives it.
    fn used(&self, change: impl FnOnce(&mut Usage)) -> Usage {
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut usage);
        *usage
    }

    /// The one line of this request: how it went, and no word of it.
    fn log(&self, how: Outcome<'_>) {
        let usage = self.used(|_| ());
        self.state.metrics.used(usage);
        self.state.metrics.ended(how);
        let error = match how {
            Outcome::Failed(error) => Some(error),
            Outcome::Answered | Outcome::HungUp => None,
        };
        tracing::info!(
            outcome = how.name(),
            status = error.map_or(200, |error| error.status().as_u16()),
            code = error.map(ApiError::name),
            prompt_tokens = usage.prompt_tokens,
            tokens = usage.completion_tokens,
            ms = self.asked.elapsed().as_millis() as u64,
            "request"
        );
    }

    /// `n` answers to one prompt, which is computed once.
    async fn answers(
        &self,
        model: &Found,
        source: &mut Source,
        prompt: &[u32],
        first_index: u32,
    ) -> Result<(), Ends> {
        let opened = Instant::now();
        let seed = self.ask.sampling.seed.unwrap_or_else(rand::random);
        let mut after_prompt = None;
        for at in 0..self.ask.n {
            let seed = seed.wrapping_add(at);
            let index = first_index.saturating_add(at);
            let kept_tokens = source.spares(prompt);
            let (answer, calls, row) = self
                .answer(model, source, prompt, after_prompt.take(), seed, index)
                .await?;
            after_prompt = row;
            let models = &*self.state.models;
            let times = (self.asked, opened);
            let extra = Extra::new(models, model, source, &answer, seed, times);
            let extra = extra.kept(kept_tokens);
            let ended = Ended {
                stop: answer.stop,
                stop_text: answer.stop_text,
                calls,
                extra,
            };
            self.send(Event::Ended { index, ended }).await?;
        }
        Ok(())
    }

    /// One answer, what it calls, and the row that follows the prompt, for the next one.
    async fn answer(
        &self,
        model: &Found,
        source: &mut Source,
        prompt: &[u32],
        first: Option<Row>,
        seed: u32,
        index: u32,
    ) -> Result<(Answer, Vec<Call>, Option<Row>), Ends> {
        let options = SamplerOptions {
            seed,
            ..self.ask.sampling.options.clone()
        };
        let vocab = model.vocab.as_deref();
        let mut sampler = self.sampler(&options, source.n_vocab(), vocab)?;
        let question = Question {
            prompt,
            words: vocab.map_or(Words::Ids(None), Words::Text),
            max_tokens: self.max_tokens(),
            stops: self.ask.stops.clone(),
            form: (self.ask.sampling).form(self.max_tokens(), self.ask.grammar.is_some()),
            said: Vec::new(),
            first,
            cancel: &self.cancel,
        };
        let mut answering = Answering::new(source, &mut sampler, question);
        let (mut after_prompt, mut spoken) = (None, Spoken::default());
        let mut clock = self.state.metrics.clock((index == 0).then_some(self.asked));
        while let Some(piece) = answering.next().await? {
            (self.seen).piece(answering.source(), piece.token.is_some());
            if piece.token.is_some() {
                clock.token();
                self.used(|usage| usage.completion_tokens += 1);
            }
            let chance = self.chance(vocab, &piece);
            let Piece { mut text, row, .. } = piece;
            if !self.ask.tools.is_empty() {
                text = spoken.push(&text).to_owned();
            }
            if after_prompt.is_none() && self.ask.n > 1 {
                after_prompt = row;
            }
            self.say(index, text, chance).await?;
        }
        let answer = answering.end();
        if answer.stop == Stop::Interrupted {
            return Err(self.hung_up());
        }
        let (text, calls) = spoken.finish(&self.ask.tools);
        self.say(index, text, None).await?;
        Ok((answer, calls, after_prompt))
    }

    async fn say(&self, index: u32, text: String, chance: Option<Chance>) -> Result<(), Ends> {
        if text.is_empty() && chance.is_none() {
            return Ok(());
        }
        let event = Event::Piece {
            index,
            text,
            chance,
        };
        self.send(event).await
    }

    fn sampler(
        &self,
        options: &SamplerOptions,
        n_vocab: u32,
        vocab: Option<&Vocab>,
    ) -> Result<Sampler, ApiError> {
        let wrong = |error: SampleError| ApiError::malformed(error.to_string());
        let sampler = Sampler::new(options, n_vocab).map_err(wrong)?;
        let Some(grammar) = &self.ask.grammar else {
            return Ok(sampler);
        };
        let why = "this model has no tokenizer, so its answers keep to no format";
        let vocab = vocab.ok_or_else(|| ApiError::field("response_format", why))?;
        sampler.within(grammar, vocab).map_err(wrong)
    }

    fn chance(&self, vocab: Option<&Vocab>, piece: &Piece) -> Option<Chance> {
        let top = self.ask.sampling.top_logprobs?;
        Some(Chance::new(vocab?, piece.token?, piece.row.as_ref()?, top))
    }

    fn max_tokens(&self) -> u32 {
        self.ask.max_tokens.unwrap_or(self.state.max_tokens)
    }

    /// What `work` gives, unless nobody waits for it any more.
    async fn or_hung_up<T>(&self, work: impl Future<Output = T>) -> Result<T, Ends> {
        tokio::select! {
            biased;
            () = self.cancel.wait() => Err(self.hung_up()),
            done = work => Ok(done),
        }
    }

    /// Either the reader has left, or this server ends.
    fn hung_up(&self) -> Ends {
        if self.events.is_closed() {
            Ends::Unheard
        } else {
            ApiError::stopping().into()
        }
    }

    async fn send(&self, event: Event) -> Result<(), Ends> {
        match timeout(READER_TIMEOUT, self.events.send(event)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Ends::Unheard),
        }
    }
}

/// A place for an answer that runs.
///
/// # Errors
/// As many requests as this server takes are running.
pub fn place(state: &State) -> Result<OwnedSemaphorePermit, ApiError> {
    let places = Arc::clone(&state.places);
    let place = places.try_acquire_owned();
    place.map_err(|_| ApiError::too_many(state.places_max))
}

/// How many tokens the prompts of a request have.
///
/// # Errors
/// There is no such model, or it does not take them; or too many requests are running.
pub async fn prompt_tokens(state: &State, ask: Ask) -> Result<usize, ApiError> {
    let _place = place(state)?;
    let model = state.models.find(ask.model.as_deref()).await?;
    let prompts = tokenize(ask.prompts, ask.param, ask.tools, &model).await?;
    Ok(prompts.iter().map(Vec::len).sum())
}

/// The ids of all prompts of the field `param`, each of which leaves room for an answer.
///
/// # Errors
/// The model does not take one of them.
pub async fn tokenize(
    prompts: Vec<Prompt>,
    param: &'static str,
    tools: Tools,
    model: &Arc<Found>,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let model = Arc::clone(model);
    // A long text takes a while.
    let tokenized = tokio::task::spawn_blocking(move || {
        let prompts = prompts.iter();
        prompts
            .map(|prompt| ids(prompt, param, &tools, &model))
            .collect()
    });
    match tokenized.await {
        Ok(ids) => ids,
        Err(_) => Err(ApiError::internal("the tokenizer failed")),
    }
}

fn ids(prompt: &Prompt, param: &str, tools: &Tools, model: &Found) -> Result<Vec<u32>, ApiError> {
    let at_fault = |error: PromptError| ApiError::field(param, error.to_string());
    let vocab = || {
        let why =
            "this model has no tokenizer: give token ids (to /v1/completions, or /v1/embeddings)";
        model
            .vocab
            .as_deref()
            .ok_or_else(|| ApiError::field(param, why))
    };
    let ids = match prompt {
        Prompt::Ids(ids) => not_empty(ids.clone()),
        Prompt::Text(text) => of_text(vocab()?, text),
        Prompt::Chat(messages) => {
            let vocab = vocab()?;
            let Some(template) = vocab.chat_template() else {
                let why = "this model has no chat template: use /v1/completions";
                return Err(ApiError::field(param, why));
            };
            if !tools.is_empty() && !template.contains("tools") {
                let why = "this model's chat template has no place for tools";
                return Err(ApiError::field("tools", why));
            }
            of_chat(vocab, template, messages, &tools.list)
        }
    };
    let ids = ids.map_err(at_fault)?;
    if ids.len() >= model.n_ctx_max as usize {
        return Err(ApiError::too_long(param, ids.len(), model.n_ctx_max));
    }
    if let Some(vocab) = &model.vocab
        && let Some(id) = ids.iter().find(|id| **id >= vocab.n_tokens())
    {
        let why = format!(
            "token {id} is not in the vocabulary of {}",
            vocab.n_tokens()
        );
        return Err(ApiError::field(param, why));
    }
    Ok(ids)
}
