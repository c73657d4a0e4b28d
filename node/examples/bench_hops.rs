//! Prints what a hop costs on loopback: `cargo run --release -p node --example bench_hops`.
//! `-- quic` measures QUIC, `forget` without retaining what was sent; more arguments are widths of hidden rows.
#![allow(clippy::print_stdout, reason = "printing is what it is for")]

use node::session::{HopBench, bench_hops};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut bench = HopBench::default();
    let args: Vec<String> = std::env::args().skip(1).collect();
    bench.quic = args.iter().any(|arg| arg == "quic");
    bench.retain = !args.iter().any(|arg| arg == "forget");
    let widths: Vec<u32> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    if !widths.is_empty() {
        bench.n_embd = widths;
    }
    println!("hops  n_embd  step p50  compute p50  overhead/hop p50  p99   (µs)");
    for cost in bench_hops(&bench).await? {
        println!(
            "{:4}  {:6}  {:8.1}  {:11.1}  {:16.1}  {:5.1}",
            cost.hops,
            cost.n_embd,
            cost.step_p50_us,
            cost.compute_p50_us,
            cost.overhead_p50_us,
            cost.overhead_p99_us
        );
    }
    Ok(())
}
