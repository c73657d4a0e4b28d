//! Flags that `run` and `chat` share: how a session over the swarm is opened.

use std::time::Duration;

use swarm_proto::Dtype;

use crate::run_report::Privacy;

/// Whom the session may pass, how its rows travel, how long it waits for a place.
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

    /// How activations travel between hops: f32 (exact), bf16 or q8_0 (a quarter of the bytes).
    #[arg(long, env = "SHOAL_WIRE", value_name = "TYPE", default_value_t = Dtype::F32)]
    pub wire: Dtype,

    /// How long to wait for a place where every holder of some layers is busy; 0 fails at once.
    #[arg(long, env = "SHOAL_WAIT", value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(..=WAIT_S_MAX))]
    wait: u32,
}

/// A day: whoever says more means for ever, and should not find a forgotten client years later.
const WAIT_S_MAX: i64 = 86_400;

impl SessionArgs {
    /// Only listed peers may be dialled.
    pub fn trusted(&self) -> bool {
        self.privacy == Some(Privacy::Trusted)
    }

    /// How long to wait for a place.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.wait.into())
    }
}
