//! The real `shoal` command, asked as a user asks it: flags in, JSON out, a deadline on every call.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use crate::cold::NodeStatus;
use crate::facts::Facts;
use crate::process::clean_environment;

/// How often something outside is looked at while it is waited for.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// What a finished command left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed for programs.
    pub stdout: String,
    /// What it printed for people.
    pub stderr: String,
}

/// One hop of a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// The peer id.
    pub peer: String,
    /// The layers it ran, as `start..end`.
    pub layers: String,
}

/// What `shoal run --json` says, as far as it is used here.
#[derive(Clone, Debug, Deserialize)]
pub struct Answer {
    /// The new text, without the prompt.
    pub text: String,
    /// The new tokens' ids.
    pub tokens: Vec<u32>,
    /// The hops, in order; empty for a local run.
    #[serde(default)]
    pub route: Vec<Hop>,
    /// From the prompt sent to the first token, in milliseconds.
    pub ttft_ms: f64,
    /// Tokens a second after the first.
    pub tokens_per_s: f64,
    /// Losses of hops that were got over; none in a local run.
    #[serde(default)]
    pub recoveries: Vec<Recovery>,
}

/// A loss of a hop that a run got over.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Recovery {
    /// What was lost, in words.
    pub lost: String,
    /// From the failure to the new route.
    pub took_ms: f64,
}

impl Answer {
    /// Whether two answers are the same, token by token.
    pub fn same(&self, other: &Self) -> bool {
        self.tokens == other.tokens && self.text == other.text
    }
}

/// What `shoal status --json` says about one layer.
#[derive(Clone, Debug, Deserialize)]
pub struct LayerStatus {
    /// Its number.
    pub layer: u32,
    /// The peers that serve it.
    pub holders: Vec<String>,
}

/// A question to a model.
#[derive(Clone, Debug)]
pub struct Ask {
    /// A name, an id, or a file.
    pub model: String,
    /// What comes first, given to the model as it is.
    pub prompt: String,
    /// The prompt is token ids, for models without a tokenizer.
    pub tokens: bool,
    /// How many tokens at most.
    pub n: u32,
}

impl Ask {
    /// A question in words.
    pub fn text(model: &str, prompt: &str, n: u32) -> Self {
        Self {
            model: model.to_owned(),
            prompt: prompt.to_owned(),
            tokens: false,
            n,
        }
    }

    /// Greedy and without a chat template, so that two runs can be compared. The prompt comes last.
    fn args(&self, how: &str) -> Vec<String> {
        let n = self.n.to_string();
        let tokens = self.tokens.then_some("--tokens");
        let fixed = [how, "--raw", "--temp", "0", "-n", &n];
        let args = fixed.into_iter().chain(tokens).chain(["--", &self.prompt]);
        args.map(str::to_owned).collect()
    }
}

/// A user of one swarm.
#[derive(Clone, Debug)]
pub struct Client {
    shoal: PathBuf,
    swarm: String,
    peers: Vec<String>,
    home: PathBuf,
    more: Vec<String>,
}

impl Client {
    /// A user with this home, who knows the swarm's id and some peers' addresses.
    pub fn new(shoal: &Path, swarm: &str, peers: Vec<String>, home: &Path) -> Self {
        Self {
            shoal: shoal.to_owned(),
            swarm: swarm.to_owned(),
            peers,
            home: home.to_owned(),
            more: Vec::new(),
        }
    }

    /// The same user, who gives further flags with every question to the swarm.
    #[must_use]
    pub fn with<S: Into<String>>(mut self, flags: impl IntoIterator<Item = S>) -> Self {
        self.more.extend(flags.into_iter().map(Into::into));
        self
    }

    /// The same user, introduced to these addresses instead.
    #[must_use]
    pub fn knowing(mut self, peers: Vec<String>) -> Self {
        self.peers = peers;
        self
    }

    /// The flags that name the swarm.
    pub fn swarm_args(&self) -> Vec<String> {
        let peers = self.peers.iter().flat_map(|peer| ["--peer", peer]);
        let swarm = ["--swarm", &self.swarm, "--mdns", "off"];
        let flags = swarm.into_iter().chain(peers).map(str::to_owned);
        flags.chain(self.more.iter().cloned()).collect()
    }

    /// A command line that a person can type to do the same.
    pub fn command_line(&self, verb: &str) -> String {
        format!(
            "{} {verb} {}",
            self.shoal.display(),
            self.swarm_args().join(" ")
        )
    }

    /// Looks at a model by name or file.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub async fn inspect(&self, model: &str, limit: Duration) -> Result<Facts> {
        self.json(
            &["inspect".to_owned(), "--json".to_owned(), model.to_owned()],
            limit,
        )
        .await
    }

    /// Asks over the swarm.
    ///
    /// # Errors
    /// When the command fails or takes longer than `limit`; its own message is quoted.
    pub async fn ask(&self, ask: &Ask, limit: Duration) -> Result<Answer> {
        self.json(&self.run_args(ask, "--json"), limit).await
    }

    /// The arguments of a question over the swarm; `how` says in which form the answer comes.
    pub(crate) fn run_args(&self, ask: &Ask, how: &str) -> Vec<String> {
        let mut args = vec!["run".to_owned()];
        args.extend(self.swarm_args());
        args.extend(["--model".to_owned(), ask.model.clone()]);
        args.extend(ask.args(how));
        args
    }

    /// Asks the whole model in one process: the reference.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub async fn ask_local(&self, ask: &Ask, limit: Duration) -> Result<Answer> {
        let mut args = vec!["run".to_owned(), "--local".to_owned(), ask.model.clone()];
        args.extend(ask.args("--json"));
        self.json(&args, limit).await
    }

    /// Waits until a client that asks the swarm sees every layer of `model` held, and returns the layers.
    ///
    /// # Errors
    /// When that takes longer than `limit`: names the layers missing or the command's last error.
    pub async fn until_covered(&self, n_layer: u32, limit: Duration) -> Result<Vec<LayerStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            let seen = self.layers(limit).await;
            let missing = match &seen {
                Ok(layers) => missing(layers, n_layer),
                Err(_) => (0..n_layer).collect(),
            };
            if missing.is_empty() {
                return seen;
            }
            if Instant::now() >= deadline {
                seen?;
                bail!(
                    "after {} s no peer is known for layers {missing:?}",
                    limit.as_secs()
                );
            }
            poll_pause().await;
        }
    }

    /// The layers of the swarm's first model and who holds them.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub async fn layers(&self, limit: Duration) -> Result<Vec<LayerStatus>> {
        #[derive(Deserialize)]
        struct Status {
            models: Vec<Model>,
        }
        #[derive(Deserialize)]
        struct Model {
            layers: Vec<LayerStatus>,
        }
        let mut args = vec!["status".to_owned(), "--json".to_owned()];
        args.extend(self.swarm_args());
        let status: Status = self.json(&args, limit).await?;
        Ok(status
            .models
            .into_iter()
            .next()
            .map(|model| model.layers)
            .unwrap_or_default())
    }

    /// How the node with this home is.
    ///
    /// # Errors
    /// As [`Client::ask`]; also where no node runs there yet.
    pub async fn node_status(&self, home: &Path, limit: Duration) -> Result<NodeStatus> {
        self.of_node(&["status"], home, limit).await
    }

    /// Pauses the node with this home, for good.
    ///
    /// # Errors
    /// As [`Client::node_status`].
    pub async fn pause_node(&self, home: &Path, limit: Duration) -> Result<NodeStatus> {
        self.of_node(&["pause"], home, limit).await
    }

    async fn of_node(&self, words: &[&str], home: &Path, limit: Duration) -> Result<NodeStatus> {
        let home = home.display().to_string();
        let args = ["node"].iter().chain(words).copied();
        let args = args.chain(["--json", "--home", &home]).map(str::to_owned);
        self.json(&args.collect::<Vec<_>>(), limit).await
    }

    /// Runs `shoal` and reads the JSON it prints.
    ///
    /// # Errors
    /// When it fails (its message is quoted), takes longer than `limit`, or prints something else.
    pub async fn json<T: DeserializeOwned>(&self, args: &[String], limit: Duration) -> Result<T> {
        let output = self.output(args, limit).await?;
        if !output.status.success() {
            bail!(
                "`shoal {}` failed ({}):\n{}",
                args.join(" "),
                output.status,
                output.stderr.trim_end()
            );
        }
        serde_json::from_str(output.stdout.trim()).with_context(|| {
            format!(
                "`shoal {}` printed something unexpected: {}",
                args.join(" "),
                output.stdout.trim_end()
            )
        })
    }

    /// Runs `shoal` to its end.
    ///
    /// # Errors
    /// When it cannot be started or takes longer than `limit` (it is killed then).
    pub async fn output<S: AsRef<str>>(&self, args: &[S], limit: Duration) -> Result<Output> {
        let deadline = Instant::now() + limit;
        let child = self.start(args)?;
        let output = timeout_at(deadline, child.wait_with_output())
            .await
            .map_err(|_| {
                let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
                anyhow!(
                    "`shoal {}` took longer than {} s",
                    args.join(" "),
                    limit.as_secs()
                )
            })??;
        Ok(Output {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Starts `shoal` with its input and outputs as pipes. Dropping the child kills it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start<S: AsRef<str>>(&self, args: &[S]) -> Result<Child> {
        std::fs::create_dir_all(&self.home)
            .with_context(|| format!("cannot make {}", self.home.display()))?;
        let mut command = Command::new(&self.shoal);
        clean_environment(&mut command, &self.home);
        command
            .args(args.iter().map(AsRef::as_ref))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", self.shoal.display()))
    }
}

/// Waits a moment between two looks at something outside. A look has a deadline of its own.
pub async fn poll_pause() {
    let mut ticks = interval(POLL_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    ticks.tick().await;
}

fn missing(layers: &[LayerStatus], n_layer: u32) -> Vec<u32> {
    let held = |layer: u32| {
        layers
            .iter()
            .any(|status| status.layer == layer && !status.holders.is_empty())
    };
    (0..n_layer).filter(|&layer| !held(layer)).collect()
}
