//! An answer as it comes: `shoal run --json-lines`, read line by line, with a deadline on the whole.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use crate::client::{Answer, Ask, Client, Hop};

/// A line of `shoal run --json-lines`, as far as it is used here.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The session is open along these hops.
    Route {
        /// In order.
        route: Vec<Hop>,
    },
    /// A token was chosen.
    Token {
        /// Its id; none where only text was left to show.
        token: Option<u32>,
        /// Since the prompt was sent, by the client's clock.
        at_ms: f64,
    },
    /// The answer has ended.
    End(Answer),
}

/// A question that is being answered. Dropping it ends the client.
#[derive(Debug)]
pub struct Stream {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    notes: JoinHandle<String>,
    deadline: Instant,
}

impl Stream {
    /// Asks over the swarm; the whole answer may take `limit`.
    ///
    /// # Errors
    /// When the client cannot be started.
    pub fn ask(client: &Client, ask: &Ask, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        let mut child = client.start(&client.run_args(ask, "--json-lines"))?;
        let stdout = child.stdout.take().context("no output of the client")?;
        let mut stderr = child.stderr.take().context("no notes of the client")?;
        let notes = tokio::spawn(async move {
            let mut notes = Vec::new();
            // What was said before an error of reading is as good.
            let _ = stderr.read_to_end(&mut notes).await;
            String::from_utf8_lossy(&notes).into_owned()
        });
        Ok(Self {
            child,
            lines: BufReader::new(stdout).lines(),
            notes,
            deadline,
        })
    }

    /// What happens next.
    ///
    /// # Errors
    /// When the client fails (its notes are quoted), says something else, or takes too long.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Event> {
        let line = timeout_at(self.deadline, self.lines.next_line()).await;
        let line = line.map_err(|_| anyhow!("the client takes too long"))??;
        match line.map(|line| (serde_json::from_str(&line), line)) {
            Some((Ok(event), _)) => Ok(event),
            Some((Err(_), line)) if !line.starts_with(r#"{"error""#) => {
                bail!("the client printed something unexpected: {line}")
            }
            _ => {
                let status = self.child.wait().await?;
                let notes = (&mut self.notes).await.unwrap_or_default();
                bail!("the client failed ({status}): {}", notes.trim())
            }
        }
    }
}
