//! Flags that all share who open sessions over the swarm: how.

use std::time::Duration;

use swarm_proto::{Dtype, Numerics};

use crate::run_report::Privacy;
use crate::swarm::Ask;

/// Whom the session may pass, how its rows travel, who goes on where nobody else can.
#[derive(clap::Args, Clone, Debug)]
pub struct SessionArgs {
    /// Who may see the prompt: open (any peer), trusted (only listed peers are dialled), local (nobody).
    #[arg(
        long,
        env = "SHOAL_PRIVACY",
        value_enum,
        value_name = "LEVEL",
        hide_possible_values = true
    )]
    pub privacy: Option<Privacy>,

    /// How its rows travel.
    #[command(flatten)]
    pub travel: TravelArgs,

    /// The same model in a file here: when no route is left and the wait is over, the answer goes on with it in
    /// this process.
    #[arg(long, value_name = "NAME|FILE")]
    pub local_fallback: Option<String>,
}

/// How the rows of a session travel, who stands by, how long it waits for a place.
#[derive(clap::Args, Clone, Debug)]
pub struct TravelArgs {
    /// How activations travel between hops: f32 (exact), bf16 or q8_0 (a quarter of the bytes).
    #[arg(long, env = "SHOAL_WIRE", value_name = "TYPE", default_value_t = Dtype::F32)]
    pub wire: Dtype,

    /// exact: each token has the bits that it has alone. fast: machines with several sessions may run their rows
    /// together also where the model's quantisation (K quants) then gives slightly other numbers; many users at
    /// once are served several times as fast. `run` and `chat` are exact, `serve` is fast, unless this says
    /// otherwise; models in f32, q8_0 or q4_0 are exact both ways.
    #[arg(long, env = "SHOAL_NUMERICS", value_name = "exact|fast")]
    pub numerics: Option<Numerics>,

    /// Whether other holders of the hops' layers stand by, so that a lost hop costs no pause: auto (where
    /// there are any), off.
    #[arg(
        long,
        env = "SHOAL_STANDBY",
        value_enum,
        value_name = "WHEN",
        default_value_t = Standby::Auto,
        hide_possible_values = true
    )]
    standby: Standby,

    /// How long to wait for a place where every holder of some layers is busy, and for holders of lost layers
    /// to come back; 0 fails at once.
    #[arg(long, env = "SHOAL_WAIT", value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(..=WAIT_S_MAX))]
    wait: u32,
}

/// When other peers stand by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Standby {
    /// Nobody does: less work and KV on other peers, a pause when a hop is lost.
    Off,
    /// For each hop whose layers another peer with room to spare holds too.
    Auto,
}

/// A day: whoever says more means for ever, and should not find a forgotten client years later.
const WAIT_S_MAX: i64 = 86_400;

impl SessionArgs {
    /// Only listed peers may be dialled.
    pub fn trusted(&self) -> bool {
        self.privacy == Some(Privacy::Trusted)
    }
}

impl TravelArgs {
    /// What these flags ask of a session of `n_ctx` positions, where nothing is said with the `usual` numerics.
    pub fn ask(&self, n_ctx: u32, usual: Numerics) -> Ask {
        Ask {
            n_ctx,
            dtype: self.wire,
            numerics: self.numerics.unwrap_or(usual),
            standby: self.standby == Standby::Auto,
            patience: Duration::from_secs(self.wait.into()),
        }
    }
}
