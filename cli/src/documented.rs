//! The documents say what the programs do: docs/configuration.md is held against the table of flags (and written from
//! it with `SHOAL_WRITE_DOCS=1`), and every command that a document or a help text shows is one that is understood.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Arg, Command};

use crate::PROGRAMS;

const REFERENCE: &str = "docs/configuration.md";
/// Documents that show commands.
const SHOWN: [&str; 9] = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "ARCHITECTURE.md",
    "docs/configuration.md",
    "docs/operating.md",
    "deploy/Containerfile",
    "deploy/shoal-node.service",
    "deploy/shoal-serve.service",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A command by its words, as `shoal bench hops`.
fn command(words: &str) -> Command {
    let mut words = words.split(' ');
    let mut command = crate::program(words.next().unwrap_or_default());
    for word in words {
        let below = command.get_subcommands().find(|it| it.get_name() == word);
        command = below.cloned().unwrap_or_else(|| panic!("no `{word}`"));
    }
    command
}

/// Flags of every command that joins a swarm.
fn shared() -> Vec<Arg> {
    #[derive(clap::Parser)]
    struct Shared {
        #[command(flatten)]
        _swarm: node::config::SwarmArgs,
    }
    use clap::CommandFactory;
    Shared::command().get_arguments().cloned().collect()
}

/// Whether config.toml takes a key of this name: any other is refused by name.
fn in_file(key: &str) -> bool {
    let read = toml::from_str::<node::config::FileConfig>(&format!("{key} = {{}}"));
    let error = read.err().map(|error| error.to_string());
    error.is_none_or(|error| !error.contains("unknown field"))
}

fn row(arg: &Arg) -> Option<String> {
    let long = arg.get_long()?;
    if arg.is_hide_set() || ["help", "version"].contains(&long) {
        return None;
    }
    let takes = arg.get_action().takes_values();
    let names = arg.get_value_names().unwrap_or_default();
    let value = match names.first() {
        Some(name) if takes => format!(" {name}"),
        _ => String::new(),
    };
    let cell = |text: String| text.replace('|', "\\|");
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let (help, said) = match help.rsplit_once(" [default: ") {
        Some((help, said)) => (format!("{help}."), said.trim_end_matches(']').to_owned()),
        None => (help, String::new()),
    };
    let defaults: Vec<_> = arg.get_default_values().iter().collect();
    let default = match &defaults[..] {
        [one] if takes => format!("`{}`", one.to_string_lossy()),
        _ => said,
    };
    let env = arg
        .get_env()
        .map(|env| format!("`{}`", env.to_string_lossy()));
    let key = in_file(long).then(|| format!("`{long}`"));
    let none = || "–".to_owned();
    Some(format!(
        "| `--{}` | {} | {} | {} | {} |\n",
        cell(format!("{long}{value}")),
        env.unwrap_or_else(none),
        key.unwrap_or_else(none),
        cell(if default.is_empty() { none() } else { default }),
        cell(help),
    ))
}

/// The table of a command's flags, without those that many share.
fn table(words: &str) -> String {
    let shared: BTreeSet<_> = shared().iter().map(|arg| arg.get_id().clone()).collect();
    let (args, own): (Vec<Arg>, bool) = match words {
        "shared" => (self::shared(), false),
        words => (command(words).get_arguments().cloned().collect(), true),
    };
    let mut table =
        String::from("| flag | variable | in config.toml | default | |\n|---|---|---|---|---|\n");
    for arg in &args {
        if !own || !shared.contains(arg.get_id()) {
            table += &row(arg).unwrap_or_default();
        }
    }
    table
}

/// The document with each `<!-- flags of X -->` … `<!-- end -->` filled in.
fn filled(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("<!-- flags of ") {
        let (words, after) = after.split_once(" -->\n").expect("the marker ends");
        let (_, after) = after.split_once("<!-- end -->").expect("`<!-- end -->`");
        let _ = write!(
            out,
            "{before}<!-- flags of {words} -->\n{}<!-- end -->",
            table(words)
        );
        rest = after;
    }
    out + rest
}

#[test]
fn the_reference_is_what_the_programs_take() {
    let text = read(REFERENCE);
    let wanted = filled(&text);
    if std::env::var_os("SHOAL_WRITE_DOCS").is_some() {
        std::fs::write(root().join(REFERENCE), wanted).unwrap();
        return;
    }
    let differs = text.lines().zip(wanted.lines()).find(|(a, b)| a != b);
    assert!(
        text == wanted,
        "{REFERENCE} is not what the flags say: run this test with SHOAL_WRITE_DOCS=1; first difference: {differs:?}"
    );
}

#[test]
fn every_command_with_flags_of_its_own_is_in_the_reference() {
    let text = read(REFERENCE);
    for words in ["shared", "shoal-node", "shoal serve", "shoal run"] {
        assert!(
            text.contains(&format!("<!-- flags of {words} -->")),
            "{words}"
        );
    }
    for below in command("shoal").get_subcommands() {
        let name = format!("`shoal {}", below.get_name());
        assert!(text.contains(&name), "{name}` is not mentioned");
    }
}

#[test]
fn a_service_can_be_told_everything_by_variables() {
    for words in ["shoal-node", "shoal serve"] {
        for arg in command(words).get_arguments() {
            let Some(long) = arg.get_long() else { continue };
            let spoken = ["help", "version", "ready-json", "local-fallback"].contains(&long);
            assert!(spoken || arg.get_env().is_some(), "{words} --{long}");
        }
    }
}

#[test]
fn variables_in_documents_exist() {
    fn envs(command: &Command, found: &mut BTreeSet<String>) {
        let own = command.get_arguments().filter_map(Arg::get_env);
        found.extend(own.map(|env| env.to_string_lossy().into_owned()));
        command.get_subcommands().for_each(|it| envs(it, found));
    }
    let mut known = BTreeSet::new();
    for name in PROGRAMS {
        envs(&crate::program(name), &mut known);
    }
    // Of the tests.
    let of_tests = [
        "SHOAL_WRITE_DOCS",
        "SHOAL_REAL_CLIENTS",
        "SHOAL_CROWD_S",
        "SHOAL_BROWSER",
    ];
    known.extend(of_tests.map(String::from));
    for path in SHOWN.iter().chain(&["deploy/shoal.env"]) {
        let text = read(path);
        let word = |c: char| !(c.is_ascii_uppercase() || c == '_' || c.is_ascii_digit());
        for name in text
            .split(word)
            .filter(|name| name.starts_with("SHOAL_") && name.len() > 6)
        {
            assert!(
                known.contains(name),
                "{path}: no flag has the variable {name}"
            );
        }
    }
}

/// Command lines of ours in a text: lines of fenced blocks and of comments, and spans of code that begin with a
/// program's name.
fn command_lines(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            continue;
        }
        let bare = line.trim_start().trim_start_matches("# ").trim_start();
        let spans = line.split('`').skip(1).step_by(2);
        let whole = (fenced || line.starts_with('#') || line.starts_with("  ")).then_some(bare);
        for candidate in spans.chain(whole) {
            let first = candidate
                .split_whitespace()
                .find(|word| *word != "sudo" && *word != "-u");
            let program = first.and_then(|word| word.rsplit('/').next());
            if program.is_some_and(|program| PROGRAMS.contains(&program)) {
                found.push(candidate.to_owned());
            }
        }
    }
    found
}

/// Words as a shell sees them, up to a comment, a pipe or another command.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quote, mut begun) = (String::new(), None, false);
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), c) => word.push(c),
            (None, '"' | '\'') => (quote, begun) = (Some(c), true),
            (None, '#' | '|' | '>' | ';' | '&' | '(' | '…' | '[') if !begun => break,
            (None, ' ') => {
                // Two spaces in a row: what follows explains the command.
                if !begun && !words.is_empty() {
                    break;
                }
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            (None, c) => {
                begun = true;
                word.push(c);
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

/// What a program says to a line, where it does not understand it.
fn misunderstood(line: &str) -> Option<String> {
    // Whose home it is comes first: `sudo -u USER`.
    let own = line.strip_prefix("sudo -u shoal ").unwrap_or(line);
    let words = words(own);
    let begins = |word: &String| PROGRAMS.contains(&word.rsplit('/').next().unwrap_or_default());
    let at = words.iter().position(begins)?;
    let name = words[at].rsplit('/').next().unwrap_or_default().to_owned();
    let tried = crate::program(&name).try_get_matches_from(&words[at..]);
    let error = tried.err()?;
    // What a document leaves open (NAME, 12D3KooW...) has no value yet, and a mention needs no arguments.
    match error.kind() {
        ErrorKind::UnknownArgument | ErrorKind::InvalidSubcommand => {
            Some(format!("`{line}`: {error}"))
        }
        _ => None,
    }
}

#[test]
fn commands_in_documents_exist() {
    let mut seen = 0;
    for path in SHOWN {
        for line in command_lines(&read(path)) {
            seen += 1;
            let wrong = misunderstood(&line);
            assert!(wrong.is_none(), "{path}: {}", wrong.unwrap_or_default());
        }
    }
    assert!(seen > 60, "only {seen} commands were found");
}

#[test]
fn examples_in_help_exist() {
    fn check(command: &Command) {
        let help = command.get_after_help().map(ToString::to_string);
        for line in help.unwrap_or_default().lines() {
            if line.starts_with("  ") {
                let wrong = misunderstood(line.trim());
                assert!(wrong.is_none(), "{}", wrong.unwrap_or_default());
            }
        }
        command.get_subcommands().for_each(check);
    }
    for name in PROGRAMS {
        check(&crate::program(name));
    }
}

#[test]
fn the_checks_above_can_fail() {
    assert!(misunderstood("shoal serve --no-such-flag").is_some());
    assert!(misunderstood("target/release/shoal nonsense").is_some());
    assert!(misunderstood("sudo -u shoal shoal node nonsense").is_some());
    assert!(misunderstood("sudo -u shoal shoal node status").is_none());
    assert!(misunderstood("shoal run \"# no comment\" --bogus   # a comment").is_some());
    assert!(misunderstood("shoal run \"Why?\"   --bogus explains").is_none());
    assert!(!in_file("no-such-key") && in_file("memory"));
    assert!(table("shoal-node").contains("`SHOAL_MEMORY`"));
    let lines = command_lines("text `shoal gc` text\n```\nsudo -u shoal shoal run x | cat\n```\n");
    assert_eq!(lines, ["shoal gc", "sudo -u shoal shoal run x | cat"]);
}
