//! What chaining layers costs: llama.cpp's plain decode loop on the whole model
//! against a stage of every layer behind its worker, in one process, in turns.
//!
//! ```text
//! decode [--model FILE | --shape demo|1b] [--tokens N] [--turns N] [--threads N] [--prompt N]
//! ```
//!
//! Prints one JSON object: microseconds a token (medians of turns) by the clock
//! and of CPU time (which other work on the machine disturbs less), the ratio,
//! and whether both said the same.

#![allow(clippy::print_stdout)] // an example's purpose

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use engine::{
    Blueprint, Done, EngineError, FileSource, Job, LlamaStage, LoadOptions, PREFILL_CHUNK,
    RandomShape, RandomWeights, Rows, Slot, Step, Want, WholeModel, Worker, random_model,
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

/// What was measured on one side, turn by turn.
#[derive(Default)]
struct Side {
    decode: Vec<Duration>,
    cpu: Vec<Duration>,
    prefill: Vec<Duration>,
}

impl Side {
    fn note(&mut self, turn: &Turn) {
        self.decode.push(turn.decode);
        self.cpu.push(turn.cpu);
        self.prefill.push(turn.prefill);
    }
}

/// Microseconds of each of `n`, in the median turn.
fn median_us(times: &mut [Duration], n: u32) -> f64 {
    times.sort();
    times
        .get(times.len() / 2)
        .map_or(0.0, |t| t.as_secs_f64() * 1e6 / f64::from(n.max(1)))
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
    let (mut plain, mut chained, mut same) = (Side::default(), Side::default(), true);
    // The first turn warms both up.
    for turn in 0..=options.turns {
        let a = run_whole(&mut whole, &prompt, options.tokens)?;
        let b = run_worker(&worker, slot, n_layer, &prompt, options.tokens)?;
        same &= a.tokens == b.tokens;
        if turn > 0 {
            plain.note(&a);
            chained.note(&b);
        }
    }
    let n = options.tokens;
    let (a, b) = (
        median_us(&mut plain.decode, n),
        median_us(&mut chained.decode, n),
    );
    let (a_cpu, b_cpu) = (median_us(&mut plain.cpu, n), median_us(&mut chained.cpu, n));
    let report = serde_json::json!({
        "model": options.model.map_or(options.shape, |path| path.display().to_string()),
        "n_layer": n_layer,
        "n_embd": blueprint.n_embd(),
        "threads": options.threads,
        "chunk": PREFILL_CHUNK,
        "tokens": n,
        "plain_us": a,
        "chained_us": b,
        "ratio": a / b,
        "added_us": b - a,
        "plain_cpu_us": a_cpu,
        "chained_cpu_us": b_cpu,
        "cpu_ratio": a_cpu / b_cpu,
        "cpu_added_us": b_cpu - a_cpu,
        "plain_prefill_us": median_us(&mut plain.prefill, options.prompt),
        "chained_prefill_us": median_us(&mut chained.prefill, options.prompt),
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

struct Turn {
    tokens: Vec<u32>,
    prefill: Duration,
    decode: Duration,
    cpu: Duration,
}

/// CPU time of this process, all threads.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn best(row: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (0..row.len()).reduce(better).unwrap_or(0) as u32
}

fn run_whole(whole: &mut WholeModel, prompt: &[u32], n: u32) -> Result<Turn, EngineError> {
    let mut out = Vec::new();
    let begin = Instant::now();
    whole.feed(0, prompt, &mut out)?;
    let prefill = begin.elapsed();
    let mut tokens = Vec::new();
    let (begin, cpu) = (Instant::now(), cpu_time());
    for i in 0..n {
        let token = best(&out);
        tokens.push(token);
        whole.run(prompt.len() as u32 + i, &[token], Want::Last, &mut out)?;
    }
    Ok(Turn {
        tokens,
        prefill,
        decode: begin.elapsed(),
        cpu: cpu_time() - cpu,
    })
}

fn open(worker: &Worker, n_ctx: u32, n_layer: u32) -> Result<Slot, Box<dyn Error>> {
    let (tx, rx) = channel();
    worker.open(n_ctx, 0..n_layer, Box::new(move |slot| drop(tx.send(slot))))?;
    Ok(rx.recv()??)
}

fn run_worker(
    worker: &Worker,
    slot: Slot,
    n_layer: u32,
    prompt: &[u32],
    n: u32,
) -> Result<Turn, Box<dyn Error>> {
    let step = |pos0: u32, tokens: &[u32], want| -> Result<Done, Box<dyn Error>> {
        let (tx, rx) = channel();
        let step = Step {
            slot,
            layers: 0..n_layer,
            pos0,
            n_rows: tokens.len() as u32,
            want,
        };
        let reply = Box::new(move |done| drop(tx.send(done)));
        worker.submit(Job {
            step,
            input: Rows::Tokens(tokens.to_vec()),
            reply,
        })?;
        Ok(rx.recv()??)
    };
    let mut rows = Vec::new();
    let begin = Instant::now();
    let chunks = prompt.chunks(PREFILL_CHUNK as usize);
    for (pos0, chunk) in (0..).step_by(PREFILL_CHUNK as usize).zip(chunks) {
        rows = step(pos0, chunk, Want::Last)?.rows;
    }
    let prefill = begin.elapsed();
    let mut tokens = Vec::new();
    let (begin, cpu) = (Instant::now(), cpu_time());
    for i in 0..n {
        let token = best(&rows);
        tokens.push(token);
        rows = step(prompt.len() as u32 + i, &[token], Want::Last)?.rows;
    }
    Ok(Turn {
        tokens,
        prefill,
        decode: begin.elapsed(),
        cpu: cpu_time() - cpu,
    })
}
