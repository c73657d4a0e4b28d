//! What is said about a run: one dim line on stderr for people, a JSON object for programs.

use node::answer::Left;
use serde::{Deserialize, Serialize};

use crate::fallback::WHY_CHARS_MAX;
use crate::figures;

/// Who can read the prompt; each level is stricter than the one before it.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Privacy {
    /// Any peer of the swarm may be on the route; peers on it can read the prompt.
    #[default]
    Open,
    /// Only the peers listed with --allow are dialled; they can read the prompt.
    Trusted,
    /// The whole model runs in this process; nothing leaves it.
    Local,
}

impl Privacy {
    /// The consequence, in words.
    fn consequence(self, hops: usize) -> String {
        let these = if hops == 1 {
            "this peer"
        } else {
            "these peers"
        };
        match self {
            Privacy::Open => format!("open: {these} can read the prompt"),
            Privacy::Trusted => {
                format!("trusted: {these} can read the prompt, nobody else was dialled")
            }
            Privacy::Local => "local: the prompt stays in this process".into(),
        }
    }
}

/// One hop of the route.
#[derive(Clone, Debug, Serialize)]
pub struct Hop {
    /// Who.
    pub peer: String,
    /// Which layers, as `0..4`.
    pub layers: String,
}

impl From<&swarm_proto::Hop> for Hop {
    fn from(hop: &swarm_proto::Hop) -> Self {
        Self {
            peer: hop.peer.to_string(),
            layers: hop.layers.to_string(),
        }
    }
}

impl Hop {
    /// A route, or those who stand by for it.
    pub fn all(hops: &[swarm_proto::Hop]) -> Vec<Self> {
        hops.iter().map(Self::from).collect()
    }
}

/// A route that broke while the answer ran, and was replaced.
#[derive(Clone, Debug, Serialize)]
pub struct Recovery {
    /// Tokens of prompt and answer when it broke.
    pub pos: u32,
    /// What was lost.
    pub lost: String,
    /// Hops of the new route that were not on the old one.
    pub replaced: usize,
    /// From the failure to the new route.
    pub took_ms: f64,
    /// Whether all peers compute the same bits; else the text may differ in a close choice.
    pub exact: bool,
}

impl From<&node::Recovery> for Recovery {
    fn from(recovery: &node::Recovery) -> Self {
        Self {
            pos: recovery.pos,
            lost: figures::printable(&recovery.lost, 300),
            replaced: recovery.replaced,
            took_ms: (recovery.took.as_secs_f64() * 1e6).round() / 1e3,
            exact: recovery.exact,
        }
    }
}

/// That this process took over from the swarm.
#[derive(Clone, Debug, Serialize)]
pub struct FellBack {
    /// Tokens of the answer that came before: `route` chose these, this process the others.
    pub at_token: usize,
    /// Why.
    pub why: String,
}

impl FellBack {
    /// After a prompt of `prompt` tokens, and `said` of the answer by another process.
    pub fn new(left: &Left, prompt: usize, said: usize) -> Self {
        // The last one chosen was not fed yet.
        let chosen = (left.pos + 1).saturating_sub(prompt.max(1));
        Self {
            at_token: chosen.max(said),
            why: figures::printable(&left.why, WHY_CHARS_MAX),
        }
    }
}

/// That this is an answer which another process had begun.
#[derive(Clone, Debug, Serialize)]
pub struct Resumed {
    /// What it was called.
    pub id: String,
    /// Tokens of the answer that were there.
    pub tokens: usize,
}

/// Everything `--json` prints.
#[derive(Debug, Default, Serialize)]
pub struct RunReport {
    /// The answer without the prompt.
    pub text: String,
    /// The answer's token ids.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: String,
    /// The model's name.
    pub model: String,
    /// The model's id, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_id: Option<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub generated_tokens: usize,
    /// Room of the context, prompt and answer together.
    pub n_ctx: u32,
    /// From sending the prompt to the first token.
    pub ttft_ms: f64,
    /// Speed after the first token.
    pub tokens_per_s: f64,
    /// Where the time went.
    pub timings: Timings,
    /// Who computed what, in order.
    pub route: Vec<Hop>,
    /// How many there were.
    pub hops: usize,
    /// Who stood by for which layers; they can read the prompt too.
    pub standbys: Vec<Hop>,
    /// Hops that were lost while it ran; `route` is the last one.
    pub recoveries: Vec<Recovery>,
    /// That the whole model in this process went on, where it did; `route` is the last one before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fell_back: Option<FellBack>,
    /// That another process had begun it, where it had; the timings are of this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed: Option<Resumed>,
    /// Who could read the prompt.
    pub privacy: Privacy,
    /// The same as a fact.
    pub peers_can_read_prompt: bool,
    /// Type of the activations between hops.
    pub wire: String,
    /// Seed of the dice.
    pub seed: u32,
}

/// A line of `--json-lines`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Line<'a> {
    /// The session is open.
    Route {
        /// Along these.
        route: &'a [Hop],
    },
    /// A token was chosen.
    Token {
        /// Its id; none where only text was left to show.
        token: Option<u32>,
        /// The text that can be shown now.
        text: &'a str,
        /// Since the prompt was sent.
        at_ms: f64,
    },
    /// The answer has ended.
    End(&'a RunReport),
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Timings {
    /// Finding the swarm and its adverts, or loading the model.
    pub connect_ms: f64,
    /// Opening the session on every hop.
    pub open_ms: f64,
    /// From sending the prompt to the first token.
    pub prompt_ms: f64,
    /// From the first token to the last.
    pub decode_ms: f64,
    /// The whole command.
    pub total_ms: f64,
}

/// What people are told of losses, after the answer; nothing where there were none.
pub fn recoveries_line(recoveries: &[Recovery]) -> Option<String> {
    let longest = recoveries.iter().map(|r| r.took_ms).fold(0.0, f64::max);
    let inexact = if recoveries.iter().all(|r| r.exact) {
        ""
    } else {
        "; peers of another CPU type took part, so that close choices may have fallen otherwise"
    };
    match recoveries {
        [] => None,
        [one] => Some(format!(
            "a hop was lost on the way ({}); the answer went on after {longest:.0} ms{inexact}",
            one.lost
        )),
        many => Some(format!(
            "the route was lost {} times on the way; the answer went on each time, after {longest:.0} ms at most{inexact}",
            many.len()
        )),
    }
}

/// `…Ab3dEf 0..3 → …Zz91kQ 3..8, 2 stand by · open: these peers can read the prompt · wire f32`.
pub fn route_line(route: &[Hop], standbys: &[Hop], privacy: Privacy, wire: &str) -> String {
    let consequence = privacy.consequence(route.len() + standbys.len());
    if privacy == Privacy::Local {
        return format!("route: this process · {consequence}");
    }
    let hops: Vec<String> = route
        .iter()
        .map(|hop| format!("{} {}", figures::short_peer(&hop.peer), hop.layers))
        .collect();
    let by = match standbys.len() {
        0 => String::new(),
        1 => ", 1 stands by".into(),
        n => format!(", {n} stand by"),
    };
    let hops = hops.join(" → ");
    format!("route: {hops}{by} · {consequence} · wire {wire}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(peer: &str, layers: &str) -> Hop {
        Hop {
            peer: peer.into(),
            layers: layers.into(),
        }
    }

    #[test]
    fn the_line_says_who_can_read_the_prompt() {
        let route = [
            hop("12D3KooWAAAAb3dEf", "0..3"),
            hop("12D3KooWAAAz91kQx", "3..8"),
        ];
        assert_eq!(
            route_line(&route, &route, Privacy::Open, "f32"),
            "route: …Ab3dEf 0..3 → …z91kQx 3..8, 2 stand by · open: these peers can read the prompt · wire f32"
        );
        assert!(
            route_line(&route[..1], &[], Privacy::Trusted, "q8_0")
                .contains("trusted: this peer can read the prompt")
        );
        assert_eq!(
            route_line(&[], &[], Privacy::Local, "f32"),
            "route: this process · local: the prompt stays in this process"
        );
    }
}
