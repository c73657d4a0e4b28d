//! What chaining layers costs: llama.cpp's plain decode loop on the whole model
//! against a stage of every layer behind its worker, in one process, token by token.
//!
//! ```text
//! decode [--model FILE | --shape demo|1b] [--tokens N] [--turns N] [--threads N] [--prompt N]
//! ```
//!
//! Prints one JSON object: microseconds a token by the clock and of CPU time
//! (which other work on the machine disturbs less), the ratio, and whether both
//! said the same.

#![allow(clippy::print_stdout)] // an example's purpose

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use engine::{
    Blueprint, Done, FileSource, Job, LlamaStage, LoadOptions, PREFILL_CHUNK, RandomShape,
    RandomWeights, Reply, Rows, Slot, Step, Want, WholeModel, Worker, random_model,
};

struct Options {
    model: Option<PathBuf>,
    shape: String,
    tokens: u32,
    turns: usize,
    threads: u32,
    prompt: u32,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        model: None,
        shape: "1b".into(),
        tokens: 64,
        turns: 5,
        threads: engine::physical_cores(),
        prompt: 32,
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().ok_or("a value is missing")?;
        match name.as_str() {
            "--model" => options.model = Some(value.into()),
            "--shape" => options.shape = value,
            "--tokens" => options.tokens = value.parse()?,
            "--turns" => options.turns = value.parse()?,
            "--threads" => options.threads = value.parse()?,
            "--prompt" => options.prompt = value.parse()?,
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    Ok(options)
}

/// The model to measure: the file given, or one made up in `dir`.
fn model(options: &Options, dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    if let Some(path) = &options.model {
        return Ok(path.clone());
    }
    let shape = match options.shape.as_str() {
        "1b" => RandomShape::one_billion(),
        "demo" => RandomShape::demo(),
        other => return Err(format!("unknown shape {other}").into()),
    };
    let path = dir.join("model.gguf");
    random_model("llama", &shape, RandomWeights::Q4KM, 1, &path)?;
    Ok(path)
}

/// Time of one token on one side, in microseconds.
#[derive(Clone, Copy)]
struct Cost {
    clock: f64,
    cpu: f64,
}

fn quantile(values: impl Iterator<Item = f64>, q: f64) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let at = (values.len().saturating_sub(1) as f64 * q) as usize;
    values.get(at).copied().unwrap_or(0.0)
}

/// Medians over pairs of tokens: one plain, one chained, one after the other,
/// so that what else the machine does weighs on both.
fn compare(pairs: &[(Cost, Cost)], time: fn(&Cost) -> f64) -> serde_json::Value {
    let of = |f: &dyn Fn(f64, f64) -> f64, q| {
        quantile(pairs.iter().map(|(a, b)| f(time(a), time(b))), q)
    };
    serde_json::json!({
        "plain_us": of(&|a, _| a, 0.5),
        "chained_us": of(&|_, b| b, 0.5),
        "plain_p10_us": of(&|a, _| a, 0.1),
        "chained_p10_us": of(&|_, b| b, 0.1),
        "added_us": of(&|a, b| b - a, 0.5),
        "ratio": of(&|a, b| a / b, 0.5),
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    let dir = tempfile::tempdir()?;
    let begin = Instant::now();
    let path = model(&options, dir.path())?;
    let generated = begin.elapsed();
    let source = FileSource::open(&path)?;
    let blueprint = Blueprint::new(source.header())?;
    let n_layer = blueprint.n_layer();
    let n_ctx = options.prompt + options.tokens;
    let mut whole = WholeModel::load(&path, n_ctx, options.threads)?;
    let load = LoadOptions {
        n_threads: options.threads,
        ..LoadOptions::default()
    };
    let begin = Instant::now();
    let stage = LlamaStage::load(&blueprint, 0..n_layer, &source, &load, &mut |_| ())?;
    let loaded = begin.elapsed();
    let worker = Worker::spawn(Box::new(stage), 8)?;
    let slot = open(&worker, n_ctx, n_layer)?;

    let prompt: Vec<u32> = (0..options.prompt)
        .map(|i| i * 7 % blueprint.n_vocab())
        .collect();
    let (mut pairs, mut same) = (Vec::new(), true);
    // The first turn warms both up.
    for turn in 0..=options.turns {
        let mut a = Vec::new();
        whole.feed(0, &prompt, &mut a)?;
        let mut b = feed(&worker, slot, n_layer, &prompt)?;
        for i in 0..options.tokens {
            let (token, pos) = (best(&a), options.prompt + i);
            let plain = timed(|| Ok(whole.run(pos, &[token], Want::Last, &mut a)?))?;
            let chained = timed(|| {
                b = step(&worker, slot, n_layer, pos, &[token])?;
                Ok(())
            })?;
            same &= a == b;
            if turn > 0 {
                pairs.push((plain, chained));
            }
        }
    }
    let report = serde_json::json!({
        "model": options.model.map_or(options.shape, |path| path.display().to_string()),
        "n_layer": n_layer,
        "n_embd": blueprint.n_embd(),
        "threads": options.threads,
        "pairs": pairs.len(),
        "clock": compare(&pairs, |cost| cost.clock),
        "cpu": compare(&pairs, |cost| cost.cpu),
        "same": same,
        "generate_s": generated.as_secs_f64(),
        "load_s": loaded.as_secs_f64(),
    });
    println!("{report}");
    if same {
        Ok(())
    } else {
        Err("the two said different things".into())
    }
}

/// CPU time of this process, all threads.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn timed(call: impl FnOnce() -> Result<(), Box<dyn Error>>) -> Result<Cost, Box<dyn Error>> {
    let (begin, cpu) = (Instant::now(), cpu_time());
    call()?;
    let cpu = cpu_time() - cpu;
    Ok(Cost {
        clock: begin.elapsed().as_secs_f64() * 1e6,
        cpu: cpu.as_secs_f64() * 1e6,
    })
}

fn best(row: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (0..row.len()).reduce(better).unwrap_or(0) as u32
}

fn open(worker: &Worker, n_ctx: u32, n_layer: u32) -> Result<Slot, Box<dyn Error>> {
    let (tx, rx) = channel();
    let reply: Reply<Slot> = Box::new(move |slot| drop(tx.send(slot)));
    worker.open(n_ctx, 0..n_layer, reply)?;
    Ok(rx.recv()??)
}

fn step(
    worker: &Worker,
    slot: Slot,
    n_layer: u32,
    pos0: u32,
    tokens: &[u32],
) -> Result<Vec<f32>, Box<dyn Error>> {
    let (tx, rx) = channel();
    let n_rows = tokens.len() as u32;
    let step = Step {
        slot,
        layers: 0..n_layer,
        pos0,
        n_rows,
        want: Want::Last,
    };
    let reply = Box::new(move |done| drop(tx.send(done)));
    worker.submit(Job {
        step,
        input: Rows::Tokens(tokens.to_vec()),
        reply,
    })?;
    let done: Done = rx.recv()??;
    Ok(done.rows)
}

fn feed(
    worker: &Worker,
    slot: Slot,
    n_layer: u32,
    prompt: &[u32],
) -> Result<Vec<f32>, Box<dyn Error>> {
    let mut rows = Vec::new();
    let chunks = prompt.chunks(PREFILL_CHUNK as usize);
    for (pos0, chunk) in (0..).step_by(PREFILL_CHUNK as usize).zip(chunks) {
        rows = step(worker, slot, n_layer, pos0, chunk)?;
    }
    Ok(rows)
}
