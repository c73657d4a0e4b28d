//! `shoal inspect`: a model's dimensions, its shards, and whether and where it can be cut.

use std::path::Path;

use serde::Serialize;
use shard_registry::{Resolved, Store};

use crate::figures;
use crate::home::Home;
use crate::local_models;
use crate::model_facts::ModelFacts;
use crate::terminal::{self, BAD, BOLD, DIM, GOOD, paint};

/// Show a model's dimensions and shards, and whether and where it can be cut.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal inspect model.gguf
  shoal inspect demo
  shoal inspect demo --json | jq .layer_bytes

A file is only read, not imported. A name or an id also shows the shards' hashes.")]
pub struct Args {
    /// A GGUF file (the first one of several), a name, or the beginning of an id.
    #[arg(value_name = "FILE|NAME|ID")]
    model: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    home: Home,
}

/// What is printed.
#[derive(Serialize)]
struct Inspection {
    /// The model's id, when it is imported.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(flatten)]
    facts: ModelFacts,
    /// Publishers whose signature on it is right.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    signed_by: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    shards: Vec<ShardFacts>,
}

/// One shard.
#[derive(Serialize)]
struct ShardFacts {
    kind: String,
    bytes: u64,
    id: String,
}

/// Finds the model, reads its header or manifest, prints.
pub fn main(args: Args) -> anyhow::Result<()> {
    let home = args.home.dir()?;
    let store = local_models::store(&home)?;
    let path = Path::new(&args.model);
    let inspection = if path.is_file()
        && store
            .resolve(&args.model)
            .is_ok_and(|found| matches!(found, Resolved::File(_)))
    {
        let facts = ModelFacts::new(&local_models::header_of_file(path)?)?;
        Inspection {
            id: None,
            facts,
            signed_by: Vec::new(),
            shards: Vec::new(),
        }
    } else {
        of_store(&home, &store, &args.model)?
    };
    if args.json {
        terminal::say_json(&inspection)
    } else {
        print(&inspection)
    }
}

fn of_store(home: &Path, store: &Store, model: &str) -> anyhow::Result<Inspection> {
    let id = local_models::find(home, model)?;
    let manifest = store.manifest(id)?;
    let mut header = manifest.header()?;
    // The tokenizer lies in the metadata shard; its kind and the template are worth a line.
    if let Ok(metadata) = store.metadata(id) {
        header.kv = manifest.vocab_header(&metadata)?.kv;
    }
    let shards = manifest
        .shards
        .iter()
        .map(|shard| ShardFacts {
            kind: shard.kind.to_string(),
            bytes: shard.bytes,
            id: shard.id.to_string(),
        })
        .collect();
    let (signatures, problems) = store.signatures(id);
    for problem in problems {
        terminal::warn(problem);
    }
    Ok(Inspection {
        id: Some(id.to_string()),
        facts: ModelFacts::new(&header)?,
        signed_by: signatures.iter().map(|s| s.publisher.to_string()).collect(),
        shards,
    })
}

/// Layers of equal size share a line: an 80-layer model should not fill three screens.
fn layer_lines(layer_bytes: &[u64]) -> Vec<(String, u64)> {
    let mut lines: Vec<(std::ops::Range<usize>, u64)> = Vec::new();
    for (layer, &bytes) in layer_bytes.iter().enumerate() {
        match lines.last_mut() {
            Some((range, same)) if *same == bytes => range.end = layer + 1,
            _ => lines.push((layer..layer + 1, bytes)),
        }
    }
    lines
        .into_iter()
        .map(|(range, bytes)| {
            let name = if range.len() == 1 {
                format!("layer {}", range.start)
            } else {
                format!("layers {}..{}", range.start, range.end)
            };
            (name, bytes)
        })
        .collect()
}

fn row(name: &str, value: impl std::fmt::Display) -> Result<(), crate::failure::Failure> {
    terminal::say(format!("  {} {value}", paint(DIM, format!("{name:<12}"))))
}

fn print(inspection: &Inspection) -> anyhow::Result<()> {
    let facts = &inspection.facts;
    let title = facts.name.as_deref().unwrap_or("(no name)");
    let id = inspection
        .id
        .as_deref()
        .map_or_else(String::new, |id| format!(" {}", figures::short_hash(id)));
    terminal::say(format!("{}{}", paint(BOLD, title), paint(DIM, id)))?;
    row("architecture", &facts.arch)?;
    row("layers", facts.n_layer)?;
    row("width", dimensions(facts))?;
    if let Some((n, used)) = facts.experts {
        let each = facts
            .expert_bytes
            .map(|each| format!(", {} each", figures::bytes(each)));
        let each = each.unwrap_or_default();
        row(
            "experts",
            format!("{n} a layer, {used} for each token{each}"),
        )?;
    }
    row("context", format!("{} tokens", facts.n_ctx_train))?;
    let template = if facts.chat_template {
        "with a chat template"
    } else {
        "no chat template"
    };
    row(
        "vocabulary",
        format!(
            "{} tokens, tokenizer {}, {template}",
            facts.n_vocab, facts.tokenizer
        ),
    )?;
    let bits = format!("{:.2} bits each", facts.bits_per_weight());
    row(
        "weights",
        format!(
            "{}, {bits}, {}",
            figures::count(facts.parameters),
            facts.quantisation()
        ),
    )?;
    row("size", figures::bytes(facts.bytes))?;
    if let Some(bytes) = facts.kv_token_bytes {
        let whole = bytes.saturating_mul(facts.n_ctx_train.into());
        row(
            "kv",
            format!(
                "{} a token, {} for the whole context",
                figures::bytes(bytes),
                figures::bytes(whole)
            ),
        )?;
    }
    row("cuts", cuts(facts))?;
    for publisher in &inspection.signed_by {
        row("signed by", publisher)?;
    }
    print_shards(inspection)
}

fn dimensions(facts: &ModelFacts) -> String {
    let heads = match (facts.n_head, facts.n_head_kv) {
        (Some(n), Some(kv)) => format!(", {n} heads, {kv} of keys and values"),
        (Some(n), None) => format!(", {n} heads"),
        _ => String::new(),
    };
    format!("{}{heads}", facts.n_embd)
}

fn cuts(facts: &ModelFacts) -> String {
    match &facts.why_not {
        None if facts.n_layer > 1 => {
            format!("{} between any two layers, exact", paint(GOOD, "yes:"))
        }
        None => "none: it has one layer".into(),
        Some(why) => format!("{} {why}", paint(BAD, "no:")),
    }
}

fn print_shards(inspection: &Inspection) -> anyhow::Result<()> {
    terminal::say("")?;
    if inspection.shards.is_empty() {
        let facts = &inspection.facts;
        let mut lines = vec![("embedding".to_string(), facts.embedding_bytes)];
        lines.extend(layer_lines(&facts.layer_bytes));
        lines.push(("head".into(), facts.head_bytes));
        for (name, bytes) in lines {
            terminal::say(format!("  {name:<16} {:>10}", figures::bytes(bytes)))?;
        }
        return Ok(());
    }
    for shard in &inspection.shards {
        let id = paint(DIM, figures::short_hash(&shard.id));
        terminal::say(format!(
            "  {:<16} {:>10}  {id}",
            shard.kind,
            figures::bytes(shard.bytes)
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_layers_share_a_line() {
        let lines = layer_lines(&[5, 5, 5, 7, 5]);
        let names: Vec<&str> = lines.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["layers 0..3", "layer 3", "layer 4"]);
    }
}
