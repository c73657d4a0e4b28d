//! The batch noise of a model on this machine: the same rows of several sessions, alone and in company.

use anyhow::Context;
use engine::BatchNoise;
use futures::future::try_join_all;
use node::Session;
use serde::Serialize;
use swarm_proto::Form;

use super::{prompt, row, short_prompt};
use crate::terminal;

/// Sessions that are compared: as many as share a pass of a stage.
const SESSIONS: usize = 4;
/// Rows of each, behind its prompt: what company changes in the KV adds up.
pub const TOKENS: u32 = 8;

/// As it is reported.
#[derive(Serialize)]
pub struct Noise {
    /// Rows of logits that were compared.
    rows: u32,
    /// The greatest difference of two logits.
    greatest: f32,
    /// The root of the mean square of all differences.
    rms: f32,
    /// More than this is no noise.
    limit: f32,
}

/// Feeds the same tokens to each session alone and to all at once; also warms up whatever they run on.
pub async fn measure(sessions: &mut [Session]) -> anyhow::Result<BatchNoise> {
    let mut noise = BatchNoise::default();
    let few = sessions.len().min(SESSIONS);
    if few < 2 {
        return Ok(noise);
    }
    let _wheel = terminal::wheel("what company changes in the logits");
    let mut alone = Vec::new();
    for (i, session) in sessions[..few].iter_mut().enumerate() {
        alone.push(rows(session, i).await?);
    }
    let together = sessions[..few].iter_mut().enumerate();
    let together = try_join_all(together.map(async |(i, session)| rows(session, i).await));
    for (alone, together) in alone.iter().zip(together.await?) {
        for (alone, together) in alone.iter().zip(&together) {
            noise.compare(alone, together);
        }
    }
    Ok(noise)
}

/// The logits behind a prompt and behind each of some tokens, which are always the same.
async fn rows(session: &mut Session, i: usize) -> anyhow::Result<Vec<Vec<f32>>> {
    session.truncate(0)?;
    let first = row(session, &short_prompt(i), Form::Full).await?;
    let mut rows = vec![first.full];
    for token in prompt(TOKENS, 1000 + u32::try_from(i).context("many sessions")?) {
        rows.push(row(session, &[token], Form::Full).await?.full);
    }
    Ok(rows)
}

impl Noise {
    /// None where nothing was compared.
    pub fn of(noise: &BatchNoise) -> Option<Self> {
        (noise.rows() > 0).then(|| Self {
            rows: noise.rows(),
            greatest: noise.greatest(),
            rms: noise.rms(),
            limit: noise.limit(),
        })
    }

    /// For people.
    pub fn print(&self) -> anyhow::Result<()> {
        let of = format!("in {} rows", self.rows);
        Ok(terminal::say(if self.greatest == 0.0 {
            format!("  batch noise: none {of}, company changes no bit")
        } else {
            format!(
                "  batch noise: company changes a logit by at most {:.2e} {of}, {:.2e} RMS; up to {:.2e} is taken for \
                 noise",
                self.greatest, self.rms, self.limit
            )
        })?)
    }
}
