//! What waits for the stage, and which of it goes first. Pure.
//!
//! ```text
//! single rows   ─▶ by bench ─▶ wait for others (`company`)? ─▶ fair by owner ─▶ one pass
//! longer steps  ─▶ fair by owner ─▶ as many rows as those who decode have time for
//! ```

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::company::{Company, Ready, Rhythm};
use super::pace::{Pace, ROWS, Turn};
use super::{Job, Reply, Rows, Share, SlotWaiter};
use crate::stage::{Bench, EngineError, Slot, Stage, StageStats, Want};

/// How often a step may be overtaken: keeps prefill going under many decoders.
const OVERTAKEN_MAX: u32 = 4;
/// A longer step that waits for the tokens of others is computed within this time, evenly: well before whoever sent
/// it takes this hop for lost (`Deadlines::step` of the node), however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(6);

#[derive(Default)]
pub(super) struct Queue {
    pub(super) items: VecDeque<Item>,
    pub(super) stats: StageStats,
    pub(super) closed: bool,
    pub(super) dead: bool,
    seats: HashMap<Slot, Seat>,
    companies: HashMap<Bench, Company>,
    pace: Pace,
    /// When each owner had rows in a pass, and a part of a longer step, last: a count of turns.
    turns: HashMap<u64, Turns>,
    turn: u64,
}

/// An open session.
struct Seat {
    bench: Option<Bench>,
    owner: u64,
    rhythm: Rhythm,
    /// When its last single row was over.
    decoded: Option<Instant>,
}

#[derive(Clone, Copy, Default)]
struct Turns {
    row: u64,
    long: u64,
}

/// What is done to the stage between two steps.
pub(super) type Change = Box<dyn FnOnce(&mut dyn Stage) -> Result<(), EngineError> + Send>;

pub(super) enum Item {
    Open {
        n_ctx: u32,
        layers: Range<u32>,
        share: Share,
        waiter: Box<dyn SlotWaiter>,
    },
    Close(Slot),
    Change {
        change: Change,
        reply: Reply<()>,
    },
    Run(Box<Run>),
}

/// A step that waits, or a part of which ran.
pub(super) struct Run {
    pub(super) job: Job,
    pub(super) since: Instant,
    overtaken: u32,
    /// When it was next first.
    begun: Option<Instant>,
    /// Rows that ran, what came of them, and how long it took.
    pub(super) done: u32,
    pub(super) rows: Vec<f32>,
    pub(super) compute: Duration,
    pub(super) queued: Duration,
}

impl Run {
    pub(super) fn new(job: Job, since: Instant) -> Run {
        Run {
            job,
            since,
            overtaken: 0,
            begun: None,
            done: 0,
            rows: Vec::new(),
            compute: Duration::ZERO,
            queued: Duration::ZERO,
        }
    }
}

impl Run {
    /// When it would be late with so many more of its rows.
    fn late(&self, more: u32, now: Instant) -> Instant {
        let begun = self.begun.unwrap_or(now);
        begun + PATIENCE * (self.done + more) / self.job.step.n_rows.max(1)
    }
}

/// What the stage does next.
pub(super) enum Taken {
    /// Opening, closing, a change.
    Item(Item),
    /// Single rows of sessions of one bench, or one of any.
    Rows(Vec<Run>),
    /// So many rows of a longer step.
    Long(Box<Run>, u32),
    /// Nothing before then, unless more comes.
    Wait(Instant),
    Nothing,
}

/// Rows that could run in one pass.
struct Group {
    /// Where they are in the queue, ascending.
    at: Vec<usize>,
    bench: Option<Bench>,
    /// The longest wait of its owners, in turns.
    turn: u64,
    since: Instant,
    /// They are token ids: this is the first stage.
    tokens: bool,
}

/// How long a pass of so many rows of a bench takes, where it is worth waiting for.
pub(super) type Worth<'a> = &'a dyn Fn(Bench, u32) -> Option<Duration>;

impl Queue {
    pub(super) fn new(stats: StageStats) -> Queue {
        Queue {
            stats,
            ..Queue::default()
        }
    }

    /// A session was opened.
    pub(super) fn seat(&mut self, slot: Slot, bench: Option<Bench>, owner: u64) {
        let seat = Seat {
            bench,
            owner,
            rhythm: Rhythm::default(),
            decoded: None,
        };
        self.seats.insert(slot, seat);
        if let Some(bench) = bench {
            self.companies.entry(bench).or_default().joined();
        }
    }

    /// Puts the closing first, where it keeps nobody waiting for long and may
    /// make room for an opening; gives back the slot's steps.
    pub(super) fn close(&mut self, slot: Slot) -> Vec<Job> {
        let mut dropped = Vec::new();
        for item in std::mem::take(&mut self.items) {
            match item {
                Item::Run(run) if run.job.step.slot == slot => dropped.push(run.job),
                other => self.items.push_back(other),
            }
        }
        self.items.push_front(Item::Close(slot));
        if let Some(seat) = self.seats.remove(&slot) {
            let others = || self.seats.values();
            if !others().any(|other| other.owner == seat.owner) {
                self.turns.remove(&seat.owner);
            }
            if let Some(bench) = seat.bench
                && !others().any(|other| other.bench == seat.bench)
            {
                self.companies.remove(&bench);
            }
        }
        dropped
    }

    /// Puts a step back a part of which ran; gives it back where its session was closed meanwhile.
    pub(super) fn put_back(&mut self, run: Box<Run>) -> Result<(), Box<Run>> {
        if self.dead || !self.seats.contains_key(&run.job.step.slot) {
            return Err(run);
        }
        self.items.push_front(Item::Run(run));
        Ok(())
    }

    /// Single rows ran.
    pub(super) fn decoded(&mut self, slots: &[Slot], now: Instant, took: Duration) {
        let mut since = Vec::with_capacity(slots.len());
        for slot in slots {
            if let Some(seat) = self.seats.get_mut(slot) {
                since.extend(seat.decoded.replace(now));
            }
        }
        self.pace.decoded(now, took, since.into_iter());
    }

    /// A part of a longer step of this session ran.
    pub(super) fn prompted(&mut self, slot: Slot, rows: u32, now: Instant, took: Duration) {
        let begun = now.checked_sub(took).unwrap_or(now);
        let beside = self.others_decode(slot, begun).is_some();
        self.pace.prompted(now, rows, took, beside);
        // What comes behind its prompt is the first token again.
        if let Some(seat) = self.seats.get_mut(&slot) {
            seat.decoded = None;
            seat.rhythm.pause();
        }
    }

    /// What goes first. Without the time, as a stage has it that is driven by hand, nothing waits or is cut.
    pub(super) fn take(&mut self, now: Option<Instant>, worth: Worth<'_>) -> Taken {
        let short = |item: &Item| !matches!(item, Item::Run(_));
        // Short, and somebody waits for it: at the head nothing overtakes it.
        if self.items.front().is_some_and(short) {
            return self.items.pop_front().map_or(Taken::Nothing, Taken::Item);
        }
        let (groups, long, starving) = self.ready();
        if let Some(at) = starving {
            return self.take_long(at, now, true);
        }
        let mut wait: Option<Instant> = None;
        let due = groups.into_iter().filter(|group| {
            let until = now.and_then(|now| self.held(group, long.is_none(), now, worth));
            wait = wait.min(until).or(wait).or(until);
            until.is_none()
        });
        if let Some(group) = due.min_by_key(|group| (group.turn, group.since)) {
            return Taken::Rows(self.take_rows(&group));
        }
        if let Some(at) = self.items.iter().position(short) {
            return self.items.remove(at).map_or(Taken::Nothing, Taken::Item);
        }
        match (wait, long) {
            (Some(until), _) => Taken::Wait(until),
            (None, Some(at)) => self.take_long(at, now, false),
            (None, None) => Taken::Nothing,
        }
    }

    /// The single rows that may run, by bench; the longer step that is next; and one that was overtaken too often.
    fn ready(&self) -> (Vec<Group>, Option<usize>, Option<usize>) {
        let mut seen = HashSet::new();
        let mut groups: Vec<Group> = Vec::new();
        let mut long: Option<(u64, usize)> = None;
        for (at, item) in self.items.iter().enumerate() {
            let Item::Run(run) = item else {
                seen.extend(item.slot());
                continue;
            };
            let slot = run.job.step.slot;
            if !seen.insert(slot) {
                continue;
            }
            let seat = self.seats.get(&slot);
            let turns = seat.and_then(|seat| self.turns.get(&seat.owner));
            let turns = turns.copied().unwrap_or_default();
            if run.job.step.n_rows > 1 {
                if run.overtaken >= OVERTAKEN_MAX {
                    return (groups, None, Some(at));
                }
                if long.is_none_or(|(turn, _)| turns.long < turn) {
                    long = Some((turns.long, at));
                }
                continue;
            }
            // Rows behind the last norm are another output of a call than logits.
            let bench = seat.and_then(|seat| seat.bench);
            let bench = bench.filter(|_| run.job.step.want != Want::Normed);
            let same = |group: &&mut Group| bench.is_some() && group.bench == bench;
            match groups.iter_mut().find(same) {
                Some(group) => {
                    group.at.push(at);
                    group.turn = group.turn.min(turns.row);
                    group.since = group.since.min(run.since);
                }
                None => groups.push(Group {
                    at: vec![at],
                    bench,
                    turn: turns.row,
                    since: run.since,
                    tokens: matches!(run.job.input, Rows::Tokens(_)),
                }),
            }
        }
        (groups, long.map(|(_, at)| at), None)
    }

    /// Until when a group waits for others of its bench, if it does.
    fn held(
        &mut self,
        group: &Group,
        spare: bool,
        now: Instant,
        worth: Worth<'_>,
    ) -> Option<Instant> {
        let bench = group.bench.filter(|_| !self.closed)?;
        let ready: Vec<Slot> = group
            .at
            .iter()
            .filter_map(|at| self.items[*at].slot())
            .collect();
        let others = self.seats.iter();
        let others = others.filter(|(slot, s)| s.bench == Some(bench) && !ready.contains(slot));
        let missing: Vec<Rhythm> = others.map(|(_, seat)| seat.rhythm).collect();
        if missing.is_empty() {
            return None;
        }
        let seats = ready.iter().filter_map(|slot| self.seats.get(slot));
        let sessions: Vec<Rhythm> = seats.map(|seat| seat.rhythm).collect();
        let ready = Ready {
            bench,
            since: group.since,
            sessions: &sessions,
            missing: &missing,
            gathers: group.tokens && spare,
        };
        let company = self.companies.entry(bench).or_default();
        company.until(&ready, now, worth)
    }

    fn take_rows(&mut self, group: &Group) -> Vec<Run> {
        let first = group.at.first().copied().unwrap_or(0);
        for item in self.items.iter_mut().take(first) {
            if let Item::Run(run) = item {
                run.overtaken += 1;
            }
        }
        let mut runs = Vec::with_capacity(group.at.len());
        for at in group.at.iter().rev() {
            if let Some(Item::Run(run)) = self.items.remove(*at) {
                runs.push(*run);
            }
        }
        runs.reverse();
        self.turn += 1;
        for run in &runs {
            if let Some(seat) = self.seats.get_mut(&run.job.step.slot) {
                seat.rhythm.came(run.since, self.turn);
                self.turns.entry(seat.owner).or_default().row = self.turn;
            }
        }
        if let Some(bench) = group.bench {
            self.companies.entry(bench).or_default().ran();
        }
        runs
    }

    fn take_long(&mut self, at: usize, now: Option<Instant>, starving: bool) -> Taken {
        let Some(Item::Run(run)) = self.items.get(at) else {
            return Taken::Nothing;
        };
        let left = run.job.step.n_rows - run.done;
        let slot = run.job.step.slot;
        let seat = self.seats.get(&slot);
        let cuts = seat.is_some_and(|seat| seat.bench.is_some());
        let least = if cuts { left.min(ROWS) } else { left };
        let begun = run.begun.or(now);
        let mut rows = left;
        if let Some(now) = now
            && let Some(last) = self.others_decode(slot, now)
        {
            let late = run.late(least, now);
            match self.pace.turn(left, cuts, now, last) {
                Turn::Rows(some) => rows = some,
                Turn::Wait(_) if starving || late <= now => rows = least,
                Turn::Wait(until) => {
                    if let Some(Item::Run(run)) = self.items.get_mut(at) {
                        run.begun = begun;
                    }
                    return Taken::Wait(until.min(late));
                }
            }
        }
        self.turn += 1;
        if let Some(seat) = seat {
            self.turns.entry(seat.owner).or_default().long = self.turn;
        }
        match self.items.remove(at) {
            Some(Item::Run(mut run)) => {
                run.overtaken = 0;
                run.begun = begun;
                Taken::Long(run, rows)
            }
            _ => Taken::Nothing,
        }
    }

    /// When somebody else had a token, if anybody is taken to decode.
    fn others_decode(&self, slot: Slot, now: Instant) -> Option<Instant> {
        let others = self.seats.iter().filter(|(other, _)| **other != slot);
        let last = others.filter_map(|(_, seat)| seat.decoded).max()?;
        (now < self.pace.pauses(last)).then_some(last)
    }
}

impl Taken {
    pub(super) fn stopped(self) {
        match self {
            Taken::Item(item) => item.stopped(),
            Taken::Rows(runs) => {
                for run in runs {
                    (run.job.reply)(Err(EngineError::Stopped));
                }
            }
            Taken::Long(run, _) => Item::Run(run).stopped(),
            Taken::Wait(_) | Taken::Nothing => {}
        }
    }
}

impl Item {
    fn slot(&self) -> Option<Slot> {
        match self {
            Item::Open { .. } | Item::Change { .. } => None,
            Item::Close(slot) => Some(*slot),
            Item::Run(run) => Some(run.job.step.slot),
        }
    }

    pub(super) fn stopped(self) {
        match self {
            Item::Open { waiter, .. } => waiter.take(Err(EngineError::Stopped)),
            Item::Close(_) => {}
            Item::Change { reply, .. } => reply(Err(EngineError::Stopped)),
            Item::Run(run) => (run.job.reply)(Err(EngineError::Stopped)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::{Step, Want};
    use crate::worker::Reply;

    const MS: Duration = Duration::from_millis(1);

    fn run(slot: u64, pos0: u32, n_rows: u32, since: Instant) -> Item {
        let step = Step {
            slot: Slot(slot),
            layers: 0..3,
            pos0,
            n_rows,
            want: Want::None,
        };
        let job = Job {
            step,
            input: Rows::Tokens(vec![1; n_rows as usize]),
            reply: Box::new(|_| ()),
        };
        Item::Run(Box::new(Run::new(job, since)))
    }

    /// Sessions by slot, bench and owner.
    fn queue(seats: &[(u64, Option<u64>, u64)]) -> Queue {
        let mut queue = Queue::default();
        for (slot, bench, owner) in seats {
            queue.seat(Slot(*slot), bench.map(Bench), *owner);
        }
        queue
    }

    /// As a name: the slots of rows, or the slot and the rows of a longer step.
    fn named(taken: &Taken) -> String {
        match taken {
            Taken::Rows(runs) => {
                let slots = runs.iter().map(|run| run.job.step.slot.0.to_string());
                slots.collect::<Vec<_>>().join("+")
            }
            Taken::Long(run, rows) => format!("{}: {rows}", run.job.step.slot.0),
            Taken::Item(_) => "item".into(),
            Taken::Wait(_) => "wait".into(),
            Taken::Nothing => "nothing".into(),
        }
    }

    fn nobody(_: Bench, _: u32) -> Option<Duration> {
        None
    }

    #[test]
    fn rows_of_a_bench_go_together_one_of_each_session() {
        let now = Instant::now();
        let mut queue = queue(&[
            (1, Some(7), 0),
            (2, Some(7), 0),
            (3, Some(8), 0),
            (4, None, 0),
            (5, None, 0),
        ]);
        for (at, slot) in (0u32..).zip([1, 1, 3, 2, 4, 5, 2]) {
            queue.items.push_back(run(slot, at, 1, now + MS * at));
        }
        // The row of 9 waits behind its own prompt.
        queue.seat(Slot(9), Some(Bench(7)), 0);
        queue.items.push_back(run(9, 0, 8, now));
        queue.items.push_back(run(9, 8, 1, now));
        let mut order = Vec::new();
        loop {
            let taken = queue.take(Some(now + 9 * MS), &nobody);
            if let Taken::Nothing = taken {
                break;
            }
            order.push(named(&taken));
        }
        assert_eq!(order, ["1+2", "1+2", "3", "4", "5", "9: 8", "9"]);
    }

    #[test]
    fn who_comes_along_each_time_is_waited_for_and_nobody_else() {
        let mut now = Instant::now();
        let mut queue = queue(&[(1, Some(7), 0), (2, Some(7), 0), (3, Some(7), 0)]);
        let worth = |_: Bench, rows: u32| (rows >= 2).then_some(5 * MS);
        for pos in 0..3 {
            now += 20 * MS;
            (1..=2).for_each(|slot| queue.items.push_back(run(slot, pos, 1, now)));
            assert_eq!(named(&queue.take(Some(now), &worth)), "1+2");
        }
        now += 20 * MS;
        queue.items.push_back(run(1, 3, 1, now));
        let until = queue.take(Some(now), &worth);
        assert!(matches!(until, Taken::Wait(until) if until == now + 5 * MS));
        assert_eq!(named(&queue.take(Some(now), &nobody)), "1", "not worth it");
        // It did not come for two gaps: it is not waited for until it does again.
        now += 21 * MS;
        queue.items.push_back(run(1, 4, 1, now));
        assert_eq!(named(&queue.take(Some(now), &worth)), "1");
        for pos in 5..7 {
            now += 20 * MS;
            (1..=2).for_each(|slot| queue.items.push_back(run(slot, pos, 1, now)));
            assert_eq!(named(&queue.take(Some(now), &worth)), "1+2");
        }
        now += 20 * MS;
        queue.items.push_back(run(2, 7, 1, now));
        assert_eq!(named(&queue.take(Some(now), &worth)), "wait");
        assert_eq!(named(&queue.take(Some(now + 5 * MS), &worth)), "2");
        // Nobody is waited for by hand, and nobody who left.
        now += 20 * MS;
        queue.items.push_back(run(2, 8, 1, now));
        assert_eq!(named(&queue.take(None, &worth)), "2");
        drop(queue.close(Slot(1)));
        assert_eq!(named(&queue.take(Some(now), &worth)), "item");
        queue.items.push_back(run(2, 9, 1, now));
        assert_eq!(named(&queue.take(Some(now), &worth)), "2");
    }

    #[test]
    fn an_owner_of_many_sessions_starves_nobody() {
        let now = Instant::now();
        let mut queue = queue(&[(1, None, 10), (2, None, 10), (3, None, 10), (4, None, 20)]);
        let mut order = Vec::new();
        for round in 0..4u32 {
            for slot in 1..=4 {
                queue.items.push_back(run(slot, round, 1, now + MS * round));
            }
        }
        for _ in 0..6 {
            order.push(named(&queue.take(Some(now), &nobody)));
        }
        assert_eq!(order, ["1", "4", "2", "4", "3", "4"]);
        // Prompts, too.
        let mut queue = super::tests::queue(&[(1, None, 10), (2, None, 10), (4, None, 20)]);
        for slot in [1, 2, 1, 2, 4, 4] {
            queue.items.push_back(run(slot, 0, 32, now));
        }
        let order: Vec<_> = (0..4)
            .map(|_| named(&queue.take(Some(now), &nobody)))
            .collect();
        assert_eq!(order, ["1: 32", "4: 32", "2: 32", "4: 32"]);
    }

    #[test]
    fn a_prompt_runs_in_parts_while_others_decode() {
        let start = Instant::now();
        let mut queue = queue(&[(1, Some(7), 10), (2, Some(8), 20)]);
        queue.items.push_back(run(2, 0, 32, start));
        assert_eq!(
            named(&queue.take(Some(start), &nobody)),
            "2: 32",
            "nobody decodes"
        );
        queue.prompted(Slot(2), 32, start, 64 * MS);
        let mut now = start + MS;
        for _ in 0..3 {
            now += 100 * MS;
            queue.decoded(&[Slot(1)], now, 20 * MS);
        }
        queue.items.push_back(run(2, 32, 32, now));
        let taken = queue.take(Some(now), &nobody);
        let Taken::Long(mut step, rows) = taken else {
            panic!("{}", named(&taken));
        };
        assert_eq!(rows, 12);
        step.done = rows;
        queue.prompted(Slot(2), rows, now + 24 * MS, 24 * MS);
        assert!(queue.put_back(step).is_ok());
        assert_eq!(named(&queue.take(Some(now + 60 * MS), &nobody)), "wait");
        // The token comes, and then the next part.
        queue.items.push_back(run(1, 9, 1, now));
        assert_eq!(named(&queue.take(Some(now + 90 * MS), &nobody)), "1");
        now += 110 * MS;
        queue.decoded(&[Slot(1)], now, 20 * MS);
        assert_eq!(named(&queue.take(Some(now), &nobody)), "2: 12");
        queue.prompted(Slot(2), 12, now + 24 * MS, 24 * MS);
        // A token is late: that is no reason for a whole frame, which would make the next late, too.
        queue.items.push_back(run(2, 64, 32, now));
        let late = now + 250 * MS;
        assert_eq!(named(&queue.take(Some(late), &nobody)), "2: 12");
        queue.prompted(Slot(2), 12, late + 24 * MS, 24 * MS);
        // Nobody decodes any more: the rest at once.
        queue.items.push_back(run(2, 96, 32, now));
        drop(queue.close(Slot(1)));
        assert_eq!(named(&queue.take(Some(late), &nobody)), "item");
        assert_eq!(named(&queue.take(Some(late + 25 * MS), &nobody)), "2: 32");
    }

    #[test]
    fn a_frame_is_computed_in_time_however_little_prompts_may_take() {
        let mut now = Instant::now();
        let mut queue = queue(&[(1, Some(7), 10), (2, Some(8), 20)]);
        queue.decoded(&[Slot(1)], now, 20 * MS);
        queue.items.push_back(run(2, 0, 32, now));
        let (start, mut rows) = (now, 0);
        while rows < 32 {
            // A row takes longer than all gaps together.
            match queue.take(Some(now), &nobody) {
                Taken::Long(mut step, some) => {
                    assert_eq!(some, 4);
                    rows += some;
                    step.done = rows;
                    queue.prompted(Slot(2), some, now, 4000 * MS);
                    assert!(queue.put_back(step).is_ok());
                }
                Taken::Wait(until) => {
                    now = until.min(now + 50 * MS);
                    queue.decoded(&[Slot(1)], now, 20 * MS);
                }
                other => panic!("{}", named(&other)),
            }
        }
        assert!(now > start + PATIENCE / 2 && now <= start + PATIENCE + 50 * MS);
    }

    #[test]
    fn who_computes_a_prompt_does_not_decode() {
        let now = Instant::now();
        let mut queue = queue(&[(1, Some(7), 10), (2, Some(8), 20)]);
        queue.decoded(&[Slot(1)], now, 20 * MS);
        queue.items.push_back(run(2, 0, 32, now));
        assert_eq!(queue.others_decode(Slot(2), now + MS), Some(now));
        queue.prompted(Slot(1), 32, now + 60 * MS, 60 * MS);
        assert_eq!(named(&queue.take(Some(now + 60 * MS), &nobody)), "2: 32");
    }

    #[test]
    fn opening_and_closing_are_not_overtaken_for_ever() {
        let slot = |n| Slot(n);
        let row = |n| {
            let step = Step {
                slot: slot(n),
                layers: 0..3,
                pos0: 0,
                n_rows: 1,
                want: Want::None,
            };
            let job = Job {
                step,
                input: Rows::Tokens(vec![1]),
                reply: Box::new(|_| ()),
            };
            Item::Run(Box::new(Run::new(job, Instant::now())))
        };
        let mut queue = Queue::default();
        queue.items.push_back(Item::Close(slot(9)));
        queue.items.push_back(row(1));
        let nobody: Reply<Slot> = Box::new(|_| ());
        queue.items.push_back(Item::Open {
            n_ctx: 64,
            layers: 0..3,
            share: Share::default(),
            waiter: Box::new(nobody),
        });
        // Single rows keep coming; what was there first still has its turn.
        let mut taken = Vec::new();
        for n in 2..5 {
            queue.items.push_back(row(n));
            taken.push(match queue.take(Some(Instant::now()), &|_, _| None) {
                Taken::Item(Item::Close(_)) => "close",
                Taken::Item(Item::Open { .. }) => "open",
                Taken::Rows(_) => "row",
                _ => "something else",
            });
        }
        assert_eq!(taken, ["close", "row", "open"]);
    }
}
