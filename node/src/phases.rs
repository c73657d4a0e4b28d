//! Where a session's time went, as spans of a trace: one for each prompt and each run of decoded tokens, with sums over
//! its frames. A frame costs some additions and two looks at the clock, whether or not anybody exports traces.
//!
//! ```text
//! request ─ session (hop 0) ─┬─ session (hop 1) ─ …
//!                            ├─ prompt   rows, queue_us, compute_us, wire_in_us, wire_out_us, elsewhere_us
//!                            └─ decode   the same
//! ```
//!
//! No two clocks are compared: a hop says how long it was busy and how long it waited for others, the client how long
//! each answer took and how much of that the hops computed. What is left between the two is wires and queues.

use std::time::Duration;

use tokio::time::Instant;
use tracing::Span;
use tracing::field::Empty;

/// Spans of one session at most: a conversation of many turns goes on without them.
const PHASES_MAX: u32 = 64;

/// What the frames are part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// A prompt, or what is fed again after a loss.
    Prompt,
    /// Tokens one by one.
    Decode,
}

impl Phase {
    /// Of a frame of so many rows; `answered`: its last row's successor is asked for.
    pub(crate) fn of(n_rows: usize, answered: bool) -> Self {
        if n_rows == 1 && answered {
            Phase::Decode
        } else {
            Phase::Prompt
        }
    }
}

/// Times of frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sums {
    /// Frames.
    pub(crate) frames: u64,
    /// Rows in them.
    pub(crate) rows: u64,
    /// Waiting for their turn at the stage.
    pub(crate) queue: Duration,
    /// In the stage; at the client, in the stages of all hops.
    pub(crate) compute: Duration,
    /// Since their first bytes had come, until they were whole.
    pub(crate) wire_in: Duration,
    /// Waiting for a stream that took no more bytes.
    pub(crate) wire_out: Duration,
    /// Waiting for others: at a hop between two frames, at the client all that the hops did not compute.
    pub(crate) elsewhere: Duration,
}

impl Sums {
    fn add(&mut self, more: Sums) {
        self.frames = self.frames.saturating_add(more.frames);
        self.rows = self.rows.saturating_add(more.rows);
        self.queue = self.queue.saturating_add(more.queue);
        self.compute = self.compute.saturating_add(more.compute);
        self.wire_in = self.wire_in.saturating_add(more.wire_in);
        self.wire_out = self.wire_out.saturating_add(more.wire_out);
        self.elsewhere = self.elsewhere.saturating_add(more.elsewhere);
    }

    fn record(&self, span: &Span) {
        for (name, value) in [
            ("frames", self.frames),
            ("rows", self.rows),
            ("queue_us", us(self.queue)),
            ("compute_us", us(self.compute)),
            ("wire_in_us", us(self.wire_in)),
            ("wire_out_us", us(self.wire_out)),
            ("elsewhere_us", us(self.elsewhere)),
        ] {
            span.record(name, value);
        }
    }
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The phases of one session, at one of its ends. Dropping it ends the last one.
#[derive(Debug, Default)]
pub(crate) struct Phases {
    now: Option<(Phase, Span)>,
    sums: Sums,
    begun: u32,
    /// What the spans are part of; none: of the current one.
    parent: Option<Span>,
    /// When nothing more was under way; none while something is.
    idle_since: Option<Instant>,
}

impl Phases {
    /// Phases whose spans are children of this one.
    pub(crate) fn within(parent: Span) -> Self {
        Self {
            now: None,
            sums: Sums::default(),
            begun: 0,
            parent: Some(parent),
            idle_since: None,
        }
    }

    /// A frame comes, or is sent, while `busy` says whether others are under way. Where it begins a phase, what was
    /// before is over.
    pub(crate) fn begin(&mut self, phase: Phase, busy: bool) {
        if self.now.as_ref().is_none_or(|(now, _)| *now != phase) {
            self.end();
            let span = if self.begun < PHASES_MAX {
                let parent = self.parent.clone();
                parent.map_or_else(|| span(phase), |parent| parent.in_scope(|| span(phase)))
            } else {
                Span::none()
            };
            self.begun = self.begun.saturating_add(1);
            self.now = Some((phase, span));
            self.idle_since = None;
        }
        if !busy && let Some(since) = self.idle_since.take() {
            self.sums.elsewhere = self.sums.elsewhere.saturating_add(since.elapsed());
        }
    }

    /// It is done, with these times; `idle`: nothing else is under way.
    pub(crate) fn add(&mut self, times: Sums, idle: bool) {
        self.sums.add(times);
        if idle {
            self.idle_since = Some(Instant::now());
        }
    }

    /// Nothing more comes for now.
    pub(crate) fn end(&mut self) {
        if let Some((_, span)) = self.now.take() {
            std::mem::take(&mut self.sums).record(&span);
        }
    }
}

impl Drop for Phases {
    fn drop(&mut self) {
        self.end();
    }
}

fn span(phase: Phase) -> Span {
    macro_rules! span {
        ($name:literal) => {
            tracing::info_span!(
                $name,
                frames = Empty,
                rows = Empty,
                queue_us = Empty,
                compute_us = Empty,
                wire_in_us = Empty,
                wire_out_us = Empty,
                elsewhere_us = Empty,
            )
        };
    }
    match phase {
        Phase::Prompt => span!("prompt"),
        Phase::Decode => span!("decode"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_rows_that_are_answered_are_decoded_tokens() {
        assert_eq!(Phase::of(1, true), Phase::Decode);
        assert_eq!(Phase::of(1, false), Phase::Prompt);
        assert_eq!(Phase::of(32, true), Phase::Prompt);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_others_is_told_from_work_and_phases_are_apart() {
        let ms = Duration::from_millis;
        let frame = |compute| Sums {
            frames: 1,
            rows: 1,
            compute,
            ..Sums::default()
        };
        let mut phases = Phases::default();
        phases.begin(Phase::Prompt, false);
        phases.add(frame(ms(30)), true);
        tokio::time::advance(ms(100)).await;
        // What is between two phases is neither's.
        phases.begin(Phase::Decode, false);
        assert_eq!(phases.sums, Sums::default());
        phases.add(frame(ms(5)), true);
        tokio::time::advance(ms(7)).await;
        phases.begin(Phase::Decode, false);
        tokio::time::advance(ms(5)).await;
        phases.add(frame(ms(5)), true);
        assert_eq!(phases.sums.elsewhere, ms(7));
        assert_eq!((phases.sums.frames, phases.sums.compute), (2, ms(10)));
    }

    #[test]
    fn a_long_conversation_has_a_bounded_number_of_spans() {
        use std::sync::atomic::{AtomicU32, Ordering};
        use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
        static SPANS: AtomicU32 = AtomicU32::new(0);
        struct Count;
        impl<S: tracing::Subscriber> Layer<S> for Count {
            fn on_new_span(
                &self,
                _: &tracing::span::Attributes<'_>,
                _: &tracing::Id,
                _: Context<'_, S>,
            ) {
                SPANS.fetch_add(1, Ordering::Relaxed);
            }
        }
        let counting = tracing_subscriber::registry().with(Count);
        tracing::subscriber::with_default(counting, || {
            let mut phases = Phases::default();
            for _ in 0..PHASES_MAX {
                phases.begin(Phase::Prompt, false);
                phases.begin(Phase::Decode, false);
            }
        });
        assert_eq!(SPANS.load(Ordering::Relaxed), PHASES_MAX);
    }
}
