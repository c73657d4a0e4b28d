//! What the real binary prints where no network is needed: help, errors, JSON, and that nothing but a
//! terminal sees an escape code.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The binary with an empty home and none of the caller's settings.
fn shoal(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("SHOAL_")) {
        command.env_remove(name);
    }
    command
        .args(args)
        .env("SHOAL_HOME", home)
        .env("HOME", home)
        .env("XDG_CONFIG_HOME", home.join("config"))
        .env("XDG_DATA_HOME", home.join("data"))
        .stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    let home = tempfile::tempdir().unwrap();
    shoal(home.path(), args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

const COMMANDS: [&[&str]; 27] = [
    &["run"],
    &["chat"],
    &["status"],
    &["models"],
    &["import"],
    &["pull"],
    &["rm"],
    &["gc"],
    &["inspect"],
    &["pin"],
    &["sign"],
    &["verify"],
    &["route"],
    &["node"],
    &["node", "status"],
    &["node", "pause"],
    &["node", "resume"],
    &["invite"],
    &["join"],
    &["doctor"],
    &["bench"],
    &["bench", "hops"],
    &["bench", "decode"],
    &["bench", "pipeline"],
    &["bench", "standby"],
    &["bench", "wire"],
    &["completions"],
];

#[test]
fn every_command_has_help_with_an_example() {
    for command in COMMANDS {
        let args: Vec<&str> = command.iter().copied().chain(["--help"]).collect();
        let output = run(&args);
        assert_eq!(output.status.code(), Some(0), "{command:?}");
        let help = stdout(&output);
        assert!(help.contains("Usage: shoal"), "{command:?}: {help}");
        assert!(
            help.contains("Example"),
            "{command:?} has no example: {help}"
        );
        assert!(!help.contains('\x1b'), "{command:?}");
    }
}

#[test]
fn the_first_page_names_every_command() {
    let help = stdout(&run(&["--help"]));
    for command in COMMANDS {
        assert!(
            help.contains(&format!("  {}", command[0])),
            "{command:?} in {help}"
        );
    }
}

#[test]
fn bad_arguments_are_usage_errors() {
    for args in [
        &["run", "--temp", "-1", "x"][..],
        &["run", "--temp", "hot", "x"],
        &["run", "--top-p", "1.5", "x"],
        &["run", "--wire", "f16", "x"],
        &["run", "--privacy", "secret", "x"],
        &["run", "--ctx", "0", "x"],
        &["run", "--no-such-flag"],
        &["frobnicate"],
        &["completions", "tcsh"],
        &["node", "pause", "--for", "soon"],
        &["node", "--quiet-hours", "22-7"],
        &["node", "--cpu-share", "0"],
    ] {
        let output = run(args);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            stderr(&output)
        );
        assert!(stdout(&output).is_empty(), "{args:?}");
    }
}

#[test]
fn token_ids_that_are_words_are_refused() {
    let output = run(&["run", "--local", "demo", "--tokens", "once upon"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("`once` is not a token id"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_model_that_is_not_here_is_named_with_those_that_are() {
    let output = run(&["run", "--local", "nosuch", "hello"]);
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("nosuch") && error.contains("demo"),
        "{error}"
    );
    assert!(error.contains("try:"), "{error}");
}

#[test]
fn without_a_node_its_home_is_named() {
    for command in ["status", "pause", "resume"] {
        let home = tempfile::tempdir().unwrap();
        let output = shoal(home.path(), &["node", command]).output().unwrap();
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(home.path().to_str().unwrap()), "{error}");
        assert!(error.contains("try: start one"), "{error}");
        let left = std::fs::read_dir(home.path()).unwrap().count();
        assert_eq!(left, 0, "{command} leaves something behind");
    }
}

#[test]
fn a_bad_ticket_is_refused_in_one_line() {
    for ticket in ["shoal1notaticket", "hello", "shoal1"] {
        let output = run(&["join", ticket]);
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.starts_with("error: "), "{error}");
        assert!(error.contains("ticket"), "{error}");
    }
}

#[test]
fn a_hostile_gguf_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let u64s = |values: &[u64]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let head = |rest: Vec<u8>| [b"GGUF\x03\0\0\0".to_vec(), rest].concat();
    let cases = [
        ("empty", Vec::new()),
        ("not-gguf", b"#!/bin/sh\necho hello\n".to_vec()),
        ("cut-short", head(Vec::new())),
        ("huge-counts", head(u64s(&[u64::MAX, u64::MAX]))),
        ("huge-key", head(u64s(&[0, 1, u64::MAX / 2]))),
        ("no-architecture", head(u64s(&[0, 0]))),
    ];
    for (name, bytes) in cases {
        let path = dir.path().join(format!("{name}.gguf"));
        std::fs::write(&path, bytes).unwrap();
        for command in ["inspect", "import"] {
            let output = run(&[command, path.to_str().unwrap()]);
            let error = stderr(&output);
            assert_eq!(output.status.code(), Some(1), "{command} {name}: {error}");
            assert!(error.starts_with("error: "), "{command} {name}: {error}");
            assert!(!error.contains("panicked"), "{command} {name}: {error}");
            let causes = error
                .lines()
                .filter(|line| !line.starts_with("  try: "))
                .count();
            assert_eq!(causes, 1, "{command} {name}: {error}");
            assert!(stdout(&output).is_empty(), "{command} {name}");
        }
    }
}

#[test]
fn json_is_json() {
    let home = tempfile::tempdir().unwrap();
    for args in [
        &["doctor", "--json"][..],
        &["inspect", "demo", "--json"],
        &["models", "--offline", "--json"],
    ] {
        let output = shoal(home.path(), args).output().unwrap();
        let value: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
                panic!(
                    "{args:?}: {error}: {}\n{}",
                    stdout(&output),
                    stderr(&output)
                )
            });
        assert!(value.is_object() || value.is_array(), "{args:?}");
    }
}

#[test]
fn a_pipe_sees_no_escape_codes() {
    let home = tempfile::tempdir().unwrap();
    for args in [
        &["doctor"][..],
        &["models", "--offline"],
        &["inspect", "demo"],
        &[
            "run",
            "--local",
            "demo",
            "-n",
            "4",
            "--temp",
            "0",
            "Once upon a time",
        ],
        &["run", "--local", "nosuch", "x"],
        &["nosuch"],
    ] {
        let output = shoal(home.path(), args).output().unwrap();
        assert!(
            !output.stdout.contains(&0x1b),
            "{args:?}: {}",
            stdout(&output)
        );
        assert!(
            !output.stderr.contains(&0x1b),
            "{args:?}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn the_demo_answers_from_an_empty_home() {
    let home = tempfile::tempdir().unwrap();
    let ask = |extra: &[&str]| {
        let args = [
            &["run", "--local", "demo", "-n", "16", "--temp", "0"],
            extra,
        ]
        .concat();
        let output = shoal(home.path(), &args).output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(0),
            "{args:?}: {}",
            stderr(&output)
        );
        output
    };
    let plain = ask(&["--raw", "Once upon a time"]);
    assert!(
        stderr(&plain).contains("local: the prompt stays in this process"),
        "{}",
        stderr(&plain)
    );
    let json = ask(&["--raw", "--json", "Once upon a time"]);
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let text = report["text"].as_str().unwrap();
    assert!(
        !text.contains("Once upon a time"),
        "the prompt is not part of the answer: {text}"
    );
    assert_eq!(
        stdout(&plain).trim_end_matches('\n'),
        text.trim_end_matches('\n')
    );
    let lines = stdout(&ask(&["--raw", "--json-lines", "Once upon a time"]));
    let lines: Vec<serde_json::Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let (end, tokens) = (lines.last().unwrap(), &lines[1..lines.len() - 1]);
    assert_eq!(
        (&lines[0]["event"], &end["event"]),
        (&"route".into(), &"end".into())
    );
    let field = |name: &str| {
        tokens
            .iter()
            .map(|line| line[name].clone())
            .collect::<Vec<_>>()
    };
    let ids: Vec<_> = field("token")
        .into_iter()
        .filter(|id| !id.is_null())
        .collect();
    assert_eq!(end["tokens"], serde_json::Value::from(ids));
    let pieces = field("text");
    let pieces: String = pieces.iter().map(|piece| piece.as_str().unwrap()).collect();
    assert_eq!((pieces.as_str(), &end["text"]), (text, &report["text"]));
    let at = field("at_ms");
    assert!(at.is_sorted_by_key(|at| at.as_f64()), "{at:?}");
    let generated = report["generated_tokens"].as_u64().unwrap();
    assert!((1..=16).contains(&generated), "{report}");
    assert_eq!(report["privacy"], "local");
    assert_eq!(report["peers_can_read_prompt"], false);
    assert!(
        report["ttft_ms"].as_f64().unwrap() > 0.0 && report["tokens_per_s"].as_f64().unwrap() > 0.0
    );
}

#[test]
fn the_answer_ends_before_a_stop_text() {
    let home = tempfile::tempdir().unwrap();
    let ask = |stop: &[&str]| {
        let args = [
            &[
                "run", "--local", "demo", "--raw", "--json", "-n", "24", "--temp", "0",
            ],
            stop,
            &["Once upon a time"],
        ]
        .concat();
        let output = shoal(home.path(), &args).output().unwrap();
        serde_json::from_slice::<serde_json::Value>(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", stderr(&output)))
    };
    let whole = ask(&[])["text"].as_str().unwrap().to_string();
    let middle: String = whole
        .chars()
        .skip(whole.chars().count() / 2)
        .take(4)
        .collect();
    let cut = ask(&["--stop", "never to be seen", "--stop", &middle]);
    let expected = &whole[..whole.find(&middle).unwrap()];
    assert_eq!(
        cut["text"].as_str().unwrap(),
        expected,
        "stop at {middle:?} in {whole:?}"
    );
}

#[test]
fn the_prompt_comes_from_stdin_too() {
    use std::io::Write;
    let home = tempfile::tempdir().unwrap();
    let args = ["run", "--local", "demo", "--raw", "-n", "8", "--temp", "0"];
    let argument = shoal(home.path(), &args)
        .arg("Once upon a time")
        .output()
        .unwrap();
    for dash in [&[][..], &["-"]] {
        let mut child = shoal(home.path(), &args)
            .args(dash)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(b"Once upon a time\n")
            .unwrap();
        let piped = child.wait_with_output().unwrap();
        assert_eq!(piped.status.code(), Some(0), "{}", stderr(&piped));
        assert_eq!(stdout(&piped), stdout(&argument));
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let home = tempfile::tempdir().unwrap();
    let mut child = shoal(
        home.path(),
        &[
            "run", "--local", "demo", "--raw", "-n", "64", "--temp", "0", "Once",
        ],
    )
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!stderr(&output).contains("error"), "{}", stderr(&output));
}

/// A copy of the demo model in `dir`, imported as `mine`.
fn import_copy(home: &Path, dir: &Path) -> std::path::PathBuf {
    let path = dir.join("mine.gguf");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf");
    std::fs::copy(demo, &path).unwrap();
    let args = ["import", path.to_str().unwrap(), "--name", "mine"];
    let output = shoal(home, &args).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    path
}

#[test]
fn a_local_model_that_changed_since_its_import_is_refused() {
    let (home, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = import_copy(home.path(), dir.path());
    let ask = |model: &str, more: &[&str]| {
        let args = ["run", "--local", model, "--raw", "-n", "2", "--temp", "0"];
        let output = shoal(home.path(), &args)
            .args(more)
            .arg("Once")
            .output()
            .unwrap();
        (output.status.code(), stderr(&output))
    };
    let (code, said) = ask("mine", &[]);
    assert_eq!(code, Some(0), "{said}");
    let mut bytes = std::fs::read(&path).unwrap();
    let last_weight = bytes.len() - 64;
    bytes[last_weight] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let (code, said) = ask("mine", &[]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("has changed since it was imported") && said.contains("shoal import"),
        "{said}"
    );
    assert_eq!(ask("mine", &["--no-verify"]).0, Some(0));
    // A file that is named as such is the user's own word.
    assert_eq!(ask(path.to_str().unwrap(), &[]).0, Some(0));
}

#[test]
fn a_model_whose_file_is_gone_is_marked() {
    let (home, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = import_copy(home.path(), dir.path());
    let models = |more: &[&str]| {
        let args = [&["models", "--offline"], more].concat();
        stdout(&shoal(home.path(), &args).output().unwrap())
    };
    assert!(!models(&[]).contains("missing"));
    std::fs::remove_file(&path).unwrap();
    let said = models(&[]);
    let gone = format!(
        "file missing: {}",
        path.canonicalize().unwrap_or(path.clone()).display()
    );
    assert!(
        said.contains("file missing: ") && said.contains("mine.gguf"),
        "{gone}: {said}"
    );
    assert!(said.contains("shoal import"), "{said}");
    let report: serde_json::Value = serde_json::from_str(&models(&["--json"])).unwrap();
    let missing = report["local"][0]["missing"].as_array().unwrap();
    assert_eq!(missing.len(), 1, "{report}");
    let output = shoal(home.path(), &["run", "--local", "mine", "x"])
        .output()
        .unwrap();
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("mine.gguf is gone") && error.contains("try:"),
        "{error}"
    );
}

#[test]
fn removing_a_model_leaves_the_users_file_and_says_so() {
    let (home, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = import_copy(home.path(), dir.path());
    let shoal = |args: &[&str]| shoal(home.path(), args).output().unwrap();
    let report = |args: &[&str]| -> serde_json::Value {
        serde_json::from_str(&stdout(&shoal(args))).unwrap()
    };
    assert_eq!(report(&["gc", "--json"])["blobs"], 0);
    let file = shoal(&["rm", path.to_str().unwrap()]);
    assert_eq!(file.status.code(), Some(2), "{}", stderr(&file));
    let removed = report(&["rm", "mine", "--json"]);
    assert_eq!(removed["aliases"][0], "mine", "{removed}");
    assert_eq!(removed["blobs"], 0, "{removed}");
    assert_eq!(removed["files"].as_array().unwrap().len(), 1, "{removed}");
    assert!(path.exists());
    let again = shoal(&["rm", "mine"]);
    assert_eq!(again.status.code(), Some(1), "{}", stderr(&again));
    assert_eq!(
        report(&["models", "--offline", "--json"])["local"],
        serde_json::json!([])
    );
}

#[test]
fn an_empty_prompt_is_refused_unless_it_is_raw() {
    let home = tempfile::tempdir().unwrap();
    for prompt in [&[""][..], &[" \n"], &["-"], &[]] {
        let args = [&["run", "--local", "demo"], prompt].concat();
        let output = shoal(home.path(), &args).output().unwrap();
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{prompt:?}: {error}");
        assert!(error.contains("the prompt is empty"), "{prompt:?}: {error}");
    }
    let raw = [
        "run", "--local", "demo", "--raw", "-n", "4", "--temp", "0", "",
    ];
    let output = shoal(home.path(), &raw).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn a_failure_is_json_where_json_was_asked_for() {
    let home = tempfile::tempdir().unwrap();
    for (args, code) in [
        (&["run", "--local", "nosuch", "--json", "x"][..], 1),
        (&["run", "--local", "demo", "--json", ""], 2),
        (&["run", "--mdns", "off", "--json", "x"], 1),
        (&["status", "--mdns", "off", "--json"], 1),
        (&["inspect", "nosuch", "--json"], 1),
    ] {
        let output = shoal(home.path(), args).output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "{args:?}: {}",
            stderr(&output)
        );
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{args:?}: {error}: {}", stdout(&output)));
        let error = &report["error"];
        assert_eq!(error["exit_code"], code, "{report}");
        let message = error["message"].as_str().unwrap();
        assert!(stderr(&output).contains(message), "{report}");
        assert!(error["try"].is_string(), "{report}");
    }
    let plain = shoal(home.path(), &["run", "--local", "nosuch", "x"])
        .output()
        .unwrap();
    assert!(plain.stdout.is_empty());
}

#[test]
fn variables_for_flags_take_the_usual_words() {
    let home = tempfile::tempdir().unwrap();
    let code = |name: &str, word: &str| {
        let mut command = shoal(home.path(), &["status", "--mdns", "off"]);
        command.env(name, word).output().unwrap().status.code()
    };
    // 1: it was understood, and there is nobody to ask. 2: it was not understood.
    for word in ["1", "0", "true", "false", "yes", "no", "on", "off"] {
        assert_eq!(code("SHOAL_LOG_JSON", word), Some(1), "{word}");
    }
    assert_eq!(code("SHOAL_LOG_JSON", "maybe"), Some(2));
}
