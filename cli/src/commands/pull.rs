//! `shoal pull`: fetches a model's shards into this machine's store, verified as they come.

use std::ops::Range;

use download::Source;
use node::config::{parse_bytes, parse_layers};
use node::transfer::{Limits, Transfer, TransferError};
use serde::Serialize;
use shard_registry::blobs::Quota;
use shard_registry::{AliasName, Manifest, Resolved, ShardEntry, Store, StoreError};
use swarm_proto::{LayerRange, ModelId};

use crate::choose_model::choose;
use crate::commands::import;
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::swarm::{Member, Swarm};
use crate::terminal::{self, BOLD, HINT, paint};
use crate::{figures, local_models, obtain};

/// Fetch a model, or some of its layers, from the peers that have it; from a hub or an address, too.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal pull llama-1b
  shoal pull 3f1c9a0b77e2 --layers 0..8
  shoal pull hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
  shoal pull llama-1b --peer /ip4/192.168.1.5/tcp/4001 --json

Every 16 KiB are checked as they come. Ctrl-C keeps what is here; the same command goes on from there.
A second pull of a model that is here reads and checks all of it, and fetches what is damaged.")]
pub struct Args {
    /// The model: a name that this machine or the swarm has for it, its id, or what `shoal import` takes.
    #[arg(value_name = "ID|NAME|hf:…|https://…")]
    model: String,
    /// Only these layers, for example 0..8; the first comes with the embedding, the last with the head.
    #[arg(long, value_name = "A..B", value_parser = parse_layers)]
    layers: Option<Range<u32>>,
    /// What to call it here [default: as in the swarm].
    #[arg(long, value_name = "NAME")]
    name: Option<AliasName>,
    /// Most that fetched shards may take of the disk, for example 20G [default: all but a reserve].
    #[arg(long, value_name = "SIZE", env = "SHOAL_DISK", value_parser = parse_bytes)]
    disk: Option<u64>,
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
    name: Option<String>,
    /// Layers that are here now, of `n_layer`.
    layers: Vec<String>,
    n_layer: u16,
    /// Bytes of the shards that were asked for.
    bytes: u64,
    /// Of these, bytes that came from peers now.
    fetched_bytes: u64,
    shards: usize,
}

/// Fetches and prints what is here.
pub fn main(args: Args) -> anyhow::Result<()> {
    if let Ok(source @ (Source::Hub(_) | Source::Url(_))) = obtain::source(&args.model) {
        if args.layers.is_some() {
            let why =
                "--layers is for models of the swarm: a file of a hub or an address comes whole";
            return Err(Failure::usage(why).into());
        }
        let home = args.swarm.settings(false)?.home;
        return import::bring(&home, &source, args.name.as_ref(), args.json);
    }
    let json = args.json;
    let report = node::runtime::run(from_swarm(args))??;
    if json {
        return terminal::say_json(&report);
    }
    terminal::say(&report.model)?;
    let name = report.name.as_deref().unwrap_or(&report.model);
    let here = figures::layers_here(&report.layers, report.n_layer);
    terminal::note_styled(format!(
        "{} · {here} · {} fetched, {} checked",
        paint(BOLD, name),
        figures::bytes(report.fetched_bytes),
        figures::bytes(report.bytes),
    ));
    let whole = report.layers == [format!("0..{}", report.n_layer)];
    let next = if whole {
        format!("shoal run --local {name} \"...\", or shoal node --model {name}")
    } else {
        format!("shoal pull {name} for the rest")
    };
    terminal::note_styled(format!("{} {next}", paint(HINT, "next:")));
    Ok(())
}

async fn from_swarm(args: Args) -> anyhow::Result<Report> {
    let interrupt = Interrupt::listen();
    let member = interrupt.or_end(args.swarm.join(false)).await?;
    let fetched = interrupt.or_end(fetch(&args, &member)).await;
    member.leave().await;
    fetched
}

async fn fetch(args: &Args, member: &Member) -> anyhow::Result<Report> {
    let store = local_models::store(&member.settings.home)?;
    let (id, called) = meant(&args.model, &store, member)?;
    let limits = Limits {
        quota: Quota {
            max_bytes: args.disk.or(disk_of_file(member)?),
            ..Quota::default()
        },
        ..Limits::default()
    };
    let net = member.client.net().clone();
    let book = member.client.book().clone();
    // A client cannot be reached: nobody is sent to it.
    let transfer = Transfer::new(net, store.clone(), limits, book, false);
    let wheel = terminal::wheel(format!(
        "fetching what describes {}",
        figures::printable(&args.model, 80)
    ));
    let manifest = transfer.describe(id).await?;
    drop(wheel);
    let layers = wanted(args.layers.as_ref(), &manifest)?;
    let shards: Vec<ShardEntry> = manifest.shards_of(layers).cloned().collect();
    // Before its bytes: what is broken off has a name.
    let name = call(args.name.clone(), called, &store, id)?;
    transfer.check_room(&shards).await?;
    let fetched = fetch_all(&transfer, id, &manifest, &shards).await;
    let (bytes, fetched_bytes) = fetched.map_err(|error| removed(error, &args.model))?;
    let here = store
        .here(id)
        .map_err(|error| removed(error.into(), &args.model))?;
    Ok(Report {
        model: id.to_string(),
        name,
        layers: here.layers.iter().map(ToString::to_string).collect(),
        n_layer: manifest.n_layer,
        bytes,
        fetched_bytes,
        shards: shards.len(),
    })
}

/// A model that is not there any more was taken away meanwhile: nothing is wrong with what was fetched.
fn removed(error: anyhow::Error, name: &str) -> anyhow::Error {
    let of_store = match error.downcast_ref::<TransferError>() {
        Some(TransferError::Store(error)) => Some(error),
        _ => error.downcast_ref::<StoreError>(),
    };
    if !matches!(of_store, Some(StoreError::Missing { .. })) {
        return error;
    }
    let name = figures::printable(name, 80);
    Failure::new(format!(
        "{name} was removed from this machine while it was fetched"
    ))
    .try_this(format!(
        "`shoal pull {name}` to have it after all, or `shoal gc` to remove what came since"
    ))
    .into()
}

/// Bytes of all shards, and of those that were not here.
async fn fetch_all(
    transfer: &Transfer,
    id: ModelId,
    manifest: &Manifest,
    shards: &[ShardEntry],
) -> anyhow::Result<(u64, u64)> {
    let total = shards.iter().map(|shard| shard.bytes).sum();
    let bar = terminal::bar_of_bytes(total, "fetching");
    let (mut before, mut fetched) = (0u64, 0u64);
    for shard in shards {
        bar.set_message(format!("fetching {}", shard.kind));
        let mut first = None;
        let mut progress = |here: u64| {
            fetched += here.saturating_sub(*first.get_or_insert(here));
            first = Some(here);
            bar.set_position(before + here);
        };
        let done = transfer.fetch(id, manifest, shard, &mut progress).await;
        if let Err(error) = done {
            bar.abandon();
            return Err(error.into());
        }
        before += shard.bytes;
    }
    bar.finish_and_clear();
    Ok((total, fetched))
}

/// An id, whole; a name or the beginning of an id that this machine or the swarm knows.
fn meant(text: &str, store: &Store, member: &Member) -> anyhow::Result<(ModelId, Option<String>)> {
    let served = member.report().models;
    let id = match (text.parse::<ModelId>(), store.resolve(text)) {
        (Ok(id), _) => id,
        (_, Ok(Resolved::Model(id))) => id,
        _ => choose(Some(text), None, &served)?,
    };
    let called = served
        .iter()
        .find(|model| model.id == id)
        .map(|model| model.name.clone());
    Ok((id, called.or_else(|| Some(text.to_owned()))))
}

fn wanted(layers: Option<&Range<u32>>, manifest: &Manifest) -> anyhow::Result<LayerRange> {
    let all = manifest.layers();
    let Some(layers) = layers else { return Ok(all) };
    let bound = |layer: u32| u16::try_from(layer).unwrap_or(u16::MAX);
    let asked = LayerRange {
        start: bound(layers.start),
        end: bound(layers.end),
    };
    if all.covers(asked) {
        return Ok(asked);
    }
    Err(Failure::usage(format!("layers {asked} asked for, the model has {all}")).into())
}

/// Gives the model a name, unless it has one: the one asked for, else what the swarm calls it where that is free.
fn call(
    asked: Option<AliasName>,
    called: Option<String>,
    store: &Store,
    id: ModelId,
) -> anyhow::Result<Option<String>> {
    let (aliases, _) = store.aliases();
    let mine = aliases.iter().find(|(_, to)| *to == id);
    let free = |alias: &AliasName| aliases.iter().all(|(other, _)| other != alias);
    let is_id = |text: &String| id.to_string().starts_with(&text.to_ascii_lowercase());
    let name = match (asked, mine) {
        (Some(asked), _) => asked,
        (None, Some((alias, _))) => return Ok(Some(alias.to_string())),
        (None, None) => {
            let called = called.filter(|text| !is_id(text));
            let alias = called.and_then(|text| text.parse::<AliasName>().ok());
            match alias.filter(free) {
                Some(alias) => alias,
                None => return Ok(None),
            }
        }
    };
    store.set_alias(&name, id)?;
    Ok(Some(name.to_string()))
}

fn disk_of_file(member: &Member) -> anyhow::Result<Option<u64>> {
    let Some(text) = &member.settings.file.disk else {
        return Ok(None);
    };
    let bytes = parse_bytes(text).map_err(|e| Failure::usage(format!("config file: disk: {e}")))?;
    Ok(Some(bytes))
}
