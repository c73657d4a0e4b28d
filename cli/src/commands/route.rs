//! `shoal route`: the route that would be taken now, what it costs by which parts, and why everybody else is
//! not on it. Asks the swarm as `shoal status` does, and opens nothing.

use std::time::Duration;

use node::{Explained, SessionSpec};
use serde::Serialize;
use shard_registry::Snapshot;
use shard_registry::experts::{self, Compared, MixtureShape, Unfit, Way};
use shard_registry::route::{Doubt, Other};
use swarm_proto::{Hop, LayerRange, ModelAdvert, Peer};

use crate::failure::Failure;
use crate::figures;
use crate::swarm::{Member, Swarm, SwarmModel};
use crate::terminal::{self, BAD, BOLD, DIM, GOOD, HINT, WARN, paint};

/// Show the route that would be taken now, and why.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal route demo
  shoal route demo --explain
  shoal route llama-1b --ctx 8192 --explain --json | jq '.others[] | {peer, why}'

Nothing is opened. Times are the planner's, for one token, from the adverts and from round trips measured here.
Among routes that are about as cheap one is drawn, as for a session, so two calls may differ.")]
pub struct Args {
    /// Which model: a name, or the beginning of its id [default: the only one served].
    #[arg(value_name = "NAME|ID", env = "SHOAL_MODEL")]
    model: Option<String>,
    /// Also what each hop costs, who stands by, and why everybody else is not on it.
    #[arg(long)]
    explain: bool,
    /// Positions that a session would hold.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    ctx: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    swarm: Swarm,
}

/// What is printed.
#[derive(Serialize)]
struct Report {
    model: String,
    name: String,
    n_layer: u16,
    n_ctx: u32,
    /// In order; empty where there is no route.
    hops: Vec<HopReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_ms: Option<f64>,
    /// Why there is no route.
    #[serde(skip_serializing_if = "Option::is_none")]
    no_route: Option<String>,
    /// Layers that no usable peer serves.
    missing: Vec<MissingReport>,
    /// By the adverts some layers have no room; the hops say themselves whether they are full.
    as_if_idle: bool,
    others: Vec<OtherReport>,
    /// Peers that were seen to be slower than they claim.
    doubts: Vec<DoubtReport>,
    /// Of a mixture over several machines: what they would take otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    mixture: Option<MixtureReport>,
}

/// Whole layers in a row against one trunk that asks the others for experts.
#[derive(Serialize)]
struct MixtureReport {
    /// `pipeline` or `island`, where either is possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    better: Option<&'static str>,
    why: String,
    /// Who would be the island's trunk.
    trunk: String,
    /// What it takes and by which parts, or why it is none.
    island: String,
    pipeline: String,
}

/// In layer-tokens a second.
#[derive(Serialize)]
struct DoubtReport {
    peer: String,
    claims: f32,
    seen: f32,
    counted: f32,
}

#[derive(Serialize)]
struct HopReport {
    layers: String,
    peer: String,
    age_s: f64,
    network_ms: f64,
    network_measured: bool,
    queue_ms: f64,
    overhead_ms: f64,
    compute_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    standby: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    no_standby: Option<String>,
}

#[derive(Serialize)]
struct MissingReport {
    layers: String,
    /// Peers that serve some of them and may not be used, or are loading them, with the reason.
    peers: Vec<OtherReport>,
}

#[derive(Clone, Serialize)]
struct OtherReport {
    peer: String,
    serves: Vec<String>,
    loading: Vec<String>,
    age_s: f64,
    why: String,
}

/// Asks the swarm, plans and prints.
pub fn main(args: Args) -> anyhow::Result<()> {
    let (asked, json, explain) = (args.model.clone(), args.json, args.explain);
    let report = node::runtime::run(async move {
        let member = args.swarm.join(false).await?;
        let report = look(&member, asked.as_deref(), args.ctx).await;
        member.leave().await;
        report
    })??;
    let failure = report.no_route.as_ref().map(|why| {
        let failure = Failure::new(format!("{}: {why}", report.name));
        failure.try_this(remedy(&report))
    });
    if json {
        terminal::say_json(&report)?;
    } else {
        print(&report, explain)?;
    }
    match failure {
        Some(failure) if json => Err(failure.told_in_json().into()),
        Some(failure) => Err(failure.into()),
        None => Ok(()),
    }
}

async fn look(member: &Member, asked: Option<&str>, n_ctx: u32) -> anyhow::Result<Report> {
    let model = member.model(asked).await?;
    let n_ctx = n_ctx.min(model.n_ctx_max);
    let spec = SessionSpec::new(model.id, &model.manifest, n_ctx);
    let explained = member.client.explain(&spec);
    let now_ms = crate::swarm::now_ms();
    let adverts = member.client.adverts();
    let age_s = |peer: Peer| {
        let made = adverts.get(&peer).map(|advert| advert.seq);
        let ms = now_ms.saturating_sub(made.unwrap_or(now_ms));
        (ms / 100) as f64 / 10.0
    };
    let mut report = Report::new(&model, n_ctx, &explained, &age_s);
    report.mixture = MixtureReport::of(&model, &explained, &adverts);
    Ok(report)
}

fn remedy(report: &Report) -> String {
    let name = &report.name;
    match report.missing.first() {
        Some(gap) => format!("`shoal node --model {name} --layers {}`", gap.layers),
        None => format!("`shoal status --model {name}` shows who holds what"),
    }
}

fn ms(d: Duration) -> f64 {
    (d.as_secs_f64() * 1e6).round() / 1e3
}

impl Report {
    fn new(
        model: &SwarmModel,
        n_ctx: u32,
        explained: &Explained,
        age_s: &dyn Fn(Peer) -> f64,
    ) -> Self {
        let route = explained.hops.as_deref().unwrap_or_default();
        let others: Vec<(&Other, OtherReport)> = explained
            .others
            .iter()
            .map(|other| (other, OtherReport::new(other, age_s)))
            .collect();
        let missing = match &explained.hops {
            Err(node::ClientError::NoRoute(none)) => none.missing.clone(),
            Err(node::ClientError::Untrusted { missing, .. }) => missing.clone(),
            _ => Vec::new(),
        };
        let missing = missing.iter().map(|gap| MissingReport::new(*gap, &others));
        Self {
            model: model.id.to_string(),
            name: model.name.clone(),
            n_layer: model.manifest.n_layer,
            n_ctx,
            hops: hop_reports(route, explained, age_s),
            token_ms: explained.priced.as_ref().map(|priced| ms(priced.total())),
            reply_ms: explained.priced.as_ref().map(|priced| ms(priced.reply)),
            no_route: explained
                .hops
                .as_ref()
                .err()
                .map(|e| figures::printable(&e.to_string(), 300)),
            missing: missing.collect(),
            as_if_idle: explained.as_if_idle,
            others: others.into_iter().map(|(_, report)| report).collect(),
            doubts: explained.doubts.iter().map(DoubtReport::new).collect(),
            mixture: None,
        }
    }
}

impl MixtureReport {
    fn of(model: &SwarmModel, explained: &Explained, adverts: &Snapshot) -> Option<Self> {
        let shape = MixtureShape::of(&model.manifest)?;
        let hops = explained.hops.as_ref().ok()?;
        let believed = |peer: &Peer, claim: &ModelAdvert| {
            let mut doubts = explained.doubts.iter();
            let doubt = doubts.find(|doubt| doubt.peer == *peer);
            let claimed = claim.layer_tokens_s.map(|measured| measured.value);
            doubt.map(|doubt| doubt.counted).or(claimed)
        };
        let compared = experts::compare(adverts, model.id, &shape, hops, believed)?;
        Some(Self::new(&compared))
    }

    fn new(compared: &Compared) -> Self {
        let told = |time: Result<String, &Unfit>| time.unwrap_or_else(|why| format!("none: {why}"));
        let (better, why, island, pipeline) = match &compared.choice {
            Ok(choice) => (
                Some(match choice.way {
                    Way::Island => "island",
                    Way::Pipeline => "pipeline",
                }),
                choice.to_string(),
                told(choice.island.as_ref().map(ToString::to_string)),
                told(choice.pipeline.as_ref().map(ToString::to_string)),
            ),
            Err((island, pipeline)) => (
                None,
                "neither".into(),
                told(Err(island)),
                told(Err(pipeline)),
            ),
        };
        Self {
            better,
            why,
            trunk: compared.trunk.to_string(),
            island,
            pipeline,
        }
    }

    fn lines(&self) -> [String; 3] {
        [
            format!("  better: {}", self.why),
            format!("  pipeline, whole layers in a row: {}", self.pipeline),
            format!(
                "  island, {} asks the others for experts: {}",
                figures::short_peer(&self.trunk),
                self.island
            ),
        ]
    }
}

fn hop_reports(
    route: &[Hop],
    explained: &Explained,
    age_s: &dyn Fn(Peer) -> f64,
) -> Vec<HopReport> {
    let parts = explained.priced.iter().flat_map(|priced| &priced.hops);
    let hops = route.iter().zip(parts).zip(&explained.standbys);
    hops.map(|((hop, parts), standby)| HopReport {
        layers: hop.layers.to_string(),
        peer: hop.peer.to_string(),
        age_s: age_s(hop.peer),
        network_ms: ms(parts.network),
        network_measured: parts.measured,
        queue_ms: ms(parts.queue),
        overhead_ms: ms(parts.overhead),
        compute_ms: ms(parts.compute),
        standby: standby.as_ref().ok().map(ToString::to_string),
        no_standby: standby.as_ref().err().map(ToString::to_string),
    })
    .collect()
}

impl MissingReport {
    fn new(gap: LayerRange, others: &[(&Other, OtherReport)]) -> Self {
        let meets = |layers: &LayerRange| layers.start < gap.end && gap.start < layers.end;
        let of_gap = others.iter().filter(|(other, _)| {
            let named = other.live.iter().chain(&other.intended);
            named.into_iter().any(meets)
        });
        Self {
            layers: gap.to_string(),
            peers: of_gap.map(|(_, report)| report.clone()).collect(),
        }
    }
}

impl OtherReport {
    fn new(other: &Other, age_s: &dyn Fn(Peer) -> f64) -> Self {
        let list = |ranges: &[LayerRange]| ranges.iter().map(ToString::to_string).collect();
        Self {
            peer: other.peer.to_string(),
            serves: list(&other.live),
            loading: list(&other.intended),
            age_s: age_s(other.peer),
            why: other.why.to_string(),
        }
    }
}

fn print(report: &Report, explain: bool) -> anyhow::Result<()> {
    let about = format!(
        "{} · {} · context {}",
        figures::short_hash(&report.model),
        figures::plural(report.n_layer.into(), "layer"),
        report.n_ctx
    );
    terminal::say(format!(
        "{} {}",
        paint(BOLD, &report.name),
        paint(DIM, about)
    ))?;
    if let Some(total) = report.token_ms {
        let hops: Vec<String> = report
            .hops
            .iter()
            .map(|hop| format!("{} {}", figures::short_peer(&hop.peer), hop.layers))
            .collect();
        terminal::say(format!("{} {}", paint(GOOD, "route:"), hops.join(" → ")))?;
        terminal::say(format!("  {total:.3} ms a token by the planner's figures"))?;
    }
    if report.as_if_idle {
        terminal::say(paint(
            WARN,
            "  by the adverts nobody has room for some of these layers; they will say so themselves",
        ))?;
    }
    for gap in &report.missing {
        print_missing(gap)?;
    }
    if explain {
        print_hops(report)?;
        print_mixture(report)?;
        print_others(report)?;
        print_doubts(report)?;
    }
    Ok(())
}

fn print_missing(gap: &MissingReport) -> anyhow::Result<()> {
    let layers = paint(BAD, format!("missing: layers {}", gap.layers));
    if gap.peers.is_empty() {
        terminal::say(format!("{layers}, and nobody is loading them"))?;
    } else {
        terminal::say(layers)?;
    }
    for peer in &gap.peers {
        terminal::say(format!("  {}", peer.line()))?;
    }
    Ok(())
}

fn print_hops(report: &Report) -> anyhow::Result<()> {
    if report.hops.is_empty() {
        return Ok(());
    }
    let head = format!(
        "  {:<9} {:<8} {:>10} {:>10} {:>10} {:>10}   {:>7}",
        "layers", "peer", "network", "queue", "hop", "compute", "heard"
    );
    terminal::say("")?;
    terminal::say(paint(DIM, head))?;
    for hop in &report.hops {
        let network = match hop.network_measured {
            true => format!("{:.3} ms", hop.network_ms),
            false => format!("≈ {:.1} ms", hop.network_ms),
        };
        terminal::say(format!(
            "  {:<9} {:<8} {network:>10} {:>7.3} ms {:>7.3} ms {:>7.3} ms   {:>3.0} s ago",
            hop.layers,
            figures::short_peer(&hop.peer),
            hop.queue_ms,
            hop.overhead_ms,
            hop.compute_ms,
            hop.age_s
        ))?;
        let standby = match (&hop.standby, &hop.no_standby) {
            (Some(peer), _) => format!("stands by: {}", figures::short_peer(peer)),
            (None, why) => {
                format!("nobody stands by: {}", why.as_deref().unwrap_or_default())
            }
        };
        terminal::say(paint(DIM, format!("  {:<9} {standby}", "")))?;
    }
    if let Some(reply) = report.reply_ms {
        terminal::say(format!("  {:<18} {reply:>7.3} ms", "back to here"))?;
    }
    if report.hops.iter().any(|hop| !hop.network_measured) {
        let about = "  ≈: not measured, estimated from both ends' round trips";
        terminal::say(paint(DIM, about))?;
    }
    Ok(())
}

fn print_mixture(report: &Report) -> anyhow::Result<()> {
    let Some(mixture) = &report.mixture else {
        return Ok(());
    };
    terminal::say("")?;
    terminal::say(paint(BOLD, "as a mixture of experts"))?;
    for line in mixture.lines() {
        terminal::say(line)?;
    }
    let about = "  one token without the way to and from here; as if each machine had room for little more than it serves now";
    terminal::say(paint(DIM, about))?;
    Ok(())
}

fn print_others(report: &Report) -> anyhow::Result<()> {
    if report.others.is_empty() {
        return Ok(());
    }
    terminal::say("")?;
    terminal::say(paint(BOLD, "not on it"))?;
    for other in &report.others {
        terminal::say(format!("  {}", other.line()))?;
    }
    terminal::say(format!(
        "  {} peers whose adverts expired are in no list: `shoal status`",
        paint(HINT, "→")
    ))?;
    Ok(())
}

fn print_doubts(report: &Report) -> anyhow::Result<()> {
    if report.doubts.is_empty() {
        return Ok(());
    }
    terminal::say("")?;
    terminal::say(paint(BOLD, "slower than they claim"))?;
    for doubt in &report.doubts {
        terminal::say(format!("  {}", doubt.line()))?;
    }
    let about = "  layers a second for one row, in the answers to this home of the last minutes";
    terminal::say(paint(DIM, about))?;
    Ok(())
}

impl DoubtReport {
    fn new(doubt: &Doubt) -> Self {
        Self {
            peer: doubt.peer.to_string(),
            claims: doubt.claimed,
            seen: doubt.seen,
            counted: doubt.counted,
        }
    }

    fn line(&self) -> String {
        format!(
            "{:<8} claims {:.0}, seen {:.0}: counted as {:.0}",
            figures::short_peer(&self.peer),
            self.claims,
            self.seen,
            self.counted
        )
    }
}

impl OtherReport {
    fn line(&self) -> String {
        let what = match (&self.serves[..], &self.loading[..]) {
            ([], []) => "nothing".into(),
            ([], loading) => format!("loading {}", loading.join(" ")),
            (serves, _) => serves.join(" "),
        };
        let peer = figures::short_peer(&self.peer);
        let heard = paint(DIM, format!("heard {:.0} s ago", self.age_s));
        format!("{peer:<8} {what:<9} {}  {heard}", self.why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_says_which_way_is_better_and_why_not_the_other() {
        let far = Unfit::TooFar {
            rtt: Duration::from_millis(30),
        };
        let gap = Unfit::Gap(3);
        let neither = MixtureReport::new(&Compared {
            trunk: Peer([1; 32]),
            choice: Err((far, gap)),
        });
        assert_eq!(neither.better, None);
        let [better, pipeline, island] = neither.lines();
        assert_eq!(better, "  better: neither");
        assert!(
            pipeline.contains("none: no stage computes layer 3"),
            "{pipeline}"
        );
        assert!(island.contains("none: a holder is 30ms away"), "{island}");
    }

    #[test]
    fn a_claim_that_is_not_believed_is_told_beside_what_was_seen() {
        let doubt = DoubtReport::new(&Doubt {
            peer: Peer([1; 32]),
            claimed: 5000.0,
            seen: 40.4,
            counted: 80.8,
        });
        let line = doubt.line();
        assert!(
            line.ends_with("claims 5000, seen 40: counted as 81"),
            "{line}"
        );
    }
}
