//! One layer's calls, on the stage thread that needs them: sent, waited for, sent elsewhere.
//!
//! ```text
//! call ─▶ attempt at a holder ─▶ rows: done
//!                              ├▶ late: another attempt beside it, the first answer counts
//!                              └▶ failed: another attempt at once ─▶ nobody left: waits for somebody
//! ```
//! A call goes to one other holder that has all of its experts, else to several, each with whole groups: the bits
//! of an expert's rows depend on how many there are (`docs/decisions/0141`).

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use engine::{ExpertCall, ExpertError, ExpertReply, HolderId};

use super::{
    choose::LOCAL,
    island::{NOBODY, Shared},
    link::{Event, Failed, Reply, Request},
    wire,
};

/// How long after everybody was busy somebody is asked again.
const BUSY_AGAIN: Duration = Duration::from_millis(5);
/// How often a step looks for somebody that waits for a place in a queue.
const ORPHAN_AGAIN: Duration = Duration::from_millis(20);
/// How long a step looks out for an answer before it sleeps: to be woken takes a good part of what an answer does.
const AWAKE_MAX: Duration = Duration::from_micros(300);
/// The least often that a waiting step looks up.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Asks, and waits for all of it. Blocks: not for an async thread.
///
/// # Errors
/// An expert that nobody had for as long as the island's options say, or what the last of its holders said.
pub(super) fn ask(
    shared: &Arc<Shared>,
    calls: Vec<(HolderId, ExpertCall)>,
) -> Result<Vec<ExpertReply>, ExpertError> {
    let (to, events) = channel();
    let mut step = Step {
        shared,
        to,
        events,
        open: calls.len(),
        wants: Vec::with_capacity(calls.len()),
        told: false,
    };
    let mut local = Vec::new();
    for (holder, call) in calls {
        for group in &call.groups {
            shared.picked(call.layer, group.expert, group.rows.len() as u64);
        }
        let want = step.wants.len();
        step.wants.push(Want::new(call));
        // What cannot be sent is settled below, when everything else is on its way.
        match holder {
            NOBODY => {}
            HolderId(LOCAL) => local.push(want),
            HolderId(remote) => step.send(want, remote, None),
        }
    }
    // These may be computed at once, on this thread: while the others travel.
    for want in local {
        step.send(want, LOCAL, None);
    }
    step.run()?;
    let replies = step.wants.into_iter();
    Ok(replies
        .map(|want| ExpertReply { rows: want.rows })
        .collect())
}

/// What one holder was asked of a call.
struct Attempt {
    holder: u32,
    /// Which of the call's groups; none: all.
    groups: Option<Vec<usize>>,
    since: Instant,
    /// When somebody else is asked, too.
    deadline: Instant,
    late: bool,
    /// Answered, or failed.
    over: bool,
}

impl Attempt {
    fn covers(&self, group: usize) -> bool {
        self.groups
            .as_ref()
            .is_none_or(|groups| groups.contains(&group))
    }
}

/// A call, until all of its groups have rows.
struct Want {
    call: ExpertCall,
    /// Which groups have rows; empty as long as none has.
    filled: Vec<bool>,
    rows: Vec<f32>,
    done: bool,
    attempts: Vec<Attempt>,
    /// Since when some group is with nobody.
    orphaned: Option<Instant>,
    /// When somebody is asked again who was busy.
    again: Option<Instant>,
    last: Option<String>,
}

impl Want {
    fn new(call: ExpertCall) -> Self {
        Self {
            call,
            filled: Vec::new(),
            rows: Vec::new(),
            done: false,
            attempts: Vec::new(),
            orphaned: None,
            again: None,
            last: None,
        }
    }

    fn is_filled(&self, group: usize) -> bool {
        self.filled.get(group).copied().unwrap_or(false)
    }

    fn unfilled(&self) -> impl Iterator<Item = usize> {
        (0..self.call.groups.len()).filter(|group| !self.is_filled(*group))
    }

    fn runs(&self, group: usize) -> impl Iterator<Item = &Attempt> {
        let running = self.attempts.iter().filter(|attempt| !attempt.over);
        running.filter(move |attempt| attempt.covers(group))
    }

    /// Takes an answer in; whether the call is done with it.
    fn fill(&mut self, groups: Option<&[usize]>, rows: Vec<f32>) -> bool {
        if self.done {
            return false;
        }
        if groups.is_none() && self.filled.is_empty() {
            self.rows = rows;
            self.done = true;
            return true;
        }
        let n_embd = self.call.n_embd as usize;
        let n_groups = self.call.groups.len();
        if self.filled.is_empty() {
            self.filled = vec![false; n_groups];
            self.rows = vec![0.0; self.call.rows_out() * n_embd];
        }
        let mut starts = Vec::with_capacity(n_groups);
        let mut end = 0;
        for group in &self.call.groups {
            starts.push(end);
            end += group.rows.len() * n_embd;
        }
        let mut rows = rows.as_slice();
        let all: Vec<usize> = (0..n_groups).collect();
        for &group in groups.unwrap_or(&all) {
            let len = self.call.groups[group].rows.len() * n_embd;
            let (of_group, rest) = rows.split_at(len.min(rows.len()));
            rows = rest;
            if !self.filled[group] && of_group.len() == len {
                self.rows[starts[group]..starts[group] + len].copy_from_slice(of_group);
                self.filled[group] = true;
            }
        }
        self.done = self.filled.iter().all(|filled| *filled);
        self.done
    }
}

struct Step<'a> {
    shared: &'a Arc<Shared>,
    to: Sender<Event>,
    events: Receiver<Event>,
    /// Calls that are not done.
    open: usize,
    wants: Vec<Want>,
    /// Whether the island tells of changes.
    told: bool,
}

impl Step<'_> {
    fn run(&mut self) -> Result<(), ExpertError> {
        for want in 0..self.wants.len() {
            self.settle(want);
        }
        while self.open > 0 {
            let due = self.due()?;
            let mut event = self.next(due);
            while let Some(now) = event {
                self.take(now);
                event = self.events.try_recv().ok();
            }
        }
        Ok(())
    }

    /// The next event, until then.
    fn next(&self, due: Instant) -> Option<Event> {
        let begun = Instant::now();
        while begun.elapsed() < AWAKE_MAX {
            if let Ok(event) = self.events.try_recv() {
                return Some(event);
            }
            std::thread::yield_now();
        }
        let wait = due.saturating_duration_since(Instant::now());
        self.events.recv_timeout(wait).ok()
    }

    /// Does what is due, and says when to look again.
    fn due(&mut self) -> Result<Instant, ExpertError> {
        let now = Instant::now();
        let mut next = now + LOOK_EVERY;
        for at in 0..self.wants.len() {
            if self.wants[at].done {
                continue;
            }
            if self.shared.is_closed() {
                return Err(ExpertError::Backend("this node is going down".into()));
            }
            let mut late = false;
            for attempt in &mut self.wants[at].attempts {
                if !attempt.over && !attempt.late && attempt.deadline <= now {
                    (attempt.late, late) = (true, true);
                    if let Some(holder) = self.shared.holder(attempt.holder) {
                        holder.late(now.saturating_duration_since(attempt.since));
                    }
                }
            }
            let want = &self.wants[at];
            if late || want.again.is_some_and(|again| again <= now) {
                self.settle(at);
            }
            let want = &self.wants[at];
            let deadlines = want.attempts.iter();
            let deadlines = deadlines.filter(|attempt| !attempt.over && !attempt.late);
            let deadlines = deadlines.map(|attempt| attempt.deadline);
            let lost = want
                .orphaned
                .map(|since| since + self.shared.options.missing_wait);
            if lost.is_some_and(|lost| lost <= now) {
                return Err(self.nobody(at));
            }
            let all = deadlines.chain(want.again).chain(lost);
            next = all.min().map_or(next, |soonest| next.min(soonest));
        }
        Ok(next)
    }

    /// Why a call has no answer.
    fn nobody(&self, at: usize) -> ExpertError {
        let want = &self.wants[at];
        let layer = want.call.layer;
        let orphan = want
            .unfilled()
            .find(|group| want.runs(*group).next().is_none());
        let expert = orphan.and_then(|group| want.call.groups.get(group));
        let expert = expert.map_or(0, |group| group.expert);
        match &want.last {
            Some(why) => ExpertError::Backend(format!("expert {expert} of layer {layer}: {why}")),
            None => ExpertError::NotHeld { layer, expert },
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Changed => {
                for at in 0..self.wants.len() {
                    self.settle(at);
                }
            }
            Event::Answer {
                want: at,
                attempt,
                rows,
            } => {
                let Some(want) = self.wants.get_mut(at) else {
                    return;
                };
                let Some(tried) = want.attempts.get_mut(attempt) else {
                    return;
                };
                tried.over = true;
                match rows {
                    Ok(rows) => {
                        let groups = tried.groups.take();
                        if want.fill(groups.as_deref(), rows) {
                            self.open -= 1;
                        }
                    }
                    Err(why) => {
                        self.failed(at, attempt, why);
                        self.settle(at);
                    }
                }
            }
        }
    }

    /// Sees to it that the same is not asked of the same again.
    fn failed(&mut self, at: usize, attempt: usize, why: Failed) {
        let want = &mut self.wants[at];
        let tried = &want.attempts[attempt];
        let layer = want.call.layer;
        match why {
            Failed::Lost | Failed::Paused => {}
            Failed::Busy => want.again = Some(Instant::now() + BUSY_AGAIN),
            Failed::NotHeld(expert) => {
                let holder = tried.holder;
                self.shared
                    .deny(holder, layer, std::iter::once(expert.into()));
            }
            Failed::Said(why) => {
                let groups = want.call.groups.iter().enumerate();
                let asked = groups.filter(|(group, _)| tried.covers(*group));
                let experts = asked.map(|(_, group)| group.expert);
                self.shared.deny(tried.holder, layer, experts);
                want.last = Some(why);
            }
        }
    }

    /// Sends what is with nobody, or with those who are late only, to others.
    fn settle(&mut self, at: usize) {
        let want = &self.wants[at];
        if want.done {
            return;
        }
        // Who is at work on it, or was busy a moment ago.
        let mut without: Vec<u32> = Vec::new();
        let waits = want.again.is_some_and(|again| again > Instant::now());
        for attempt in &want.attempts {
            if !attempt.over || waits {
                without.push(attempt.holder);
            }
        }
        loop {
            let want = &self.wants[at];
            let needy: Vec<usize> = want
                .unfilled()
                .filter(|group| want.runs(*group).all(|attempt| attempt.late))
                .collect();
            if needy.is_empty() {
                break;
            }
            let experts: Vec<(u32, u32)> = needy
                .iter()
                .map(|group| &want.call.groups[*group])
                .map(|group| (group.expert, group.rows.len() as u32))
                .collect();
            let others = self.shared.others(want.call.layer, &experts, &without);
            let mut by_holder: Vec<(u32, Vec<usize>)> = Vec::new();
            for (group, holder) in needy.into_iter().zip(others) {
                let Some(holder) = holder else { continue };
                match by_holder.iter_mut().find(|(with, _)| *with == holder) {
                    Some((_, groups)) => groups.push(group),
                    None => by_holder.push((holder, vec![group])),
                }
            }
            if by_holder.is_empty() {
                self.listen();
                break;
            }
            for (holder, groups) in by_holder {
                without.push(holder);
                self.hedged(at, &groups);
                let all = groups.len() == self.wants[at].call.groups.len();
                self.send(at, holder, (!all).then_some(groups));
            }
        }
        self.orphans(at);
    }

    /// Counts for those who are late with these groups.
    fn hedged(&self, at: usize, groups: &[usize]) {
        let late = self.wants[at].attempts.iter().filter(|attempt| {
            !attempt.over && attempt.late && groups.iter().any(|group| attempt.covers(*group))
        });
        for attempt in late {
            if let Some(holder) = self.shared.holder(attempt.holder) {
                holder.hedged();
            }
        }
    }

    /// Notes groups that are with nobody, so that somebody comes to have them.
    fn orphans(&mut self, at: usize) {
        let want = &mut self.wants[at];
        let orphans: Vec<u32> = (0..want.call.groups.len())
            .filter(|group| !want.is_filled(*group) && want.runs(*group).next().is_none())
            .map(|group| want.call.groups[group].expert)
            .collect();
        let waits = want.again.is_some_and(|again| again > Instant::now());
        if !waits {
            want.again = None;
        }
        if orphans.is_empty() {
            want.orphaned = None;
            return;
        }
        want.orphaned.get_or_insert_with(Instant::now);
        // A queue that was full for a moment tells nobody when it is not.
        want.again = want.again.or_else(|| Some(Instant::now() + ORPHAN_AGAIN));
        let layer = want.call.layer;
        for expert in orphans {
            self.shared.want(layer, expert);
        }
    }

    /// Is told of holders that come from now on.
    fn listen(&mut self) {
        if !self.told {
            self.told = true;
            self.shared.wait(self.to.clone());
            // What changed before that, nobody told.
            let _ = self.to.send(Event::Changed);
        }
    }

    /// Asks a holder for a call, or some of its groups. What cannot be sent fails at once.
    fn send(&mut self, at: usize, number: u32, groups: Option<Vec<usize>>) {
        let want = &mut self.wants[at];
        let part = groups
            .as_deref()
            .map(|groups| wire::part_of(&want.call, groups));
        let call = part.as_ref().unwrap_or(&want.call);
        let rows = u32::try_from(call.rows_out()).unwrap_or(u32::MAX);
        let reply = Reply {
            to: self.to.clone(),
            want: at,
            attempt: want.attempts.len(),
            said: false,
        };
        let now = Instant::now();
        let mut deadline = now + LOOK_EVERY;
        let sent = if number == LOCAL {
            // Its own machine is never late, only slow: nobody is asked beside it.
            deadline = now + Duration::from_secs(3600);
            ask_local(self.shared, call.clone(), reply)
        } else if let Some(holder) = self.shared.holder(number) {
            deadline = now + holder.deadline(rows);
            let id = holder.next_id();
            let mut frame = Vec::new();
            match wire::encode_call(id, call, &mut frame) {
                Ok(()) => {
                    let request = Request {
                        id,
                        frame,
                        rows,
                        reply,
                    };
                    holder.send(request).map_err(|request| request.reply)
                }
                Err(why) => {
                    want.last = Some(why.to_string());
                    Err(reply)
                }
            }
        } else {
            Err(reply)
        };
        let over = match sent {
            Ok(()) => false,
            Err(mut unsent) => {
                // Settled by the caller, who asks another one.
                unsent.said = true;
                true
            }
        };
        want.attempts.push(Attempt {
            holder: number,
            groups,
            since: now,
            deadline,
            late: false,
            over,
        });
    }
}

/// Has the trunk's own worker compute a call.
fn ask_local(shared: &Arc<Shared>, call: ExpertCall, reply: Reply) -> Result<(), Reply> {
    let Some(worker) = shared.local() else {
        return Err(reply);
    };
    let rows = u32::try_from(call.rows_out()).unwrap_or(u32::MAX);
    let (begun, of) = (Instant::now(), Arc::downgrade(shared));
    let (to, want, attempt) = (reply.to.clone(), reply.want, reply.attempt);
    let answer = move |answer: Result<ExpertReply, ExpertError>| {
        if let (Ok(_), Some(shared)) = (&answer, of.upgrade()) {
            shared.local_answered(rows, begun.elapsed());
        }
        let failed = |why| match why {
            ExpertError::NotHeld { expert, .. } => Failed::NotHeld(expert.try_into().unwrap_or(0)),
            ExpertError::Busy { .. } => Failed::Busy,
            other => Failed::Said(other.to_string()),
        };
        reply.send(answer.map(|reply| reply.rows).map_err(failed));
    };
    match worker.submit(call, Box::new(answer)) {
        Ok(()) => Ok(()),
        // The closure said that it was lost as it was dropped; this one says nothing more.
        Err(_) => Err(Reply {
            to,
            want,
            attempt,
            said: true,
        }),
    }
}
