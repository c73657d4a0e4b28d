//! Which of the two ways is taken, and why.

use std::{fmt, time::Duration};

use super::{
    ISLAND_RTT_MAX,
    cost::{IslandTime, PipelineTime, Unfit},
};

/// A way to compute a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A trunk that asks holders for experts.
    Island,
    /// Whole layers, one machine after the other.
    Pipeline,
}

/// What the user says about islands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wish {
    /// Nothing: near holders only.
    #[default]
    Near,
    /// However far the holders are, whatever is faster.
    FarHolders,
    /// An island, even where a pipeline is faster.
    Island,
}

/// What is taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Which way.
    pub way: Way,
    /// Why.
    pub reason: Reason,
    /// What an island takes, or why there is none.
    pub island: Result<IslandTime, Unfit>,
    /// The same of a pipeline.
    pub pipeline: Result<PipelineTime, Unfit>,
}

/// Why a way is taken.
#[derive(Debug, Clone, PartialEq)]
pub enum Reason {
    /// It takes less time.
    Faster {
        /// What it takes.
        takes: Duration,
        /// What the other takes.
        other: Duration,
    },
    /// The other cannot be.
    OnlyOne(Unfit),
    /// An island would be faster or the same, but each layer would wait for too long a way.
    TooFar {
        /// To the farthest holder.
        rtt: Duration,
    },
    /// The user wants an island.
    Insisted,
}

/// Takes the faster of the ways that are possible. An island whose holders are farther than [`ISLAND_RTT_MAX`] is
/// taken only where the user wishes it: a way so long is none that stays as it was measured.
///
/// # Errors
/// None is possible: why there is no island, and why no pipeline.
pub fn choose(
    island: Result<IslandTime, Unfit>,
    pipeline: Result<PipelineTime, Unfit>,
    wish: Wish,
) -> Result<Choice, (Unfit, Unfit)> {
    let (way, reason) = match (&island, &pipeline) {
        (Err(island), Err(pipeline)) => return Err((island.clone(), pipeline.clone())),
        (Err(why), Ok(_)) => (Way::Pipeline, Reason::OnlyOne(why.clone())),
        (Ok(_), _) if wish == Wish::Island => (Way::Island, Reason::Insisted),
        // Slow is better than not at all, but only if the user says so.
        (Ok(island), Err(why)) if near(island, wish) => (Way::Island, Reason::OnlyOne(why.clone())),
        (Ok(far), Err(why)) => {
            let why_no_island = Unfit::TooFar { rtt: far.rtt_max };
            return Err((why_no_island, why.clone()));
        }
        (Ok(island), Ok(pipeline)) => faster(island, pipeline, wish),
    };
    Ok(Choice {
        way,
        reason,
        island,
        pipeline,
    })
}

fn near(island: &IslandTime, wish: Wish) -> bool {
    wish != Wish::Near || island.rtt_max <= ISLAND_RTT_MAX
}

fn faster(island: &IslandTime, pipeline: &PipelineTime, wish: Wish) -> (Way, Reason) {
    let (island_takes, pipeline_takes) = (island.total, pipeline.total);
    if island_takes >= pipeline_takes {
        let reason = Reason::Faster {
            takes: pipeline_takes,
            other: island_takes,
        };
        return (Way::Pipeline, reason);
    }
    if !near(island, wish) {
        let rtt = island.rtt_max;
        return (Way::Pipeline, Reason::TooFar { rtt });
    }
    let reason = Reason::Faster {
        takes: island_takes,
        other: pipeline_takes,
    };
    (Way::Island, reason)
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Island => "an island",
            Way::Pipeline => "a pipeline",
        })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: &Duration| time.as_secs_f64() * 1e3;
        match self {
            Reason::Faster { takes, other } => {
                write!(f, "{:.2} ms a token and not {:.2}", ms(takes), ms(other))
            }
            Reason::OnlyOne(why) => write!(f, "the other is none: {why}"),
            Reason::TooFar { rtt } => write!(
                f,
                "an island would be faster, but a holder is {:.2} ms away; {:.1} are taken unasked",
                ms(rtt),
                ms(&ISLAND_RTT_MAX)
            ),
            Reason::Insisted => f.write_str("an island is asked for"),
        }
    }
}

/// As `an island (2.10 ms a token and not 5.31)`.
impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.way, self.reason)
    }
}
