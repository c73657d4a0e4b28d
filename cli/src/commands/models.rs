//! `shoal models`: what this machine knows and what the swarm serves.

use std::path::PathBuf;

use serde::Serialize;

use crate::swarm::Swarm;
use crate::swarm_report::ModelReport;
use crate::terminal::{self, BAD, BOLD, DIM, GOOD, HINT, paint};
use crate::{figures, local_models};

/// List the models of this machine and of the swarm.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal models
  shoal models --offline
  shoal models --json | jq '.swarm[] | select(.complete) | .name'")]
pub struct Args {
    /// Only this machine.
    #[arg(long)]
    offline: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    swarm: Swarm,
}

/// What is printed.
#[derive(Serialize)]
struct Report {
    local: Vec<LocalModel>,
    swarm: Vec<SwarmModel>,
    #[serde(skip_serializing_if = "Option::is_none")]
    swarm_error: Option<String>,
}

/// A model in this machine's store.
#[derive(Serialize)]
struct LocalModel {
    model: String,
    names: Vec<String>,
    /// Of these, names that nothing moves.
    pinned: Vec<String>,
    /// Publishers whose signature on it is right.
    signed_by: Vec<String>,
    arch: String,
    n_layer: u16,
    bytes: u64,
    /// All weights are here, not only the description or some layers.
    weights: bool,
    /// Layers that are here.
    layers: Vec<String>,
    /// Bytes of fetched shards.
    fetched_bytes: u64,
    files: Vec<String>,
    /// Of these, files that are gone.
    missing: Vec<String>,
}

/// A model that peers serve.
#[derive(Serialize)]
struct SwarmModel {
    model: String,
    name: String,
    n_layer: u16,
    complete: bool,
    gaps: Vec<String>,
    peers: usize,
}

/// Lists both.
pub fn main(args: Args) -> anyhow::Result<()> {
    let (local, problems) = local(&args)?;
    for problem in problems {
        terminal::warn(problem);
    }
    let mut report = Report {
        local,
        swarm: Vec::new(),
        swarm_error: None,
    };
    if !args.offline {
        match args.swarm.report() {
            Ok(swarm) => report.swarm = swarm.models.into_iter().map(SwarmModel::from).collect(),
            Err(error) => report.swarm_error = Some(format!("{error:#}")),
        }
    }
    if args.json {
        terminal::say_json(&report)
    } else {
        print(&report, args.offline)
    }
}

fn local(args: &Args) -> anyhow::Result<(Vec<LocalModel>, Vec<shard_registry::Problem>)> {
    let store = local_models::store(&args.swarm.home()?)?;
    let (models, mut problems) = store.models();
    let mut local = Vec::new();
    for model in models {
        let manifest = store.manifest(model.id)?;
        let (signatures, wrong) = store.signatures(model.id);
        problems.extend(wrong);
        let pinned = model
            .aliases
            .iter()
            .filter(|alias| store.pinned(alias).is_some());
        let shown = |path: &PathBuf| path.display().to_string();
        let here = store.here(model.id)?;
        local.push(LocalModel {
            model: model.id.to_string(),
            pinned: pinned.map(ToString::to_string).collect(),
            signed_by: signatures.iter().map(|s| s.publisher.to_string()).collect(),
            names: model.aliases.iter().map(ToString::to_string).collect(),
            arch: figures::printable(&manifest.arch, 64),
            n_layer: manifest.n_layer,
            bytes: manifest.total_bytes(),
            weights: !model.files.is_empty() || here.is_whole(),
            layers: here.layers.iter().map(ToString::to_string).collect(),
            fetched_bytes: here.blob_bytes,
            files: model.files.iter().map(shown).collect(),
            missing: local_models::missing(&model.files).map(shown).collect(),
        });
    }
    local.sort_by(|a, b| (&a.names, &a.model).cmp(&(&b.names, &b.model)));
    Ok((local, problems))
}

impl From<ModelReport> for SwarmModel {
    fn from(report: ModelReport) -> Self {
        Self {
            peers: report.holders.len(),
            model: report.model,
            name: report.name,
            n_layer: report.n_layer,
            complete: report.complete,
            gaps: report.gaps,
        }
    }
}

fn print(report: &Report, offline: bool) -> anyhow::Result<()> {
    terminal::say(paint(BOLD, "on this machine"))?;
    for model in &report.local {
        let id = paint(DIM, figures::short_hash(&model.model));
        let here = match (model.weights, model.layers.is_empty()) {
            (true, _) => figures::bytes(model.bytes),
            (false, false) => figures::bytes(model.fetched_bytes),
            (false, true) => "description only".into(),
        };
        let layers = match model.files.is_empty() && !model.layers.is_empty() {
            true => figures::layers_here(&model.layers, model.n_layer),
            false => figures::plural(model.n_layer.into(), "layer"),
        };
        terminal::say(format!(
            "  {:<24} {id}  {:<9} {layers:>10}  {here}",
            model.names.join(", "),
            model.arch
        ))?;
        if !model.pinned.is_empty() {
            let pinned = model.pinned.join(", ");
            terminal::say(format!("  {} {pinned}", paint(DIM, "pinned:")))?;
        }
        for publisher in &model.signed_by {
            terminal::say(format!("  {} {publisher}", paint(DIM, "signed by")))?;
        }
        for path in &model.missing {
            let path = figures::printable(path, 400);
            terminal::say(format!("  {} {path}", paint(BAD, "file missing:")))?;
        }
    }
    if report.local.iter().any(|model| !model.missing.is_empty()) {
        let remedy = local_models::BRING_BACK;
        terminal::say(format!("  {} {remedy}", paint(HINT, "→")))?;
    }
    if report.local.is_empty() {
        terminal::say(format!(
            "  none yet {} `shoal import FILE.gguf`, `shoal pull NAME`; `demo` comes with the program",
            paint(HINT, "→")
        ))?;
    }
    if offline {
        return Ok(());
    }
    terminal::say("")?;
    terminal::say(paint(BOLD, "in the swarm"))?;
    for model in &report.swarm {
        let id = paint(DIM, figures::short_hash(&model.model));
        let state = if model.complete {
            paint(GOOD, "complete")
        } else {
            paint(BAD, format!("nobody holds {}", model.gaps.join(", ")))
        };
        let layers = figures::plural(model.n_layer.into(), "layer");
        let peers = figures::plural(model.peers, "peer");
        terminal::say(format!(
            "  {:<24} {id}  {peers:<9} {layers:>10}  {state}",
            model.name
        ))?;
    }
    if let Some(error) = &report.swarm_error {
        terminal::say(format!("  {} {error}", paint(BAD, "not reached:")))?;
    } else if report.swarm.is_empty() {
        terminal::say(format!(
            "  none {} `shoal node --model NAME` serves one",
            paint(HINT, "→")
        ))?;
    }
    Ok(())
}
