//! The programs `shoal`, a table of its subcommands, and `shoal-node`, one of them by itself. Each subcommand lives in
//! a file of its own under `commands/`; this crate reads arguments and prints, everything else is `node` and below.

mod answer;
mod api_args;
mod beginnings;
mod choose_model;
mod commands;
mod conversation;
mod daemon;
#[cfg(test)]
mod documented;
mod failure;
mod fallback;
mod figures;
mod generation;
mod home;
mod interrupt;
mod journal;
mod kept;
mod layer_map;
mod local_models;
mod model_facts;
mod obtain;
mod opening;
mod prompt;
mod run_report;
mod serving;
mod session_args;
mod supervisor;
mod swarm;
mod swarm_report;
mod terminal;
mod tokens;

use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use commands::{
    bench, chat, completions, doctor, gc, import, inspect, invite, join, man, models, node, pin,
    pull, rm, route, run, serve, sign, status, top, verify,
};

/// Run a language model that is too big for any one of your machines, on several of them.
#[derive(Parser)]
#[command(name = "shoal", version, styles = terminal::help_styles(), max_term_width = 100)]
#[command(subcommand_required = true, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Start here:
  shoal run --local demo \"Once upon a time\"    the demo model, in this process
  shoal import model.gguf                       make a GGUF known, without copying it (hf:… downloads one)
  shoal pull NAME                               fetch a model from the peers that have it
  shoal node --model NAME                       serve the layers that fit this machine
  shoal invite                                  a ticket for the next machine
  shoal run \"Why is the sea salt?\"              ask the swarm
  shoal serve                                   answer programs that speak to OpenAI

Settings come from flags, then SHOAL_* variables, then config.toml, then defaults.
`shoal COMMAND --help` has examples.";

#[derive(Subcommand)]
enum Command {
    Run(run::Args),
    Chat(chat::Args),
    Serve(serve::Args),
    Status(status::Args),
    Top(top::Args),
    Route(route::Args),
    Models(models::Args),
    Import(import::Args),
    Pull(pull::Args),
    Rm(rm::Args),
    Gc(gc::Args),
    Inspect(inspect::Args),
    Pin(pin::Args),
    Sign(sign::Args),
    Verify(verify::Args),
    Node(Box<node::Args>),
    Invite(invite::Args),
    Join(join::Args),
    Doctor(doctor::Args),
    Bench(bench::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// Serve layers of a language model to a swarm.
#[derive(Parser)]
#[command(name = "shoal-node", version, styles = terminal::help_styles(), max_term_width = 100)]
#[command(after_help = NODE_EXAMPLES)]
struct NodeCli {
    #[command(flatten)]
    args: daemon::Args,
}

const NODE_EXAMPLES: &str = "\
Examples:
  shoal-node --model demo
  shoal-node --model llama-1b --memory 4G --listen /ip4/0.0.0.0/tcp/4001
  shoal-node --model llama-1b --api 127.0.0.1:8080      answers OpenAI's HTTP API, too

Settings come from flags, then SHOAL_* variables, then config.toml, then defaults. Ctrl-C and SIGTERM withdraw its
advert, let running answers and sessions end for a few seconds and stop it.";

/// What is installed.
const PROGRAMS: [&str; 2] = ["shoal", "shoal-node"];

/// One of [`PROGRAMS`], with all its flags.
fn program(name: &str) -> clap::Command {
    match name {
        "shoal-node" => NodeCli::command(),
        _ => Cli::command(),
    }
}

/// The program `shoal`.
pub fn shoal() -> ExitCode {
    let matches = Cli::command().get_matches();
    let command = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli.command,
        Err(error) => error.exit(),
    };
    failure::report(run(command), wants_json(&matches))
}

/// The program `shoal-node`.
pub fn shoal_node() -> ExitCode {
    let NodeCli { args } = NodeCli::parse();
    failure::report(daemon::main(args), false)
}

/// Whether the command, at whatever depth, was given `--json` or `--json-lines`.
fn wants_json(matches: &ArgMatches) -> bool {
    let given = |flag| matches!(matches.try_get_one::<bool>(flag), Ok(Some(true)));
    let below = matches.subcommand().map(|(_, below)| below);
    given("json") || given("json_lines") || below.is_some_and(wants_json)
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(args) => run::main(args),
        Command::Chat(args) => chat::main(args),
        Command::Serve(args) => serve::main(args),
        Command::Status(args) => status::main(args),
        Command::Top(args) => top::main(args),
        Command::Route(args) => route::main(args),
        Command::Models(args) => models::main(args),
        Command::Import(args) => import::main(args),
        Command::Pull(args) => pull::main(args),
        Command::Rm(args) => rm::main(args),
        Command::Gc(args) => gc::main(args),
        Command::Inspect(args) => inspect::main(args),
        Command::Pin(args) => pin::main(args),
        Command::Sign(args) => sign::main(args),
        Command::Verify(args) => verify::main(args),
        Command::Node(args) => node::main(*args),
        Command::Invite(args) => invite::main(args),
        Command::Join(args) => join::main(args),
        Command::Doctor(args) => doctor::main(args),
        Command::Bench(args) => bench::main(args),
        Command::Completions(args) => completions::main(args),
        Command::Man(args) => man::main(args),
    }
}
