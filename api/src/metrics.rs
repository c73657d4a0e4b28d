//! What the server counts, and `GET /metrics`. Labels are the server's own words: its paths, statuses and outcomes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use node::answer::Source;
use node::metrics::{self, Metrics, seconds_buckets};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::answers::Usage;
use crate::error::ApiError;
use crate::state::State as Shared;

/// All of it in Prometheus' format.
pub async fn metrics(State(state): State<Arc<Shared>>) -> Response {
    let text = state.metrics.shown.text();
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

type Label = [(&'static str, &'static str); 1];
/// The path that was matched, and the status.
type PathStatus = [(&'static str, String); 2];

/// Counters of a server. Clones share them.
#[derive(Clone)]
pub struct ApiMetrics {
    shown: Metrics,
    requests: Family<PathStatus, Counter>,
    responses: Histogram,
    places: Gauge,
    running: Gauge,
    waiting: Gauge,
    sessions: Gauge,
    answers: Family<Label, Counter>,
    prompt_tokens: Counter,
    answer_tokens: Counter,
    open: Histogram,
    first_token: Histogram,
    gap: Histogram,
    recoveries: Counter,
    recovery: Histogram,
}

impl ApiMetrics {
    /// Nothing is counted yet; `to` shows them, with a server of so many places.
    pub fn new(to: &Metrics, places_max: usize) -> Self {
        let seconds = || Histogram::new(seconds_buckets());
        let new = Self {
            shown: to.clone(),
            requests: Family::default(),
            responses: seconds(),
            places: Gauge::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            sessions: Gauge::default(),
            answers: Family::default(),
            prompt_tokens: Counter::default(),
            answer_tokens: Counter::default(),
            open: seconds(),
            first_token: seconds(),
            gap: seconds(),
            recoveries: Counter::default(),
            recovery: seconds(),
        };
        new.places
            .set(i64::try_from(places_max).unwrap_or(i64::MAX));
        new.register();
        new
    }

    fn register(&self) {
        let it = self.clone();
        self.shown.register(|to| {
            to.register(
                "shoal_http_requests",
                "Requests by path and status",
                it.requests,
            );
            let help = "From a request's head to that of its response";
            to.register("shoal_http_response_seconds", help, it.responses);
            to.register(
                "shoal_requests_max",
                "Requests that are answered at once at most",
                it.places,
            );
            to.register(
                "shoal_requests_running",
                "Requests that are being answered",
                it.running,
            );
            let help = "Requests that wait for a place in the swarm";
            to.register("shoal_requests_waiting", help, it.waiting);
            let help = "Sessions that this server has open in the swarm";
            to.register("shoal_client_sessions", help, it.sessions);
            to.register(
                "shoal_answers",
                "Requests for answers by what came of them",
                it.answers,
            );
            to.register("shoal_prompt_tokens", "Tokens of prompts", it.prompt_tokens);
            to.register("shoal_answer_tokens", "Tokens of answers", it.answer_tokens);
            let help = "To open a session on every hop, waiting for a place included";
            to.register("shoal_session_open_seconds", help, it.open);
            let help = "From a request to its first token";
            to.register("shoal_first_token_seconds", help, it.first_token);
            to.register(
                "shoal_token_gap_seconds",
                "Between two tokens of an answer",
                it.gap,
            );
            let help = "Losses of hops that answers got over";
            to.register("shoal_recoveries", help, it.recoveries);
            let help = "From losing a hop to going on along another route";
            to.register("shoal_recovery_seconds", help, it.recovery);
        });
    }

    /// A response has begun.
    pub fn responded(&self, path: &str, status: u16, took: Duration) {
        let labels = [("path", path.to_owned()), ("status", status.to_string())];
        self.requests.get_or_create(&labels).inc();
        self.responses.observe(took.as_secs_f64());
    }

    /// A request is being answered, until what is given is dropped.
    pub fn running(&self) -> Counted {
        Counted::new(&self.running)
    }

    /// It waits for a session, until what is given is dropped.
    pub fn waiting(&self) -> Waiting {
        Waiting {
            _counted: Counted::new(&self.waiting),
            open: self.open.clone(),
            since: Instant::now(),
        }
    }

    /// It has one, until what is given is dropped.
    pub fn session(&self) -> Counted {
        Counted::new(&self.sessions)
    }

    /// A session is over, with all that was got over in it.
    pub fn recovered(&self, source: &Source) {
        for recovery in source.recoveries() {
            self.recoveries.inc();
            self.recovery.observe(recovery.took.as_secs_f64());
        }
    }

    /// A request for an answer is over; no error is given where nobody listens any more.
    pub fn ended(&self, how: Outcome<'_>) {
        self.answers.get_or_create(&[("outcome", how.name())]).inc();
    }

    /// So many tokens went in and out.
    pub fn used(&self, usage: Usage) {
        self.prompt_tokens.inc_by(usage.prompt_tokens as u64);
        self.answer_tokens.inc_by(usage.completion_tokens as u64);
    }

    /// Times the tokens of an answer.
    pub fn clock(&self, asked: Option<Instant>) -> TokenClock {
        TokenClock {
            first: asked.map(|asked| (asked, self.first_token.clone())),
            last: None,
            gap: self.gap.clone(),
        }
    }
}

/// What came of a request for an answer.
#[derive(Clone, Copy)]
pub enum Outcome<'a> {
    /// All of it.
    Answered,
    /// The client left.
    HungUp,
    /// An error.
    Failed(&'a ApiError),
}

impl Outcome<'_> {
    /// One word of a few.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Answered => "answered",
            Outcome::HungUp => "hung_up",
            Outcome::Failed(error) => match error.status().as_u16() {
                429 => "full",
                503 => "unavailable",
                400..500 => "refused",
                _ => "failed",
            },
        }
    }
}

/// One more of something that there is, until it is dropped.
pub struct Counted(Gauge);

impl Counted {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A request that waits for a session.
pub struct Waiting {
    _counted: Counted,
    open: Histogram,
    since: Instant,
}

impl Waiting {
    /// It has one.
    pub fn opened(self) {
        self.open.observe(self.since.elapsed().as_secs_f64());
    }
}

/// Of one answer.
pub struct TokenClock {
    /// When the request came, until the first token is there.
    first: Option<(Instant, Histogram)>,
    last: Option<Instant>,
    gap: Histogram,
}

impl TokenClock {
    /// A token was chosen.
    pub fn token(&mut self) {
        let now = Instant::now();
        if let Some((asked, first)) = self.first.take() {
            first.observe((now - asked).as_secs_f64());
        }
        if let Some(last) = self.last.replace(now) {
            self.gap.observe((now - last).as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str, line: &str) -> Option<f64> {
        let found = text.lines().find_map(|it| it.strip_prefix(line));
        found.and_then(|value| value.trim().parse().ok())
    }

    #[test]
    fn what_is_over_is_not_counted_as_running() {
        let shown = Metrics::default();
        let metrics = ApiMetrics::new(&shown, 4);
        let running = metrics.running();
        let waiting = metrics.waiting();
        assert_eq!(value(&shown.text(), "shoal_requests_running "), Some(1.0));
        assert_eq!(value(&shown.text(), "shoal_requests_waiting "), Some(1.0));
        waiting.opened();
        drop(running);
        let text = shown.text();
        assert_eq!(value(&text, "shoal_requests_max "), Some(4.0));
        assert_eq!(value(&text, "shoal_requests_running "), Some(0.0));
        assert_eq!(value(&text, "shoal_requests_waiting "), Some(0.0));
        assert_eq!(value(&text, "shoal_session_open_seconds_count "), Some(1.0));
    }

    #[test]
    fn the_first_token_is_no_gap() {
        let shown = Metrics::default();
        let metrics = ApiMetrics::new(&shown, 1);
        let mut clock = metrics.clock(Some(Instant::now()));
        (0..5).for_each(|_| clock.token());
        // A further answer of the same request begins where the prompt ends.
        let mut clock = metrics.clock(None);
        (0..2).for_each(|_| clock.token());
        let text = shown.text();
        assert_eq!(value(&text, "shoal_first_token_seconds_count "), Some(1.0));
        assert_eq!(value(&text, "shoal_token_gap_seconds_count "), Some(5.0));
    }

    #[test]
    fn outcomes_are_few_words() {
        let metrics = Metrics::default();
        let counters = ApiMetrics::new(&metrics, 1);
        for how in [
            Outcome::Answered,
            Outcome::HungUp,
            Outcome::Failed(&ApiError::too_many(1)),
            Outcome::Failed(&ApiError::full("x")),
            Outcome::Failed(&ApiError::unavailable("x")),
            Outcome::Failed(&ApiError::malformed("x")),
            Outcome::Failed(&ApiError::internal("x")),
        ] {
            counters.ended(how);
        }
        let text = metrics.text();
        for (outcome, times) in [
            ("answered", 1.0),
            ("hung_up", 1.0),
            ("full", 2.0),
            ("unavailable", 1.0),
            ("refused", 1.0),
            ("failed", 1.0),
        ] {
            let line = format!("shoal_answers_total{{outcome=\"{outcome}\"}} ");
            assert_eq!(value(&text, &line), Some(times), "{text}");
        }
    }
}
