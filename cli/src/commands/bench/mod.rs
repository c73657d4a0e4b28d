//! `shoal bench`: figures of this machine, as ratios measured in one run.

mod batch;
mod decode;
mod hops;
mod moe;
mod nodes;
mod pipeline;
mod serve;
mod standby;
mod wire;

use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use engine::{RandomShape, RandomWeights};
use serde::Serialize;

use crate::failure::Failure;
use crate::home::Home;
use crate::local_models;
use crate::terminal::{self, BOLD, DIM, paint};

/// Measure hop overhead, decode speed, pipelining, batching, the HTTP server, experts apart, and what a smaller
/// wire type costs.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal bench hops                        overhead of a hop beyond compute, on loopback
  shoal bench decode --model llama-1b     a node holding everything against a plain loop
  shoal bench pipeline --one-billion      two prompts over two nodes against one on one
  shoal bench batch --one-billion         many sessions over one route against one
  shoal bench standby                     what it costs that others stand by
  shoal bench serve                       the HTTP server with 1 to 16 clients at once
  shoal bench moe                         what it costs that experts are computed apart
  shoal bench wire --text held-out.txt    perplexity with f32, bf16 and q8_0 between hops

Each starts what it needs on this machine and takes it down again.")]
pub struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    Batch(batch::Args),
    Hops(hops::Args),
    Decode(decode::Args),
    Pipeline(pipeline::Args),
    Serve(serve::Args),
    Standby(standby::Args),
    Moe(moe::Args),
    Wire(wire::Args),
}

/// Runs the chosen measurement.
pub fn main(args: Args) -> anyhow::Result<()> {
    match args.bench {
        Bench::Batch(args) => batch::main(args),
        Bench::Hops(args) => hops::main(args),
        Bench::Decode(args) => decode::main(args),
        Bench::Pipeline(args) => pipeline::main(args),
        Bench::Serve(args) => serve::main(args),
        Bench::Standby(args) => standby::main(args),
        Bench::Moe(args) => moe::main(args),
        Bench::Wire(args) => wire::main(args),
    }
}

/// A model here.
#[derive(clap::Args)]
struct Named {
    /// The model: a name, the beginning of an id, or a GGUF file.
    #[arg(
        short,
        long,
        env = "SHOAL_MODEL",
        value_name = "NAME|ID|FILE",
        default_value = local_models::DEMO
    )]
    model: String,
    #[command(flatten)]
    home: Home,
}

/// A model here, or one made for the measurement.
#[derive(clap::Args)]
struct Measured {
    #[command(flatten)]
    named: Named,
    /// Instead of --model a random model of 1.1 billion weights in Q4_K_M, made for this run (700 MB of temporary disk).
    #[arg(long)]
    one_billion: bool,
}

impl Measured {
    /// Its file; made in `temp` where it is not the user's.
    fn file(&self, temp: &Path) -> anyhow::Result<PathBuf> {
        if !self.one_billion {
            let home = self.named.home.dir()?;
            return local_models::whole_file(&home, &self.named.model)?.into_path(temp);
        }
        let path = temp.join("random-1b-q4_k_m.gguf");
        let _wheel = terminal::wheel("making a random model of 1.1 billion weights");
        engine::random_model(
            "llama",
            &RandomShape::one_billion(),
            RandomWeights::Q4KM,
            1,
            &path,
        )?;
        Ok(path)
    }
}

/// Everything a measurement writes, gone with it.
fn temporary() -> std::io::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix("shoal-bench-").tempdir()
}

/// The first line of a report: what was measured, and how.
fn say_title(model: &str, how: impl std::fmt::Display) -> Result<(), Failure> {
    terminal::say(format!("{} {}", paint(BOLD, model), paint(DIM, how)))
}

/// Whether two sides chose the same tokens.
fn sameness(same: bool) -> &'static str {
    if same {
        "the same tokens"
    } else {
        "NOT the same tokens"
    }
}

/// `n_layer` layers over `hops` hops, as evenly as they go.
fn share_out(n_layer: u32, hops: u32) -> Vec<Range<u32>> {
    let hops = hops.clamp(1, n_layer.max(1));
    (0..hops)
        .map(|i| (n_layer * i).div_ceil(hops)..(n_layer * (i + 1)).div_ceil(hops))
        .collect()
}

/// The middle and the bad end of some samples.
#[derive(Debug, Serialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
}

impl Quantiles {
    fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let rounded = |share| (percentile(&samples, share) * 10.0).round() / 10.0;
        Self {
            p50: rounded(0.5),
            p99: rounded(0.99),
        }
    }
}

/// Smallest value that at least `share` of the sorted samples do not exceed.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted
        .get(rank.clamp(1, sorted.len().max(1)) - 1)
        .copied()
        .unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::{percentile, share_out};

    #[test]
    fn layers_are_shared_out_evenly_and_completely() {
        assert_eq!(share_out(8, 3), [0..3, 3..6, 6..8]);
        assert_eq!(share_out(2, 5), [0..1, 1..2]);
        for (n_layer, hops) in [(1, 1), (7, 3), (16, 5), (80, 9)] {
            let shares = share_out(n_layer, hops);
            assert_eq!(shares.first().unwrap().start, 0);
            assert_eq!(shares.last().unwrap().end, n_layer);
            assert!(
                shares
                    .windows(2)
                    .all(|w| w[0].end == w[1].start && w[0].end > w[0].start)
            );
        }
    }

    #[test]
    fn percentiles_are_samples() {
        let sorted: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&sorted, 0.5), 50.0);
        assert_eq!(percentile(&sorted, 0.99), 99.0);
        assert_eq!(percentile(&sorted, 1.0), 100.0);
        assert_eq!(percentile(&[7.0], 0.5), 7.0);
        assert!(percentile(&[], 0.5).is_nan());
    }
}
