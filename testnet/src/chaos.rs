//! The same question again and again, while hops of the route that answers it fail.
//!
//! ```text
//! draw a fault ─▶ ask ─▶ route: which node ─▶ so many tokens ─▶ strike … heal ─▶ the answer ends ─▶ compare
//!       ▲                                                                                            │
//!       └────────────────────── the node is whole again (thawed, healed, started again) ◀────────────┘
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use testnet::client::{Answer, Ask, Hop};
use testnet::faults::{Fault, Harm, Kind};
use testnet::relay::Links;
use testnet::screen::Screen;
use testnet::stream::{Event, Stream};
use testnet::swarm::Swarm;
use testnet::tally::{Outcome, Tally, stall_ms};
use tokio::time::sleep;

/// With fewer tokens a fault would come after the answer.
const TOKENS_MIN: usize = 16;

/// A stall that is told of by itself.
const WORTH_A_LINE_MS: f64 = 2000.0;

/// What is to happen.
pub struct Plan<'a> {
    /// These kinds, one after the other.
    pub kinds: &'a [Kind],
    /// So many faults of each.
    pub faults: u32,
    /// What they are drawn from.
    pub seed: u64,
    /// How long an answer, or the start of a node, may take.
    pub limit: Duration,
    /// Nodes that hold experts for the others: they come first, and every second fault is one of theirs.
    pub holders: Option<usize>,
}

/// Lets every fault happen, each in an answer of its own, and compares with `calm`. A run that fails is counted, and
/// the others go on.
///
/// # Errors
/// When the answer is too short to strike into, an undisturbed run is another, or a node does not come back.
pub async fn play(
    plan: &Plan<'_>,
    ask: &Ask,
    calm: &Answer,
    swarm: &mut Swarm,
    screen: &mut Screen,
) -> Result<Tally> {
    if calm.tokens.len() < TOKENS_MIN {
        bail!(
            "the answer has {} tokens, too few for a fault in it: another --prompt, or more with -n",
            calm.tokens.len()
        );
    }
    screen.lines(&format!(
        "\n{} faults of each kind, drawn with --seed {}, each in a run of its own\n",
        plan.faults, plan.seed
    ));
    let undisturbed = undisturbed_ms(plan, ask, calm, swarm).await?;
    let mut outcomes = Vec::new();
    for &kind in plan.kinds {
        for number in 0..plan.faults {
            let fault = Fault::draw(kind, number, u32::try_from(calm.tokens.len())?, plan.seed);
            let what = format!("{} {} of {}", kind.name(), number + 1, plan.faults);
            let run = disturbed(&fault, plan, ask, calm, swarm);
            let outcome = screen.wait_for(&what, run).await.context(what.clone())?;
            if !outcome.held() || outcome.stall_ms > WORTH_A_LINE_MS {
                screen.lines(&format!("  {what}, {}", explain(&fault, &outcome)));
            }
            outcomes.push((kind, outcome));
        }
        screen.lines(&format!("  {} done", kind.name()));
    }
    screen.lines("");
    Ok(Tally::new(&outcomes, undisturbed))
}

/// What a person wants to know of a run that went badly.
fn explain(fault: &Fault, outcome: &Outcome) -> String {
    let what = match (&outcome.failed, outcome.held()) {
        (Some(why), _) => why.clone(),
        (None, true) => format!("{:.0} ms without a token", outcome.stall_ms),
        (None, false) => format!(
            "{} tokens lost, {} changed, {} doubled",
            outcome.lost, outcome.changed, outcome.doubled
        ),
    };
    let gone = outcome.recoveries.iter();
    let gone = gone.map(|loss| {
        format!(
            "\n      {} (new route after {:.0} ms)",
            loss.lost, loss.took_ms
        )
    });
    format!("{fault}: {what}{}", gone.collect::<String>())
}

/// What a client saw of an answer.
#[derive(Default)]
struct Seen {
    tokens: Vec<u32>,
    at_ms: Vec<f64>,
    end: Option<Answer>,
}

impl Seen {
    /// Reads on until `tokens` have come, or to the end.
    async fn read(&mut self, stream: &mut Stream, tokens: usize) -> Result<()> {
        while self.tokens.len() < tokens && self.end.is_none() {
            match stream.next().await? {
                Event::Token {
                    token: Some(token),
                    at_ms,
                } => {
                    self.tokens.push(token);
                    self.at_ms.push(at_ms);
                }
                Event::End(answer) => self.end = Some(answer),
                Event::Token { .. } | Event::Route { .. } => {}
            }
        }
        Ok(())
    }
}

async fn undisturbed_ms(plan: &Plan<'_>, ask: &Ask, calm: &Answer, swarm: &Swarm) -> Result<f64> {
    let mut stream = Stream::ask(&swarm.client("client"), ask, plan.limit)?;
    let mut seen = Seen::default();
    seen.read(&mut stream, usize::MAX).await?;
    if seen.tokens != calm.tokens {
        bail!("two undisturbed answers differ");
    }
    Ok(stall_ms(&seen.at_ms, 1))
}

async fn disturbed(
    fault: &Fault,
    plan: &Plan<'_>,
    ask: &Ask,
    calm: &Answer,
    swarm: &mut Swarm,
) -> Result<Outcome> {
    let mut seen = Seen::default();
    let mut struck = None;
    let ran = run(fault, plan, ask, swarm, &mut seen, &mut struck).await;
    if let Some(index) = struck {
        mend(fault, index, plan.limit, swarm).await?;
    }
    let mut outcome = Outcome::compare(&calm.tokens, &seen.tokens);
    outcome.stall_ms = stall_ms(&seen.at_ms, fault.token);
    match (ran, seen.end) {
        (Ok(()), Some(answer)) => {
            outcome.recoveries = answer.recoveries;
            // Tokens were compared as they came; the text is what a person has.
            if answer.text != calm.text && outcome.held() {
                outcome.changed = 1;
            }
        }
        (Err(error), _) => outcome.failed = Some(format!("{error:#}")),
        (Ok(()), None) => outcome.failed = Some("the answer has no end".into()),
    }
    Ok(outcome)
}

/// Asks, and strikes when it is time; `struck` is then the node.
async fn run(
    fault: &Fault,
    plan: &Plan<'_>,
    ask: &Ask,
    swarm: &mut Swarm,
    seen: &mut Seen,
    struck: &mut Option<usize>,
) -> Result<()> {
    let mut stream = Stream::ask(&swarm.client("client"), ask, plan.limit)?;
    let Event::Route { route } = stream.next().await? else {
        bail!("the client began without a route");
    };
    let index = match plan.holders {
        Some(holders) if fault.hop % 2 == 1 => usize::try_from(fault.hop / 2)? % holders.max(1),
        _ => node_of(
            &route,
            fault.hop / if plan.holders.is_some() { 2 } else { 1 },
            swarm,
        )?,
    };
    seen.read(&mut stream, fault.token as usize).await?;
    *struck = Some(index);
    let striking = strike(fault, index, swarm);
    let reading = seen.read(&mut stream, usize::MAX);
    tokio::pin!(striking, reading);
    tokio::select! {
        read = &mut reading => read,
        done = &mut striking => {
            done?;
            reading.await
        }
    }
}

fn node_of(route: &[Hop], hop: u64, swarm: &Swarm) -> Result<usize> {
    let hop = usize::try_from(hop % (route.len() as u64).max(1))?;
    let peer = &route.get(hop).context("a route without hops")?.peer;
    let mut nodes = swarm.nodes().iter();
    let is_it = |ready: &testnet::process::Ready| ready.peer == *peer;
    nodes
        .position(|node| node.ready.as_ref().is_some_and(is_it))
        .with_context(|| format!("{peer} on the route is none of our nodes"))
}

/// Beat after beat; the last one's harm stays where the answer ends before it does.
async fn strike(fault: &Fault, index: usize, swarm: &mut Swarm) -> Result<()> {
    for beat in &fault.beats {
        harm(beat.harm, index, swarm)?;
        sleep(beat.lasts).await;
        heal(beat.harm, index, swarm)?;
        sleep(beat.pause).await;
    }
    Ok(())
}

fn harm(harm: Harm, index: usize, swarm: &mut Swarm) -> Result<()> {
    match harm {
        Harm::Kill => signal(Signal::KILL, index, swarm),
        Harm::Freeze => signal(Signal::STOP, index, swarm),
        Harm::Links(links) => {
            gates(swarm)?.set(index, links);
            Ok(())
        }
        Harm::Reset => {
            gates(swarm)?.reset(index);
            Ok(())
        }
    }
}

/// Who was killed stays so until [`mend`].
fn heal(harm: Harm, index: usize, swarm: &mut Swarm) -> Result<()> {
    match harm {
        Harm::Kill | Harm::Reset => Ok(()),
        Harm::Freeze => signal(Signal::CONT, index, swarm),
        Harm::Links(_) => {
            gates(swarm)?.set(index, Links::default());
            Ok(())
        }
    }
}

/// Undoes whatever was done, also where it was undone already.
async fn mend(fault: &Fault, index: usize, limit: Duration, swarm: &mut Swarm) -> Result<()> {
    for beat in fault.beats.iter().take(1) {
        heal(beat.harm, index, swarm)?;
        if beat.harm == Harm::Kill {
            swarm.restart(index, limit).await?;
        }
    }
    Ok(())
}

fn gates(swarm: &Swarm) -> Result<&testnet::relay::Relay> {
    swarm.relay().context("there are no gates")
}

fn signal(signal: Signal, index: usize, swarm: &mut Swarm) -> Result<()> {
    let node = swarm.nodes_mut().get_mut(index);
    node.context("no such node")?.process.signal(signal)
}
